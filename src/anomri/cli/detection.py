"""Commands that find anomalies and show them: `detect`, `bids`, `view`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal, Optional

import typer

from anomri.cli import inputs
from anomri.cli.options import (
    Device,
    FalsePositiveMl,
    MinVolume,
    Model,
    OutFolder,
    Precision,
    Sensitivity,
    Shard,
    SomeChannels,
    app,
    detector_of,
    err,
    out,
)
from anomri.errors import AnomriError


@app.command()
def detect(
    output: OutFolder,
    model: Model = None,
    input: inputs.Scans = None,
    flair: inputs.Channel = None,
    t1: inputs.Channel = None,
    t1ce: inputs.Channel = None,
    t2: inputs.Channel = None,
    channel: inputs.Channels = None,
    brain_mask: inputs.BrainMask = None,
    skull_strip: inputs.SkullStrip = False,
    bias_correction: inputs.BiasCorrection = False,
    register: inputs.Register = False,
    series: inputs.Series = None,
    keep_identifiers: inputs.KeepIdentifiers = False,
    dicom_seg: inputs.DicomSeg = False,
    reconstruction: Annotated[
        bool, typer.Option("--reconstruction", help="Also write the reconstruction.")
    ] = False,
    sensitivity: Sensitivity = None,
    false_positive_ml: FalsePositiveMl = None,
    min_volume: MinVolume = None,
    channels: SomeChannels = None,
    shard: Shard = None,
    format: Annotated[
        Literal["text", "json"],
        typer.Option(help="json: one document with all results and paths, on stdout."),
    ] = "text",
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Write an anomaly map, a mask and a lesion table for every scan, on its own grid; and a report.

    Stop it when you like: the same command goes on. On several GPUs or machines: torchrun or srun before it.
    """
    from anomri.cli.progress import case_progress
    from anomri.model.detector import BUILT_IN
    from anomri.optional import import_extra
    from anomri.runs.detect import detect_cohort
    from anomri.runs.tables import CaseResult, cases_before, write_dicom_seg
    from anomri.runtime.processes import join_processes
    from anomri.scans.intake import named, take_in
    from anomri.scans.prepare import Preparation

    preparation = Preparation(brain_mask, skull_strip, bias_correction, register)
    given = {"flair": flair, "t1": t1, "t1ce": t1ce, "t2": t2}
    files = named(
        [*(channel or []), *(f"{name}={path}" for name, path in given.items() if path)], "--channel"
    )
    team = join_processes(device)
    detector = detector_of(
        model, device, precision, sensitivity, false_positive_ml, min_volume, channels
    )
    if model is None and team.is_main:
        _note(
            f"the model that comes with anomri is used, for research only; {BUILT_IN / 'MODEL_CARD.md'} says what it is."
        )
    if dicom_seg:
        import_extra("highdicom", "dicom", "--dicom-seg")
        if detector.thresholds is None:
            raise AnomriError(
                "--dicom-seg: this model has no threshold, so there is no mask to write."
            )
    intake = team.run_on_main(
        lambda: take_in(
            input,
            files,
            output,
            detector.find_cases,
            series=named(series or [], "--series"),
            keep_identifiers=keep_identifiers,
            dicom_seg=dicom_seg,
            note=_note,
        )
    )
    if brain_mask is not None and len(intake.cases) > 1:
        raise AnomriError(
            f"--brain-mask is the mask of one scan, but there are {len(intake.cases)}; name masks in a TSV."
        )
    if (
        team.is_main
        and not shard
        and (before := cases_before(output, [case.name for case in intake.cases]))
    ):
        _note(
            f"{output} has maps of {before} from another run; the tables and the report will be of this run alone."
        )
    with case_progress(err) as advance:

        def told(result: CaseResult, total: int) -> None:
            advance(result.case, total)
            for text in (result.summary or {}).get("notes", []):  # type: ignore[attr-defined]
                _note(f"{result.case}: {text.removeprefix(f'{result.case}: ')}")
            if result.error:
                err.print(f"failed: {result.error}", style="red", soft_wrap=True)

        results = detect_cohort(
            intake.cases,
            output,
            detector,
            reconstruction=reconstruction,
            preparation=preparation,
            shard=shard,
            progress=told,
        )
    if dicom_seg and team.is_main:
        results = [write_dicom_seg(output, result, intake.series) for result in results]
        for result in results:
            if result.error and result.summary:
                err.print(f"failed: {result.error}", style="red", soft_wrap=True)
    failed = sum(result.error is not None for result in results)
    if format == "json" and team.is_main:
        report = None if shard else str((output / "report.html").resolve())
        facts = {"report": report, "cases": [result.to_json() for result in results]}
        typer.echo(json.dumps(facts, indent=2))
        raise typer.Exit(1 if failed else 0)
    then = (
        f"After the last shard: anomri merge {output}"
        if shard
        else f"Look at {output / 'report.html'}"
    )
    out.print(f"{len(results) - failed} scans done, {failed} failed. {then}", soft_wrap=True)
    raise typer.Exit(1 if failed else 0)


def _note(text: str) -> None:
    err.print(f"note: {text}", soft_wrap=True)


@app.command()
def bids(
    context: typer.Context,
    bids_dir: Annotated[Path, typer.Argument(metavar="BIDS_DIR", help="BIDS data set.")],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder for the derivatives.")],
    level: Annotated[
        str,
        typer.Argument(metavar="participant|group", help="Detect, or collect tables and a report."),
    ],
    model: Model = None,
    participant_label: Annotated[
        Optional[list[str]], typer.Option(help="Only this one; may be given again.")
    ] = None,
    session_label: Annotated[
        Optional[list[str]], typer.Option(help="Only this one; may be given again.")
    ] = None,
    skip_bids_validation: Annotated[
        bool, typer.Option("--skip-bids-validation", help="Take the data set as it is.")
    ] = False,
    skull_strip: inputs.SkullStrip = False,
    bias_correction: inputs.BiasCorrection = False,
    register: inputs.Register = False,
    sensitivity: Sensitivity = None,
    false_positive_ml: FalsePositiveMl = None,
    min_volume: MinVolume = None,
    channels: SomeChannels = None,
    device: Device = "auto",
    precision: Precision = "auto",
) -> None:
    """Detect in a BIDS data set and write BIDS derivatives."""
    from anomri.cli.progress import case_progress
    from anomri.runs.bids import run_group, run_participant
    from anomri.scans.prepare import Preparation

    if level == "group":
        sources = {name: context.get_parameter_source(name) for name in context.params}
        given = [
            name for name, source in sources.items() if source and source.name == "COMMANDLINE"
        ]
        options = [
            f"--{name.replace('_', '-')}"
            for name in given
            if name not in ("bids_dir", "out_dir", "level")
        ]
        if options:
            _note(
                f"{', '.join(options)}: of no use at the level group, which collects what there is."
            )
        if not bids_dir.is_dir():
            raise AnomriError(f"{bids_dir}: no such folder.")
        out.print(f"Look at {run_group(out_dir)}", soft_wrap=True)
        return
    if level != "participant":
        raise AnomriError(f"there is no level {level!r}; the levels are participant and group.")
    detector = detector_of(
        model, device, precision, sensitivity, false_positive_ml, min_volume, channels
    )
    with case_progress(err) as advance:
        results = run_participant(
            bids_dir,
            out_dir,
            detector,
            participant_labels=participant_label,
            session_labels=session_label,
            skip_bids_validation=skip_bids_validation,
            preparation=Preparation(None, skull_strip, bias_correction, register),
            warn=_note,
            progress=lambda result, total: advance(result.case, total),
        )
    for result in results:
        if result.error:
            err.print(f"failed: {result.error}", style="red", soft_wrap=True)
    raise typer.Exit(1 if any(result.error for result in results) else 0)


@app.command()
def view(
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder that `anomri detect` wrote.")
    ],
    scans: Annotated[
        Optional[Path],
        typer.Option(
            metavar="COHORT",
            help="The scans the maps were made from, to show behind them; default: those converted from DICOM.",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1 (0: a free one).")
    ] = 0,
    browser: Annotated[
        bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")
    ] = True,
) -> None:
    """Show maps, masks and scans in a page on this machine, to scroll through; Ctrl-C ends it."""
    from anomri.reporting.viewer import view as run

    run(
        folder,
        port=port,
        scans=scans,
        open_browser=browser,
        announce=lambda url: out.print(f"{url} (Ctrl-C to stop)", soft_wrap=True),
    )
