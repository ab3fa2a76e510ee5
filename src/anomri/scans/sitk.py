"""SimpleITK, set up so that its results are the same every time and on every machine."""

from __future__ import annotations

from typing import Any

from anomri.optional import import_extra


def import_sitk(purpose: str) -> Any:
    """SimpleITK with one thread; raises `AnomriError` with the command to install it.

    Several threads sum in an order that changes from run to run. A filter's own
    ``SetNumberOfThreads`` does not reach all of its parts.
    """
    sitk = import_extra("SimpleITK", "register", purpose)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    return sitk
