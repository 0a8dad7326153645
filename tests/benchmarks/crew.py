"""Who is on the stage: contestants are started when a measure first needs them, and kept while the next one does."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any

from tests.benchmarks.contestants import ALL
from tests.benchmarks.contestants.contestant import Contestant
from tests.benchmarks.stage import Stage


def lacking(kind: type[Contestant]) -> list[str]:
    """Return the modules for want of which a contestant is left out."""
    return [name for name in kind.needs if find_spec(name) is None]


def absent() -> dict[str, str]:
    """Return who is left out, and for want of what."""
    return {kind.name: ", ".join(lacking(kind)) for kind in ALL if lacking(kind)}


class Crew:
    """The contestants that run; nobody else does while a measure is taken."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._present: dict[str, Contestant] = {}

    def call(self, concurrency: int, *kinds: type[Contestant], fresh: bool = False) -> list[Any]:
        """Return those of them that are installed, running and warm; with ``fresh`` they have done nothing before."""
        wanted = [kind for kind in kinds if not lacking(kind)]
        names = {kind.name for kind in wanted}
        self._dismiss(
            each
            for each in self._present.values()
            if fresh or each.name not in names or each.concurrency != concurrency
        )
        self._start(kind(self._stage, concurrency) for kind in wanted if kind.name not in self._present)
        return [self._present[kind.name] for kind in wanted]

    def close(self) -> None:
        """Dismiss all."""
        self._dismiss(self._present.values())

    def _start(self, starting: Iterable[Contestant]) -> None:
        new = list(starting)
        for contestant in new:
            self._present[contestant.name] = contestant
            contestant.start()
        for contestant in new:
            contestant.warm_up()

    def _dismiss(self, leaving: Iterable[Contestant]) -> None:
        gone = list(leaving)
        for contestant in gone:
            contestant.ask_to_end()
        for contestant in gone:
            contestant.stop()
            del self._present[contestant.name]
