"""anomri: find what does not look healthy in a brain MRI, after seeing healthy brains only.

>>> import anomri
>>> detector = anomri.train("cohort", "model")                  # doctest: +SKIP
>>> detection = anomri.load("model").detect("scan_folder")      # doctest: +SKIP
>>> detection.save("out")                                       # doctest: +SKIP
>>> print(anomri.evaluate("cohort", "out", model="model"))      # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from anomri.cases import Case
    from anomri.cohorts import find_cases
    from anomri.comparison import compare
    from anomri.detection import detect_cohort
    from anomri.detector import Detector
    from anomri.evaluation import evaluate
    from anomri.findings import Detection
    from anomri.merging import merge
    from anomri.pooling import Evaluation
    from anomri.reporting import report
    from anomri.spec import AnomriError
    from anomri.training import train

    load = Detector.load

_HOMES = {
    "AnomriError": "spec",
    "Case": "cases",
    "Detection": "findings",
    "Detector": "detector",
    "Evaluation": "pooling",
    "compare": "comparison",
    "detect_cohort": "detection",
    "evaluate": "evaluation",
    "find_cases": "cohorts",
    "load": "detector",
    "merge": "merging",
    "report": "reporting",
    "train": "training",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import what is asked for when it is asked for: torch takes seconds, and ``--help`` needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'anomri' has no attribute {name!r}")
    value = getattr(import_module(f"anomri.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
