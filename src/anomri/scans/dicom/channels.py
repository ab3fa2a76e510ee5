"""Which channel an MR series is, from what its headers say about it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from anomri.scans.dicom.weighting import GRADIENT_ECHO, SPIN_ECHO, UNKNOWN, weighting

# Images other than T1, T2 or FLAIR of the whole brain, and words that leave open which one it is.
_OTHER = re.compile(
    r"(?<![a-z0-9])(?:dwi|adc|dti|swi|swan|asl|dsc|dce|dyn|mra|mrv|tof|bold|fmri|m?mip|minip|phase|"
    r"pha|(?:t[12])?map(?:ping)?|scout|survey|locali[sz]er|sub|stir|dir|pd|mp2rage|t1rho|"
    r"spine|neck|orbits?|fieldmap)(?![a-z0-9])|"
    r"t2[ _-]?(?:\*|star)|perfusion|diffusion|subtract|angio"
)
# Words of images whose weighting their times do not say.
_NOT_BY_TIMES = re.compile(
    r"(?<![a-z0-9])(?:3[ _-]?pl|loc(?![a-z])|cal(?![a-z])|calib|b[ _=-]?\d|perf|cb[fv]|mtt|ttp|tmax|"
    r"trace|e?adc|fa(?![a-z])|ciss|fiesta|drive|b-?ssfp|true ?fisp|spectro|svs|press(?![a-z])|csi|"
    r"mrs(?![a-z])|field|task|rest|func|ep2d|epi(?![a-z])|mtc?(?![a-z])|psir|ir(?![a-z])|ph(?![a-z])|"
    r"coll?ateral|phlebo|veno|arterial|carotid|cow(?![a-z])|pc(?:3d|2d|a)?(?![a-z])|flow|csf|merge|"
    r"medic|gre|hemo|heme|fl[23]d|ffe|test|phantom|knee|shoulder|breast|heart|liver|pelvis|hip|"
    r"lumbar|cervical|thoracic|[clt]-?spine)"
)
_FLAIR = re.compile(r"flair|tirm|dark[ _-]?fl|da-fl")
# Philips writes a letter before the weighting, as in sT2/TSE/T and eT1.
_T1 = re.compile(r"(?<![a-z0-9])[es]?t1(?!\d)|mp[ _-]?rage|bravo|spgr")
_T2 = re.compile(r"(?<![a-z0-9])[es]?t2(?!\d)")
_AGENT = r"(?:gd|gad\w*|contrast|km)(?![a-z])"
_WITH_AGENT = re.compile(
    rf"(?<![a-z])(?:ce(?![a-z])|(?:post)?{_AGENT})|post(?![a-z0-9]|[ _-]?op)|"
    r"t1[ _-]?(?:ce|c|gd|km)(?![a-z])|\+ ?c\b|c\+"
)
_WITHOUT_AGENT = re.compile(
    rf"(?<![a-z])(?:(?:pre(?![a-z0-9]|[ _-]?op)|native?(?![a-z])|without|w/?o(?![a-z]))"
    rf"(?:[ _-]*(?:{_AGENT}|c\b))?|"
    rf"(?:non?|pre)[ _-]*{_AGENT})|(?<![a-z0-9])(?:-c\b|c-(?!\w))"
)
_EITHER = re.compile(
    r"(?<![a-z0-9])w(?:ith)?[ _]*(?:/|&|\+|and)?[ _]*w(?:/?o|ithout)(?![a-z])|t1-c\b"
)
_NO_AGENT = {"no", "none", "n", "no contrast", "without", "nil", "0"}


@dataclass(frozen=True)
class Series:
    """The headers of one MR series, without anything about the patient; times in ms."""

    uid: str
    study: str
    description: str
    protocol: str
    modality: str
    files: tuple[Path, ...]
    frames: int = 0
    """The number of slices if all are in one file (enhanced MR), else 0."""
    agent: str | None = None
    """The contrast agent; ``None`` if the headers do not mention one."""
    echo_time: float | None = None
    inversion_time: float | None = None
    repetition_time: float | None = None
    gradient_echo: bool = False
    spin_echo: bool = False
    other_contrast: str = ""
    """Why its times do not say its weighting, if they do not (see `weighting.other_contrast`)."""
    doubt: str = ""
    """From what its channel was guessed if its name does not say it, or what contradicts it."""
    frame: str = ""
    """The FrameOfReferenceUID: coordinates are comparable between series that share it."""

    @property
    def times(self) -> str:
        """The times that decide on the weighting, in words."""
        named = {"echo": self.echo_time, "repetition": self.repetition_time}
        words = [
            f"no {name} time" if time is None else f"{name} time {time:g} ms"
            for name, time in named.items()
        ]
        inversion = f"inversion time {self.inversion_time:g} ms" if self.inversion_time else ""
        return ", ".join([*words, inversion or "no inversion"])

    @property
    def slices(self) -> int:
        """The number of slices: one a file, or all in one."""
        return self.frames or len(self.files)

    @property
    def slice_names(self) -> list[str]:
        """What each slice is called in messages."""
        if self.frames:
            return [
                f"frame {number} of {self.files[0].name}" for number in range(1, self.frames + 1)
            ]
        return [path.name for path in self.files]

    @property
    def place(self) -> str:
        """The folder and the series, for messages."""
        return f"{self.files[0].parent}, series {self}"

    def __str__(self) -> str:
        return f"{self.description or 'without description'!r} ({self.slices} slices, {self.uid})"


@dataclass(frozen=True)
class Guess:
    """Which channel a series probably is, and what the user should know about that."""

    channel: str | None
    note: str = ""
    """From what it was guessed if not from its name, what contradicts it, or why it is unknown."""
    by_name: bool = True


def guess_channel(series: Series) -> str | None:
    """The likely channel of a series: ``flair``, ``t1``, ``t1ce`` or ``t2``; ``None`` if unsure.

    See `explain_guess`.
    """
    return explain_guess(series).channel


def explain_guess(series: Series) -> Guess:
    """Which channel a series is by its name or, if that says nothing, by its times.

    The words of SeriesDescription (ProtocolName if it is empty) must name exactly one weighting,
    and no other kind of image (diffusion, T2*, angiography, ...). The other headers can only
    contradict: T1 has an echo time of at most 30 ms, T2 and FLAIR of at least 60 ms; FLAIR inverts
    at 1400 ms or later and T2 not at all; a T2 from gradient echoes is a T2*. A T1 is ``t1ce`` if
    its words or ContrastBolusAgent name a contrast agent, and ``None`` if they disagree. If neither
    mentions one it is ``t1``; two such series in a study are an error of `choose_series`.

    A name without any such word leaves the choice to the times (see `weighting.weighting`).
    """
    # Not both: on some scanners ProtocolName is that of the whole examination, with all weightings.
    text = (series.description or series.protocol).lower()
    if not _says_something(text):
        return _guess_by_times(series, text)
    channel = _guess_by_name(series, text)
    measured = _weighting(series)
    if channel is None:
        is_other = _OTHER.search(text) or not measured
        contradiction = f"its name and its times ({series.times}) do not name one and the same"
        return Guess(None, "" if is_other else contradiction)
    # Some scanners do not say that a FLAIR has an inversion.
    may_be_inverted = channel == "flair" and series.inversion_time is None
    if measured and measured != channel.removesuffix("ce") and not may_be_inverted:
        return Guess(
            channel,
            f"taken for {channel} by its name, but it has the times of {measured} "
            f"({series.times}); check it",
        )
    return Guess(channel)


def _says_something(text: str) -> bool:
    return any(words.search(text) for words in (_OTHER, _FLAIR, _T1, _T2))


def _weighting(series: Series) -> str | None:
    if series.other_contrast:
        return None
    sequence = UNKNOWN
    if series.gradient_echo != series.spin_echo:
        sequence = GRADIENT_ECHO if series.gradient_echo else SPIN_ECHO
    return weighting(series.echo_time, series.repetition_time, series.inversion_time, sequence)


def _guess_by_times(series: Series, text: str) -> Guess:
    """The channel of a series whose name says nothing."""
    channel = _weighting(series)
    if series.other_contrast:
        return Guess(None, f"its name does not say it, and {series.other_contrast}", by_name=False)
    protocol = series.protocol.lower()
    if _NOT_BY_TIMES.search(text) or _OTHER.search(protocol) or _NOT_BY_TIMES.search(protocol):
        return Guess(None, "its name is not that of a T1, T2 or FLAIR", by_name=False)
    if channel is None:
        return Guess(
            None,
            f"its name does not say it, and its times are of none ({series.times})",
            by_name=False,
        )
    by_protocol = _guess_by_name(series, protocol) if _says_something(protocol) else channel
    if by_protocol is None or by_protocol.removesuffix("ce") != channel:
        return Guess(
            None,
            f"its protocol and its times ({series.times}) contradict each other",
            by_name=False,
        )
    if channel == "t1":
        channel = _t1_or_t1ce(series, f"{text} {protocol}")
        if channel is None:
            return Guess(None, "it is a T1, but with or without contrast agent?", by_name=False)
    agent = ", a contrast agent" if channel == "t1ce" else ""
    return Guess(channel, f"guessed from its {series.times}{agent}", by_name=False)


def _guess_by_name(series: Series, text: str) -> str | None:
    if _OTHER.search(text):
        return None
    echo, inversion = series.echo_time, series.inversion_time
    if _T1.search(text):
        if _FLAIR.search(text) or _T2.search(text) or (echo is not None and echo > 30):
            return None
        return _t1_or_t1ce(series, text)
    if echo is not None and echo < 60:
        return None
    if _FLAIR.search(text):
        return None if inversion is not None and 0 < inversion < 1400 else "flair"
    if _T2.search(text) and not inversion and not series.gradient_echo:
        return "t2"
    return None


def _t1_or_t1ce(series: Series, text: str) -> str | None:
    if _EITHER.search(text):
        return None
    says_with = bool(_WITH_AGENT.search(_WITHOUT_AGENT.sub(" ", text)))
    says_without = bool(_WITHOUT_AGENT.search(text))
    # Many scanners leave the tag empty even if an agent was given; only a value counts.
    if series.agent:
        given = series.agent.lower() not in _NO_AGENT
        says_with |= given
        says_without |= not given
    if says_with and says_without:
        return None
    return "t1ce" if says_with else "t1"
