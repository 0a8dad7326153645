"""A transaction that its user fills, and we end."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import psycopg
from psycopg import errors
from psycopg.pq import PipelineStatus, TransactionStatus

from ..exceptions import StepError
from .queries import Query
from .shield import deferred_signals

logger = logging.getLogger("celery_durable.store")

CONFLICTS = (errors.SerializationFailure, errors.DeadlockDetected)
#: A transaction that Postgres has ended because it was idle for too long, or has taken too long.
OVERDUE = frozenset({"25P03", "25P04"})

Connection = psycopg.Connection[tuple[Any, ...]]
Row = tuple[Any, ...]


class Conflict(Exception):
    """Another transaction was in the way: ``error`` is the serialization failure, or the deadlock."""

    def __init__(self, error: Exception) -> None:
        super().__init__(brief(error))
        self.error = error


class Transaction:
    """A transaction on a connection that nobody else has; its user can't commit it."""

    #: Only object-relational mappers have one.
    session = None

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        #: The connection broke, not by its user.
        self.is_lost = False
        self._abandoned = False
        # Made now, it knows nothing of the row factories and adapters that the user may set.
        self._cursor = connection.cursor()
        self._block = connection.transaction()
        self._transaction = self._block.__enter__()

    def run(self, query: Query, params: Mapping[str, Any]) -> list[Row]:
        """Execute and return all rows; raise StepError if the user has left the transaction in no state for that."""
        self._check()
        with deferred_signals():
            return self._cursor.execute(query.text, params).fetchall()

    def abandon(self, error: BaseException | None = None) -> None:
        """Roll back at the end; raise ``error`` if it is the database's own, not its user's."""
        if isinstance(error, psycopg.Error) and self._is_own(error):
            raise error
        self._abandoned = True

    def _is_own(self, error: psycopg.Error) -> bool:
        """Tell whether the body is to run again, as it wasn't what has failed."""
        if error.sqlstate in OVERDUE:
            return False
        return self.connection.broken or isinstance(error, (*CONFLICTS, errors.ReadOnlySqlTransaction))

    def end(self) -> None:
        """Commit, or roll back what was abandoned."""
        if self._abandoned:
            self.roll_back()
            return
        try:
            with deferred_signals():
                self._block.__exit__(None, None, None)
        except psycopg.ProgrammingError as error:
            raise StepError(f"The step has left a block `with connection.transaction():` open ({error}).") from error

    def roll_back(self) -> None:
        """Undo. What was interrupted in the middle of a statement can't be undone by another one, but by leaving."""
        self.is_lost = self.connection.broken
        try:
            status = self.connection.info.transaction_status
            if status in (TransactionStatus.INTRANS, TransactionStatus.INERROR):
                self._transaction.force_rollback = True
                self._block.__exit__(None, None, None)
                return
            if status is TransactionStatus.ACTIVE:
                self.connection.cancel()
        except psycopg.Error as error:
            # Postgres rolls back when it sees that the connection is closed.
            logger.debug("A transaction is left without a ROLLBACK: %s", brief(error))
        self.connection.close()

    def _check(self) -> None:
        if self.connection.broken:
            raise psycopg.OperationalError("the connection is lost")
        if self.connection.closed:
            raise StepError("The step has closed its connection.")
        if self.connection.info.pipeline_status is not PipelineStatus.OFF:
            raise StepError("The step has left a block `with connection.pipeline():` open.")
        wrong = _NOT_WELL.get(self.connection.info.transaction_status)
        if wrong is not None:
            raise StepError(wrong)


#: What a step can do to its transaction so that it can't be committed.
_NOT_WELL = {
    TransactionStatus.IDLE: (
        "The step has ended its transaction itself: leave out COMMIT and ROLLBACK, and raise an error to roll back."
    ),
    TransactionStatus.ACTIVE: "The step has left a COPY or a stream of rows unfinished.",
    TransactionStatus.INERROR: (
        "A statement of the step has failed, and the error was swallowed: wrap what may fail in "
        "`with durable.current.connection.transaction():`."
    ),
}


def brief(error: Exception) -> str:
    """Return what an error says, on one line; of one that SQLAlchemy has wrapped, without statement and parameters."""
    said = getattr(error, "orig", None) or error
    return " ".join(str(said).split()) or type(said).__name__
