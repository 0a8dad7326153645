"""What all contestants have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from tests.benchmarks.processes import PATIENCE, Process
from tests.benchmarks.stage import Stage


class Contestant:
    """One of those that take turns; what it keeps is in a database of its own."""

    name: ClassVar[str]
    #: The modules without which it is left out.
    needs: ClassVar[tuple[str, ...]] = ()
    #: Forgets what the turns have left.
    emptying: ClassVar[str] = ""

    process: Process | None = None

    def __init__(self, stage: Stage, concurrency: int) -> None:
        self.stage, self.concurrency = stage, concurrency
        self.database = stage.database(self.name)

    def start(self) -> None:
        """Start what it runs on."""

    def warm_up(self) -> None:
        """Return once it works."""

    def ask_to_end(self) -> None:
        """Begin to stop."""
        if self.process is not None:
            self.process.ask_to_end()

    def stop(self) -> None:
        """End its processes; those of a quick run needn't say goodbye."""
        if self.process is not None:
            self.process.stop(self.stage.size(PATIENCE, 0))

    def empty(self) -> None:
        """Forget what the turns have left."""
        if self.emptying:
            self.stage.execute(self.emptying, database=self.database)

    def rows(self, query: str, params: Any = None) -> list[tuple[Any, ...]]:
        """Return what a query finds in its database."""
        return self.stage.rows(query, params, database=self.database)
