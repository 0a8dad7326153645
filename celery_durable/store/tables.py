"""All tables of one schema, through one source of connections."""

from __future__ import annotations

from typing import Any

from .awaits import Awaits
from .checkpoints import Checkpoints
from .connecting import Url, where
from .events import Events
from .host import IDENTITY, Place, identity
from .lists import Lists
from .markers import Markers
from .messages import Messages
from .migrate import checker
from .nodes import Nodes
from .online import Building, build
from .pool import Connections, Database, lent, pooled, single
from .workflows import Workflows


class Store:
    """What is kept in one schema, and who of its tables reads and writes it."""

    def __init__(
        self,
        connections: Connections,
        url: Url,
        schema: str,
        *,
        auto_migrate: bool,
        lent: Connections | None = None,
    ) -> None:
        database = Database(connections, url, checker(schema, auto_migrate=auto_migrate), lent)
        self._database = database
        self._url = url
        self._schema = schema
        self._auto_migrate = auto_migrate
        self._homes: dict[Place, bool] = {}
        self._markers: dict[Place, Markers] = {}
        self.workflows = Workflows(database, schema)
        self.checkpoints = Checkpoints(database, schema)
        self.nodes = Nodes(database, schema)
        self.messages = Messages(database, schema)
        self.events = Events(database, schema)
        self.awaits = Awaits(database, schema)
        self.lists = Lists(database, schema)

    @classmethod
    def shared(cls, url: Url, schema: str, *, auto_migrate: bool, lease: float, pgbouncer: bool) -> Store:
        """Return the store for tasks and callers: a lazy pool in each process, and another one for their own use."""
        where(url())
        connections, apart = (make(url, lease=lease, pgbouncer=pgbouncer) for make in (pooled, lent))
        return cls(connections, url, schema, auto_migrate=auto_migrate, lent=apart)

    @classmethod
    def of_one_thread(cls, url: Url, schema: str, *, auto_migrate: bool, lease: float, pgbouncer: bool) -> Store:
        """Return a store with a single connection, for a thread that must not wait for others."""
        where(url())
        return cls(single(url, lease=lease, pgbouncer=pgbouncer), url, schema, auto_migrate=auto_migrate)

    def is_home(self, place: Place, *, patience: float) -> bool:
        """Tell whether a place of the app's own is our database; ``patience`` is for ours."""
        if place not in self._homes:
            before, there, after = self._identity(patience), identity(place, patience=0), self._identity(patience)
            if before != after:  # ours was restarted meanwhile
                return self.is_home(place, patience=patience)
            self._homes[place] = there == after
        return self._homes[place]

    def markers_at(self, place: Place) -> Markers:
        """Return the markers in a database of the app's own."""
        return self._markers.setdefault(place, Markers(place, self._schema, auto_migrate=self._auto_migrate))

    def _identity(self, patience: float) -> tuple[Any, ...]:
        return self._database.run(IDENTITY, {}, patience=patience)[0]

    def build(self) -> Building | None:
        """Return what applies online migrations bit by bit, if that is ours to do and no other process is at it."""
        return build(self._url(), self._schema, wait=False) if self._auto_migrate else None

    def close(self) -> None:
        """Close all connections of this process."""
        self._database.close()
