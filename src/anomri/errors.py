"""The errors that a user can put right, and the request to stop."""

from __future__ import annotations


class AnomriError(Exception):
    """Something in the input that the user can put right; its message says what, where and how."""


def first_line(error: BaseException) -> str:
    """What an error of a library says first, or its kind if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Interrupted(BaseException):
    """A run was asked to stop by ``signal``; what it reached is saved, and the message says how to
    go on.

    No ``Exception``: what guards against a library's errors must not take a stop for one.
    """

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.signal = signal
