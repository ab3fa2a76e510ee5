"""Whether a file is DICOM, from its first bytes; nothing here needs a DICOM library.

DICOM files begin with a preamble of 128 bytes and ``DICM`` (PS3.10, 7.1). Old scanners and
anonymisers write data sets without them, which begin with their first element.
"""

from __future__ import annotations

import itertools
import re
import struct
from collections.abc import Iterator
from pathlib import Path

PREFIX = b"DICM"
PREAMBLE = 128
"""How many bytes a DICOM file has before its prefix."""
LOOKED_AT = 512
"""How many bytes of a file are looked at."""
FIRST_GROUPS = (0x0002, 0x0008)
"""Groups of elements with which a data set begins."""
LONG_LENGTH = {b"OB", b"OW", b"OF", b"OD", b"OL", b"UN", b"UT", b"UC", b"UR", b"SQ"}
"""Value representations with a length of four bytes, after two that are reserved."""
NO_SIZE = -1
"""Stands for the size of what is not an element."""
FEW, MANY = 2, 3
"""A data set of two elements, or three if it says nothing of their kinds, is known by them."""


def is_dicom(path: Path) -> bool:
    """Whether a file begins as DICOM does, with or without a preamble; hidden files do not."""
    if path.name.startswith(".") or not path.is_file():
        return False
    with path.open("rb") as file:
        return find_start(file.read(LOOKED_AT)) is not None


def find_start(content: bytes) -> int | None:
    """Where the elements of a DICOM file begin, in bytes; ``None`` if it is not DICOM.

    >>> find_start(bytes(128) + b"DICM and elements")
    132
    >>> element = bytes.fromhex("0800 0500 4353 0a00") + b"ISO_IR 100"
    >>> find_start(element + bytes.fromhex("0800 1600 5549 0200") + b"1.")
    0
    >>> find_start(bytes(512)) is None
    True
    """
    if content[PREAMBLE:].startswith(PREFIX):
        return PREAMBLE + len(PREFIX)
    # Some tools leave out the preamble but not the prefix, or the other way round.
    after_prefix = len(PREFIX) if content.startswith(PREFIX) else 0
    for start in dict.fromkeys((after_prefix, PREAMBLE)):
        if _is_data_set(content[start:LOOKED_AT]):
            return start
    return None


def _is_data_set(content: bytes) -> bool:
    """Whether bytes are elements of DICOM: their groups and numbers rise, and lengths are even."""
    return any(
        _has_elements(content, order, explicit) for order in "<>" for explicit in (True, False)
    )


def _has_elements(content: bytes, order: str, explicit: bool) -> bool:
    if len(content) < 8 or struct.unpack_from(f"{order}H", content)[0] not in FIRST_GROUPS:
        return False
    wanted = FEW if explicit else MANY
    tags = list(itertools.islice(_tags(content, order, explicit), wanted))
    rising = all(before < after for before, after in itertools.pairwise(tags))
    near = all(group <= 0x0020 for group, _ in tags)
    return len(tags) == wanted and rising and near


def _tags(content: bytes, order: str, explicit: bool) -> Iterator[tuple[int, int]]:
    """The group and number of each element, up to the first that cannot be one."""
    position = 0
    while position + 8 <= len(content):
        size, header = _value_size(content[position : position + 12], order, explicit)
        if size % 2:
            return
        group, number = struct.unpack_from(f"{order}HH", content, position)
        yield group, number
        position += header + size


def _value_size(element: bytes, order: str, explicit: bool) -> tuple[int, int]:
    """The bytes of an element's value and those before it; the first is odd if it is none."""
    kind = element[4:6]
    if not explicit:
        return struct.unpack_from(f"{order}I", element, 4)[0], 8
    if not re.fullmatch(b"[A-Z]{2}", kind):
        return NO_SIZE, 8
    if kind not in LONG_LENGTH:
        return struct.unpack_from(f"{order}H", element, 6)[0], 8
    if len(element) < 12:
        return NO_SIZE, 12
    return struct.unpack_from(f"{order}I", element, 8)[0], 12
