"""The operations of which docs/cost-model.md tells, each as something to prepare and something to measure."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from typing import Any

import celery_durable as durable
from celery_durable.engine import runner
from celery_durable.engine.context import Attempt, boot_time, running
from celery_durable.engine.outcome import Completed, Outcome, Waiting
from celery_durable.recovery import Recovery
from celery_durable.store import NodeFacts
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.inprocess import Inprocess

#: What is done at once where it is done for many.
MANY = 20
WAKE = f"wake, each of {MANY}"

#: How long finished workflows are kept that are to be pruned.
_AT_ONCE = {"SUCCESS": 0.0}

Act = Callable[[], Any]


@dataclass(frozen=True)
class Operation:
    """``prepare`` makes everything ready and returns what is measured; that is for so many workflows."""

    name: str
    prepare: Callable[[Bench], Act]
    many: int = 1


class Bench:
    """An app with some workflows and steps, and the way to bring a workflow to where something begins."""

    def __init__(self, url: str, sql: Sql) -> None:
        self.shop, self.sql = Inprocess(url, "memory://"), sql
        self.app, self.node = self.shop.app, self.shop.node
        self.store, self.engine = self.shop.installation.store, self.shop.installation.engine
        self._numbers = count()

        @self.shop.step(name="shop.charge", autoretry_for=(ValueError,), default_retry_delay=0.001)
        def charge(order_id: str, failures: int = 0) -> str:
            if durable.current.step.attempt <= failures:
                raise ValueError("The payment service is busy.")
            return f"payment of {order_id}"

        @self.shop.workflow(name="shop.fulfil")
        def fulfil(order_id: str) -> str:
            return f"order {order_id} is done"

        self.charge, self.fulfil = charge, fulfil

    def things(self, many: int) -> dict[str, Act]:
        """Return what can be put into the database, each with the way to do it so many times, once a call."""
        attempt, *others = [self.running() for _ in range(many + 1)]
        return {
            "a finished workflow": lambda: self.finish(self.running()),
            "a step": lambda: self.step(attempt),
            "a suspension, or another end of an attempt": lambda: runner.hand_over(others.pop()),
            "a message": lambda: durable.send(attempt.id, {"parcel": 7}, app=self.app),
        }

    def ready(self, operation: Operation) -> Act:
        """Prepare an operation on a node that lives."""
        self.beat()
        return operation.prepare(self)

    def new_id(self) -> str:
        """Return an id as long as those that Celery makes."""
        return str(uuid.UUID(int=next(self._numbers)))

    def start(self) -> str:
        """Start a workflow."""
        workflow_id: str = self.fulfil.apply_async(("order-42",), task_id=self.new_id()).id
        return workflow_id

    def claim(self, workflow_id: str) -> Attempt:
        """Let this node's process take a workflow."""
        claim = self.store.workflows.claim(
            workflow_id, "shop.fulfil", uuid.uuid4(), self.node, retries=0, patience=0
        )  # fmt: skip
        assert claim is not None
        return Attempt.of(self.engine, "shop.fulfil", claim, boot_time(), send=lambda messages: None)

    def running(self) -> Attempt:
        """Return an attempt that has just begun."""
        return self.claim(self.start())

    def step(self, attempt: Attempt, failures: int = 0) -> None:
        """Let an attempt call its next step."""
        with running(attempt):
            self.charge("order-42", failures)

    def until(self, attempt: Attempt, body: Act) -> Outcome:
        """Run a workflow function; nothing of its end is written yet."""
        return runner.call_body(attempt, body, lambda error: None)

    def wait(self, attempt: Attempt, body: Act) -> None:
        """Run a workflow function until it waits without a worker."""
        outcome = self.until(attempt, body)
        assert isinstance(outcome, Waiting), outcome
        runner.suspend(attempt, outcome)

    def finish(self, attempt: Attempt, *, dispatched: bool = True) -> None:
        """End an attempt with a result."""
        outcome = self.until(attempt, lambda: "order 42 is done")
        assert isinstance(outcome, Completed)
        runner.finish(attempt, outcome, dispatched=dispatched)

    def recovery(self) -> Recovery:
        """Return the duties of a sweep."""
        return self.shop.installation.recovery(lambda messages: (), patience=0)

    def times(self, number: int, act: Act) -> None:
        """Do something so many times, on a node that lives."""
        for _ in range(number):
            self.beat()
            act()

    def beat(self) -> None:
        """Write a heartbeat of a node on which four workflows run."""
        facts = NodeFacts(self.node, "worker@test", 1, 15.0)
        active = [f"{self.node}-{number}" for number in range(4)]
        self.store.nodes.beat(facts, active=active, accepted={}, as_of=None, draining=False, patience=0)

    def close(self) -> None:
        """Close the connections."""
        self.shop.close()


def _start(bench: Bench) -> Act:
    return bench.start


def _enqueue_many(bench: Bench) -> Act:
    signatures = [bench.fulfil.s("order-42").set(task_id=bench.new_id()) for _ in range(MANY)]
    return lambda: durable.enqueue_many(signatures)


def _claim(bench: Bench) -> Act:
    workflow_id = bench.start()
    return lambda: bench.claim(workflow_id)


def _claim_with_history(bench: Bench) -> Act:
    attempt = bench.running()
    for _ in range(20):
        bench.step(attempt)
    runner.hand_over(attempt)
    return lambda: bench.claim(attempt.id)


def _step(bench: Bench) -> Act:
    attempt = bench.running()
    return lambda: bench.step(attempt)


def _replayed_step(bench: Bench) -> Act:
    first = bench.running()
    bench.step(first)
    runner.hand_over(first)
    attempt = bench.claim(first.id)
    return lambda: bench.step(attempt)


def _failed_try(bench: Bench) -> Act:
    attempt = bench.running()
    return lambda: bench.step(attempt, failures=1)


def _sleep(bench: Bench) -> Act:
    attempt = bench.running()
    return lambda: bench.wait(attempt, lambda: durable.sleep(3600))


def _wake(bench: Bench) -> Act:
    for _ in range(MANY):
        bench.wait(bench.running(), lambda: durable.sleep(3600))
    bench.sql.execute("UPDATE celery_durable.workflow SET wake_at = clock_timestamp() WHERE state = 'SUSPENDED'")
    return bench.recovery().wake


def _send(bench: Bench) -> Act:
    attempt = bench.running()
    return lambda: durable.send(attempt.id, {"parcel": 7}, topic="parcel", app=bench.app)


def _send_to_one_that_waits(bench: Bench) -> Act:
    attempt = bench.running()
    bench.wait(attempt, lambda: durable.recv("parcel"))
    return lambda: durable.send(attempt.id, {"parcel": 7}, topic="parcel", app=bench.app)


def _recv(bench: Bench) -> Act:
    attempt = bench.running()
    durable.send(attempt.id, {"parcel": 7}, topic="parcel", app=bench.app)
    return lambda: bench.until(attempt, lambda: durable.recv("parcel"))


def _recv_nothing(bench: Bench) -> Act:
    attempt = bench.running()
    return lambda: bench.wait(attempt, lambda: durable.recv("parcel"))


def _set_event(bench: Bench) -> Act:
    attempt = bench.running()
    return lambda: bench.until(attempt, lambda: durable.set_event("state", "packed"))


def _child(bench: Bench) -> Act:
    attempt = bench.running()
    return lambda: bench.until(attempt, lambda: bench.fulfil.delay("order-43"))


def _await_child(bench: Bench) -> Act:
    attempt = bench.running()
    return lambda: bench.wait(attempt, lambda: bench.fulfil.delay("order-43").get())


def _finish(bench: Bench) -> Act:
    attempt = bench.running()
    return lambda: bench.finish(attempt)


def _confirm(bench: Bench) -> Act:
    attempts = [bench.running() for _ in range(MANY)]
    for attempt in attempts:
        bench.finish(attempt, dispatched=False)
    ids = [attempt.id for attempt in attempts]
    return lambda: bench.store.workflows.confirm(bench.node, ids, patience=0)


def _hand_over(bench: Bench) -> Act:
    attempt = bench.running()
    return lambda: runner.hand_over(attempt)


def _cancel(bench: Bench) -> Act:
    workflow_id = bench.start()
    return lambda: durable.cancel_workflow(workflow_id, app=bench.app)


def _resume(bench: Bench) -> Act:
    workflow_id = bench.start()
    durable.cancel_workflow(workflow_id, app=bench.app)
    return lambda: durable.resume_workflow(workflow_id, app=bench.app)


def _rescue(bench: Bench) -> Act:
    ids = [bench.running().id for _ in range(MANY)]
    return lambda: bench.recovery().rescue(bench.node, ids)


def _heartbeat(bench: Bench) -> Act:
    return bench.beat


def _idle_sweep(bench: Bench) -> Act:
    bench.recovery().sweep()
    return bench.recovery().sweep


def _prune(bench: Bench) -> Act:
    bench.store.workflows.prune(kept=_AT_ONCE, limit=100_000, patience=0)
    for _ in range(MANY):
        attempt = bench.running()
        for _ in range(3):
            bench.step(attempt)
        bench.finish(attempt)
    return lambda: bench.store.workflows.prune(kept=_AT_ONCE, limit=MANY, patience=0)


def operations() -> Iterator[Operation]:
    """Return all operations, as a workflow meets them."""
    yield Operation("start", _start)
    yield Operation(f"`enqueue_many`, each of {MANY}", _enqueue_many, MANY)
    yield Operation("claim", _claim)
    yield Operation("claim, with a history of 20 steps", _claim_with_history)
    yield Operation("step", _step)
    yield Operation("step, replayed", _replayed_step)
    yield Operation("step, one try of it failed", _failed_try)
    yield Operation("`sleep`, without the worker", _sleep)
    yield Operation(WAKE, _wake, MANY)
    yield Operation("`send`", _send)
    yield Operation("`send`, to one that waits for it", _send_to_one_that_waits)
    yield Operation("`recv`, the message is there", _recv)
    yield Operation("`recv`, it isn't: wait", _recv_nothing)
    yield Operation("`set_event`", _set_event)
    yield Operation("child", _child)
    yield Operation("child, and `get()`: wait", _await_child)
    yield Operation("finish", _finish)
    yield Operation(f"confirm, each of {MANY}", _confirm, MANY)
    yield Operation("hand-over", _hand_over)
    yield Operation("cancel", _cancel)
    yield Operation("resume", _resume)
    yield Operation(f"rescue, each of {MANY}", _rescue, MANY)
    yield Operation("heartbeat", _heartbeat)
    yield Operation("sweep that finds nothing", _idle_sweep)
    yield Operation(f"prune, each of {MANY} with 3 steps", _prune, MANY)
