"""Which channel an MR series is, from what its headers say about it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

# Images other than T1, T2 or FLAIR of the whole brain, and words that leave open which one it is.
_OTHER = re.compile(
    r"(?<![a-z0-9])(?:dwi|adc|dti|swi|swan|asl|dsc|dce|dyn|mra|mrv|tof|bold|fmri|m?mip|minip|phase|"
    r"pha|(?:t[12])?map(?:ping)?|scout|survey|locali[sz]er|sub|stir|dir|pd|mp2rage|t1rho|"
    r"spine|neck|orbits?|fieldmap)(?![a-z0-9])|"
    r"t2[ _-]?(?:\*|star)|perfusion|diffusion|subtract|angio"
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
    agent: str | None = None
    """The contrast agent; ``None`` if the headers do not mention one."""
    echo_time: float | None = None
    inversion_time: float | None = None
    gradient_echo: bool = False
    frame: str = ""
    """The FrameOfReferenceUID: coordinates are comparable between series that share it."""

    @property
    def slices(self) -> int:
        """The number of slices, one a file."""
        return len(self.files)

    @property
    def place(self) -> str:
        """The folder and the series, for messages."""
        return f"{self.files[0].parent}, series {self}"

    def __str__(self) -> str:
        return f"{self.description or 'without description'!r} ({self.slices} slices, {self.uid})"


def guess_channel(series: Series) -> str | None:
    """The likely channel of a series: ``flair``, ``t1``, ``t1ce`` or ``t2``; ``None`` if unsure.

    The words of SeriesDescription (ProtocolName if it is empty) must name exactly one weighting,
    and no other kind of image (diffusion, T2*, angiography, ...). The other headers can only
    contradict: T1 has an echo time of at most 30 ms, T2 and FLAIR of at least 60 ms; FLAIR inverts
    at 1400 ms or later and T2 not at all; a T2 from gradient echoes is a T2*. A T1 is ``t1ce`` if
    its words or ContrastBolusAgent name a contrast agent, and ``None`` if they disagree. If neither
    mentions one it is ``t1``; two such series in a study are an error of `choose_series`.
    """
    # Not both: on some scanners ProtocolName is that of the whole examination, with all weightings.
    text = (series.description or series.protocol).lower()
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
