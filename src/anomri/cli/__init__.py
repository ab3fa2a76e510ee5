"""The command line: parse, one call, exit code. Torch is imported inside a command only."""

from __future__ import annotations

import signal

import typer

# isort: off
from anomri.cli import training, detection, evaluation  # noqa: F401  # they register their commands, in the order of --help

# isort: on
from anomri.cli.options import app, err, out
from anomri.errors import AnomriError, Interrupted
from anomri.runtime.interruption import StopRequest, stoppable
from anomri.runtime.launch import read_launch


def main(args: list[str] | None = None) -> int:
    """Run the command line with ``args`` (default: the process's); returns the exit code.

    0: all done, or stopped by a scheduler with all saved. 1: some case failed, the others are written. 2: the input or
    the command does not fit.
    """
    try:
        with stoppable() as stop:
            # The answer too is given in there: a scheduler says it twice, and the second must not end the process.
            return _run(args, stop)
    except Interrupted as stopped:
        return _stopped(stopped)


def _run(args: list[str] | None, stop: StopRequest) -> int:
    try:
        # One of several processes speaks for all; the others only tell what went wrong with them alone.
        out.quiet = err.quiet = read_launch().rank > 0
        try:
            return int(app(args=args, standalone_mode=False) or 0)
        except Exception as error:
            if stop.signal is None or isinstance(error, AnomriError):
                raise
            # What fails because another process has stopped already.
            raise Interrupted(
                f"stopped ({error}); the same command goes on.", stop.signal
            ) from error
    except AnomriError as error:
        err.quiet = err.quiet and getattr(error, "reported", False)
        err.print(f"error: {error}", style="red", soft_wrap=True)
        return 2
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        err.print(f"error: {where}{error.strerror or error}", style="red", soft_wrap=True)
        return 2
    except Interrupted as stopped:
        return _stopped(stopped)
    except typer.Exit as leaving:
        return int(leaving.exit_code)
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own: a wrong option
            err.print(f"error: {error.format_message()}", style="red", soft_wrap=True)
            return 2
        if stop.signal is not None:
            # A stop that came at the very end of the work, and that a library made something else of.
            err.print(f"stopped ({error}); the same command goes on.", soft_wrap=True)
            return 0
        raise


def _stopped(stopped: Interrupted) -> int:
    err.print(str(stopped), soft_wrap=True)
    # A scheduler that ends a job with SIGTERM takes 0 for a clean stop.
    return 130 if stopped.signal == signal.SIGINT else 0
