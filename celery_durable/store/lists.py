"""What there is, seen from outside: lists, counts, what has become of one workflow, how all of it stands."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from .. import states
from .checkpoints import ANY_SIZE
from .pool import Database
from .queries import Queries
from .rows import AttemptRow, NodeRow, Standings, SweepRow, WorkflowRow


@dataclass(frozen=True, slots=True)
class Filters:
    """Which workflows are meant: those that fit all that isn't None."""

    states: Collection[str] | None = None
    id: str | None = None
    names: Collection[str] | None = None
    queue: str | None = None
    parent_id: str | None = None
    root_id: str | None = None
    forked_from: str | None = None
    #: A part of the beginning of its error.
    error: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None


class Lists:
    """Reads of all tables. Their plans are made for their very parameters."""

    def __init__(self, database: Database, schema: str) -> None:
        self._database = database
        self._sql = Queries("lists.sql", schema)

    def matching(
        self,
        filters: Filters,
        *,
        after: tuple[datetime, str] | None,
        limit: int,
        most: int | None,
        patience: float,
    ) -> list[WorkflowRow]:
        """Return the newest workflows that fit, after one of that time and id, without values larger than ``most``."""
        wanted = filters.states
        ended = wanted is not None and states.FINAL.issuperset(wanted)
        after_at, after_id = after or (None, None)
        params = {
            **_params(filters), "ended": ended, "after_at": after_at, "after_id": after_id, "limit": limit,
            "most": ANY_SIZE if most is None else most,
        }  # fmt: skip
        return [WorkflowRow.of(row) for row in self._read("matching", patience, **params)]

    def count(self, filters: Filters, *, most: int, patience: float) -> dict[str, int]:
        """Return how many workflows of each state fit, counted no further than ``most``."""
        wanted = states.ALL if filters.states is None else filters.states
        return {state: self._count(state, filters, most, patience) for state in sorted(wanted)}

    def _count(self, state: str, filters: Filters, most: int, patience: float) -> int:
        params = {**_params(filters), "state": state, "ended": state in states.FINAL, "most": most}
        ((number,),) = self._read("count", patience, **params)
        return int(number)

    def names(self, *, patience: float) -> list[str]:
        """Return the names of the tasks that have workflows."""
        return [name for (name,) in self._read("names", patience)]

    def attempts(self, workflow_id: str, *, patience: float) -> list[AttemptRow]:
        """Return the attempts of a workflow that have ended otherwise than with it."""
        return [AttemptRow(*row) for row in self._read("attempts", patience, id=workflow_id)]

    def nodes(self, *, patience: float) -> list[NodeRow]:
        """Return the workers' main processes."""
        return [NodeRow(*row) for row in self._read("nodes", patience)]

    def sweeps(self, *, patience: float) -> list[SweepRow]:
        """Return the last sweep of each kind of sweeper, the latest one first."""
        return [SweepRow(*row) for row in self._read("sweeps", patience)]

    def standings(self, *, lease: float, most: int, patience: float) -> Standings:
        """Return how all of it stands, counted no further than ``most``."""
        (row,) = self._read("standings", patience, lease=lease, most=most)
        return Standings(*row)

    def live(self, *, most: int, patience: float) -> list[tuple[str, str, int]]:
        """Return state, task and number of the workflows that haven't ended, of each state counted up to ``most``."""
        return self._read("live", patience, most=most)

    def _read(self, query: str, patience: float, **params: Any) -> list[tuple[Any, ...]]:
        return self._database.read(self._sql[query], params, patience=patience)


def _params(filters: Filters) -> dict[str, Any]:
    params = asdict(filters)
    return {
        name: sorted(value) if name in ("states", "names") and value is not None else value
        for name, value in params.items()
    }
