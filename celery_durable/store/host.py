"""Connections of the app's own, through whatever library has made them: what we need of them, and no more."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import tuple_row

from ..exceptions import ConfigurationError, DatabaseUnavailable, StepError
from .queries import Query
from .shield import deferred_signals
from .transaction import OVERDUE, Conflict, Connection, Row, brief

logger = logging.getLogger("celery_durable.store")

UNIQUE, NO_LOCK = "23505", "55P03"
#: Undefined table, undefined column, schema, and function.
MISSING = frozenset({"42P01", "42703", "3F000", "42883"})
_CONFLICTS = frozenset({"40001", "40P01"})
#: A transaction in which a statement has failed.
_ABORTED = "25P02"

_PAUSE = 0.5

#: Two connections that agree on this see the same tables.
IDENTITY = Query("host.identity", "SELECT current_database(), pg_postmaster_start_time()::text")


class Host(Protocol):
    """A connection that isn't ours, in its owner's transaction."""

    def check(self) -> None:
        """Raise ConfigurationError if no transaction is open on it, and its library's error if that is broken."""

    def execute(self, text: str, params: Mapping[str, Any]) -> list[Row]:
        """Execute a statement with ``%(name)s`` parameters; return all rows, none for one that returns nothing."""


class HostTransaction(Host, Protocol):
    """The transaction of an atomic step, in a database of the app's own."""

    #: What the step's own statements go through: ``current.connection``.
    connection: Any
    #: What an object-relational mapper calls a session: ``current.session``.
    session: Any

    def is_lost(self) -> bool:
        """Tell whether the connection broke."""


class Place(Protocol):
    """A database in which atomic steps of the app have their transactions."""

    #: How its user names it, for errors.
    name: str

    def transaction(self) -> AbstractContextManager[HostTransaction]:
        """Begin a transaction; commit it when the block ends, roll it back when that raises."""


class PsycopgHost:
    """A psycopg connection of the caller's own."""

    def __init__(self, connection: Any) -> None:
        if isinstance(connection, psycopg.AsyncConnection):
            raise TypeError("An outbox takes a psycopg.Connection; an AsyncConnection can't be used by delay().")
        if not isinstance(connection, psycopg.Connection):
            raise TypeError(
                "An outbox takes a psycopg.Connection, a connection of Django's, or a Session or Connection of "
                f"SQLAlchemy's, not {connection!r:.100}."
            )
        self._connection: Connection = connection

    def check(self) -> None:
        """Raise ConfigurationError if each statement would be committed by itself."""
        connection = self._connection
        if connection.autocommit and connection.info.transaction_status is TransactionStatus.IDLE:
            raise ConfigurationError(
                "The connection of this outbox commits each statement by itself: open a transaction first, "
                "`with connection.transaction():`."
            )

    def execute(self, text: str, params: Mapping[str, Any]) -> list[Row]:
        """Execute on a cursor that knows nothing of the caller's row factory."""
        with self._connection.cursor(row_factory=tuple_row) as cursor:
            cursor.execute(text.encode(), params or None)
            return cursor.fetchall() if cursor.description else []


def sqlstate_of(error: BaseException | None) -> str | None:
    """Return the SQLSTATE of a driver's error, or of the one that a library has wrapped; None: it has none."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
        if isinstance(state, str):
            return state
        seen.append(error)
        error = getattr(error, "orig", None) or error.__cause__
    return None


def plain(rows: Any) -> list[Row]:
    """Return rows as psycopg gives them: as tuples, with bytes for what other drivers show as a memoryview."""
    return [tuple(bytes(each) if isinstance(each, memoryview) else each for each in row) for row in rows]


def is_conflict(error: BaseException) -> bool:
    """Tell whether another transaction was in the way."""
    return sqlstate_of(error) in _CONFLICTS


class Hosted:
    """A transaction of an atomic step in a database of the app's own; its user can't commit it."""

    def __init__(self, host: HostTransaction) -> None:
        self._host = host
        self.connection = host.connection
        self.session = host.session
        self.is_abandoned = False
        #: The connection broke; asked at the time, because its library may have made another one since.
        self.is_lost = False

    def run(self, query: Query, params: Mapping[str, Any]) -> list[Row]:
        """Execute and return all rows; raise StepError if the user has left the transaction in no state for that."""
        self._host.check()
        try:
            with deferred_signals():
                return self._host.execute(query.text, params)
        except Exception as error:
            if sqlstate_of(error) != _ABORTED:
                raise
            raise StepError(
                "A statement of the step has failed, and the error was swallowed: wrap what may fail in a savepoint."
            ) from error

    def abandon(self, error: BaseException | None = None) -> None:
        """Roll back at the end; raise ``error`` if it is the database's own, not its user's."""
        self.note_loss()
        if error is not None and (is_conflict(error) or self.is_lost) and sqlstate_of(error) not in OVERDUE:
            raise error
        self.is_abandoned = True

    def note_loss(self) -> None:
        """Look whether the connection is lost."""
        self.is_lost = self.is_lost or self._host.is_lost()


@contextmanager
def hosted(place: Place, *, patience: float) -> Iterator[Hosted]:
    """Begin a transaction at a place, and commit it at the end; any error rolls back.

    ``patience``: seconds to go on trying while that database can't be reached; then its library's error is raised.
    Afterwards raises Conflict for a serialization failure or a deadlock, DatabaseUnavailable where it isn't known
    whether the commit has happened, and what the database has against it.
    """
    block, host = _begun(place, patience)
    transaction = Hosted(host)
    try:
        try:
            yield transaction
            if transaction.is_abandoned:
                raise _Abandoned
        except BaseException:
            transaction.note_loss()
            with deferred_signals():
                block.__exit__(*sys.exc_info())
            raise
        with deferred_signals():
            block.__exit__(None, None, None)
    except _Abandoned:
        return
    except Exception as error:
        if is_conflict(error):
            raise Conflict(error) from error
        if not isinstance(error, StepError) and (transaction.is_lost or _is_cut(error)):
            raise DatabaseUnavailable(f"The connection to {place.name} was lost: {brief(error)}") from error
        raise


def identity(place: Place, *, patience: float) -> Row:
    """Return which database of which server a place is, now that it runs."""
    with hosted(place, patience=patience) as transaction:
        return transaction.run(IDENTITY, {})[0]


def _begun(place: Place, patience: float) -> tuple[AbstractContextManager[HostTransaction], HostTransaction]:
    give_up_at = time.monotonic() + patience
    while True:
        block = place.transaction()
        try:
            return block, block.__enter__()
        except Exception as error:
            if not _is_operational(error) or time.monotonic() >= give_up_at:
                raise
            logger.warning("%s can't be reached (%s), trying again.", place.name, brief(error))
        time.sleep(_PAUSE)


def _is_operational(error: BaseException) -> bool:
    """Tell by PEP 249's names whether a driver, or a library around it, says that there is no connection."""
    return any(cls.__name__ in ("OperationalError", "InterfaceError") for cls in type(error).__mro__)


def _is_cut(error: BaseException) -> bool:
    """Tell whether what failed was the connection: it has no SQLSTATE then, or one of a server that goes."""
    state = sqlstate_of(error)
    return _is_operational(error) and (state is None or state[:2] == "08" or state[:4] == "57P0")


class _Abandoned(Exception):
    """Nothing is to be committed, and that is no error."""
