"""The demo: anomri at work on synthetic scans, so that no data is needed.

First the model in the package looks at one scan. Then a cohort is made, models are trained on its
healthy brains, evaluated on the others, and compared in a report.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anomri.demo.cohort import make_cohort, make_one
from anomri.errors import AnomriError
from anomri.evaluation.evaluate import evaluate
from anomri.evaluation.result import Evaluation
from anomri.files import output_folder, write_text
from anomri.model.detector import Detector
from anomri.reporting.pages import CaseView, Page, Table, case_views, write_page
from anomri.reporting.plots import curves_plot
from anomri.reporting.previews import save_preview
from anomri.runs.detect import detect_cohort
from anomri.runtime.launch import require_single_process
from anomri.scans.find import find_cases
from anomri.spec import ModelSpec
from anomri.training.train import Progress, train

NOTE = (
    "Everything on this page is SYNTHETIC: brains deformed from the MNI152 template, lesions drawn "
    "by a program. The figures show that the software works; they say nothing about patients."
)
HEALTHY, LESIONED = 12, 6
METHODS = ("dae", "thresholding")
MARKER = "SYNTHETIC.txt"
"""A file that says that a folder is a demo's, which the next demo may replace."""
FOLDERS = (
    "first-look",
    "cohort",
    "maps",
    *(f"{kind}-{method}" for kind in ("model", "evaluation") for method in METHODS),
)
"""What a demo writes, beside its report."""
SHOWN = (
    "AUPRC, pooled",
    "ceil-Dice, pooled",
    "Dice at the threshold, components filtered, mean of patients",
    "lesion-wise sensitivity, components filtered, mean of patients",
    "false positive components per scan, components filtered",
)
"""The figures of an evaluation that are shown."""


@dataclass(frozen=True)
class DemoResult:
    """Where the demo's report, model, maps and (if kept) cohort lie, and each method's figures."""

    report: Path
    model: Path
    maps: Path
    cohort: Path
    evaluations: dict[str, Evaluation]

    def table(self) -> str:
        """The comparison as text."""
        lines = ["Synthetic cohort, patients not trained on [95 % interval]:"]
        for name in SHOWN:
            lines.append(f"  {name}")
            for method, evaluation in self.evaluations.items():
                lines.append(f"    {method:13s} {_figure(evaluation, name)}")
        return "\n".join(lines)


def run_demo(
    out: str | Path,
    *,
    keep: bool = False,
    seed: int = 0,
    progress: Callable[[Progress], None] = lambda state: None,
    announce: Callable[[str], None] = lambda text: None,
) -> DemoResult:
    """Run the demo and write its first look, models, maps and ``report.html`` into ``out``.

    ``keep`` leaves the synthetic cohort in ``out/cohort``. ``announce`` is called with what is
    worth a look before the end. An earlier demo in ``out`` is replaced; raises `AnomriError` if
    ``out`` holds anything else.
    """
    require_single_process("the demo")
    folder = output_folder(Path(out))
    _clear(folder)
    announce(_first_look(folder / "first-look", seed, progress))
    cohort = folder / "cohort"
    _make(cohort, seed, progress)
    evaluations = _train_and_evaluate(folder, cohort, seed, progress)
    lesioned = [case for case in find_cases(cohort) if case.split == "test"]
    results = detect_cohort(lesioned, folder / "maps", folder / "model-dae", reconstruction=True)
    failed = [result.error for result in results if result.error]
    if failed:
        raise AnomriError("the demo's own scans failed:\n  " + "\n  ".join(failed))
    report = write_page(folder / "report.html", _page(folder, evaluations))
    if not keep:
        shutil.rmtree(cohort)
    return DemoResult(report, folder / "model-dae", folder / "maps", cohort, evaluations)


def _first_look(folder: Path, seed: int, progress: Callable[[Progress], None]) -> str:
    """Let the model in the package find the lesion of one synthetic scan; says where to look."""
    progress(Progress("look", 0, 1))
    detection = Detector.load().detect(make_one(folder / "scan", seed=seed))
    detection.save(folder)
    save_preview(detection, folder)
    progress(Progress("look", 1, 1))
    picture = folder / "previews" / f"{detection.name}.planes.jpg"
    largest = max((lesion.volume_mm3 for lesion in detection.lesions), default=0.0) / 1000
    return (
        f"The model in the package looked at a synthetic scan: {len(detection.lesions)} findings, "
        f"the largest of {largest:.0f} ml. Look at {picture} while a small model is trained."
    )


def _make(cohort: Path, seed: int, progress: Callable[[Progress], None]) -> None:
    total = HEALTHY + LESIONED
    made: list[str] = []

    def count(name: str) -> None:
        made.append(name)
        progress(Progress("make", len(made), total))

    progress(Progress("make", 0, total))
    make_cohort(cohort, healthy=HEALTHY, lesioned=LESIONED, seed=seed, progress=count)


def _train_and_evaluate(
    folder: Path, cohort: Path, seed: int, progress: Callable[[Progress], None]
) -> dict[str, Evaluation]:
    def evaluated(case: str, done: int, total: int) -> None:
        progress(Progress("evaluate", done, total))

    evaluations = {}
    with tempfile.TemporaryDirectory(prefix=".cache-", dir=folder) as cache:
        for method in METHODS:
            detector = train(
                cohort,
                folder / f"model-{method}",
                method=method,
                preset="demo",
                cache=cache,
                training={"seed": seed} if method == "dae" else None,
                subsets=False,
                data_licence="synthetic, made by anomri; see its documentation",
                progress=progress,
            )
            evaluations[method] = evaluate(
                cohort, folder / f"evaluation-{method}", model=detector, progress=evaluated
            )
    return evaluations


def _page(folder: Path, evaluations: dict[str, Evaluation]) -> Page:
    dae = evaluations["dae"]
    spec = ModelSpec.read(folder / "model-dae" / "model.json")
    assert spec.cohort is not None
    captions = {
        patient.case: f"AUPRC {patient.average_precision:.3f}, Dice {patient.dice:.3f}"
        for patient in dae.patients
        if patient.dice is not None
    }
    patients = {patient.case: patient for patient in dae.patients}
    return Page(
        title="anomri demo: a synthetic cohort",
        lead=(
            f"A denoising autoencoder saw {spec.cohort.training_slices:,} slices of "
            f"{spec.cohort.training_cases} healthy synthetic brains. Below is what it finds in "
            f"{len(dae.patients)} others with lesions."
        ),
        note=NOTE,
        cases=[
            CaseView(place, preview, captions.get(patient.case, ""))
            for place, preview, patient in case_views(folder / "evaluation-dae", patients)
        ],
        tables=[
            Table("Against thresholding of FLAIR", ("figure", *evaluations), _figures(evaluations)),
            Table("Protocol", ("what", "how"), list(dae.protocol.items())),
        ],
        plots=[
            curves_plot(
                {name: evaluation.curve for name, evaluation in evaluations.items()},
                {name: evaluation.threshold for name, evaluation in evaluations.items()},
            )
        ],
        footer=spec.citation,
    )


def _figures(evaluations: dict[str, Evaluation]) -> list[tuple[str, ...]]:
    """A row for each figure that is shown, with its value for each method."""
    return [
        (name, *(_figure(evaluation, name) for evaluation in evaluations.values()))
        for name in SHOWN
    ]


def _figure(evaluation: Evaluation, name: str) -> str:
    return str(next(figure for figure in evaluation.figures if figure.name == name))


def _clear(folder: Path) -> None:
    """Remove what an earlier demo wrote; raises `AnomriError` if the folder is not a demo's."""
    present = list(folder.iterdir())
    if present and not (folder / MARKER).is_file():
        raise AnomriError(
            f"{folder}: holds files that no demo wrote; name an empty folder with -o."
        )
    for path in present:
        if path.is_dir() and (path.name in FOLDERS or path.name.startswith(".cache-")):
            shutil.rmtree(path)
    write_text(folder / MARKER, NOTE + "\n")
