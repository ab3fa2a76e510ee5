"""Shards: jobs of a cluster that share a cohort without knowing of each other."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from anomri.errors import AnomriError
from anomri.runtime.folders import LOCK, sole_use
from anomri.runtime.processes import ProcessGroup


@dataclass(frozen=True)
class Shard:
    """One of ``count`` jobs that share a cohort; ``number`` counts from 1."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """A shard from text; raises `AnomriError` if it is not one.

        >>> Shard.parse("3/40")
        Shard(number=3, count=40)
        """
        found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
        if not found or not 1 <= int(found[1]) <= int(found[2]):
            raise AnomriError(
                f"--shard {text}: write it as 3/40, the third of forty; the first is 1/40."
            )
        return cls(int(found[1]), int(found[2]))

    @property
    def process(self) -> ProcessGroup:
        """The shard as one of so many processes, to take its part of a list."""
        return ProcessGroup(self.number - 1, self.count)

    @contextmanager
    def sole_use(self, folder: Path) -> Iterator[None]:
        """Keep out of ``folder`` all runs but the other shards; see `folders.sole_use`."""
        with sole_use(folder, f"{LOCK}-{self.number}-of-{self.count}"):
            yield
