"""What the command `info` shows: facts of this installation, this machine and a model."""

from __future__ import annotations

import platform
import re
import shutil
from importlib.metadata import PackageNotFoundError, requires, version
from typing import TYPE_CHECKING

from anomri.optional import install_command

if TYPE_CHECKING:
    from anomri.model.detector import Detector

Facts = list[tuple[str, str]]
LIBRARIES = ("torch", "numpy", "nibabel", "scipy")
EXTRAS = {
    "bet": "--skull-strip",
    "bids": "BIDS datasets",
    "demo": "anomri demo",
    "dicom": "DICOM in and out",
    "onnx": "anomri export",
    "register": "--register, --bias-correction",
    "tensorboard": "training curves in TensorBoard",
}
"""The extras a user may want, and what for; `pyproject.toml` says which libraries they are."""
SKULL_STRIPPERS = ("mri_synthstrip", "hd-bet")
PROCESSOR_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""What decides how fast a network runs on a processor; bfloat16 needs one of the last two."""


def as_text(title: str, facts: Facts) -> str:
    """A heading and a line for each fact, the names as wide as the longest.

    >>> print(as_text("Machine", [("device", "cpu")]))
    Machine
      device  cpu
    <BLANKLINE>
    """
    width = max(len(name) for name, _ in facts)
    return "\n".join([title, *(f"  {name:{width}s}  {value}" for name, value in facts), ""])


def installation() -> Facts:
    """The versions of anomri, Python and the libraries that decide results."""
    return [
        ("anomri", version("anomri")),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *((name, version(name)) for name in LIBRARIES if _is_installed(name)),
    ]


def machine(device: str = "auto") -> Facts:
    """The device and precision that a run takes here, and what the processor can do."""
    import torch

    from anomri.runtime.devices import processor_flags, resolve_device, resolve_precision
    from anomri.runtime.launch import usable_processors

    found = resolve_device(device)
    name = f"{found} ({torch.cuda.get_device_name(found)})" if found.type == "cuda" else str(found)
    flags = [feature for feature in PROCESSOR_FEATURES if feature in processor_flags()]
    facts = [
        ("device", name),
        ("precision", resolve_precision("auto", found.type)),
        ("threads", f"{torch.get_num_threads()} (processors: {usable_processors()})"),
        ("processor", ", ".join(flags) or "no features known that matter"),
    ]
    if torch.cuda.device_count() > 1:
        names = [f"cuda:{k}" for k in range(torch.cuda.device_count())]
        facts.append(("other devices", ", ".join(names)))
    return facts


def extras() -> Facts:
    """Which extras are complete, what they are for, and what the others lack."""
    facts = []
    for extra, purpose in EXTRAS.items():
        missing = [name for name in libraries_of_extra(extra) if not _is_installed(name)]
        state = f"{purpose}: found"
        if missing:
            state = f"{purpose}: no {', '.join(missing)}; {install_command(extra)}"
        facts.append((extra, state))
    programs = [name for name in SKULL_STRIPPERS if shutil.which(name)]
    facts.append(("skull strippers", ", ".join(programs) or f"no {' or '.join(SKULL_STRIPPERS)}"))
    return facts


def libraries_of_extra(extra: str) -> list[str]:
    """The libraries that an extra of this package installs."""
    names = []
    for requirement in requires("anomri") or ():
        name, _, condition = requirement.partition(";")
        if re.search(rf"extra\s*==\s*['\"]{extra}['\"]", condition):
            names.append(re.split(r"[^\w.-]", name.strip(), maxsplit=1)[0])
    return names


def describe_model(detector: Detector) -> Facts:
    """A model's card in short: what it sees, what it learned from, its thresholds and its terms."""
    from anomri.scoring.scores import describe

    spec = detector.spec
    subsets = " (or some of them)" if detector.takes_subsets else ""
    facts = [
        ("method", spec.method),
        ("channels", ", ".join(spec.channels) + subsets),
    ]
    if spec.cohort:
        facts.append(
            (
                "trained on",
                f"{spec.cohort.training_slices:,} healthy slices of "
                f"{spec.cohort.training_cases} cases; {spec.cohort.validation_cases} cases held "
                "out",
            )
        )
    facts.append(("score", describe(spec.score)))
    if spec.thresholds:
        default = f"{100 * spec.thresholds.default_rate:.2g}%"
        rates = [f"{100 * rate:.2g}%" for rate in spec.thresholds.false_positive_rate]
        others = ", ".join(rate for rate in dict.fromkeys(rates) if rate != default)
        facts += [
            ("threshold", f"{spec.thresholds.threshold:.3g}"),
            ("default rate", f"{default} of healthy voxels are above it"),
            ("other rates", f"{others} (--sensitivity)"),
        ]
    else:
        facts.append(("threshold", "none: maps, but no masks"))
    facts.append(("scans' licence", spec.data_licence or "not given"))
    facts.append(("please cite", spec.citation))
    return facts


def _is_installed(library: str) -> bool:
    try:
        version(library)
    except PackageNotFoundError:
        return False
    return True
