"""What users do meanwhile: they start workflows, talk to them, cancel and resume some, and try again on errors."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import psycopg
from celery import chain

import celery_durable as durable
from celery_durable import exceptions
from tests.chaos.kinds import MESSAGES, SHARES
from tests.chaos.ledger import now
from tests.chaos.stage import Stage

T = TypeVar("T")

#: No more than so many workflows are unfinished at a time.
WINDOW = 120
#: One of ten starts is in a transaction of the user's own.
OUTBOX_SHARE = 0.1


@dataclass
class Started:
    """A workflow that its starter was told to have started."""

    id: str
    kind: str
    number: int
    #: When a cancellation of it had returned, and when a resumption was asked for after it.
    cancelled_at: float | None = None
    resumed_at: float | None = None


@dataclass
class Load:
    """Users' threads, and what they know."""

    stage: Stage
    app: Any
    seed: int
    most: int
    started: list[Started] = field(default_factory=list)
    #: Ids whose transaction was rolled back.
    undone: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._numbers = iter(range(self.most))
        self._lock = threading.Lock()
        self._unread: list[Started] = []
        self._unfinished, self._counted_at = 0, 0.0
        #: Nothing is started any more, so that nobody will wait for more messages.
        self._all_started = threading.Event()
        jobs = [self._start_some, self._start_some, self._start_some, self._talk, self._talk, self._steer]
        self._threads = [
            threading.Thread(target=self._guarded, args=(job, random.Random(f"{self.seed} {n}")), daemon=True)
            for n, job in enumerate(jobs)
        ]
        self._talkers = [thread for thread, job in zip(self._threads, jobs, strict=True) if job == self._talk]

    def begin(self) -> None:
        """Let the users do their work from now on."""
        for thread in self._threads:
            thread.start()

    def end(self) -> None:
        """Start nothing more, and return when every message is sent."""
        self._stop.set()
        self._join([each for each in self._threads if each not in self._talkers])
        self._all_started.set()
        self._join(self._talkers)

    def _join(self, threads: list[threading.Thread]) -> None:
        for thread in threads:
            thread.join(120)
            if thread.is_alive():
                self.errors.append(f"a user's call hangs: {thread.name}")

    def _guarded(self, job: Callable[[random.Random], None], dice: random.Random) -> None:
        try:
            job(dice)
        except Exception as error:
            self.errors.append(f"a user met {error!r} in {job.__name__}")

    # Starts

    def _start_some(self, dice: random.Random) -> None:
        while not self._stop.is_set():
            if self._is_full():
                self._stop.wait(0.05)
                continue
            with self._lock:
                number = next(self._numbers, None)
            if number is None:
                return
            kind = dice.choices([*SHARES], [*SHARES.values()])[0]
            if kind != "linked" and dice.random() < OUTBOX_SHARE:
                self._start_in_transaction(kind, number, dice)
            else:
                self._started(kind, number, self._start(kind, number))

    def _start(self, kind: str, number: int) -> str:
        """Start a workflow: until it is known to be started, the same one again."""
        if kind == "linked":
            task = self._task("linked")
            links = chain(task.s([], "c0"), task.s("c1"), task.s("c2"))
            return str(self._insist(lambda: links.apply_async()).id)
        workflow_id = str(uuid.uuid4())
        self._insist(lambda: self._task(kind).apply_async((number,), task_id=workflow_id))
        return workflow_id

    def _start_in_transaction(self, kind: str, number: int, dice: random.Random) -> None:
        workflow_id, commits = str(uuid.uuid4()), dice.random() < 0.7
        try:
            with psycopg.connect(self.stage.postgres.url, connect_timeout=10) as connection:
                connection.execute("INSERT INTO purchase VALUES (%s)", [workflow_id])
                with durable.outbox(connection):
                    self._task(kind).apply_async((number,), task_id=workflow_id)
                if not commits:
                    connection.rollback()
                    self.undone.append(workflow_id)
                    return
        except (psycopg.OperationalError, exceptions.DatabaseUnavailable):
            if not self._was_committed(workflow_id):
                return
        self._started(kind, number, workflow_id)

    def _was_committed(self, workflow_id: str) -> bool:
        """Ask the other table of the transaction, whose answer was lost, until the database answers."""
        while True:
            try:
                with self.stage.sql() as connection:
                    found = connection.execute("SELECT FROM purchase WHERE workflow = %s", [workflow_id])
                    return found.fetchone() is not None
            except psycopg.OperationalError:
                time.sleep(0.05)

    def _started(self, kind: str, number: int, workflow_id: str) -> None:
        made = Started(workflow_id, kind, number)
        with self._lock:
            self.started.append(made)
            if kind == "receiving":
                self._unread.append(made)

    def _is_full(self) -> bool:
        with self._lock:
            if now() - self._counted_at > 0.2:
                self._counted_at = now()
                self._unfinished = self._count()
            return self._unfinished >= WINDOW

    def _count(self) -> int:
        try:
            with self.stage.sql() as connection:
                row = connection.execute(
                    "SELECT count(*) FROM celery_durable.workflow WHERE finished_at IS NULL"
                ).fetchone()
        except psycopg.Error:
            return 0  # it is away: the next start meets that
        return int(row[0]) if row else 0

    # Messages

    def _talk(self, dice: random.Random) -> None:
        while True:
            with self._lock:
                listener = self._unread.pop(0) if self._unread else None
            if listener is not None:
                self._send_all(listener, dice)
            elif self._all_started.wait(0.1):
                return

    def _send_all(self, listener: Started, dice: random.Random) -> None:
        """Numbered messages on two topics, some of them twice."""
        for turn in range(MESSAGES):
            for topic in ("chat", "talk"):
                for again in range(dice.choice([1, 1, 2])):
                    self._send(listener.id, f"{topic} {turn}", topic, may_be_over=again > 0)

    def _send(self, workflow_id: str, text: str, topic: str, *, may_be_over: bool) -> None:
        tries = 0

        def send() -> None:
            nonlocal tries
            tries += 1
            durable.send(workflow_id, text, topic=topic, idempotency_key=text, app=self.app)

        try:
            self._insist(send)
        except exceptions.WorkflowFinished:
            # The message had come before: it was the last one that the workflow waited for.
            if not may_be_over and tries == 1:
                raise

    # Steering

    def _steer(self, dice: random.Random) -> None:
        seen = 0
        while not self._stop.wait(0.1):
            with self._lock:
                fresh = [each for each in self.started[seen:] if each.kind == "long_running"]
                seen = len(self.started)
            for each in fresh:
                self._stop.wait(dice.uniform(0, 1))
                if self._insist(lambda each=each: durable.cancel_workflow(each.id, app=self.app)):  # type: ignore[misc]
                    each.cancelled_at = now()
                    if dice.random() < 0.6:
                        self._stop.wait(dice.uniform(0, 1.5))
                        each.resumed_at = now()
                        self._resume(each)

    def _resume(self, each: Started) -> None:
        # A conflict: an answer was lost, it was resumed, and may have ended.
        with suppress(exceptions.WorkflowConflict):
            self._insist(lambda: durable.resume_workflow(each.id, app=self.app))

    def _task(self, kind: str) -> Any:
        return self.app.tasks[f"tests.chaos.app.{kind}"]

    def _insist(self, call: Callable[[], T]) -> T:
        """Call until the database answers, as whoever is told to try again does."""
        while True:
            try:
                return call()
            except exceptions.DatabaseUnavailable:
                time.sleep(0.05)
