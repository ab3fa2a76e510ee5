"""Cases through a model: each read ahead, searched, saved, and reported as soon as it is done."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from anomri.errors import AnomriError
from anomri.model.detection import Detection
from anomri.model.detector import Detector
from anomri.reporting.previews import save_preview
from anomri.runs.tables import CaseResult
from anomri.runtime.launch import usable_processors
from anomri.runtime.memory import is_out_of_memory
from anomri.runtime.threads import divide_torch_threads
from anomri.scans.case import Case
from anomri.scans.volume import Volume

MOST_SCANS = 8
"""How many scans are worked on side by side beside a GPU: each takes some hundred megabytes."""
T = TypeVar("T")
Read = Callable[[Case], Volume]
Save = Callable[[Case, Detection], Sequence[Path] | None]
FindMap = Callable[[Case, Volume], NDArray[np.float32] | None]
"""Gives the stored anomaly map of a scan, (x, y, z) in the working orientation, if it may be used."""


def without_maps(case: Case, volume: Volume) -> None:
    """No map is stored: every scan goes through the network."""


def detect_each(
    detector: Detector,
    cases: Sequence[Case],
    read: Read,
    save: Save,
    folder: Path,
    find_map: FindMap = without_maps,
) -> Iterator[CaseResult]:
    """Read, search and ``save`` each case, with a preview in ``folder``; gives its result as soon
    as it is done.

    Results come in the order of the cases. Beside a CUDA GPU, whose share of the work is short,
    several scans are worked on side by side. Else one follows another, and the next one is read
    while the network works. A scan whose map `find_map` finds does not go through the network.
    """
    workers = 1
    if detector.device.type == "cuda":
        workers = min(usable_processors() // 2, MOST_SCANS, len(cases))
    if workers < 2:
        for case, volume, begun in read_ahead(cases, read):
            yield _detect_case(detector, case, volume, begun, save, folder, find_map)
        return

    def work(case: Case) -> CaseResult:
        return _detect_case(detector, *_try_to_read(case, read), save, folder, find_map)

    with divide_torch_threads(workers):
        yield from _run_ahead((partial(work, case) for case in cases), workers - 1)


def read_ahead(
    cases: Sequence[Case], read: Read
) -> Iterator[tuple[Case, Volume | AnomriError, float]]:
    """Each case with its volume, or the error of reading it, and when reading began; one is read
    ahead."""
    return _run_ahead((partial(_try_to_read, case, read) for case in cases), 1)


def describe_error(case: Case, error: BaseException) -> str:
    """An error of one case in words that name the case or its file.

    >>> describe_error(Case("case7", {}), ZeroDivisionError("division by zero"))
    'case7: ZeroDivisionError: division by zero'
    >>> describe_error(Case("case7", {}), MemoryError())
    'case7: MemoryError: not enough memory'
    >>> describe_error(Case("case7", {}), KeyError())
    'case7: KeyError'
    """
    if isinstance(error, AnomriError):
        return str(error)
    text = " ".join(str(error).split())
    if not text and is_out_of_memory(error):
        text = "not enough memory"
    return ": ".join(part for part in (case.name, type(error).__name__, text) if part)


def _detect_case(
    detector: Detector,
    case: Case,
    volume: Volume | AnomriError,
    begun: float,
    save: Save,
    folder: Path,
    find_map: FindMap,
) -> CaseResult:
    try:
        if isinstance(volume, AnomriError):
            raise volume
        stored = find_map(case, volume)
        if stored is None:
            detection = detector.detect(volume)
        else:
            detection = detector.detect_in_map(volume, stored)
        files = tuple(save(case, detection) or ())
        save_preview(detection, folder)
        return CaseResult(case.name, time.monotonic() - begun, detection.summary(), files=files)
    except Exception as error:
        return CaseResult(case.name, time.monotonic() - begun, error=describe_error(case, error))


def _try_to_read(case: Case, read: Read) -> tuple[Case, Volume | AnomriError, float]:
    begun = time.monotonic()
    try:
        return case, read(case), begun
    except Exception as error:  # a library may raise anything for an odd scan, and the run goes on
        return case, AnomriError(describe_error(case, error)), begun


def _run_ahead(works: Iterable[Callable[[], T]], count: int) -> Iterator[T]:
    """The results of ``works`` in their order; ``count`` more are begun before each is given."""
    begun = deque[Future[T]]()
    for work in works:
        begun.append(_run_in_background(work))
        if len(begun) > count:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _run_in_background(work: Callable[[], T]) -> Future[T]:
    """The result of ``work``, done in a thread that does not keep the process from ending."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
