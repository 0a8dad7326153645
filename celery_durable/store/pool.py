"""Connections to Postgres: made late, per process, never carried over a fork, tried again when they break."""

from __future__ import annotations

import logging
import math
import os
import re
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Any, Protocol, TypeVar

import psycopg
from psycopg import errors
from psycopg.pq import TransactionStatus

from .connecting import PREPARED_AFTER, Url, bare, connector, unavailable, where
from .executing import Answer, Session, Statement, planned_anew
from .queries import Query
from .shield import deferred_signals
from .transaction import CONFLICTS, Conflict, Connection, Row, Transaction, brief

logger = logging.getLogger("celery_durable.store")

#: May go by when the database is back, has room again, or a deadlock's other side is done; ``_passes`` decides.
TRANSIENT = (psycopg.OperationalError, errors.ReadOnlySqlTransaction)
#: Connection, rollback, resources, object in use, operator.
_PASSING = frozenset({"08", "40", "53", "55", "57"})
#: Those of them that aren't about what other transactions do.
_GONE = frozenset({"08", "53"})
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
_NO_MEMORY = re.compile("out of memory|cannot allocate memory")
#: A try that has taken longer than the first of these seconds isn't made again for the second.
_LONG_TRY, _SILENCE = 1.0, 1.0

T = TypeVar("T")


class Connections(Protocol):
    """A source of autocommit connections."""

    def lease(self) -> Any:
        """Return a context manager that lends a Session; a broken one isn't lent again."""

    def close(self) -> None:
        """Close all of them."""


class Database:
    """Runs named statements, each in its own transaction, on one Postgres.

    ``check`` is called on the first connection of a process. ``patience`` is how many seconds a statement goes on
    trying while the database can't be reached; every statement here may be repeated after its answer was lost.
    Raises DatabaseUnavailable when patience ends, at once if it has ended for another one and nothing has succeeded
    since; ConfigurationError if a connection can't be used, MemoryError if this process has no room for a value.
    ``lent`` is where transactions have their connections from.
    """

    def __init__(
        self,
        connections: Connections,
        url: Url,
        check: Callable[[Connection], None],
        lent: Connections | None = None,
    ) -> None:
        self._connections = connections
        self._lent = lent or connections
        self._url = url
        self._check = check
        self._checked: str | None = None
        self._absence = Absence()

    def run(self, query: Query, params: Mapping[str, Any], *, patience: float) -> list[Row]:
        """Execute and return all rows."""
        return self._execute(query, params, patience).rows

    def read(self, query: Query, params: Mapping[str, Any], *, patience: float) -> list[Row]:
        """Execute with a plan that is made for these very parameters, and return all rows."""
        return self._patiently(partial(self._planned_anew, query, params), query.name, patience)

    def count(self, query: Query, params: Mapping[str, Any], *, patience: float) -> int:
        """Execute and return how many rows it wrote."""
        return self._execute(query, params, patience).rowcount

    def run_all(self, statements: Sequence[Statement], *, patience: float) -> list[Row]:
        """Execute in one transaction and one round trip; return the rows of the last one."""
        return self._patiently(partial(self._together, statements), statements[-1][0].name, patience)[-1].rows

    def run_then(self, first: Statement, then: Statement, *, patience: float) -> tuple[list[Row], list[Row]]:
        """Execute one, and the other after its commit, in one round trip; return the rows of both."""
        both = self._patiently(partial(self._together, (first, then), apart=True), first[0].name, patience)
        return both[0].rows, both[1].rows

    def _together(self, statements: Sequence[Statement], *, apart: bool = False) -> list[Answer]:
        with self._connections.lease() as connection:
            self._check_once(connection)
            return connection.executor.run_all(statements, apart=apart)

    def _execute(self, query: Query, params: Mapping[str, Any], patience: float) -> Answer:
        return self._patiently(partial(self._once, query, params), query.name, patience)

    def _patiently(self, action: Callable[[], T], name: str, patience: float) -> T:
        """Act; try again on a transient error until patience ends."""
        if (reason := self._absence.reason_not_to_try(patience)) is not None:
            raise unavailable(where(self._url()), reason)
        tried_at = time.monotonic()
        give_up_at = tried_at + self._absence.left_of(patience)
        pause = _FIRST_PAUSE
        while True:
            try:
                done = action()
            except TRANSIENT as error:
                _check_memory(error)
                if not _passes(error):
                    raise
                if time.monotonic() + pause > give_up_at:
                    self._absence.note(error, patience, tried_at)
                    raise unavailable(where(self._url()), error) from bare(error)
                place = where(self._url())
                logger.warning("Postgres at %s: %s failed (%s), trying again.", place, name, brief(error))
            else:
                self._absence.end()
                return done
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
            tried_at = time.monotonic()

    @contextmanager
    def transaction(self, *, patience: float) -> Iterator[Transaction]:
        """Lend a connection in a transaction, and commit at the end; any error rolls back.

        ``patience`` is for its begin; then nothing is tried again here. Raises Conflict for a serialization failure or
        a deadlock, DatabaseUnavailable where it isn't known whether the commit has happened, and what Postgres has
        against it (a constraint that is checked at the end).
        """
        try:
            with ExitStack() as lease:
                transaction = self._patiently(partial(self._begin, lease), "BEGIN", patience)
                try:
                    yield transaction
                    transaction.end()
                except BaseException as error:
                    transaction.roll_back()
                    if isinstance(error, psycopg.Error) and transaction.is_lost:
                        raise psycopg.OperationalError(brief(error)) from error
                    raise
        except CONFLICTS as error:
            raise Conflict(error) from error
        except TRANSIENT as error:
            _check_memory(error)
            raise unavailable(where(self._url()), error) from bare(error)

    def close(self) -> None:
        """Close all connections."""
        self._connections.close()
        self._lent.close()

    def _begin(self, lease: ExitStack) -> Transaction:
        with ExitStack() as trial:
            connection = trial.enter_context(self._lent.lease())
            self._check_once(connection)
            transaction = Transaction(connection)
            lease.push(trial.pop_all())
        return transaction

    def _check_once(self, connection: Connection) -> None:
        url = self._url()
        if self._checked != url:
            self._check(connection)
            self._checked = url

    def _planned_anew(self, query: Query, params: Mapping[str, Any]) -> list[Row]:
        with self._connections.lease() as connection:
            self._check_once(connection)
            return planned_anew(connection, query, params)

    def _once(self, query: Query, params: Mapping[str, Any]) -> Answer:
        with self._connections.lease() as connection:
            self._check_once(connection)
            return connection.executor.run(query, params)


class Absence:
    """Whether the database was away when this process waited for it last: then nobody waits for it again in vain.

    It begins when somebody's patience has ended, and ends with the next statement that succeeds. Meanwhile everybody
    tries once: who tries again at once may be right. If such a try has only ended by a timeout, nobody tries for a
    second. What has no end of patience (a run's statements) goes on as ever.
    """

    def __init__(self) -> None:
        self._reason: psycopg.Error | None = None
        self._silent_until = 0.0

    def reason_not_to_try(self, patience: float) -> Exception | None:
        """Return what the last try has met, if it is too early for another one."""
        if self._reason is None or math.isinf(patience) or time.monotonic() >= self._silent_until:
            return None
        return self._reason

    def left_of(self, patience: float) -> float:
        """Return the seconds for which a statement may go on trying."""
        return patience if self._reason is None or patience == math.inf else 0.0

    def note(self, error: psycopg.Error, patience: float, tried_at: float) -> None:
        """Patience has ended."""
        was_known = self._reason is not None
        if not _is_gone(error) or not (was_known or patience):
            return
        # Without its traceback, which would keep the caller's frames alive.
        self._reason = type(error)(brief(error))
        now = time.monotonic()
        self._silent_until = now + _SILENCE if was_known and now - tried_at > _LONG_TRY else 0.0

    def end(self) -> None:
        """A statement has succeeded."""
        self._reason = None


class PerProcess:
    """Connections for tasks and callers: made by the thread that needs one, never carried over a fork.

    psycopg_pool makes connections in threads of its own, which every pool process would have to start and
    which keep the reason of a failure from the caller; a stack of idle connections needs neither.
    """

    def __init__(self, url: Url, connect: Callable[[], Connection], max_size: int) -> None:
        self._url = url
        self._connect = connect
        self._max_size = max_size
        self._connected_to: str | None = None
        self._forget()
        _processes.add(self)

    def lease(self) -> _Lease:
        """Lend an idle connection, or a new one."""
        return _Lease(self)

    def close(self) -> None:
        """Close the idle connections of this process."""
        while self._idle:
            with suppress(IndexError):  # another thread has taken it
                self._drop(self._idle.pop())

    def take(self) -> Connection:
        """Return a connection that is nobody else's now."""
        url = self._url()
        if url != self._connected_to:
            self.close()
            self._connected_to = url
        try:
            return self._idle.pop()
        except IndexError:
            return self._waited_for() or self._made()

    def give_back(self, connection: Connection, error: BaseException | None) -> None:
        """Take back what was lent, with the error that has ended its use."""
        if isinstance(error, TRANSIENT):
            self.close()  # what broke this one has most likely broken the idle ones too
        # One that can't be written to would go on like that when the database has long been writable again.
        if connection.pgconn.transaction_status != TransactionStatus.IDLE or isinstance(
            error, errors.ReadOnlySqlTransaction
        ):
            self._drop(connection)
            return
        self._idle.append(connection)
        if self._waiting:
            self._wake()

    def _waited_for(self) -> Connection | None:
        """Return a connection that was given back, once there is one; None: one more may be made, and is counted."""
        with self._changed:
            self._waiting += 1  # before it looks: whoever gives one back, and doesn't see this, has done so before
            try:
                while not self._idle and len(self._open) + self._making >= self._max_size:
                    self._changed.wait(_LONGEST_PAUSE)  # nobody tells of one that an interrupted thread has lost
                if self._idle:
                    return self._idle.pop()
                self._making += 1
                return None
            finally:
                self._waiting -= 1

    def _made(self) -> Connection:
        try:
            connection = self._connect()
            self._open.add(connection)
            return connection
        finally:
            with self._changed:
                self._making -= 1
                self._changed.notify()

    def _drop(self, connection: Connection) -> None:
        connection.close()
        self._open.discard(connection)
        self._wake()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify()

    def _forget(self) -> None:
        # The parent's connections are kept alive, unused: collecting them here would close its sessions.
        self._inherited = getattr(self, "_idle", None)
        self._idle: deque[Connection] = deque()
        self._changed = threading.Condition()
        self._open: weakref.WeakSet[Connection] = weakref.WeakSet()
        self._making = self._waiting = 0


class _Lease:
    """One connection, lent for a block; a class, as each step has one, and a generator costs twice as much."""

    __slots__ = ("_connection", "_connections")

    def __init__(self, connections: PerProcess) -> None:
        self._connections = connections

    def __enter__(self) -> Connection:
        self._connection = self._connections.take()
        return self._connection

    def __exit__(self, kind: Any, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._connections.give_back(self._connection, error)


class Lent(PerProcess):
    """Connections for code that isn't ours: nothing of what it has set, locked or made is there for the next one.

    They are apart from those of our own statements, so that code that waits for one of those always gets it.
    """

    def __init__(self, url: Url, connect: Callable[[], Connection], max_size: int, *, discard: bool) -> None:
        super().__init__(url, connect, max_size)
        self._discard = discard

    def take(self) -> Connection:
        """Return a connection whose isolation is that of a new one."""
        connection = super().take()
        connection.isolation_level = psycopg.IsolationLevel.READ_COMMITTED
        return connection

    def give_back(self, connection: Connection, error: BaseException | None) -> None:
        """Take back what was lent, and tidy it up."""
        try:
            connection = self._tidied(connection)
        except psycopg.Error as untidy:
            # The transaction has ended before; only this connection is of no use any more.
            logger.debug("A connection isn't used again: %s", brief(untidy))
            connection.close()
        super().give_back(connection, error)

    def _tidied(self, connection: Connection) -> Connection:
        """Return the same session as for a new user; whoever has kept the old object can't use it any more."""
        if connection.info.transaction_status is not TransactionStatus.IDLE:
            return connection
        if self._discard:
            with deferred_signals():
                connection.execute("DISCARD ALL")
        tidied = Session(connection.pgconn)
        self._open.discard(connection)
        self._open.add(tidied)
        tidied.autocommit, tidied.prepare_threshold = True, PREPARED_AFTER if self._discard else None
        del connection.pgconn
        return tidied


class Single:
    """One connection, for one thread that is alone with it."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        self._connect = connect
        self._connection: Connection | None = None
        self._pid = os.getpid()

    @contextmanager
    def lease(self) -> Iterator[Connection]:
        """Lend the connection, made anew if it broke."""
        if self._connection is None or self._connection.closed:
            self._connection = self._connect()
        try:
            yield self._connection
        except TRANSIENT:
            self.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None and self._pid == os.getpid():
            self._connection.close()
        self._connection = None


def pooled(url: Url, *, lease: float, pgbouncer: bool, max_size: int = 32) -> PerProcess:
    """Return the connections of tasks and callers; at most ``max_size`` a process."""
    return PerProcess(url, connector(url, "ours", lease=lease, pgbouncer=pgbouncer), max_size)


def lent(url: Url, *, lease: float, pgbouncer: bool, max_size: int = 32) -> Lent:
    """Return the connections of steps' own statements; at most ``max_size`` a process.

    Behind pgbouncer a session isn't ours to tidy up: what a step sets there it must set with SET LOCAL.
    """
    return Lent(url, connector(url, "lent", lease=lease, pgbouncer=pgbouncer), max_size, discard=not pgbouncer)


def single(url: Url, *, lease: float, pgbouncer: bool) -> Single:
    """Return the connection of the node thread: it must notice within a third of the lease that it is dead."""
    return Single(connector(url, "ours", lease=lease / 3, pgbouncer=pgbouncer))


def _passes(error: psycopg.Error) -> bool:
    """Tell by its SQLSTATE whether an error may go by; a connection that breaks has none."""
    return error.sqlstate is None or error.sqlstate[:2] in _PASSING or isinstance(error, errors.ReadOnlySqlTransaction)


def _check_memory(error: psycopg.Error) -> None:
    """Raise MemoryError if this process has no memory for what is sent or received: it is no matter of patience.

    Only libpq's text tells, whatever else may be in it: the names of hosts when it connects.
    """
    text = str(error)
    if error.sqlstate is None and not text.startswith("connection ") and _NO_MEMORY.search(text):
        raise MemoryError(brief(error)) from error


def _is_gone(error: psycopg.Error) -> bool:
    """Tell whether the next statement will most likely meet the same: there is no connection, no room, no writing."""
    return error.sqlstate is None or error.sqlstate[:2] in _GONE or isinstance(error, errors.ReadOnlySqlTransaction)


_processes: weakref.WeakSet[PerProcess] = weakref.WeakSet()


def _forget_all() -> None:
    for connections in list(_processes):
        connections._forget()


os.register_at_fork(after_in_child=_forget_all)
