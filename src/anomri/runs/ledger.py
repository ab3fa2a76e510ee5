"""The ledger of a run: what was done with which case, so that a run can be killed, shared out
and resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from anomri.errors import AnomriError
from anomri.files import output_folder, read_json, write_text
from anomri.runs.identity import ScanIdentity, are_same, store_scans
from anomri.scans.case import Case

PLAN = "plan"
"""The file with the plan of a run; entries of cases end in ``.json``."""
STARTED = "started"
"""The fact of a plan that says when the run began, in seconds since the epoch."""
EXTRA_OUTPUTS = ("reconstruction",)
"""Settings that only add files: a result with more files serves a run that asks for fewer."""
DAMAGED = (AnomriError, KeyError, TypeError, AttributeError)
"""What reading a stored plan or entry raises if its content is not what was written."""


@dataclass(frozen=True)
class Task:
    """All that a case's result depends on besides its scan: the model and the settings, and who
    computed it."""

    model: str
    settings: dict[str, Any]
    version: str = field(default_factory=lambda: version("anomri"))

    def to_json(self) -> dict[str, Any]:
        """What is stored of it; settings that JSON has no type for become text."""
        stored: dict[str, Any] = json.loads(json.dumps(asdict(self), default=str))
        return stored

    def differences(self, stored: Mapping[str, Any]) -> list[str]:
        """What differs in a stored task, in words, as ``sensitivity: default -> high``.

        >>> before = Task("m", {"sensitivity": "default", "channels": ["flair"]}).to_json()
        >>> Task("m", {"sensitivity": "high", "channels": ["flair"]}).differences(before)
        ['sensitivity: default -> high']
        """
        now = self.to_json()
        if stored == now:
            return []
        found = []
        if stored.get("version") != now["version"]:
            found.append(f"version of anomri: {stored.get('version')} -> {now['version']}")
        if stored.get("model") != now["model"]:
            found.append("another model")
        before, after = stored.get("settings") or {}, now["settings"]
        for name in dict.fromkeys([*before, *after]):
            if name in EXTRA_OUTPUTS and before.get(name) and after.get(name) is False:
                continue
            if before.get(name) != after.get(name):
                found.append(f"{name}: {_words(before.get(name))} -> {_words(after.get(name))}")
        return found

    def is_served_by(self, stored: Mapping[str, Any]) -> bool:
        """Whether a result of the ``stored`` task is one of this task too, with more files or not.

        >>> before = Task("m", {"reconstruction": True}).to_json()
        >>> Task("m", {"reconstruction": False}).is_served_by(before)
        True
        >>> Task("n", {"reconstruction": False}).is_served_by(before)
        False
        """
        now = self.to_json()
        for name in EXTRA_OUTPUTS:
            if stored["settings"].get(name) and now["settings"].get(name) is False:
                now["settings"][name] = stored["settings"][name]
        return bool(stored == now)


@dataclass(frozen=True)
class Ledger:
    """An entry (JSON) for every finished or failed case of a run, and the run's plan, in
    ``folder``.

    An entry is written after all other files of its case. It counts if it has the run's ``task``
    and its scan is the one in ``scans``; what was done with others is done again. Files that an
    entry names lie in ``root``. ``facts`` are noted with the plan.
    """

    root: Path
    folder: Path
    task: Task
    scans: dict[str, ScanIdentity]
    facts: dict[str, Any] = field(default_factory=dict)

    def begin(self) -> Ledger:
        """Write the plan; a run that goes on keeps the time at which it was started."""
        output_folder(self.folder)
        facts = self.facts | self._facts_to_keep()
        scans = {name: scan.to_json() for name, scan in self.scans.items()}
        plan = {"task": self.task.to_json(), "scans": scans, "facts": facts}
        write_text(self.folder / PLAN, json.dumps(plan))
        return replace(self, facts=facts)

    def _facts_to_keep(self) -> dict[str, Any]:
        """When the same run began, if it is under way."""
        try:
            before = Ledger.open(self.root, self.folder)
        except AnomriError:
            return {}
        if before.task.to_json() != self.task.to_json() or list(before.scans) != list(self.scans):
            return {}
        return {name: before.facts[name] for name in (STARTED,) if name in before.facts}

    @classmethod
    def open(cls, root: Path, folder: Path) -> Ledger:
        """The ledger whose plan `begin` wrote; raises `AnomriError` if there is none."""
        try:
            plan = read_json(folder / PLAN)
            scans = {name: ScanIdentity.from_json(scan) for name, scan in plan["scans"].items()}
            return cls(root, folder, Task(**plan["task"]), scans, dict(plan["facts"]))
        except DAMAGED as error:
            raise AnomriError(
                f"{folder}: holds no plan of a run; begin one with `anomri detect` or `anomri evaluate`."
            ) from error

    def load(self, case: str) -> dict[str, Any] | None:
        """The entry of a case, finished or failed; ``None`` if there is none that counts."""
        entry = self.same_scan(case)
        try:
            return entry if entry and self.task.is_served_by(entry["task"]) else None
        except DAMAGED:
            return None

    def same_scan(self, case: str) -> dict[str, Any] | None:
        """The entry of a case whose scan is the same, whatever its task; ``None`` if there is
        none."""
        entry = self.stored(case)
        try:
            if entry is None:
                return None
            scan = ScanIdentity.from_json(entry["identity"])
            return entry if scan.is_same(self.scans[case]) else None
        except DAMAGED:
            return None

    def forget(self, case: str) -> None:
        """Remove a case's entry: from now on its files are those of no finished run."""
        self._path(case).unlink(missing_ok=True)

    def finished(self, case: str) -> dict[str, Any] | None:
        """The entry of a case that did not fail and whose files are all there."""
        entry = self.load(case)
        if entry is None or entry.get("error"):
            return None
        if not all((self.root / name).is_file() for name in entry.get("files", ())):
            return None
        if ScanIdentity.from_json(entry["identity"]).without_content() != self.scans[case]:
            # The same bytes in files that were moved or touched: noted, so that they are not read
            # again.
            self.save(case, entry)
        return entry

    def save(self, case: str, facts: Mapping[str, Any]) -> None:
        """Write a case's entry: that it is done, or has failed (``error``), and its ``files`` in
        ``root``."""
        scan = self.scans[case].with_content().to_json()
        entry = {"task": self.task.to_json(), **facts, "identity": scan}
        write_text(self._path(case), json.dumps(entry, indent=2) + "\n")

    def entries(self) -> list[dict[str, Any]]:
        """The entries of all cases in the plan's order; raises `AnomriError` naming those that
        are missing."""
        entries = {case: self.load(case) for case in self.scans}
        missing = [case for case, entry in entries.items() if entry is None]
        if missing:
            some = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
            raise AnomriError(
                f"{self.root}: {len(missing)} of {len(entries)} cases are not done ({some}). Give the "
                f"command of their shards again, or the same command without --shard, which does all "
                f"that is left."
            )
        return [entry for entry in entries.values() if entry is not None]

    def refuse_other_scans(self, cases: Sequence[Case]) -> None:
        """Raise `AnomriError` if the ledger has results of another scan with the name of one of the
        ``cases``.

        Names such as ``pre`` or ``baseline`` occur in the folders of many patients. A scan that was
        moved, or made anew in its place, is the same.
        """
        for case in cases:
            entry = self.stored(case.name)
            try:
                if entry is None or entry["error"]:
                    continue
                same = ScanIdentity.from_json(entry["identity"]).is_in_place_of(
                    self.scans[case.name]
                )
            except DAMAGED:
                continue
            if not same:
                raise AnomriError(
                    f"{self.root}: holds the results of another scan that is called {case.name} too, "
                    f"and those of {next(iter(case.channels.values()))} would overwrite them; choose "
                    f"another folder with -o, or list the scans in a .tsv with names of their own."
                )

    def refuse_changes(self, cases: Sequence[Case], cost: str = "") -> None:
        """Raise `AnomriError` if results of the ``cases`` with other settings would be lost.

        ``cost`` is a sentence on what it takes to make them again.
        """
        changes, count = self.changes(cases)
        if count:
            results = f"the results of {count} finished case{'s'[: count > 1]}"
            refuse_loss(self.root, changes, results, cost)

    def changes(self, cases: Sequence[Case]) -> tuple[list[str], int]:
        """How earlier results of the ``cases`` differ in their task, and how many they are."""
        found: list[str] = []
        count = 0
        for case in cases:
            entry = self.stored(case.name)
            if entry is None or entry.get("error") or not isinstance(entry.get("task"), dict):
                continue
            served = self.task.is_served_by(entry["task"])
            differences = [] if served else self.task.differences(entry["task"])
            found += differences
            count += bool(differences)
        return list(dict.fromkeys(found)), count

    def is_of(self, stored: Mapping[str, Any]) -> bool:
        """Whether ``stored``, from `summary`, is of this task and these scans."""
        return stored.get("task") == self.task.to_json() and are_same(
            stored.get("scans"), self.scans
        )

    def summary(self) -> dict[str, Any]:
        """The task and the scans as `is_of` compares them, for a result of the whole run."""
        return {"task": self.task.to_json(), "scans": store_scans(self.scans)}

    def stored(self, case: str) -> dict[str, Any] | None:
        """The entry of a case, whatever it is of; ``None`` if there is none."""
        try:
            return read_json(self._path(case))
        except AnomriError:
            return None

    def _path(self, case: str) -> Path:
        return self.folder / f"{case}.json"


def refuse_loss(folder: Path, changes: Sequence[str], results: str, cost: str = "") -> None:
    """Raise `AnomriError`: a run with other settings would replace ``results``, without consent."""
    raise AnomriError(
        f"{folder}: settings differ from those of the earlier run ({'; '.join(changes)}), and "
        f"{results} would be overwritten; add --overwrite to replace them, or choose another "
        f"folder with -o.{' ' * bool(cost)}{cost}"
    )


def _words(value: object) -> str:
    if value is None:
        return "default"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, list | tuple):
        return ",".join(str(one) for one in value)
    return str(value)
