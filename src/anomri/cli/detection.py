"""Commands that find anomalies and show them: `detect`, `bids`, `view`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

from anomri.cli import inputs
from anomri.cli.options import (
    FIND,
    INPUT,
    OUTPUT,
    Command,
    Device,
    FalsePositiveMl,
    MinVolume,
    Model,
    OutFolder,
    Overwrite,
    Precision,
    Sensitivity,
    Shard,
    SomeChannels,
    Threads,
    command,
    err,
    flag,
    load_detector,
    out,
    parse_channels,
    quick_imports,
    within,
)
from anomri.errors import AnomriError

LEVELS = ("participant", "group")
LABEL_LISTS = ("--participant-label", "--session-label")


class BidsCommand(Command):
    """A command line as BIDS Apps have it: lists separated by spaces, underscores in options."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Rewrite the arguments for typer, then parse them."""
        return super().parse_args(ctx, split_lists(args))


def split_lists(args: Sequence[str]) -> list[str]:
    """Repeat the option of a list before each of its values, and spell options with hyphens.

    A list may have several values once the level has been named: before that, the next word may
    be a folder.

    >>> split_lists(["in", "out", "participant", "--participant_label", "01", "02"])[3:]
    ['--participant-label', '01', '--participant-label', '02']
    """
    words: list[str] = []
    listing = ""
    for word in args:
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = name.replace("_", "-") + equals + value
            listing = word if word in LABEL_LISTS else ""
        elif word.startswith("-"):
            listing = ""
        elif listing and words[-1] != listing:
            # Not the first value of the list.
            if any(level in words for level in LEVELS):
                words.append(listing)
            else:
                listing = ""
        words.append(word)
    return words


@command(
    FIND,
    "anomri detect -i scans -o out",
    "anomri detect --flair flair.nii.gz --t1 t1.nii.gz -o out --skull-strip",
)
def detect(
    output: OutFolder,
    input: inputs.Scans = None,
    model: Model = None,
    flair: inputs.Channel = None,
    t1: inputs.Channel = None,
    t1ce: inputs.Channel = None,
    t2: inputs.Channel = None,
    channel: inputs.Channels = None,
    channels: SomeChannels = None,
    brain_mask: inputs.BrainMask = None,
    series: inputs.Series = None,
    keep_identifiers: inputs.KeepIdentifiers = False,
    dicom_seg: inputs.DicomSeg = False,
    skull_strip: inputs.SkullStrip = False,
    bias_correction: inputs.BiasCorrection = False,
    register: inputs.Register = False,
    sensitivity: Sensitivity = None,
    false_positive_ml: FalsePositiveMl = None,
    min_volume: MinVolume = None,
    reconstruction: Annotated[
        bool,
        flag("--reconstruction", "Also write the scan as the model thinks it healthy.", OUTPUT),
    ] = False,
    overwrite: Overwrite = False,
    format: Annotated[
        Literal["text", "json"],
        typer.Option(
            help="json: print all results and paths as one document.", rich_help_panel=OUTPUT
        ),
    ] = "text",
    device: Device = "auto",
    precision: Precision = "auto",
    threads: Threads = None,
    shard: Shard = None,
) -> None:
    """Find lesions: write an anomaly map, a mask and a lesion table for every scan, and a report.

    Maps and masks lie on the scan's own grid. A scan that fails is named,
    and the others go on. Rerun the same command to resume.

    On several GPUs or machines, start it with torchrun or srun.
    """
    with quick_imports():
        from anomri.cli.progress import case_progress
        from anomri.model.detector import BUILT_IN, Detector, model_folder
        from anomri.runs.detect import DicomOptions, detect_cohort
        from anomri.runs.tables import CaseResult
        from anomri.runtime.processes import join_processes
        from anomri.scans.intake import parse_pairs
        from anomri.scans.prepare import Preparation

    given = {"flair": flair, "t1": t1, "t1ce": t1ce, "t2": t2}
    pairs = [*(channel or []), *(f"{name}={path}" for name, path in given.items() if path)]
    files = parse_pairs(pairs, "--channel")
    if input is not None and files:
        raise AnomriError(
            "name the scan either with -i, or a file for each channel (--flair FILE --t1 FILE ...)."
        )
    preparation = Preparation(brain_mask, skull_strip, bias_correction, register)
    team = join_processes(device)
    detector = Detector.load(model, device, precision)
    if model_folder(model) == BUILT_IN and team.is_main:
        _note(
            f"using the model in the package, for research only; see {BUILT_IN / 'MODEL_CARD.md'}"
        )
    with case_progress(err) as advance:

        def on_progress(result: CaseResult, total: int) -> None:
            advance(result.case, total)
            for text in (result.summary or {}).get("notes", []):  # type: ignore[attr-defined]
                _note(f"{result.case}: {text.removeprefix(f'{result.case}: ')}")
            if result.error:
                err.print(f"failed: {result.error}", style="red", soft_wrap=True)

        results = detect_cohort(
            files if input is None else input,
            output,
            detector,
            sensitivity=sensitivity,
            false_positive_ml=false_positive_ml,
            min_volume=min_volume,
            channels=parse_channels(channels),
            reconstruction=reconstruction,
            preparation=preparation,
            dicom=DicomOptions(parse_pairs(series or [], "--series"), keep_identifiers, dicom_seg),
            overwrite=overwrite,
            shard=shard,
            notify=_note,
            progress=on_progress,
        )
    for result in results:
        if result.export_error:
            err.print(f"no DICOM SEG: {result.export_error}", style="red", soft_wrap=True)
    failed = sum(result.error is not None for result in results)
    code = 1 if failed or any(result.export_error for result in results) else 0
    if format == "json" and team.is_main:
        report = None if shard else str((output / "report.html").resolve())
        facts = {"report": report, "cases": [result.to_json() for result in results]}
        typer.echo(json.dumps(facts, indent=2))
        raise typer.Exit(code)
    then = (
        f"After the last shard: anomri merge {output}"
        if shard
        else f"Look at {output / 'report.html'}"
    )
    out.print(f"{len(results) - failed} scans done, {failed} failed. {then}", soft_wrap=True)
    raise typer.Exit(code)


def _note(text: str) -> None:
    err.print(f"note: {text}", soft_wrap=True)


@command(
    FIND,
    "anomri bids BIDS OUT participant --participant-label 01 02",
    "anomri bids BIDS OUT group",
    cls=BidsCommand,
)
def bids(
    context: typer.Context,
    bids_dir: Annotated[Path, typer.Argument(metavar="BIDS_DIR", help="BIDS dataset.")],
    out_dir: Annotated[Path, typer.Argument(metavar="OUT_DIR", help="Folder for the derivatives.")],
    level: Annotated[
        str,
        typer.Argument(
            metavar="LEVEL",
            help="participant: find lesions. group: collect tables and a report of all that is "
            "done.",
        ),
    ],
    model: Model = None,
    participant_label: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="LABELS",
            help="Only these participants, as 01 02 or sub-01 sub-02.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    session_label: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="LABELS",
            help="Only these sessions, as 1 2 or ses-1 ses-2.",
            rich_help_panel=INPUT,
        ),
    ] = None,
    skip_bids_validation: Annotated[
        bool,
        flag("--skip-bids-validation", "Do not check that the dataset is valid BIDS.", INPUT),
    ] = False,
    channels: SomeChannels = None,
    skull_strip: inputs.SkullStrip = False,
    bias_correction: inputs.BiasCorrection = False,
    register: inputs.Register = False,
    sensitivity: Sensitivity = None,
    false_positive_ml: FalsePositiveMl = None,
    min_volume: MinVolume = None,
    device: Device = "auto",
    precision: Precision = "auto",
    threads: Threads = None,
) -> None:
    """Find lesions in a BIDS dataset, as a BIDS App, and write BIDS derivatives.

    Options may be spelled with underscores too, as --participant_label.
    Rerun the same command to resume.
    """
    with quick_imports():
        from anomri.cli.progress import case_progress
        from anomri.runs.bids import run_group, run_participant
        from anomri.scans.prepare import Preparation

    if level not in LEVELS:
        raise AnomriError(f"there is no level {level!r}; the levels are participant and group.")
    if level == "group":
        unused = _options_given(context)
        if unused:
            _note(f"{', '.join(unused)}: not used at the level group, which only collects results.")
        if not bids_dir.is_dir():
            raise AnomriError(f"{bids_dir}: no such folder.")
        out.print(f"Look at {run_group(out_dir)}", soft_wrap=True)
        return
    detector = load_detector(
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
    failed = [result.error for result in results if result.error]
    for error in failed:
        err.print(f"failed: {error}", style="red", soft_wrap=True)
    out.print(
        f"{len(results) - len(failed)} scans done, {len(failed)} failed. After the last "
        f"participant: anomri bids {bids_dir} {out_dir} group",
        soft_wrap=True,
    )
    raise typer.Exit(1 if failed else 0)


def _options_given(context: typer.Context) -> list[str]:
    """The options that stand on the command line, without the arguments."""
    given = []
    for parameter in context.command.params:
        source = context.get_parameter_source(parameter.name or "")
        if parameter.param_type_name == "option" and source and source.name == "COMMANDLINE":
            given.append(next(name for name in parameter.opts if name.startswith("--")))
    return given


@command(FIND, "anomri view out --scans scans", "anomri view out --port 8080 --no-browser")
def view(
    folder: Annotated[
        Path, typer.Argument(metavar="OUT", help="Folder that `anomri detect` wrote.")
    ],
    scans: Annotated[
        Optional[Path],
        typer.Option(
            metavar="SCANS",
            help="The scans to show behind the maps (default: where the run found them).",
        ),
    ] = None,
    port: Annotated[
        int,
        typer.Option(
            metavar="N", callback=within(0, 65535), help="Port on this machine (0: a free one)."
        ),
    ] = 0,
    browser: Annotated[
        bool,
        typer.Option(
            "--browser/--no-browser",
            metavar="",
            show_default=False,
            help="Open the page in a browser, or only print its address.",
        ),
    ] = True,
) -> None:
    """Scroll through scans, maps and masks in the browser; only this machine can see the page.

    Press Ctrl-C to stop.
    """
    from anomri.reporting.viewer import view as run

    run(
        folder,
        port=port,
        scans=scans,
        open_browser=browser,
        announce=lambda url: out.print(f"{url} (Ctrl-C to stop)", soft_wrap=True),
    )
