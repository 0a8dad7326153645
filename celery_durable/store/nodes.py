"""The running workers: their heartbeats, and which of them drain."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from .pool import Database
from .queries import Queries
from .rows import Beat


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What doesn't change about one incarnation of a worker."""

    id: UUID
    hostname: str
    pid: int
    lease: float


class Nodes:
    """Table ``node``."""

    def __init__(self, database: Database, schema: str) -> None:
        self._database = database
        self._sql = Queries("nodes.sql", schema)

    def beat(
        self,
        node: NodeFacts,
        *,
        active: Collection[str],
        accepted: Mapping[str, str],
        as_of: datetime | None,
        draining: bool,
        able: bool = True,
        patience: float,
    ) -> Beat:
        """Write a heartbeat. ``as_of`` is what an earlier one returned, before ``active`` was collected.

        ``able``: this node may be elected to sweep.
        """
        params = {
            "id": node.id,
            "hostname": node.hostname,
            "pid": node.pid,
            "lease": node.lease,
            "active": list(active),
            "accepted": json.dumps(dict(accepted)),
            "as_of": as_of,
            "draining": draining,
            "able": able,
        }
        (row,) = self._database.run(self._sql["beat"], params, patience=patience)
        return Beat(*row)

    def swept(self, sweeper: str, node_id: UUID | None, found: Mapping[str, int], *, patience: float) -> None:
        """Note that a sweep has ended, and what it has found."""
        params = {"sweeper": sweeper, "node": node_id, "found": json.dumps(dict(found))}
        self._database.run(self._sql["swept"], params, patience=patience)

    def leave(self, node_id: UUID, *, patience: float) -> None:
        """Remove a node that stops."""
        self._database.run(self._sql["leave"], {"id": node_id}, patience=patience)

    def forget(self, *, patience: float) -> int:
        """Remove the rows of nodes that are long gone; return how many."""
        return self._database.count(self._sql["forget"], {}, patience=patience)
