"""The only room that speaks Postgres: one module and one ``.sql`` file a table, each transition one statement."""

from __future__ import annotations

from .awaits import Awaits
from .checkpoints import Checkpoints, StepRecord
from .events import Events
from .guest import Guest, Listener
from .messages import Letter, Messages
from .migrate import checker
from .nodes import NodeFacts, Nodes
from .pool import Connections, Database, lent, pooled, single, where
from .transaction import Conflict
from .workflows import Birth, Fork, Workflows

__all__ = ["Birth", "Conflict", "Fork", "Guest", "Letter", "Listener", "NodeFacts", "StepRecord", "Store", "check_url"]


class Store:
    """All tables of one schema, through one source of connections."""

    def __init__(
        self,
        connections: Connections,
        url: str,
        schema: str,
        *,
        auto_migrate: bool,
        lent: Connections | None = None,
    ) -> None:
        database = Database(connections, where(url), checker(schema, auto_migrate=auto_migrate), lent)
        self._database = database
        self.workflows = Workflows(database, schema)
        self.checkpoints = Checkpoints(database, schema)
        self.nodes = Nodes(database, schema)
        self.messages = Messages(database, schema)
        self.events = Events(database, schema)
        self.awaits = Awaits(database, schema)

    @classmethod
    def shared(cls, url: str, schema: str, *, auto_migrate: bool, lease: float, pgbouncer: bool) -> Store:
        """Return the store for tasks and callers: a lazy pool in each process, and another one for their own use."""
        where(url)
        connections, apart = (make(url, lease=lease, pgbouncer=pgbouncer) for make in (pooled, lent))
        return cls(connections, url, schema, auto_migrate=auto_migrate, lent=apart)

    @classmethod
    def of_one_thread(cls, url: str, schema: str, *, auto_migrate: bool, lease: float, pgbouncer: bool) -> Store:
        """Return a store with a single connection, for a thread that must not wait for others."""
        where(url)
        return cls(single(url, lease=lease, pgbouncer=pgbouncer), url, schema, auto_migrate=auto_migrate)

    def close(self) -> None:
        """Close all connections of this process."""
        self._database.close()


def check_url(url: str) -> None:
    """Raise ConfigurationError if this can't be a Postgres connection URL."""
    where(url)
