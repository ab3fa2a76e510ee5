"""Libraries that only some installations have: imported when asked for, with an error that says how to get them."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from anomri.errors import AnomriError


def optional(module: str, extra: str, purpose: str) -> Any:
    """Import a library of an optional ``extra``; raises `AnomriError` that says how to install it."""
    try:
        return import_module(module)
    except ImportError as error:
        raise AnomriError(
            f"{purpose} needs libraries that are not installed ({error}): pip install 'anomri[{extra}]'"
        ) from error
