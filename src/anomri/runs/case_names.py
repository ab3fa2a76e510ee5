"""Names of cases that can name the files of a run; a case with another name fails alone."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote_from_bytes

from anomri.errors import AnomriError
from anomri.files import PARTIAL
from anomri.scans.case import Case
from anomri.scans.names import OUTPUTS, may_name_files

RESERVED = ("run", "metrics")
"""Names that no case may have: ``run.json`` and ``metrics.json`` are files of a run."""
MAX_BYTES = 255 - len(f"{PARTIAL}12345678-") - max(len(f"_{kind}.nii.gz") for kind in OUTPUTS)
"""The longest name in bytes of a case whose files have names that file systems take."""
PLAIN = " !#$&'()+,;=@[]^`{}~"
"""Characters that stay in a name that is written anew, beside letters, digits and ``_.-``."""


def with_usable_names(cases: Sequence[Case], folder: Path | None = None) -> list[Case]:
    r"""The cases; those whose names cannot name files in ``folder`` get others, and a ``problem``.

    So such a case fails when it is read, and it alone. Names differ from all others. Raises
    `AnomriError` if no name can name files.

    >>> [case.name for case in with_usable_names([Case("p1", {}), Case("p\t2", {})])]
    ['p1', 'p%092']
    """
    taken: dict[str, str] = {}
    reserved = {*RESERVED, *(case.name.casefold() for case in cases)}
    usable, problems = [], []
    for case in cases:
        problem = _problem_of_name(case.name) or _problem_of_letters(case.name, taken, folder)
        name = _safe_name(case.name, reserved) if problem else case.name
        taken.setdefault(name.casefold(), name)
        reserved.add(name.casefold())
        usable.append(replace(case, name=name, problem=problem) if problem else case)
        problems.append(problem)
    if problems and all(problems):
        raise AnomriError(problems[0])
    return usable


def _problem_of_name(name: str) -> str:
    """Why files cannot be called after a case; empty if they can."""
    if not may_name_files(name) or name in RESERVED:
        return f"a case is called {name!r}, which cannot name its files; rename it."
    if len(os.fsencode(name)) > MAX_BYTES:
        return (
            f"a case is called {name[:30]!r}..., which is too long to name its files "
            f"({len(os.fsencode(name))} bytes, {MAX_BYTES} at most); rename it."
        )
    return ""


def _problem_of_letters(name: str, taken: dict[str, str], folder: Path | None) -> str:
    """Why a case cannot have files beside those of others; empty if it can."""
    other = taken.get(name.casefold(), name)
    if other == name or folder is None or _has_letter_case(folder):
        return ""
    return (
        f"the cases {other!r} and {name!r} differ only in capital letters, which {folder} does not "
        f"tell apart; rename one of them."
    )


def _has_letter_case(folder: Path) -> bool:
    """Whether the file system of a folder, which need not exist yet, has ``a`` and ``A`` apart."""
    existing = next(place for place in (folder, *folder.absolute().parents) if place.is_dir())
    try:
        with tempfile.NamedTemporaryFile(prefix=f"{PARTIAL}a-", dir=existing) as file:
            return not Path(file.name).with_name(Path(file.name).name.upper()).exists()
    except OSError:  # that it cannot be written to is found out elsewhere
        return True


def _safe_name(name: str, reserved: set[str]) -> str:
    """A name that can name files and is not ``reserved``, by which people know the old one."""
    written = quote_from_bytes(os.fsencode(name), safe=PLAIN)
    if len(written) > MAX_BYTES:
        written = written[:60]
    if not written or len(written) == 60 or written.casefold() in reserved:
        written += f"%{sha256(os.fsencode(name)).hexdigest()[:8]}"
    return written
