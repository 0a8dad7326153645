"""Runs an app's workflows in the calling thread, one statement after the other: the real engine on the real store.

It stands in for a worker: it takes what a worker would have got from the broker from Postgres, lets Celery's own tracer
run it, and does the duties of the recovery. Time that workflows wait for is skipped, or is the test's affair.
"""

from __future__ import annotations

import os
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

from celery import Celery
from celery.app import trace
from celery.app.task import Task

from .. import (
    states,
    worker,  # noqa: F401 - what a worker has loaded before a body runs
)
from ..client import CALLER_PATIENCE, row_of
from ..envelope import HEADER, Envelope
from ..exceptions import ConfigurationError
from ..installation import Installation, installed_on
from ..recovery import Recovery
from ..request import NODE_PROPERTY
from ..store import NodeFacts
from ..store.rows import Beat, StoredMessage
from ..store.testkit import TestKit

#: Attempts after which a test isn't worth waiting for.
MOST_ATTEMPTS = 10_000
#: What a float of seconds may lack of a timer in microseconds.
_BEYOND = 0.001
_HOSTNAME = "bench@tests"


class Killed(SystemExit):
    """Ends an attempt as SIGKILL would: nothing of it is recorded after this."""

    def __init__(self) -> None:
        super().__init__(9 - 256)  # as Celery's pool ends a process on a signal


class AtEnd(Protocol):
    """Watches a workflow until its end."""

    def check(self) -> None:
        """Say what is wrong with the run that has ended."""

    def leave(self) -> None:
        """Watch no longer."""


class Bench:
    """The workflows of one app, run here."""

    def __init__(self, installation: Installation) -> None:
        self.installation = installation
        self.app: Celery = installation.app
        self.kit = TestKit(installation.store)
        self.skips_time = True
        #: What is called when an attempt has died, before others do what remains.
        self.died: Callable[[], None] = lambda: None
        #: What watches workflows that have begun with some steps done, by id.
        self.watched: dict[str, AtEnd] = {}
        self._node = uuid.uuid4()
        self._workflows = installation.store.workflows

    # What a test asks for.

    def settle(self, workflow_id: str | None = None) -> None:
        """Run everything until nothing can go on without something from outside.

        Where time is skipped, that is until this workflow has ended, or waits for more than time. Raises
        AssertionError for one that has no end.
        """
        refused: set[str] = set()
        for _ in range(MOST_ATTEMPTS):
            message = self.kit.runnable(refused)
            if message is not None:
                if not self.deliver(message):
                    refused.add(message.workflow_id)
            elif self.sweep() or self._skip_time(workflow_id):
                refused.clear()
            else:
                return
        raise AssertionError(
            f"The workflow {workflow_id} has been run {MOST_ATTEMPTS:,} times and goes on: it seems to have no end. "
            "Use the fixture durable_clock, with which time only passes when the test says so."
        )

    def advance(self, seconds: float) -> None:
        """Let time pass, and run what becomes due on the way, in its order."""
        self.check_clock()
        self.settle_now()
        while (left := self.kit.next_timer(with_deadlines=True)) is not None and left <= seconds:
            step = max(left, 0.0) + _BEYOND
            self.kit.advance(step)
            seconds = max(seconds - step, 0.0)
            self.settle_now()
        self.kit.advance(seconds)
        self.settle_now()

    def settle_now(self) -> None:
        """Run what can go on at this time."""
        skips, self.skips_time = self.skips_time, False
        try:
            self.settle()
        finally:
            self.skips_time = skips

    def check_clock(self) -> None:
        """Raise ConfigurationError where time can't be set."""
        if not self.kit.has_clock:
            raise ConfigurationError(
                "Time can only be set in a database of the test kit: let the app use the URL of the fixture "
                "durable_postgres, which durable_app does, and set no search_path in DATABASE_URL or PGOPTIONS."
            )

    # What a worker does.

    def deliver(self, message: StoredMessage) -> bool:
        """Let Celery's tracer run one message; False if it has found nothing to do."""
        envelope = Envelope.of_stored(message)
        headers = envelope.headers
        task = self._task(headers["task"])
        args, kwargs, embed = self.installation.codec.load_message(
            envelope.body, envelope.content_type, envelope.content_encoding, f"The message of {message.workflow_id}"
        )
        request = {
            **headers, **embed, "args": args, "kwargs": kwargs, "hostname": _HOSTNAME, "is_eager": False,
            "delivery_info": {"exchange": envelope.exchange, "routing_key": envelope.routing_key},
            "properties": {**envelope.properties, NODE_PROPERTY: str(self._node)}, "ignore_result": True,
            HEADER: {"queue": envelope.queue},
        }  # fmt: skip
        workflow_id = message.workflow_id
        self.beat()
        run = trace.build_tracer(task.name, task, app=self.app)
        try:
            run(workflow_id, args, kwargs, request)
        except Killed:
            self.died()
            self.bury()
            return True
        self._workflows.confirm(self._node, [workflow_id], patience=CALLER_PATIENCE)
        row = row_of(self.installation, workflow_id)
        return row.state != states.ENQUEUED or row.attempt != message.attempt

    def beat(self, as_of: Any = None) -> Beat:
        """Say that this node lives, and that nothing runs on it."""
        facts = NodeFacts(self._node, _HOSTNAME, os.getpid(), self.installation.config.lease)
        return self.installation.store.nodes.beat(
            facts, active=[], accepted={}, as_of=as_of, draining=False, able=False, patience=CALLER_PATIENCE
        )

    def bury(self) -> None:
        """Do what the others do when this process has died: enqueue again what it had, and deliver its outcomes."""
        self.beat(self.beat().seen)
        self.recovery(_drop).rescue()
        self._redispatch()

    def sweep(self) -> bool:
        """Do the duties of the recovery; tell whether there was something to do."""
        recovery = self.recovery(_drop)
        duties = (recovery.expire, recovery.cancel, recovery.tell, recovery.notify, recovery.wake)
        return sum([*(duty() for duty in duties), self._redispatch()]) > 0

    def recovery(self, send: Callable[[list[StoredMessage]], Sequence[str]]) -> Recovery:
        """Return the duties, which send with ``send``."""
        return self.installation.recovery(send, patience=CALLER_PATIENCE)

    def _redispatch(self) -> int:
        """Deliver the outcomes of workflows whose owners are gone."""
        messages: list[StoredMessage] = []

        def keep(batch: list[StoredMessage]) -> Sequence[str]:
            messages.extend(batch)
            return ()

        self.recovery(keep).redispatch()
        for message in messages:
            self.deliver(message)
        return len(messages)

    def _skip_time(self, workflow_id: str | None) -> bool:
        """Set the clock to the next timer, if somebody wants to see the end of a workflow and it has none yet."""
        if not self.skips_time or workflow_id is None:
            return False
        row = self._workflows.by_id(workflow_id, patience=CALLER_PATIENCE)
        if row is not None and row.state in states.FINAL:
            return False
        left = self.kit.next_timer(with_deadlines=False)
        if left is None:
            return False
        self.check_clock()
        self.kit.advance(max(left, 0.0) + _BEYOND)
        return True

    def _task(self, name: str) -> Task:
        task = self.app.tasks.get(name)
        if task is None:
            raise ConfigurationError(
                f"The task {name} isn't registered on the app that the test uses: import its module before."
            )
        return task


def _drop(messages: list[StoredMessage]) -> Sequence[str]:
    """Send nothing: what is enqueued is found in Postgres."""
    return ()


_benches: weakref.WeakKeyDictionary[Installation, Bench] = weakref.WeakKeyDictionary()


def bench_of(installation: Installation) -> Bench | None:
    """Return the bench that an app is on, if it is on one."""
    return _benches.get(installation)


@contextmanager
def on_bench(app: Celery) -> Iterator[Bench]:
    """Put an app on a bench for the block, or use the one that it is on."""
    installation = installed_on(app)
    found = _benches.get(installation)
    if found is not None:
        yield found
        return
    with as_in_worker(), _strict(installation):
        bench = _benches[installation] = Bench(installation)
        try:
            yield bench
        finally:
            for watch in bench.watched.values():
                watch.leave()
            del _benches[installation]
            installation.store.nodes.leave(bench._node, patience=0)


@contextmanager
def _strict(installation: Installation) -> Iterator[None]:
    """Let no wait take time, and let a mistake of which a worker only warns be an error."""
    usual = installation.engine
    vars(installation)["engine"] = replace(usual, suspend_after=0.0, strict=True)
    try:
        yield
    finally:
        vars(installation)["engine"] = usual


@contextmanager
def as_in_worker() -> Iterator[None]:
    """Let a task that calls Celery's own ``__call__`` keep its one request, as Celery does in its workers."""
    if getattr(Task, "_stackprotected", False):
        yield
        return
    trace._install_stack_protection()
    try:
        yield
    finally:
        del Task._stackprotected
        Task.__call__ = trace._patched.pop("BaseTask.__call__")
