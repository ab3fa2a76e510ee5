"""Processes are killed and asked to stop at random moments; the same command goes on as if
nothing had been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from anomri.errors import Interrupted
from anomri.runtime.interruption import StopRequest, stoppable


@pytest.mark.slow
def test_thirty_kills_lose_nothing_and_repeat_nothing() -> None:
    """`kills.py` prints the same table; each verb's results are compared with those of a run
    left in peace."""
    script = Path(__file__).parent / "kills.py"
    command = [sys.executable, str(script), "--kills", "6", "--json"]
    ran = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert ran.returncode == 0, ran.stderr
    found = json.loads(ran.stdout)
    assert [row["verb"] for row in found["kills"]] == [
        "pack",
        "train",
        "detect",
        "evaluate",
        "merge",
    ]
    assert all(row["kills"] >= 6 for row in found["kills"])
    for what in ("lost", "twice", "other bytes", "half"):
        assert {row["verb"]: row[what] for row in found["kills"] if row[what]} == {}, (
            what,
            ran.stderr,
        )
    for stop in found["stops"]:
        assert stop["code"] == 0 and stop["seconds"] < 10, stop


def test_schedulers_may_signal_twice_and_a_second_ctrl_c_stops_at_once() -> None:
    with StopRequest.listen() as stop:
        for number in (
            signal.SIGUSR1,
            signal.SIGCONT,
            signal.SIGTERM,
            signal.SIGTERM,
            signal.SIGINT,
        ):
            if number != signal.SIGINT:
                os.kill(os.getpid(), number)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_stop_is_not_caught_as_an_error() -> None:
    before = signal.getsignal(signal.SIGUSR1)

    def guarded() -> None:
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
        except Exception:  # as code around a library that raises anything
            pytest.fail("taken for an error")
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # cleaning up is left in peace

    def run() -> None:
        with stoppable():
            guarded()

    with pytest.raises(Interrupted, match="stopped by SIGUSR1; rerun the same command to resume"):
        run()
    assert signal.getsignal(signal.SIGUSR1) == before
