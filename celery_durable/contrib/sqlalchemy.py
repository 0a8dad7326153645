"""SQLAlchemy 2: outboxes on its sessions and connections, and atomic steps in its engines.

``durable.outbox(session)`` and ``atomic=engine`` find this room by themselves; nothing has to be imported.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, TextClause, text
from sqlalchemy.orm import Session, scoped_session, sessionmaker

from ..exceptions import ConfigurationError, StepError
from ..store.host import plain
from ..store.transaction import Row

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

_PARAMETER = re.compile(r"%\((\w+)\)s")
_BLOCKING = (
    "An atomic step has its transaction in one thread: give atomic= an engine by create_engine() with a driver that "
    "blocks, such as postgresql+psycopg."
)


class SqlalchemyHost:
    """A connection of SQLAlchemy's, of whichever driver; of a session it is the one that its transaction has."""

    def __init__(self, connection: Callable[[], Connection]) -> None:
        self._connection = connection

    def check(self) -> None:
        """Raise ConfigurationError if each statement would be committed by itself, or it isn't Postgres."""
        connection = self._connection()
        if connection.dialect.name != "postgresql":
            raise ConfigurationError(
                f"This outbox leads to {connection.dialect.name}: it works in the database of durable_database_url, "
                "which is Postgres."
            )
        if getattr(connection.connection.dbapi_connection, "autocommit", False):
            raise ConfigurationError(
                "The connection of this outbox has the isolation level AUTOCOMMIT, which commits each statement by "
                "itself: use one with transactions."
            )

    def execute(self, sql: str, params: Mapping[str, Any]) -> list[Row]:
        """Execute in the owner's transaction; SQLAlchemy begins it with the first statement."""
        result = self._connection().execute(_statement(sql), params)
        return plain(result) if result.returns_rows else []


class AsyncHost(SqlalchemyHost):
    """An asynchronous connection of SQLAlchemy's, which is used by what ``run_sync`` runs."""

    def __init__(self, connection: Callable[[], Connection], owner: AsyncSession | AsyncConnection) -> None:
        super().__init__(connection)
        self._owner = owner

    def check(self) -> None:
        """Raise ConfigurationError, also for a call that nobody awaits."""
        from sqlalchemy.util.concurrency import in_greenlet

        if not in_greenlet():
            raise ConfigurationError(
                "An outbox on an asynchronous connection needs awaited calls: `await wf.adelay(…)`, "
                "`await durable.asend(…)`."
            )
        super().check()

    async def run_sync(self, call: Callable[[], Any]) -> Any:
        """Await something that uses the connection as if it were a blocking one."""
        return await self._owner.run_sync(lambda _: call())


class SqlalchemyTransaction(SqlalchemyHost):
    """The transaction of an atomic step, begun by us."""

    def __init__(self, connection: Connection, session: Session) -> None:
        super().__init__(lambda: connection)
        self.connection = connection
        self.session = session
        self._transaction = connection.begin()

    def check(self) -> None:
        """Flush the session; raise StepError if the step has left its transaction in no state to be committed."""
        if not self.connection.closed and self._transaction.is_active:
            self.session.flush()
        if self.connection.closed or not self._transaction.is_active:
            raise StepError(
                "The step has ended its transaction itself: leave out commit() and rollback() on the connection, and "
                "raise an error to roll back."
            )

    def is_lost(self) -> bool:
        """Tell whether the connection broke."""
        return self.connection.invalidated

    def end(self) -> None:
        """Commit."""
        self.session.close()
        self._transaction.commit()

    def roll_back(self) -> None:
        """Undo; what was interrupted in the middle of a statement can't be undone by another one, but by leaving."""
        try:
            self.session.close()
            self._transaction.rollback()
        except Exception as error:  # noqa: BLE001 - Postgres rolls back when it sees that the connection is closed
            self.connection.invalidate(error)


class EnginePlace:
    """An engine, for steps with ``atomic=engine`` or ``atomic=sessionmaker``."""

    def __init__(self, engine: Engine, make_session: Callable[..., Session]) -> None:
        if engine.dialect.name != "postgresql":
            raise ConfigurationError(
                f"A step can be atomic in Postgres only, and this engine leads to {engine.dialect.name}."
            )
        if engine.dialect.is_async:
            raise ConfigurationError(_BLOCKING)
        self.name = f"The database of {engine.url!r}"
        self._engine = engine
        self._make_session = make_session
        self._pid = os.getpid()

    @contextmanager
    def transaction(self) -> Iterator[SqlalchemyTransaction]:
        """Begin; commit at the end, roll back on an error."""
        self._leave_parents_connections()
        with self._engine.connect() as connection:
            transaction = SqlalchemyTransaction(connection, self._make_session(bind=connection))
            try:
                yield transaction
            except BaseException:
                transaction.roll_back()
                raise
            transaction.end()

    def _leave_parents_connections(self) -> None:
        if self._pid != os.getpid():
            self._engine.dispose(close=False)
            self._pid = os.getpid()


def host_of(connection: Any) -> SqlalchemyHost | None:
    """Return a session or connection of SQLAlchemy's as what we need of it; None for anything else."""
    # Without greenlet that module can't be imported, and nobody has one of its objects.
    asyncio = sys.modules.get("sqlalchemy.ext.asyncio")
    if isinstance(connection, scoped_session) or (asyncio and isinstance(connection, asyncio.async_scoped_session)):
        connection = connection()
    if isinstance(connection, Session):
        return SqlalchemyHost(connection.connection)
    if isinstance(connection, Connection):
        return SqlalchemyHost(lambda: connection)
    if asyncio and isinstance(connection, asyncio.AsyncSession):
        return AsyncHost(connection.sync_session.connection, connection)
    if asyncio and isinstance(connection, asyncio.AsyncConnection):
        opened = _opened(connection)
        return AsyncHost(lambda: opened, connection)
    return None


def place_of(value: Any) -> EnginePlace | None:
    """Return an engine, or a sessionmaker that has one, as a place for atomic steps; None for anything else.

    Raises ConfigurationError for what a step can't have its transaction in.
    """
    asyncio = sys.modules.get("sqlalchemy.ext.asyncio")
    if asyncio and isinstance(value, asyncio.AsyncEngine | asyncio.async_sessionmaker):
        raise ConfigurationError(_BLOCKING)
    if isinstance(value, Session | scoped_session):
        raise ConfigurationError(
            "A step is atomic in a session of its own: give atomic= the sessionmaker, or the engine, and use "
            "durable.current.session in the body."
        )
    if isinstance(value, Engine):
        return EnginePlace(value, Session)
    if isinstance(value, sessionmaker):
        engine = value.kw.get("bind")
        if not isinstance(engine, Engine):
            raise ConfigurationError("A sessionmaker for atomic steps needs its engine: sessionmaker(bind=engine).")
        return EnginePlace(engine, value)
    return None


def _opened(connection: AsyncConnection) -> Connection:
    if connection.sync_connection is None:
        raise ConfigurationError("The connection of this outbox isn't open: use `async with engine.begin() as …:`.")
    return connection.sync_connection


@lru_cache(maxsize=64)
def _statement(sql: str) -> TextClause:
    """Return a statement of ours as SQLAlchemy writes it for any driver."""
    between = _PARAMETER.split(sql)
    between[::2] = [each.replace("%%", "%").replace(":", r"\:") for each in between[::2]]
    between[1::2] = [f"(:{name})" for name in between[1::2]]
    return text("".join(between))
