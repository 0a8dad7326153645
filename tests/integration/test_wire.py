"""What a workflow costs on the wire: every round trip to Postgres is counted, and each write is one of them."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

import celery_durable as durable
from celery_durable.engine import context, runner
from celery_durable.engine.context import Attempt, boot_time, running
from celery_durable.engine.outcome import Completed
from celery_durable.store.rows import Claim
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.proxy import PostgresProxy

pytestmark = [pytest.mark.matrix, pytest.mark.oldest]

WRITES = re.compile(r"\b(INSERT INTO|UPDATE|DELETE FROM|FOR UPDATE|FOR KEY SHARE)\b")
#: The end is two requests, of which the second one doesn't wait for the first one's answer.
START, CLAIM, STEP, REPLAYED, FINISH = 1, 1, 1, 0, 2
RECEIVE, SUSPEND = 1, 1


@pytest.fixture
def shop(proxy: PostgresProxy, broker_url: str) -> Iterator[Inprocess]:
    """An app on the proxy, its connection open."""
    shop = Inprocess(proxy.url, broker_url)
    yield shop
    shop.close()


def tasks(shop: Inprocess) -> tuple[Any, Any]:
    @shop.step(name="work", autoretry_for=(ValueError,), default_retry_delay=0)
    def work(number: int, failures: int = 0) -> int:
        if durable.current and durable.current.step.attempt <= failures:
            raise ValueError(number)
        return number

    @shop.workflow(name="order")
    def order(count: int, failures: int = 0) -> int:
        return sum(work(number, failures) for number in range(count))

    return order, work


class Count:
    """Round trips and writes since the last look, or since the beginning."""

    def __init__(self, proxy: PostgresProxy) -> None:
        self.proxy = proxy
        proxy.reset()

    def __call__(self) -> int:
        statements, count = self.proxy.statements(), self.proxy.round_trips()
        assert len(statements) == count, "each statement is a round trip, with nothing around it"
        self.proxy.reset()
        return count

    def writes(self) -> int:
        return sum(bool(WRITES.search(statement)) for statement in self.proxy.statements())


def test_a_start_is_one_round_trip(shop: Inprocess, proxy: PostgresProxy) -> None:
    """The row with its message, nothing else; from the first one on a connection."""
    order, _ = tasks(shop)
    count = Count(proxy)
    for number in range(10):
        order.apply_async((1,), task_id=f"w{number}")
        assert (count.writes(), count()) == (START, START)


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_a_run_is_a_claim_its_steps_and_an_end(shop: Inprocess, proxy: PostgresProxy, sql: Sql, steps: int) -> None:
    """One round trip and one write each; on a new connection as on one that has prepared its statements."""
    order, _ = tasks(shop)
    for number in range(8):
        order.apply_async((steps,), task_id=f"w{number}")
        message = shop.message(f"w{number}")
        count = Count(proxy)
        assert shop.deliver(f"w{number}", message) == sum(range(steps))
        assert (count.writes(), count()) == (CLAIM + steps * STEP + FINISH,) * 2
    assert sql.value("SELECT count(*) FROM celery_durable.checkpoint") == 8 * steps


def test_each_arrow_has_its_statement(shop: Inprocess, proxy: PostgresProxy) -> None:
    """Nothing is hidden in an average."""
    order, _ = tasks(shop)
    order.apply_async((2,), task_id="w1")
    message = shop.message("w1")
    proxy.reset()
    shop.deliver("w1", message)
    described = [re.search(r"^-- (.*)", text)[1] for text in proxy.statements()]  # type: ignore[index]
    assert [text.split(" ", 2)[:2] for text in described] == [
        ["One", "process"], ["A", "step,"], ["A", "step,"], ["An", "attempt"], ["Wake", "those"],
    ]  # fmt: skip


def test_an_end_and_who_awaits_it_are_one_round_trip(shop: Inprocess, proxy: PostgresProxy) -> None:
    """The second request is sent before the first one is answered."""
    order, _ = tasks(shop)
    order.apply_async((0,), task_id="w1")
    message = shop.message("w1")
    ended = proxy.hold("An attempt ends", when="after")
    with ThreadPoolExecutor(1) as thread:
        run = thread.submit(shop.deliver, "w1", message)
        wait_until(lambda: any("Wake those" in text for text in proxy.statements()), message="both were sent")
        assert not run.done()
        ended.release()
        assert run.result() == 0


def test_a_replayed_step_costs_nothing(shop: Inprocess, proxy: PostgresProxy) -> None:
    """The history comes with the claim, however long it is."""
    order, _ = tasks(shop)
    order.apply_async((20,), task_id="w1")
    message = shop.message("w1")
    leave_after(shop, "w1", 18)
    count = Count(proxy)
    assert shop.deliver("w1", message) == sum(range(20))
    assert (count.writes(), count()) == (CLAIM + 2 * STEP + FINISH,) * 2


def leave_after(shop: Inprocess, workflow_id: str, steps: int) -> None:
    """An attempt that completes some steps, then is handed over."""
    attempt = begin(shop, workflow_id)
    with running(attempt):
        for number in range(steps):
            shop.app.tasks["work"](number, 0)
    assert shop.installation.store.workflows.release(attempt.fence, 60, patience=0)


def begin(shop: Inprocess, workflow_id: str) -> Attempt:
    claim = claimed(shop, workflow_id)
    return Attempt.of(shop.installation.engine, "order", claim, boot_time())


def claimed(shop: Inprocess, workflow_id: str) -> Claim:
    claim = shop.installation.store.workflows.claim(
        workflow_id, "order", uuid.uuid4(), shop.node, retries=0, patience=0
    )
    assert claim is not None
    return claim


def test_each_part_by_itself(shop: Inprocess, proxy: PostgresProxy) -> None:
    """A start; a claim, which brings the history; a step that was kept, one that wasn't; the end."""
    order, work = tasks(shop)
    count = Count(proxy)
    order.apply_async((2,), task_id="w1")
    assert count() == START
    leave_after(shop, "w1", 1)
    proxy.reset()
    attempt = begin(shop, "w1")
    assert count() == CLAIM
    with running(attempt):
        assert work(0, 0) == 0
        assert count() == REPLAYED
        assert work(1, 0) == 1
        assert count() == STEP
    outcome = runner.call_body(attempt, lambda: 1, lambda error: None)
    assert count() == 0
    assert isinstance(outcome, Completed)
    runner.finish(attempt, outcome, dispatched=True)
    assert count() == FINISH


@pytest.mark.parametrize("kind", ["function", "task", "lambda", "async"])
def test_a_step_of_any_kind(shop: Inprocess, proxy: PostgresProxy, kind: str) -> None:
    """One round trip when it is new, none when it is replayed; the rest is the wait in between."""
    step = step_of(shop, kind)

    def order(count: int) -> int:
        return sum(step(number) for number in range(count)) + durable.recv()

    async def async_order(count: int) -> int:
        return sum([await step(number) for number in range(count)]) + await durable.arecv()

    shop.workflow(async_order if kind == "async" else order, name="shop").apply_async((5,), task_id="w1")
    message = shop.message("w1")
    count = Count(proxy)
    shop.deliver("w1", message)
    assert count() == CLAIM + 5 * STEP + RECEIVE + SUSPEND
    durable.send("w1", 100, app=shop.app)
    proxy.reset()
    assert shop.deliver("w1", message) == 110
    assert count() == CLAIM + 5 * REPLAYED + RECEIVE + FINISH


def step_of(shop: Inprocess, kind: str) -> Any:
    def plain(number: int) -> int:
        return number

    async def wait(number: int) -> int:
        return number

    if kind == "task":
        return durable.as_step(shop.app.task(plain, name="plain", shared=False))
    if kind == "lambda":
        return durable.as_step(lambda number: number, name="inline")
    return durable.as_step(wait, name="wait") if kind == "async" else tasks(shop)[1]


@pytest.mark.parametrize("failures", [1, 3])
def test_a_failed_try_costs_one(shop: Inprocess, proxy: PostgresProxy, failures: int) -> None:
    """It is never given back; the outcome then costs one as always."""
    order, _ = tasks(shop)
    order.apply_async((2, failures), task_id="w1")
    message = shop.message("w1")
    count = Count(proxy)
    assert shop.deliver("w1", message) == 1
    assert (count.writes(), count()) == (CLAIM + 2 * (failures + STEP) + FINISH,) * 2


def test_the_first_step_after_a_crash_costs_one_more(shop: Inprocess, proxy: PostgresProxy) -> None:
    """Its try is written before its body; the next step costs one again."""
    order, _ = tasks(shop)
    order.apply_async((3,), task_id="w1")
    message = shop.message("w1")
    attempt = begin(shop, "w1")
    verdict = shop.installation.codec.encode_error(ValueError())
    rescued = shop.installation.store.workflows.rescue(
        attempt.fence.node, ["w1"], lease=15, verdict=verdict, error="no", limit=9, patience=0
    )
    assert rescued == [("w1", "ENQUEUED")]
    count = Count(proxy)
    assert shop.deliver("w1", message) == 3
    assert (count.writes(), count()) == (CLAIM + 1 + 3 * STEP + FINISH,) * 2


def test_a_stale_look_costs_one_read(shop: Inprocess, proxy: PostgresProxy) -> None:
    """Only before a body that starts more than a second after the last statement."""
    order, work = tasks(shop)
    order.apply_async((3,), task_id="w1")
    attempt = begin(shop, "w1")
    count = Count(proxy)
    with running(attempt):
        work(0)
        assert count() == STEP
        attempt.last_look -= context.LONGEST_BLIND + 0.1
        work(1)
        assert (count.writes(), count()) == (STEP, STEP + 1)
        work(2)
        assert count() == STEP


def test_the_slow_path_costs_one_more(shop: Inprocess, proxy: PostgresProxy) -> None:
    """When the fast statement writes nothing, the slow one says why; the run ends in a hand-over."""
    order, _ = tasks(shop)
    order.apply_async((3,), task_id="w1")
    attempt = begin(shop, "w1")
    shop.drain()
    count = Count(proxy)
    with running(attempt), pytest.raises(durable.exceptions.HandedOver):
        shop.app.tasks["work"](0)
    assert count() == STEP + 1


def test_a_lost_answer_costs_the_repetition(shop: Inprocess, proxy: PostgresProxy) -> None:
    """The step was committed: its repetition is refused, and the slow statement adopts what is there."""
    order, work = tasks(shop)
    order.apply_async((1,), task_id="w1")
    attempt = begin(shop, "w1")
    cut = proxy.cut(matching="INSERT INTO", when="after")
    with running(attempt):
        assert work(7) == 7
    cut.wait_reached(0)
    (step,) = shop.installation.store.checkpoints.of_workflow("w1", patience=0)
    assert (step.key, step.payload and step.payload.data) == ("work", b"7")


def test_a_doubled_message_costs_a_look(shop: Inprocess, proxy: PostgresProxy) -> None:
    """And changes nothing."""
    order, _ = tasks(shop)
    order.apply_async((1,), task_id="w1")
    message = shop.message("w1")
    shop.deliver("w1", message)
    count = Count(proxy)
    shop.deliver("w1", message)
    assert count() == CLAIM + 1


def test_a_step_outside_a_workflow_costs_nothing(shop: Inprocess, proxy: PostgresProxy) -> None:
    """It is a plain call."""
    _, work = tasks(shop)
    count = Count(proxy)
    assert work(5) == 5
    assert count() == 0
