"""Libraries that only some installations have, and the command that installs them."""

from __future__ import annotations

import json
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from anomri.errors import AnomriError


def import_extra(module: str, extra: str, purpose: str) -> Any:
    """Import a library of an ``extra``; raises `AnomriError` with the command to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise AnomriError(
            f"{purpose} needs a library that is not installed ({error}). "
            f"Install it with: {install_command(extra)}"
        ) from error


def install_command(extra: str) -> str:
    """The command that adds ``extra`` to this installation, from where it was installed."""
    checkout = Path(__file__).resolve().parents[2]
    if (checkout / "pyproject.toml").is_file():
        # Without -e, pip would replace the editable installation by a copy.
        return f"pip install -e '{checkout}[{extra}]'"
    return f"pip install '{_installed_from() or 'anomri'}[{extra}]'"


def _installed_from() -> Path | None:
    """The folder or file that pip installed this package from (PEP 610), if it still exists."""
    try:
        facts = json.loads(distribution("anomri").read_text("direct_url.json") or "{}")
    except PackageNotFoundError:
        return None
    url = urlsplit(facts.get("url", ""))
    path = Path(unquote(url.path))
    return path if url.scheme == "file" and path.exists() else None
