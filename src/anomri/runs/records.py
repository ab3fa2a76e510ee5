"""What a run over many cases leaves of each one, so that it can be killed, shared out, and gone on with."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from anomri.errors import AnomriError
from anomri.files import output_folder, write_text
from anomri.runtime.folders import LOCK, sole_use
from anomri.scans.case import Case
from anomri.scans.names import may_name_files

PLAN = "plan"
"""No case's record is called so: those end in ``.json``."""
RESERVED = ("run", "metrics")
"""Files of a run that end in ``.json`` as those of cases do."""


@dataclass(frozen=True)
class Shard:
    """One of ``count`` jobs of a cluster that share a cohort without knowing of each other; ``number`` is from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str | None) -> Shard | None:
        """``3/40`` as a shard; raises `AnomriError` for what is none."""
        if text is None:
            return None
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise AnomriError(
                f"--shard {text}: write it as 3/40, the third of forty; the first is 1/40."
            )
        return cls(int(found[1]), int(found[2]))

    @contextmanager
    def sole_use(self, folder: Path) -> Iterator[None]:
        """As `files.sole_use`, but other shards may write to the same folder."""
        with sole_use(folder, f"{LOCK}-{self.number}-of-{self.count}"):
            yield


@dataclass(frozen=True)
class Records:
    """A record (JSON) a case in ``folder``, written when all else of the case is; and the plan of the whole run.

    A record counts only with the key that its case has in ``keys``: a hash of the case's files, the model and the
    settings. What was done with others is done again.
    """

    folder: Path
    keys: dict[str, str]
    facts: dict[str, Any]

    @classmethod
    def begin(cls, folder: Path, keys: dict[str, str], facts: dict[str, Any]) -> Records:
        """Note the plan of a run; of the same one under way, the ``facts`` noted first stay."""
        try:
            before = cls.open(output_folder(folder))
            if before.keys == keys:
                return before
        except AnomriError:
            pass
        write_text(folder / PLAN, json.dumps({"keys": keys, "facts": facts}))
        return cls(folder, keys, facts)

    @property
    def fingerprint(self) -> str:
        """A hash of all keys: another one is another run."""
        return _hash(self.keys)

    @classmethod
    def open(cls, folder: Path) -> Records:
        """The plan that `begin` noted; raises `AnomriError` if there is none."""
        try:
            content = json.loads((folder / PLAN).read_text(encoding="utf-8"))
            return cls(folder, dict(content["keys"]), dict(content["facts"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise AnomriError(
                f"{folder}: holds no plan of a run; begin one with `anomri detect` or `evaluate`."
            ) from error

    def load(self, case: str) -> dict[str, Any] | None:
        """What was noted of a case; ``None`` if there is nothing that counts."""
        try:
            record = json.loads(self._path(case).read_text(encoding="utf-8"))
            return dict(record) if record["key"] == self.keys[case] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, case: str, facts: Mapping[str, Any]) -> None:
        """Note that a case is done; the last that is written of it."""
        write_text(self._path(case), json.dumps({"key": self.keys[case], **facts}, indent=2) + "\n")

    def all(self) -> list[dict[str, Any]]:
        """The records of all cases, in the plan's order; raises `AnomriError` naming those that are missing."""
        records = {case: self.load(case) for case in self.keys}
        missing = [case for case, record in records.items() if record is None]
        if missing:
            some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise AnomriError(
                f"{self.folder.parent}: {len(missing)} of {len(records)} cases are not done ({some}). Give the command "
                f"of their shards again, or the same command without --shard, which does all that is left."
            )
        return [record for record in records.values() if record is not None]

    def _path(self, case: str) -> Path:
        return self.folder / f"{case}.json"


def origin_of(case: Case) -> dict[str, Any]:
    """What tells a scan from another of the same name: hashes of its images' places and of the first one's content."""
    try:
        return {"places": _places_of(case), "content": _content_of(case)}
    except OSError:  # it is gone meanwhile
        return {}


def check_same_scans(folder: Path, cases: Sequence[Case]) -> None:
    """Raise `AnomriError` if a record in ``folder`` says that it is of another scan than the case of that name.

    Names as ``pre`` or ``baseline`` are those of many patients' folders. A scan that was moved, or made anew in its
    place, is the same.
    """
    for case in cases:
        try:
            origin = json.loads((folder / f"{case.name}.json").read_text(encoding="utf-8"))[
                "origin"
            ]
            # Most lie where they lay, and are not read for this.
            same = not {*origin["places"]}.isdisjoint(_places_of(case)) or origin[
                "content"
            ] == _content_of(case)
        except (OSError, ValueError, KeyError, TypeError, StopIteration):
            continue
        if not same:
            raise AnomriError(
                f"{folder.parent}: holds the results of another scan that is called {case.name} too, and those of "
                f"{next(iter(case.channels.values()))} would replace them; name another folder with -o, or list the scans in a "
                f".tsv with names of their own."
            )


def keys_of(cases: Sequence[Case], channels: Sequence[str], *settings: object) -> dict[str, str]:
    """The key of each case: a hash of whose it is, where its files lie, their sizes and times, and the settings (JSON)."""
    for case in cases:
        if not may_name_files(case.name) or case.name in RESERVED:
            raise AnomriError(
                f"a case is called {case.name!r}, which is no name for its files; rename it."
            )
    common = json.dumps([_code(), list(channels), *settings], default=str)
    return {name: _hash(common, files) for name, files in files_of(cases, channels).items()}


def files_of(cases: Sequence[Case], channels: Sequence[str]) -> dict[str, str]:
    """A hash of whose each case is, where its files lie, their sizes and times."""
    return {
        case.name: _hash(case.patient, [_stat(path) for path in _sources(case, channels)])
        for case in cases
    }


@cache
def _code() -> str:
    """A SHA-256 of this package's own code: what another version found is found again."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _sources(case: Case, channels: Sequence[str]) -> list[Path | None]:
    return [*(case.channels.get(channel) for channel in channels), case.mask, case.label]


def _places_of(case: Case) -> list[str]:
    # Links are not followed: where a tool stores contents by their hash, another place says nothing.
    return [_hash(str(path.absolute())) for path in case.channels.values()]


def _content_of(case: Case) -> str:
    return hashlib.sha256(next(iter(case.channels.values())).read_bytes()).hexdigest()[:24]


def _stat(path: Path | None) -> list[object] | None:
    try:
        return path and [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns]  # type: ignore[return-value]
    except OSError:
        return [str(path)]


def _hash(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
