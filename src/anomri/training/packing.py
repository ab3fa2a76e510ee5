"""Cohorts packed into memory-mapped slices: a training reads a random slice in microseconds."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from isal import isal_zlib
from numpy.typing import NDArray
from torch import Tensor

from anomri.errors import AnomriError
from anomri.files import output_folder, remove_abandoned, whole_file, write_text
from anomri.runtime.launch import usable_processors
from anomri.runtime.threads import worker_threads
from anomri.scans.case import Case
from anomri.scans.prepare import prepare
from anomri.scans.volume import Volume
from anomri.slices import SliceStack, Window, brain_box, find_foreground, slice_volume
from anomri.spec import Grid, Scaling

PACKING_VERSION = 10
"""Part of the name of a packed file; a new number packs every case anew."""


@dataclass(frozen=True)
class PackedCase:
    """The slices of one case on disk."""

    name: str
    file: Path
    """Holds the slices, (n, c, h, w) float16."""
    slices: int
    healthy: tuple[int, ...]
    """Numbers of the slices without a labelled lesion; all, if there is no label."""
    box: tuple[int, int, int, int]
    """Rows and columns (first, last + 1) that hold the brain."""
    fingerprint: str
    """A SHA-256 of the content of the source files."""
    spacing_mm: tuple[float, float, float]
    """Of slices, rows and columns."""
    notes: tuple[str, ...]
    """What the user should know of how its files were read."""
    checksums: NDArray[np.uint32] = field(compare=False, repr=False)
    """A CRC-32 of every slice: damage is noticed without reading the rest of the file."""
    pack: Callable[[], PackedCase] = field(compare=False, repr=False)
    """Packs the case again."""

    @property
    def memory_map(self) -> NDArray[np.float16]:
        """The slices, mapped into memory, neither read nor checked."""
        return _memory_map(self.file)

    def stack(self, scaling: Scaling) -> SliceStack:
        """All slices of the case, as those of a scan."""
        x = torch.from_numpy(np.stack(self.read(range(self.slices))).astype(np.float32))
        window = Window(0, 0, *x.shape[2:])
        return SliceStack(
            x, find_foreground(x, scaling), range(len(x)), (), None, window, self.spacing_mm
        )

    def read(self, numbers: Sequence[int]) -> list[NDArray[np.float16]]:
        """The slices ``numbers``, (c, h, w) each, checked; a damaged file is packed again, once."""
        try:
            return self._checked(numbers)
        except (OSError, ValueError, LookupError):
            again = self.pack()
            _memory_map.cache_clear()
        if again.fingerprint != self.fingerprint:
            raise AnomriError(
                f"{self.file}: is damaged, and the files of {self.name} have changed since it was "
                f"packed; start a new training."
            )
        try:
            return again._checked(numbers)
        except (OSError, ValueError, LookupError) as error:
            raise AnomriError(
                f"{self.file}: is damaged, also after packing it again ({error}); check the disk."
            ) from error

    def _checked(self, numbers: Sequence[int]) -> list[NDArray[np.float16]]:
        rows = [np.array(self.memory_map[number]) for number in numbers]
        for number, row in zip(numbers, rows, strict=True):
            if isal_zlib.crc32(row.data) != self.checksums[number]:
                raise ValueError(f"the checksum of slice {number} does not match")
        return rows


class HealthySlices:
    """The healthy slices of several packed cases, numbered through, as tensors on ``device``.

    On a GPU they are read once and stay there, if they take at most a quarter of its free memory.
    """

    def __init__(self, cases: Sequence[PackedCase], device: torch.device | str = "cpu") -> None:
        self.cases, self.device = list(cases), torch.device(device)
        # One number for each case, not for each slice: a large cohort has millions of slices.
        self._ends = np.cumsum([len(case.healthy) for case in cases], dtype=np.int64)
        self._resident = self._read_all() if self.device.type == "cuda" and len(self) else None

    def __len__(self) -> int:
        """Number of slices."""
        return int(self._ends[-1]) if len(self._ends) else 0

    def batch(self, numbers: Sequence[int]) -> Tensor:
        """The slices ``numbers`` as (n, c, h, w) float32."""
        if self._resident is not None:
            return self._resident[self._to_device(torch.tensor(numbers))].float()
        rows = [row for case, index in map(self._find, numbers) for row in case.read([index])]
        return self._to_device(torch.from_numpy(np.stack(rows))).float()

    def names(self, numbers: Sequence[int]) -> list[str]:
        """The names of the cases that the slices ``numbers`` come from, each once."""
        return sorted({self._find(number)[0].name for number in numbers})

    def _read_all(self) -> Tensor | None:
        """All slices on the GPU; ``None`` if they take more than a quarter of its free memory."""
        case, index = self._find(0)
        (first,) = case.read([index])
        free, _ = torch.cuda.mem_get_info(self.device)
        if len(self) * first.nbytes > free // 4:
            return None
        slices = torch.empty((len(self), *first.shape), dtype=torch.float16, device=self.device)
        for case, end in zip(self.cases, self._ends.tolist(), strict=True):
            if case.healthy:
                slices[end - len(case.healthy) : end] = torch.from_numpy(
                    np.stack(case.read(case.healthy))
                )
        return slices

    def _to_device(self, x: Tensor) -> Tensor:
        # From pinned memory a GPU fetches it without the processor waiting for earlier work.
        x = x.pin_memory() if self.device.type == "cuda" else x
        return x.to(self.device, non_blocking=True)

    def _find(self, number: int) -> tuple[PackedCase, int]:
        place = int(np.searchsorted(self._ends, number, side="right"))
        case = self.cases[place]
        return case, case.healthy[number - int(self._ends[place])]


def default_cache() -> Path:
    """The folder for packed cohorts: ``$ANOMRI_CACHE``, else the user's cache folder."""
    return Path(os.environ.get("ANOMRI_CACHE") or platformdirs.user_cache_dir("anomri"))


def pack_cohort(
    cases: Sequence[Case],
    channels: Sequence[str],
    grid: Grid,
    scaling: Scaling,
    folder: Path,
    on_case: Callable[[Case], None] = lambda case: None,
) -> list[PackedCase]:
    """Pack every case into ``folder``, several at once.

    A case that was packed before from the same files and settings is reused. Raises one
    `AnomriError` that lists every case that cannot be used; what was packed stays.
    """
    remove_abandoned(output_folder(folder))
    problems: list[str] = []

    def pack(case: Case) -> PackedCase | None:
        try:
            return _pack_case(case, channels, grid, scaling, folder)
        except AnomriError as error:
            problems.append(str(error))
            return None
        finally:
            on_case(case)

    with worker_threads(max(min(len(cases), usable_processors(), 8), 1)) as pool:
        packed = list(pool.map(pack, cases))
    if problems:
        raise AnomriError(
            f"{len(problems)} of {len(cases)} cases cannot be used; repair them or leave "
            "them out:\n  " + "\n  ".join(sorted(problems))
        )
    return [case for case in packed if case is not None]


def spread_healthy(cases: Sequence[PackedCase], most: int) -> list[PackedCase]:
    """At most ``most`` of the cases that have a healthy slice, spread evenly over all of them."""
    usable = [case for case in cases if case.healthy]
    places = np.linspace(0, len(usable) - 1, min(len(usable), most)).astype(int)
    return [usable[place] for place in places]


def cohort_fingerprint(packed: Sequence[PackedCase]) -> str:
    """A SHA-256 of the content of all files of the cases, whatever their names and order."""
    fingerprints = sorted(case.fingerprint for case in packed)
    return hashlib.sha256("".join(fingerprints).encode()).hexdigest()


@lru_cache(maxsize=128)
def _memory_map(file: Path) -> NDArray[np.float16]:
    # A map keeps a file open, and a process may not have one open for each case of a large cohort.
    return np.load(file, mmap_mode="r")


def _pack_case(
    case: Case,
    channels: Sequence[str],
    grid: Grid,
    scaling: Scaling,
    folder: Path,
    again: bool = False,
) -> PackedCase:
    sources = [*case.files(channels), case.mask, case.label]
    key = _key(sources, channels, grid, scaling, case.ignored)
    file, sidecar = folder / f"{key}.npy", folder / f"{key}.json"
    facts = None if again else _read_facts(file, sidecar)
    if facts is None:
        volume = prepare(case, channels, grid, resampled=False)
        stack = slice_volume(volume, grid, scaling)
        slices = stack.x.half().numpy()
        with whole_file(file) as written, written.open("wb") as target:
            np.save(target, slices)
        facts = _facts(stack, volume, [path for path in sources if path is not None])
        facts["spacing_mm"] = stack.spacing_mm
        facts["checksums"] = [isal_zlib.crc32(one.data) for one in slices]
        # Written last: a case counts as packed once its sidecar exists.
        write_text(
            sidecar,
            json.dumps({"bytes": file.stat().st_size, "crc32": _crc32(facts), "facts": facts}),
        )
    facts |= {
        "healthy": tuple(facts["healthy"]),
        "box": tuple(facts["box"]),
        "notes": tuple(facts["notes"]),
        "spacing_mm": tuple(facts["spacing_mm"]),
    }
    facts["checksums"] = np.array(facts["checksums"], dtype=np.uint32)
    pack = partial(_pack_case, case, channels, grid, scaling, folder, True)
    return PackedCase(case.name, file, **facts, pack=pack)


def _read_facts(file: Path, sidecar: Path) -> dict[str, Any] | None:
    """The facts of a case that was packed before; ``None`` if there are none, or damaged ones."""
    try:
        stored = json.loads(sidecar.read_text(encoding="utf-8"))
        facts = dict(stored["facts"])
        whole = stored["crc32"] == _crc32(facts) and stored["bytes"] == file.stat().st_size
        return facts if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _crc32(facts: object) -> int:
    return isal_zlib.crc32(json.dumps(facts).encode())


def _facts(stack: SliceStack, volume: Volume, sources: Sequence[Path]) -> dict[str, Any]:
    # The label as it was drawn: on the working grid the smallest lesions would be lost.
    lesion: NDArray[np.bool_] = np.zeros(len(stack.x), dtype=bool)
    # Where nobody looked there may be one.
    for mask in (volume.label, volume.ignored):
        if mask is not None:
            lesion |= mask[..., stack.index.start : stack.index.stop].any(axis=(0, 1))
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.read_bytes())
    return {
        "slices": len(stack.x),
        "healthy": np.flatnonzero(~lesion).tolist(),
        "box": brain_box(stack.foreground, 1),
        "fingerprint": digest.hexdigest(),
        "notes": list(volume.notes),
    }


def _key(
    sources: Sequence[Path | None],
    channels: Sequence[str],
    grid: Grid,
    scaling: Scaling,
    ignored: Sequence[int],
) -> str:
    try:
        stats = [
            path and (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
            for path in sources
        ]
    except OSError as error:
        raise AnomriError(f"{error.filename}: cannot be read ({error.strerror}).") from error
    settings = [PACKING_VERSION, list(channels), asdict(grid), asdict(scaling), stats]
    settings += [list(ignored)] if ignored else []
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:24]
