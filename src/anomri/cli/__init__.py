"""The command line: each command parses its options, makes one call, and gives an exit code.

Torch is imported inside commands only, so that ``--help`` is quick.
"""

from __future__ import annotations

import signal
import sys
from io import TextIOWrapper

import typer

# isort: off
# Imported to register their commands, in the order of --help.
from anomri.cli import detection, training, evaluation, demo, listing, info, export  # noqa: F401

# isort: on
from anomri.cli.options import app, err, out
from anomri.errors import AnomriError, Interrupted
from anomri.runtime.interruption import StopRequest, stoppable
from anomri.runtime.launch import read_launch


def main(args: list[str] | None = None) -> int:
    """Run the command line with ``args`` (default: those of the process); returns the exit code.

    0: all is done, or a scheduler stopped the run and all is saved. 1: some case failed, the
    others are written. 2: the input or the command does not fit.
    """
    _print_any_name()
    try:
        with stoppable() as stop:
            # The answer is printed inside too: a scheduler may signal twice, and the second
            # signal must not end the process.
            return _run(args, stop)
    except Interrupted as stopped:
        return _stopped(stopped)


def _print_any_name() -> None:
    """Let the streams escape what they cannot encode, such as a file's name that is not UTF-8."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _run(args: list[str] | None, stop: StopRequest) -> int:
    try:
        # One of several processes prints for all; the others print only their own errors.
        out.quiet = err.quiet = read_launch().rank > 0
        try:
            return int(app(args=args, standalone_mode=False) or 0)
        except Exception as error:
            if stop.signal is None or isinstance(error, AnomriError):
                raise
            # It failed because another process has stopped already.
            raise _interrupted(error, stop.signal) from error
    except AnomriError as error:
        err.quiet = err.quiet and getattr(error, "reported", False)
        return _wrong(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _wrong(f"{where}{error.strerror or error}")
    except Interrupted as stopped:
        return _stopped(stopped)
    except typer.Exit as leaving:
        return int(leaving.exit_code)
    except Exception as error:
        if hasattr(error, "format_message"):  # typer's own: a wrong option
            return _wrong(error.format_message())
        if stop.signal is not None:
            # A stop at the very end of the work, which a library turned into another error.
            err.print(str(_interrupted(error, stop.signal)), soft_wrap=True)
            return 0
        raise


def _wrong(message: str) -> int:
    err.print(f"error: {message}", style="red", soft_wrap=True)
    return 2


def _interrupted(error: Exception, signal: int) -> Interrupted:
    return Interrupted(f"stopped ({error}); rerun the same command to resume.", signal)


def _stopped(stopped: Interrupted) -> int:
    err.print(str(stopped), soft_wrap=True)
    # A scheduler that ends a job with SIGTERM takes 0 for a clean stop.
    return 130 if stopped.signal == signal.SIGINT else 0
