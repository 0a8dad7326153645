"""Sessions on one database that can stop anywhere: after the snapshot, before a lock, before the commit, the answer.

A statement meets one of these fates:

- ``answered``: it is committed, and who made it knows;
- ``unsent``: it never reached the database;
- ``lost``: it is committed, and nobody knows;
- ``open``: it has done its work in a transaction that is committed, or rolled back, by a later call;
- ``slow``: it has its snapshot, and goes on by a later call: what others commit meanwhile it doesn't see.

Whatever its fate, it may meet a lock of another session. That is known by ``pg_stat_activity``, never by time, and is
an error unless the protocol has one wait for the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from enum import IntEnum
from fnmatch import fnmatchcase as fnmatch
from typing import Any

import psycopg
from psycopg.pq import TransactionStatus
from psycopg.rows import namedtuple_row

from tests.fixtures.tables import TABLES
from tests.integration.parties import Party

FATES = ("answered", "unsent", "lost", "open", "slow")
PATIENCE = 20.0

#: A statement that changes one of these tables waits, if its session says so, as soon as it has its snapshot.
PAUSE = """
    CREATE FUNCTION model_pause() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
        IF coalesce(current_setting('model.pause', true), '') <> '' THEN
            PERFORM pg_advisory_lock_shared(current_setting('model.pause')::bigint);
            PERFORM pg_advisory_unlock_shared(current_setting('model.pause')::bigint);
        END IF;
        RETURN NULL;
    END $$
"""
PAUSED = ("workflow", "checkpoint", "message", "awaiting")


class Lock(IntEnum):
    """How a statement locks the row of a workflow."""

    NONE = 0
    KEY_SHARE = 1
    SHARE = 2
    NO_KEY = 3
    UPDATE = 4


#: Rule 1 of the protocol: which of these wait for which.
CONFLICTS = {
    Lock.NONE: (),
    Lock.KEY_SHARE: (Lock.UPDATE,),
    Lock.SHARE: (Lock.NO_KEY, Lock.UPDATE),
    Lock.NO_KEY: (Lock.SHARE, Lock.NO_KEY, Lock.UPDATE),
    Lock.UPDATE: (Lock.KEY_SHARE, Lock.SHARE, Lock.NO_KEY, Lock.UPDATE),
}


@dataclass(slots=True, repr=False)
class Statement:
    """What a session is to do."""

    name: str
    do: Callable[[Party], Any]
    #: Is told the answer.
    then: Callable[[Any], None]
    #: Is told that there won't be one.
    lost: Callable[[], None]
    locks: dict[str, Lock] = field(default_factory=dict)
    #: What else it may have to wait for: rows that are unique, or that only one can take; ``*`` stands for any text.
    things: frozenset[str] = frozenset()
    #: It passes over what is locked.
    skips: bool = False
    #: It may change any number of workflows.
    is_bulk: bool = False

    def may_wait_for(self, other: Statement, *, is_late: bool) -> bool:
        """Whether the protocol lets this statement wait for the other one.

        ``is_late``: the row may have been changed since its snapshot. Then Postgres goes from version to version, and
        waits for whoever makes a new one, also where their locks don't conflict. That one waits for nobody.
        """
        if any(fnmatch(mine, theirs) or fnmatch(theirs, mine) for mine in self.things for theirs in other.things):
            return True
        if self.skips:
            return False
        if is_late and any(other.locks.get(workflow, Lock.NONE) >= Lock.NO_KEY for workflow in self.locks):
            return True
        return any(other.locks.get(workflow, Lock.NONE) in CONFLICTS[lock] for workflow, lock in self.locks.items())

    def __str__(self) -> str:
        return f"{self.name} of {'/'.join(self.locks) or 'none'}"


@dataclass(slots=True, repr=False)
class Session:
    """One connection, and how far its statement has come: idle, slow, waiting or open."""

    number: int
    party: Party
    status: str = "idle"
    statement: Statement | None = None
    fate: str = ""
    future: Future[Any] | None = None
    result: Any = None
    pause: int = 0
    #: Its snapshot is older than what others have committed.
    is_late: bool = False

    def __repr__(self) -> str:
        return f"session {self.number}, {self.status}: {self.statement}"

    @property
    def pid(self) -> int:
        return self.party.connection.info.backend_pid


class Stage:
    """The sessions, one observer, and one that keeps the slow ones waiting."""

    def __init__(self, url: str, size: int = 4) -> None:
        self.observer = psycopg.connect(url, autocommit=True, row_factory=namedtuple_row)
        #: Reads what nothing can hold up, and makes the statements of a fair end.
        self.onlooker = Party(url)
        self._keeper = psycopg.connect(url, autocommit=True)
        self.sessions = [Session(number, Party(url)) for number in range(size)]
        self._threads = ThreadPoolExecutor(size)
        self._pauses = 0
        self.waits = 0
        self.statements = 0
        self._prepare_pauses()

    def _prepare_pauses(self) -> None:
        if self.observer.execute("SELECT to_regproc('model_pause')").fetchone()[0] is None:
            self.observer.execute(PAUSE)
            for table in PAUSED:
                self.observer.execute(
                    f"CREATE TRIGGER pause BEFORE INSERT OR UPDATE OR DELETE ON celery_durable.{table} "
                    "FOR EACH STATEMENT EXECUTE FUNCTION model_pause()"
                )

    def close(self) -> None:
        """Close everything."""
        self.clear()
        self._threads.shutdown()
        for connection in [
            self.observer,
            self._keeper,
            self.onlooker.connection,
            *(session.party.connection for session in self.sessions),
        ]:
            connection.close()

    def clear(self) -> None:
        """End what is on its way, and empty all tables."""
        while busy := self.busy():
            for session in busy:
                if session.status == "slow":
                    self._end_pause(session)
                    session.status = "waiting"
                elif session.status == "open":
                    session.party.connection.execute("ROLLBACK", prepare=False)
                    session.status = "idle"
                elif session.future is not None and session.future.done():
                    session.status = "open" if session.fate == "open" else "idle"
        self.observer.execute(";".join(f"DELETE FROM celery_durable.{table}" for table in TABLES))

    def idle(self) -> list[Session]:
        """Sessions that can make a statement."""
        return [session for session in self.sessions if session.status == "idle"]

    def busy(self, *statuses: str) -> list[Session]:
        """Sessions that have one on its way."""
        return [s for s in self.sessions if (s.status in statuses if statuses else s.status != "idle")]

    def make(self, statement: Statement, fate: str = "answered") -> None:
        """Let a statement meet its fate, or a lock on the way there."""
        self.statements += 1
        if fate == "unsent":
            statement.lost()
            return
        session = self.idle()[0]
        others = self.busy()
        session.statement, session.fate, session.is_late = statement, fate, fate == "slow"
        connection = session.party.connection
        if fate == "open":
            connection.execute("BEGIN", prepare=False)
        if fate == "slow":
            self._begin_pause(session)
        if fate != "slow" and not others:
            session.result = statement.do(session.party)
            self._done(session)
            return
        session.status = "slow" if fate == "slow" else "waiting"
        session.future = self._threads.submit(statement.do, session.party)
        self.calm()

    def go_on(self, session: Session) -> None:
        """Let a slow statement go on with its old snapshot."""
        self._end_pause(session)
        session.status = "waiting"
        self.calm()

    def cut(self, session: Session) -> None:
        """Break the connection of who waits for the answer; the statement goes on without him."""
        statement = session.statement
        assert statement is not None
        session.statement = replace(statement, then=lambda answer: None, lost=lambda: None)
        statement.lost()

    def commit(self, session: Session, *, lost: bool) -> None:
        """Commit an open transaction; ``lost``: nobody is told."""
        self._end(session, "COMMIT", lost=lost)

    def roll_back(self, session: Session) -> None:
        """Undo an open transaction, as when its connection breaks."""
        self._end(session, "ROLLBACK", lost=True)

    def _end(self, session: Session, command: str, *, lost: bool) -> None:
        session.party.connection.execute(command, prepare=False)
        statement = session.statement
        assert statement is not None
        session.status, session.statement = "idle", None
        if lost:
            statement.lost()
        else:
            statement.then(session.result)
        self.calm()

    def calm(self) -> None:
        """Return when every session is idle, open, kept waiting by us, or waits for another one's lock."""
        give_up_at = time.monotonic() + PATIENCE
        while True:
            moved = False
            for session in self.busy("slow", "waiting"):
                assert session.future is not None
                if session.status in ("slow", "waiting") and session.future.done():
                    moved = True
                    self._end_pause(session)
                    session.result = session.future.result()
                    self._done(session)
            if not moved and all(self._is_stuck(session) for session in self.busy("slow", "waiting")):
                return
            assert time.monotonic() < give_up_at, f"neither done nor waiting: {self}"

    def _is_stuck(self, session: Session) -> bool:
        row = self.observer.execute(
            "SELECT coalesce(wait_event_type = 'Lock', false) AS locked, pg_blocking_pids(pid) AS blockers "
            "FROM pg_stat_activity WHERE pid = %s", [session.pid]
        ).fetchone()  # fmt: skip
        if not row.locked or not row.blockers or session.future.done():
            return False
        if session.pause and self._keeper.info.backend_pid in row.blockers:
            session.status = "slow"
            return True
        blockers = [other for other in self.sessions if other.pid in row.blockers]
        if len(blockers) < len(row.blockers) or any(other.statement is None for other in blockers):
            return False  # it is only just being let go
        session.status = "waiting"
        self.waits += 1
        for other in blockers:
            assert session.statement.may_wait_for(other.statement, is_late=session.is_late), (
                f"{session.statement} must not wait for {other.statement}"
            )
        session.is_late = True
        return True

    def _done(self, session: Session) -> None:
        """The statement has done its work."""
        connection = session.party.connection
        if session.fate == "open":
            if connection.info.transaction_status is not TransactionStatus.INERROR:
                session.status = "open"
                return
            connection.execute("ROLLBACK", prepare=False)  # it has failed, and said so
        statement, session.statement, session.status = session.statement, None, "idle"
        if session.fate == "lost":
            statement.lost()
        else:
            statement.then(session.result)

    def _begin_pause(self, session: Session) -> None:
        self._pauses += 1
        session.pause = self._pauses
        self._keeper.execute("SELECT pg_advisory_lock(%s)", [session.pause])
        session.party.connection.execute(
            "SELECT set_config('model.pause', %s, false)", [str(session.pause)], prepare=False
        )

    def _end_pause(self, session: Session) -> None:
        if session.pause:
            self._keeper.execute("SELECT pg_advisory_unlock(%s)", [session.pause])
            session.pause = 0

    def __str__(self) -> str:
        return "; ".join(map(repr, self.sessions))


def things(*names: str) -> frozenset[str]:
    """What a statement may have to wait for beside workflows."""
    return frozenset(names)
