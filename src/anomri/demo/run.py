"""The main job on a synthetic cohort: make, train, detect, evaluate, compare, report; no data needed."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from anomri.demo.cohort import make_cohort
from anomri.errors import AnomriError
from anomri.evaluation.evaluate import evaluate
from anomri.evaluation.pooling import Evaluation
from anomri.files import output_folder, write_text
from anomri.reporting.pages import CaseView, Page, Table, case_views, write_page
from anomri.reporting.plots import curves_plot
from anomri.runs.detect import detect_cohort
from anomri.runtime.launch import require_single_process
from anomri.scans.find import find_cases
from anomri.training.train import Progress, train

NOTE = (
    "Everything on this page is SYNTHETIC: brains deformed from the MNI152 template, lesions drawn by a program. "
    "The figures show that the software works; they say nothing about patients."
)
HEALTHY, LESIONED = 12, 6
MARKER = "SYNTHETIC.txt"
OWN = (
    "cohort",
    "maps",
    "model-dae",
    "model-thresholding",
    "evaluation-dae",
    "evaluation-thresholding",
)
SHOWN = (
    "AUPRC, pooled",
    "ceil-Dice, pooled",
    "Dice at the threshold, components filtered, mean of patients",
    "lesion-wise sensitivity, components filtered, mean of patients",
    "false positive components per scan, components filtered",
)


@dataclass(frozen=True)
class DemoResult:
    """Where the demo's report, model, maps and (if kept) cohort lie, and what each method reached."""

    report: Path
    model: Path
    maps: Path
    cohort: Path
    evaluations: dict[str, Evaluation]

    def table(self) -> str:
        """The comparison as text."""
        rows = ["Synthetic cohort, patients not trained on [95 % interval]:"]
        for name in SHOWN:
            rows.append(f"  {name}")
            rows += [
                f"    {method:13s} {_figure(evaluation, name)}"
                for method, evaluation in self.evaluations.items()
            ]
        return "\n".join(rows)


def run_demo(
    out: str | Path,
    *,
    keep: bool = False,
    seed: int = 0,
    progress: Callable[[Progress], None] = lambda state: None,
) -> DemoResult:
    """Run the whole job on a synthetic cohort and write model, maps and ``report.html`` into ``out``.

    ``keep`` leaves the cohort as NIfTI in ``out/cohort``. What an earlier demo left in ``out`` is replaced;
    raises `AnomriError` if anything else lies there.
    """
    require_single_process("the demo")
    folder = output_folder(Path(out))
    _clear(folder)
    cohort = folder / "cohort"
    total = HEALTHY + LESIONED
    made: list[str] = []

    def count(name: str) -> None:
        made.append(name)
        progress(Progress("make", len(made), total))

    progress(Progress("make", 0, total))
    make_cohort(cohort, healthy=HEALTHY, lesioned=LESIONED, seed=seed, progress=count)
    evaluations = {}
    with tempfile.TemporaryDirectory(prefix=".cache-", dir=folder) as cache:
        for method in ("dae", "thresholding"):
            model = folder / f"model-{method}"
            detector = train(
                cohort,
                model,
                method=method,
                preset="demo",
                cache=cache,
                training={"seed": seed} if method == "dae" else None,
                data_licence="synthetic, made by anomri; see its documentation",
                progress=progress,
            )
            evaluations[method] = evaluate(cohort, folder / f"evaluation-{method}", model=detector)
    lesioned = [case for case in find_cases(cohort) if case.split == "test"]
    results = detect_cohort(lesioned, folder / "maps", folder / "model-dae", reconstruction=True)
    failed = [result.error for result in results if result.error]
    if failed:
        raise AnomriError("the demo's own scans failed:\n  " + "\n  ".join(map(str, failed)))
    report = write_page(folder / "report.html", _page(folder, evaluations))
    if not keep:
        shutil.rmtree(cohort)
    return DemoResult(report, folder / "model-dae", folder / "maps", cohort, evaluations)


def _page(folder: Path, evaluations: dict[str, Evaluation]) -> Page:
    dae = evaluations["dae"]
    captions = {
        p.case: f"AUPRC {p.average_precision:.3f}, Dice {p.dice:.3f}"
        for p in dae.patients
        if p.dice is not None
    }
    spec = json.loads((folder / "model-dae" / "model.json").read_text(encoding="utf-8"))
    cohort = spec["cohort"]
    return Page(
        title="anomri demo: a synthetic cohort",
        lead=(
            f"A denoising autoencoder saw {cohort['training_slices']:,} slices of {cohort['training_cases']} healthy "
            f"synthetic brains. Below is what it finds in {len(dae.patients)} others with lesions."
        ),
        note=NOTE,
        cases=[
            CaseView(place, preview, captions.get(patient.case, ""))
            for place, preview, patient in case_views(
                folder / "evaluation-dae", {patient.case: patient for patient in dae.patients}
            )
        ],
        tables=[
            Table(
                "Against thresholding of FLAIR",
                ("figure", *evaluations),
                [
                    (name, *(_figure(evaluation, name) for evaluation in evaluations.values()))
                    for name in SHOWN
                ],
            ),
            Table("Protocol", ("what", "how"), list(dae.protocol.items())),
        ],
        plots=[
            curves_plot(
                {name: evaluation.curve for name, evaluation in evaluations.items()},
                {name: evaluation.threshold for name, evaluation in evaluations.items()},
            )
        ],
        footer=spec["citation"],
    )


def _figure(evaluation: Evaluation, name: str) -> str:
    return str(next(figure for figure in evaluation.figures if figure.name == name))


def _clear(folder: Path) -> None:
    present = list(folder.iterdir())
    if present and not (folder / MARKER).is_file():
        raise AnomriError(
            f"{folder}: holds files that are not an earlier demo's; name an empty folder with -o."
        )
    for path in present:
        if path.is_dir() and (path.name in OWN or path.name.startswith(".cache-")):
            shutil.rmtree(path)
    write_text(folder / MARKER, NOTE + "\n")
