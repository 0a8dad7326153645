"""Our inserts in somebody else's transaction, and how the nodes hear of its commit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import psycopg
from psycopg import errors, sql
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from ..exceptions import ConfigurationError, WorkflowConflict
from .pool import Connections, single, unavailable, where
from .queries import Query
from .transaction import Connection, brief

#: Milliseconds that an insert waits for another open transaction with the same id.
_LONGEST_LOCK = 3000

_BOUND = "SELECT current_setting('lock_timeout'), set_config('lock_timeout', %s, true)"
_UNBOUND = "SELECT set_config('lock_timeout', %s, true)"


class Guest:
    """A connection of the caller's own, in a transaction that we neither begin nor end.

    What fails here is undone to where it was before: the caller's transaction stays as it is.
    """

    def __init__(self, connection: Any, schema: str) -> None:
        if isinstance(connection, psycopg.AsyncConnection):
            raise TypeError("An outbox takes a psycopg.Connection; an AsyncConnection can't be used by delay().")
        if not isinstance(connection, psycopg.Connection):
            raise TypeError(f"An outbox takes a psycopg.Connection, not {connection!r:.100}.")
        if connection.autocommit and connection.info.transaction_status is TransactionStatus.IDLE:
            raise ConfigurationError(
                "The connection of this outbox commits each statement by itself: open a transaction first, "
                "`with connection.transaction():`."
            )
        self._connection: Connection = connection
        self._schema = schema
        self._has_told = False

    def run(self, query: Query, params: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Execute and return the rows; the nodes hear of it when the caller commits."""
        with self._undisturbed() as cursor:
            cursor.execute(query.text, params)
            rows = cursor.fetchall() if cursor.description else []
            if not self._has_told:
                cursor.execute("SELECT pg_notify(%s, '')", [self._schema])
        self._has_told = True
        return rows

    def run_or_conflict(self, query: Query, params: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Execute again what another transaction has prevented; raise WorkflowConflict if it still does."""
        try:
            return self.run(query, params)
        except errors.UniqueViolation as error:
            raise WorkflowConflict(
                "Another transaction has started a workflow with this deduplication_id, which this one can't see: "
                "try again in a new transaction."
            ) from error

    @contextmanager
    def _undisturbed(self) -> Iterator[psycopg.Cursor[tuple[Any, ...]]]:
        with self._connection.cursor(row_factory=tuple_row) as cursor:
            # Begins a transaction, if the caller hasn't: the block below is never the outermost one.
            cursor.execute("SELECT 1")
            try:
                with self._connection.transaction():
                    ((before, _),) = cursor.execute(_BOUND, [str(_LONGEST_LOCK)]).fetchall()
                    yield cursor
                    cursor.execute(_UNBOUND, [before])
            except errors.LockNotAvailable as error:
                raise WorkflowConflict(
                    "Another transaction that is still open has started a workflow with this id: try again when it "
                    "has ended."
                ) from error
            except (errors.UndefinedTable, errors.UndefinedColumn) as error:
                raise ConfigurationError(
                    f"The connection of this outbox leads to a database without our tables ({brief(error)}): an outbox "
                    "works in the database of durable_database_url."
                ) from error


class Listener:
    """Hears of commits in which somebody has used an outbox. Only a help: the sweep finds all of them."""

    def __init__(self, connections: Connections, where: str, schema: str) -> None:
        self._connections = connections
        self._where = where
        self._schema = schema
        self._connection: Connection | None = None

    @classmethod
    def of(cls, url: str, schema: str, *, lease: float) -> Listener:
        """Return a listener with a connection of its own."""
        return cls(single(url, lease=lease, pgbouncer=False), where(url), schema)

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
            raise unavailable(self._where, error) from error
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
