"""The settings of a model: frozen dataclasses, and their one form on disk, ``model.json``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from annotated_types import Ge, Gt, Interval

from anomri.errors import AnomriError

if TYPE_CHECKING:
    from pydantic import ValidationError

FORMAT_VERSION = 1
CITATION = (
    "Kascenas A, Pugeault N, O'Neil AQ. Denoising Autoencoders for Unsupervised Anomaly Detection "
    "in Brain MRI. "
    "MIDL 2022, PMLR 172:653-664."
)


@dataclass(frozen=True)
class Grid:
    """The working grid: axial slices of one size, whatever the scan.

    ``field_of_view_mm`` is cut from (or padded around) the middle of the scan and resized to
    ``size``; ``None`` stretches the scan's whole field, as the released program does. For the 240 x
    240 mm of BraTS the two are the same.
    """

    size: tuple[int, int] = (128, 128)
    field_of_view_mm: tuple[float, float] | None = (240.0, 240.0)
    orientation: Literal["LPS"] = "LPS"


LEVEL, SPREAD, FLOOR = 0.6, 0.15, 0.02


@dataclass(frozen=True)
class Scaling:
    """How intensities are scaled, channel by channel, by what its voxels > 0 are.

    ``percentile`` (the paper): divided by their 99th percentile, which a large bright lesion moves.
    ``standard``: the median becomes `LEVEL` and the interquartile range `SPREAD`, which a lesion
    hardly moves; what would be darker than `FLOOR` becomes that, and voxels at 0 stay 0.
    """

    kind: Literal["percentile", "standard"] = "percentile"
    percentile: float = 99.0
    slice_sum: float = 0.5
    """Slices are taken from the first to the last whose channel mean sums to more than this."""
    foreground_sum: float = 0.01
    """A pixel belongs to the foreground (brain) where its channels sum to more than this."""


@dataclass(frozen=True)
class Score:
    """How a residual becomes an anomaly map: median(F * residual), and what is dropped.

    F is the eroded foreground. The defaults are the paper's; `scoring.registry.SCORES` says what
    each ``kind`` is, ``own`` being the method's own.
    """

    kind: str = "own"
    channels: tuple[str, ...] = ()
    """Of which the residual is averaged; none: of all that a scan has."""
    healthy_mean: tuple[float, ...] = ()
    """Mean residual of healthy tissue in each of the model's channels, for ``standardised``."""
    healthy_spread: tuple[float, ...] = ()
    """Its standard deviation."""
    healthy_maps: str = ""
    """Both for parts of the brain (`positions.pack_maps`), for the scores by position."""
    flips: bool = False
    """Average over the scan and its mirror image."""
    erosion: int = 5
    erosion_level: float = 0.95
    median: int = 5
    smoothing_mm: float = 0.0
    """Standard deviation of a Gaussian filter of the finished map, in all three directions."""
    chosen_by: str = ""
    """Why it is this score, in words."""
    max_dropped_voxels: int = 20
    """Components of the mask up to the volume of so many voxels of the working grid, were they 1 mm
    high, are dropped."""
    min_volume_mm3: float | None = None
    """Instead: those below this volume."""

    def max_dropped(self, spacing_mm: Sequence[float], voxel_mm3: float | None = None) -> int:
        """The largest component that is dropped, in voxels of ``voxel_mm3``.

        By default those of the working grid. ``spacing_mm`` is the working grid's: of slices, rows
        and columns. What is dropped is a volume, so that a scan of thick slices does not lose what
        one of thin slices keeps.
        """
        pixel_mm2 = spacing_mm[1] * spacing_mm[2]
        voxel = pixel_mm2 * spacing_mm[0] if voxel_mm3 is None else voxel_mm3
        # Rounded, for what was whole before it was multiplied and divided.
        if self.min_volume_mm3 is None:
            return math.floor(round(self.max_dropped_voxels * pixel_mm2 / voxel, 6))
        return max(math.ceil(round(self.min_volume_mm3 / voxel, 6)) - 1, 0)


Precision = Literal["auto", "32-true", "bf16-mixed"]


@dataclass(frozen=True)
class Training:
    """The optimiser and its schedule; the defaults are the published ones."""

    steps: Annotated[int, Ge(1)] = 67_200
    batch_size: Annotated[int, Ge(1)] = 16
    learning_rate: Annotated[float, Gt(0)] = 1e-4
    schedule: Literal["published", "cosine", "constant"] = "published"
    """``published``: a cosine stepped once per 32 iterations with T_max = 100, so it rises again;
    ``cosine``: one fall."""
    weight_decay: Annotated[float, Ge(0)] = 1e-5
    warmup: Annotated[int, Ge(0)] = 0
    """Steps over which the learning rate rises to its schedule."""
    amsgrad: bool = True
    gradient_clip: Annotated[float, Gt(0)] = 0.5
    precision: Precision = "32-true"
    """``auto``: bfloat16 where the processor has it; a finished model says which one it was."""
    average: Annotated[float, Interval(ge=0, lt=1)] = 0.0
    """Share of the weights' moving average that a step keeps; 0: the weights themselves are
    taken."""
    crop_to_brain: bool = False
    """Leave out the margin of the grid that no training brain reaches."""
    validate_every: Annotated[int, Ge(1)] = 500
    validation_slices: Annotated[int, Ge(1)] = 512
    seed: Annotated[int, Ge(0)] = 0
    pretrained: str = ""
    """SHA-256 of the weights that it began with (`safetensors`); none: random ones."""


@dataclass(frozen=True)
class HealthyScores:
    """What anomaly maps of held-out healthy slices look like, on the working grid.

    Only a scan's healthy slices count; their volume is divided by their share of its slices.
    """

    threshold: tuple[float, ...]
    """Rising scores."""
    false_positive_ml: tuple[float, ...]
    """Volume above each threshold in a mean held-out scan, small components dropped."""
    scan_peaks: tuple[float, ...]
    """The highest score of each scan, rising."""
    histogram: tuple[int, ...]
    """Foreground voxels by score, in bins of equal width from 0 to ``histogram_top``."""
    histogram_top: float


@dataclass(frozen=True)
class Thresholds:
    """Scores that make a mask, by how often healthy held-out tissue exceeds them.

    A training stores the table, `HealthyScores` and a default. A threshold is asked for by a voxel
    rate, by a volume, or is the default: one of them is `threshold`.
    """

    false_positive_rate: tuple[float, ...]
    """Shares of the healthy foreground voxels, on the working grid."""
    value: tuple[float, ...]
    """The score that each share exceeds."""
    default_rate: float
    """The entry of ``false_positive_rate`` whose score makes the mask by default."""
    healthy_slices: int
    healthy_cases: int
    healthy: HealthyScores | None = None
    chosen_by: str = ""
    """How the default was chosen, unless it is a fixed rate."""
    asked_rate: float | None = None
    """Instead of the default: another entry of ``false_positive_rate``."""
    asked_ml: float | None = None
    """Instead of both: an entry of ``healthy.false_positive_ml``."""

    @property
    def threshold(self) -> float:
        """The score above which a voxel is part of the mask."""
        if self.asked_ml is not None and self.healthy is not None:
            place = self.healthy.false_positive_ml.index(self.asked_ml)
            return self.healthy.threshold[place]
        rate = self.default_rate if self.asked_rate is None else self.asked_rate
        return self.value[self.false_positive_rate.index(rate)]

    @property
    def voxel_rate(self) -> float | None:
        """The voxel rate that makes the mask; ``None`` if a volume was asked for."""
        if self.asked_ml is not None:
            return None
        return self.default_rate if self.asked_rate is None else self.asked_rate

    def asking(self, rate: float | None = None, ml: float | None = None) -> Thresholds:
        """The same, with the threshold for a stored rate or volume; without either, the default."""
        return replace(self, asked_rate=rate, asked_ml=ml)


@dataclass(frozen=True)
class Cohort:
    """What a model was trained on, without names or paths: counts, and a hash of the files."""

    fingerprint: str
    training_cases: int
    validation_cases: int
    training_slices: int
    left_out_slices: int
    """Slices of training cases that were not used, because a lesion is labelled on them."""
    unused_cases: int = 0
    """Cases of the cohort that are for testing, or in no split."""


@dataclass(frozen=True)
class ModelSpec:
    """Everything that a model folder says about its model.

    `to_json` and `read` are each other's inverse.
    """

    channels: tuple[str, ...]
    method: str = "dae"
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the method, as its own frozen dataclass defines them."""
    grid: Grid = Grid()
    scaling: Scaling = Scaling()
    score: Score = Score()
    training: Training | None = None
    crop: tuple[int, int, int, int] | None = None
    """Rows and columns (first, last + 1, first, last + 1) of the grid that the network sees;
    ``None``: all."""
    thresholds: Thresholds | None = None
    subset_thresholds: dict[str, Thresholds] = field(default_factory=dict)
    """For scans that have only some of the channels, named as ``flair+t2``."""
    cohort: Cohort | None = None
    versions: dict[str, str] = field(default_factory=dict)
    citation: str = CITATION
    data_licence: str = "unknown: ask the people who trained this model"
    format_version: int = FORMAT_VERSION

    def thresholds_for(self, channels: Sequence[str]) -> Thresholds | None:
        """The thresholds for scans with these channels, in the model's order, if it stores any."""
        if tuple(channels) == self.channels:
            return self.thresholds
        return self.subset_thresholds.get("+".join(channels))

    def to_json(self) -> str:
        """This specification as indented JSON."""
        import json

        return json.dumps(asdict(self), indent=2) + "\n"

    def checked(self) -> ModelSpec:
        """The same, as it would be read back.

        Raises `AnomriError` naming a value that would not be.
        """
        from pydantic import TypeAdapter, ValidationError

        try:
            return TypeAdapter(ModelSpec).validate_json(self.to_json())
        except ValidationError as error:
            raise AnomriError(_first_problem(error)) from error

    @classmethod
    def read(cls, path: Path) -> ModelSpec:
        """Read ``model.json``.

        Raises `AnomriError` that names the file and the entry that does not fit.
        """
        from pydantic import TypeAdapter, ValidationError

        try:
            text = path.read_bytes()
        except OSError as error:
            raise AnomriError(
                f"{path}: cannot read the model's description ({error.strerror})"
            ) from error
        try:
            return TypeAdapter(cls).validate_json(text)
        except ValidationError as error:
            raise AnomriError(
                f"{path}: not a model description of anomri: {_first_problem(error)}"
            ) from error


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    return f"{where}: {first['msg']} (found {first['input']!r:.60})"
