"""Requests to stop: Ctrl-C, SIGTERM, or a scheduler (SIGUSR1, then SIGTERM)."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from anomri.errors import Interrupted

SCHEDULER_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)
)  # Windows has no SIGUSR1
"""SLURM's ``--signal=USR1@60`` and pre-emption. The SIGCONT before pre-emption needs no answer."""


class StopRequest:
    """The ``signal`` that asked to stop, if any; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @classmethod
    @contextmanager
    def listen(cls) -> Iterator[StopRequest]:
        """Note signals while the block runs (in the main thread only, which alone gets them)."""
        request = cls()

        def stop(number: int, frame: FrameType | None) -> None:
            # A scheduler may repeat its signal; that must not disturb what is being saved.
            if request.signal is not None and number == signal.SIGINT:
                raise KeyboardInterrupt
            request.signal = number

        with _handled((signal.SIGINT, *SCHEDULER_SIGNALS), stop):
            yield request


@contextmanager
def stoppable() -> Iterator[StopRequest]:
    """Raise `errors.Interrupted` in the block when a scheduler asks to stop.

    Files are written atomically, so the same command can resume the work.
    """
    request = StopRequest()

    def stop(number: int, frame: FrameType | None) -> None:
        if request.signal is None:
            request.signal = number
            name = signal.Signals(number).name
            raise Interrupted(
                f"stopped by {name}; rerun the same command to resume (a training: with --resume).",
                number,
            )

    with _handled(SCHEDULER_SIGNALS, stop):
        yield request


@contextmanager
def _handled(
    numbers: tuple[int, ...], handler: Callable[[int, FrameType | None], None]
) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
