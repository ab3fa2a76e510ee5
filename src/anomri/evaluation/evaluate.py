"""Evaluation on a cohort with labels: which cases, which voxels, which table; intervals by patient."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from anomri.errors import AnomriError
from anomri.evaluation.pooling import Evaluation, Pool, Scored, spool
from anomri.evaluation.report import EVALUATION, evaluation_report
from anomri.files import output_folder, write_text
from anomri.model.detector import Detector
from anomri.reporting.previews import remove_preview, save_preview
from anomri.runs.detect import problem, read_ahead
from anomri.runs.records import PLAN, Records, Shard, keys_of
from anomri.runs.tables import LOGS
from anomri.runtime.folders import refuse_foreign_tables, sole_use
from anomri.runtime.processes import ProcessGroup, join_processes
from anomri.scans.case import Case
from anomri.scans.find import find_cases
from anomri.scans.names import SUFFIXES
from anomri.scans.read import read_label, read_map
from anomri.scoring.metrics import count_components
from anomri.scoring.scores import describe
from anomri.slices import on_published_grid
from anomri.spec import Score

PUBLISHED_MM = (1.0, 240 / 128, 240 / 128)
"""Voxels of the paper's working grid on BraTS: slices, rows and columns."""
SCORES = ".scores"
TABLES = ("metrics.json", "patients.tsv", "curve.tsv", "report.html")
GRIDS = {
    "model": "every pixel of the slices with brain, on the model's working grid (of a finer one: on 128 x 128)",
    "input": "every voxel of the scan's own grid",
}


@dataclass(frozen=True)
class Plan:
    """What is to be compared: the ``cases``, how one's scores are had, and the ``facts`` that the protocol is made of."""

    cases: list[Case]
    scored: Callable[[Sequence[Case]], Iterator[Scored]]
    facts: dict[str, Any]
    keys: dict[str, str]
    device: str = "cpu"


def evaluate(
    cohort: str | Path | Sequence[Case],
    out: str | Path | None = None,
    *,
    model: Detector | str | Path | None = None,
    maps: str | Path | None = None,
    grid: str = "model",
    split: str | None = None,
    threshold: float | None = None,
    sensitivity: str | float | None = None,
    false_positive_ml: float | None = None,
    progress: Callable[[str, int, int], None] = lambda case, done, total: None,
) -> Evaluation:
    """Compare anomaly maps with lesion labels, of a ``model`` or of the folder ``maps``; exact, in bounded memory.

    ``grid`` is ``model`` (slices of the working grid, the paper's protocol) or ``input`` (the scan's own voxels);
    maps, ``<case>_anomaly.nii.gz`` or ``<case>.nii.gz``, are always scored on the input's. Cases are those of
    ``split``; without it, those of the split ``test`` if there are any, else all that have a label, but none that
    the model was trained or validated on. ``threshold``
    replaces the label-free one of the model; ``sensitivity`` or ``false_positive_ml`` choose another of its own.
    Scores are spooled to disk; memory holds one case and the scores of
    lesion voxels. With ``out``, tables and ``report.html`` are written there, and the same call goes on where a
    killed one ended; several processes of torchrun or srun share the cases. Raises `AnomriError`.
    """
    plan = make_plan(
        cohort, out, model, maps, grid, split, threshold, sensitivity, false_positive_ml
    )
    team = join_processes(plan.device)
    if out is None:
        if team.world_size > 1:
            raise AnomriError(
                "several processes need a folder that all of them see; name one for the results."
            )
        with tempfile.TemporaryDirectory(prefix=".scores-") as place:
            records = Records.begin(Path(place), plan.keys, plan.facts)
            _spool(plan, plan.cases, records, progress)
            return _pooled(records, None)
    folder = Path(out)
    with team.sole_use(folder):
        team.run_on_main(lambda: refuse_foreign_tables(folder, TABLES))
        done = team.run_on_main(
            lambda: _evaluated(folder, Records(folder, plan.keys, plan.facts).fingerprint)
        )
        if done is not None and not done.failed:
            return done
        records = team.run_on_main(lambda: Records.begin(folder / SCORES, plan.keys, plan.facts))
        team.run_on_all(lambda: _spool(plan, team.share(plan.cases), records, progress))
        return team.run_on_main(lambda: _pooled(records, folder))


def evaluate_shard(
    plan: Plan, out: str | Path, shard: str, progress: Callable[[str, int, int], None]
) -> int:
    """Score one share, as ``3/40``, of a plan's cases into ``out``, for `merge.merge`; returns how many failed."""
    part, folder = Shard.parse(shard), Path(out)
    assert part is not None
    with part.sole_use(folder):
        refuse_foreign_tables(folder, TABLES)
        records = Records.begin(folder / SCORES, plan.keys, plan.facts)
        mine = ProcessGroup(part.number - 1, part.count).share(plan.cases)
        _spool(plan, mine, records, progress)
        return sum(bool((records.load(case.name) or {}).get("error")) for case in mine)


def merge_evaluations(folder: Path) -> Evaluation:
    """The evaluation of cases that were scored shard by shard; raises `AnomriError` if some are missing."""
    with sole_use(folder):
        if not (folder / SCORES / PLAN).is_file():
            done = _evaluated(folder, None)
        else:
            records = Records.open(folder / SCORES)
            done = _evaluated(folder, records.fingerprint)
            # Of cases that failed, some may have been scored since.
            done = _pooled(records, folder) if done is None or done.failed else done
    if done is None:
        raise AnomriError(
            f"{folder}: holds no evaluation; begin one with `anomri evaluate --shard K/N`."
        )
    return done


def make_plan(
    cohort: str | Path | Sequence[Case],
    out: str | Path | None,
    model: Detector | str | Path | None = None,
    maps: str | Path | None = None,
    grid: str = "model",
    split: str | None = None,
    threshold: float | None = None,
    sensitivity: str | float | None = None,
    false_positive_ml: float | None = None,
) -> Plan:
    """What `evaluate` would do with the same arguments."""
    if (model is None) == (maps is None):
        raise AnomriError("give either a model or a folder of maps to evaluate.")
    if (sensitivity, false_positive_ml) != (None, None) and (
        maps is not None or threshold is not None
    ):
        raise AnomriError(
            "a sensitivity or false positive volume is the model's; give no threshold or maps beside it."
        )
    if grid not in GRIDS:
        raise AnomriError(f"there is no grid {grid!r}; the grids are {' and '.join(GRIDS)}.")
    cases = find_cases(cohort) if isinstance(cohort, str | Path) else list(cohort)
    folder = None if out is None else Path(out)
    facts: dict[str, Any] = {"grid": grid, "threshold": threshold, "given": threshold is not None}
    if model is None:
        place = Path(str(maps))
        if not place.is_dir():
            raise AnomriError(f"{place}: no such folder; name the one that holds the maps.")
        cases, facts["chosen"] = choose_cases(cases, split)
        facts |= {"what": f"maps of {maps}", "grid": "input", "dropped": _dropped(Score())}
        with_maps = [
            replace(case, channels={"map": _map_of(place, case) or place}) for case in cases
        ]
        keys = keys_of(with_maps, ["map"], facts)
        return Plan(cases, lambda some: _read_maps(place, some, folder, threshold), facts, keys)
    detector = model if isinstance(model, Detector) else Detector.load(model)
    detector = detector.with_threshold(sensitivity, false_positive_ml)
    spec = detector.spec
    cases, facts["chosen"] = choose_cases(cases, split, detector.splits)
    if threshold is None and detector.thresholds is not None:
        facts["threshold"] = detector.thresholds.threshold
    facts["dropped"] = _dropped(spec.score)
    facts["what"] = (
        f"method {spec.method}, channels {', '.join(detector.channels)}, score {describe(spec.score)}"
    )
    keys = keys_of(cases, spec.channels, facts, detector.fingerprint)
    return Plan(
        cases,
        lambda some: _detected(detector, some, grid, folder, threshold),
        facts,
        keys,
        detector.device.type,
    )


def _spool(
    plan: Plan, cases: Sequence[Case], records: Records, progress: Callable[[str, int, int], None]
) -> None:
    """Score the cases that are not scored yet, each noted when it is."""
    before = [
        case
        for case in cases
        if (records.load(case.name) or {"error": "none yet"})["error"] is None
    ]
    for done, case in enumerate(before, start=1):
        progress(case.name, done, len(cases))
    names = {case.name for case in before}
    scored = plan.scored([case for case in cases if case.name not in names])
    for done, one in enumerate(scored, start=len(before) + 1):
        records.save(one.case, spool(records.folder, one))
        progress(one.case, done, len(cases))


def _pooled(records: Records, folder: Path | None) -> Evaluation:
    """The figures of all cases of a plan; the scores are removed when they are written and none failed."""
    pool, facts = Pool(records.folder), records.facts
    for record in records.all():
        pool.count(record)
    if not pool.cases:
        raise AnomriError("no case could be evaluated:\n  " + "\n  ".join(pool.failed.values()))
    evaluation = pool.evaluate(_protocol(facts, pool), facts["threshold"])
    if folder is not None:
        # Before the scores go: from now on the same command finds that it is done.
        result = {"run": records.fingerprint, "evaluation": asdict(evaluation)}
        write_text(output_folder(folder / LOGS) / EVALUATION, json.dumps(result))
        _evaluated(folder, records.fingerprint)
    return evaluation


def _evaluated(folder: Path, run: str | None) -> Evaluation | None:
    """The evaluation that was finished in ``folder``, its files written; ``None`` if there is none, or of another run.

    Scores stay where cases failed.
    """
    try:
        result = json.loads((folder / LOGS / EVALUATION).read_text(encoding="utf-8"))
        evaluation = Evaluation.from_json(result["evaluation"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if run not in (None, result["run"]):
        return None
    evaluation.save(folder)
    evaluation_report(folder, evaluation)
    if not evaluation.failed:  # else the same command tries those again, and they alone
        shutil.rmtree(folder / SCORES, ignore_errors=True)
    return evaluation


def choose_cases(
    cases: Sequence[Case], split: str | None, seen: Mapping[str, str] | None = None
) -> tuple[list[Case], str]:
    """The labelled cases of a split and how they were chosen, in words; raises `AnomriError` if there are none.

    ``seen`` gives the split that cases and patients had when the model was trained; unless a split is asked for, those
    of its training and validation are left out.
    """
    known: set[str] = set()
    if split is None:
        held = {name for name, one in (seen or {}).items() if one in ("train", "val")}
        known = {case.name for case in cases if held & {case.name, case.patient}}
        if any(case.split == "test" and case.name not in known for case in cases):
            split, known = "test", {case.name for case in cases if case.split == "test"} & known
    in_split = [
        case for case in cases if (split is None or case.split == split) and case.name not in known
    ]
    if known and not in_split:
        raise AnomriError(
            f"the model was trained or validated on all {len(cases)} cases; evaluate on others, or ask for "
            f"--split val, knowing that those chose the model."
        )
    labelled = [case for case in in_split if case.label is not None]
    if not labelled:
        where = f"split {split!r}" if split else "cohort"
        raise AnomriError(
            f"no case of the {where} has a label (<case>_seg.nii.gz; in BIDS *_label-lesion_mask.nii.gz); there is "
            f"nothing to compare with."
        )
    words = f"split {split}" if split else "all cases"
    unlabelled = len(in_split) - len(labelled)
    words += f", without {unlabelled} that have no label" if unlabelled else ""
    return labelled, words + (
        f", without {len(known)} that the model was trained or validated on" if known else ""
    )


def _detected(
    detector: Detector,
    cases: Sequence[Case],
    grid: str,
    folder: Path | None,
    threshold: float | None,
) -> Iterator[Scored]:
    for case, volume, _ in read_ahead(cases, detector.read):
        try:
            if isinstance(volume, AnomriError):
                raise volume
            label, drawn, lost = volume.lesions(), 0, 0
            detection = detector.detect(volume, threshold=threshold)
            if folder is not None:
                save_preview(detection, folder)
            working = detector.spec.grid
            if grid == "model":
                drawn = count_components(label)
                scores, label, voxel_mm3 = on_published_grid(
                    detection.scores, detection.stack, volume, working
                )
                lost = max(drawn - count_components(label), 0)
            else:
                scores, voxel_mm3 = detection.anomaly_map, volume.geometry.voxel_mm3
            dropped = detector.spec.score.max_dropped(detection.stack.spacing_mm, voxel_mm3)
            notes, its = _on_label(case, volume.notes), detection.threshold
            yield Scored(
                case.name,
                scores,
                label,
                dropped,
                None,
                its,
                case.patient,
                notes=notes,
                lesions=drawn,
                lost=lost,
            )
        except Exception as error:
            yield Scored(case.name, error=problem(case, error))


def _on_label(case: Case, notes: Sequence[str]) -> list[str]:
    """Those of the ``notes`` that are about the case's label, with its name: labels may be called alike."""
    whose = f"{case.name}: "
    return [
        whose + note.removeprefix(whose) for note in notes if case.label and case.label.name in note
    ]


def _map_of(maps: Path, case: Case) -> Path | None:
    return next((maps / name for name in _map_names(case) if (maps / name).is_file()), None)


def _map_names(case: Case) -> list[str]:
    return [case.name + ending + suffix for ending in ("_anomaly", "") for suffix in SUFFIXES]


def _read_maps(
    maps: Path, cases: Sequence[Case], folder: Path | None, threshold: float | None
) -> Iterator[Scored]:
    for case in cases:
        try:
            if folder is not None and folder.resolve() != maps.resolve():
                # Those that are there show what a model made of the case, and not what made these maps.
                remove_preview(folder, case.name)
            path, names = _map_of(maps, case), _map_names(case)
            if path is None:
                raise AnomriError(f"{maps}: holds no {names[0]} or {names[2]}.")
            label, geometry, notes = read_label(case)
            assert case.label is not None
            scores = read_map(path, case.label, geometry)
            dropped = Score().max_dropped(PUBLISHED_MM, geometry.voxel_mm3)
            notes = _on_label(case, [*case.notes, *notes])
            yield Scored(
                case.name, scores, label, dropped, None, threshold, case.patient, notes=notes
            )
        except Exception as error:
            yield Scored(case.name, error=problem(case, error))


def _dropped(score: Score) -> str:
    if score.min_volume_mm3 is not None:
        return f"less than {score.min_volume_mm3:g} mm3"
    return f"at most {score.max_dropped_voxels} voxels of the working grid, were they 1 mm high,"


def _protocol(facts: Mapping[str, Any], pool: Pool) -> dict[str, str]:
    threshold = "none"
    if facts["threshold"] is not None:
        threshold = f"{facts['threshold']:.5g}, " + (
            "given by the user" if facts["given"] else "the model's, without labels"
        )
        others = sum(case["threshold"] != facts["threshold"] for case in pool.cases)
        threshold += (
            f"; of {others} that lack channels, the one for the channels they have, if any"
            if others
            else ""
        )
    patients = len(pool.patients)
    notes = [note for case in pool.cases for note in case.get("notes", ())]
    lost, drawn = (sum(case.get(name, 0) for case in pool.cases) for name in ("lost", "lesions"))
    return {
        "scored": facts["what"],
        "cases": f"{len(pool.cases)} ({facts['chosen']})"
        + (f"; {len(pool.failed)} failed" if pool.failed else ""),
        "voxels": f"{GRIDS[facts['grid']]}, background counted: {pool.voxels:,}",
        "lesion": "every label above zero is one class; of one that interpolation made soft, what is a half and more"
        + (
            f"; {lost} of {drawn} lesions vanish on this grid, or grow together; --grid input keeps them"
            if lost
            else ""
        ),
        **(
            {
                "labels": " ".join(notes[:5])
                + (f" And {len(notes) - 5} more." if len(notes) > 5 else "")
            }
            if notes
            else {}
        ),
        "AUPRC": "average precision over all voxels, every distinct score a threshold",
        "ceil-Dice": "best Dice over all thresholds, chosen on these labels: an upper bound",
        "threshold": threshold,
        "Dice at the threshold": "of scans with a lesion; what is found in others are false positive components",
        "lesion-wise": "26-connected lesions; detected if one voxel is in the mask",
        "intervals": "95 %, 2,000 bootstrap resamples of patients"
        + (f" ({patients}, of {len(pool.cases)} scans)" if patients < len(pool.cases) else ""),
        "components": f"26-connected ones of {facts['dropped']} are dropped where filtered",
    }
