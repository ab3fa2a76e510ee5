"""Find lesions in brain MRI without lesion labels: anomri learns from healthy brains.

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
    from anomri.comparison.compare import compare
    from anomri.errors import AnomriError
    from anomri.evaluation.evaluate import evaluate
    from anomri.evaluation.merge import merge
    from anomri.evaluation.report import report
    from anomri.evaluation.result import Evaluation
    from anomri.model.detection import Detection
    from anomri.model.detector import Detector
    from anomri.runs.detect import detect_cohort
    from anomri.scans.case import Case
    from anomri.scans.find import find_cases, read_cohort
    from anomri.training.train import train

    load = Detector.load
    __version__: str

_HOMES = {  # the module of each public name
    "AnomriError": "errors",
    "Case": "scans.case",
    "Detection": "model.detection",
    "Detector": "model.detector",
    "Evaluation": "evaluation.result",
    "compare": "comparison.compare",
    "detect_cohort": "runs.detect",
    "evaluate": "evaluation.evaluate",
    "find_cases": "scans.find",
    "load": "model.detector",
    "merge": "evaluation.merge",
    "read_cohort": "scans.find",
    "report": "evaluation.report",
    "train": "training.train",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a name when it is first used: torch takes seconds, and ``--help`` does not need it."""
    if name == "__version__":
        return import_module("importlib.metadata").version("anomri")
    if name not in _HOMES:
        raise AttributeError(f"module 'anomri' has no attribute {name!r}")
    value = getattr(import_module(f"anomri.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
