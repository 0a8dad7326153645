"""Our inserts in somebody else's transaction, and how the nodes hear of its commit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg import sql

from ..exceptions import ConfigurationError, WorkflowConflict
from .connecting import Url, bare, unavailable, where
from .host import MISSING, NO_LOCK, UNIQUE, Host, sqlstate_of
from .pool import Connections, single
from .queries import Query
from .transaction import Connection, Row, brief

#: Milliseconds that an insert waits for another open transaction with the same id.
_LONGEST_LOCK = "3000"

_BEGIN, _END = "SAVEPOINT celery_durable", "RELEASE SAVEPOINT celery_durable"
_UNDO = "ROLLBACK TO SAVEPOINT celery_durable"
_BOUND = "SELECT current_setting('lock_timeout'), set_config('lock_timeout', %(bound)s, true)"
_TELL = "SELECT set_config('lock_timeout', %(before)s, true), pg_notify(%(channel)s, '')"


class Taken(Exception):
    """Another transaction, committed meanwhile, has what must be unique."""


class Outgoing:
    """Our inserts in a transaction that we neither begin nor end.

    What fails here is undone to where it was before: the caller's transaction stays as it is.
    """

    def __init__(self, host: Host, schema: str) -> None:
        host.check()
        self._execute = host.execute
        self._schema = schema

    def run(self, query: Query, params: Mapping[str, Any]) -> list[Row]:
        """Execute and return the rows; the nodes hear of it when the caller commits. Raises Taken."""
        execute = self._execute
        execute(_BEGIN, {})
        try:
            ((before, _),) = execute(_BOUND, {"bound": _LONGEST_LOCK})
            rows = execute(query.text, params)
            execute(_TELL, {"before": before, "channel": self._schema})
            execute(_END, {})
        except Exception as error:
            self._undo(sqlstate_of(error))
            raise _translated(error) from error
        return rows

    def run_or_conflict(self, query: Query, params: Mapping[str, Any]) -> list[Row]:
        """Execute again what another transaction has prevented; raise WorkflowConflict if it still does."""
        try:
            return self.run(query, params)
        except Taken as error:
            raise WorkflowConflict(
                "Another transaction has started a workflow with this deduplication_id, which this one can't see: "
                "try again in a new transaction."
            ) from error

    def _undo(self, sqlstate: str | None) -> None:
        if sqlstate is not None:  # else the connection is lost, and its transaction with it
            self._execute(_UNDO, {})
            self._execute(_END, {})


def _translated(error: Exception) -> Exception:
    state = sqlstate_of(error)
    if state == UNIQUE:
        return Taken(brief(error))
    if state == NO_LOCK:
        return WorkflowConflict(
            "Another transaction that is still open has started a workflow with this id: try again when it has ended."
        )
    if state in MISSING:
        return ConfigurationError(
            f"The connection of this outbox leads to a database without our tables ({brief(error)}): an outbox works "
            "in the database of durable_database_url."
        )
    return error


class Listener:
    """Hears of commits in which somebody has used an outbox. Only a help: the sweep finds all of them."""

    def __init__(self, connections: Connections, url: Url, schema: str) -> None:
        self._connections = connections
        self._url = url
        self._schema = schema
        self._connection: Connection | None = None

    @classmethod
    def of(cls, url: Url, schema: str, *, lease: float) -> Listener:
        """Return a listener with a connection of its own."""
        return cls(single(url, lease=lease, pgbouncer=False), url, schema)

    def fileno(self) -> int:
        """Return what to poll; listen, if that isn't so yet."""
        if self._connection is None or self._connection.closed:
            self._listen()
        assert self._connection is not None
        return self._connection.fileno()

    def _listen(self) -> None:
        self.close()
        try:
            with self._connections.lease() as connection:
                connection.execute(sql.SQL("LISTEN {}").format(sql.Identifier(self._schema)))
        except psycopg.Error as error:
            raise unavailable(where(self._url()), error) from bare(error)
        self._connection = connection

    def heard(self) -> bool:
        """Tell whether something has come since the last time; never waits."""
        if self._connection is None:
            return False
        try:
            return any(True for _ in self._connection.notifies(timeout=0))
        except psycopg.Error:
            self.close()
            return True

    def close(self) -> None:
        """Listen no more."""
        self._connections.close()
        self._connection = None
