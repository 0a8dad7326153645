"""Many workflows started at once, and none started twice: `enqueue_many`, `deduplication_id`."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest
from celery import chain, group

import celery_durable as durable
from celery_durable.exceptions import ConfigurationError, NotAllowedInStep, SerializationError, WorkflowConflict
from celery_durable.handle import WorkflowHandle
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.proxy import PostgresProxy
from tests.integration.attempts import begin, crash, order, status

pytestmark = pytest.mark.oldest

COUNT = "SELECT count(*) FROM celery_durable.workflow WHERE name = 'checkout'"


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """One database for all of these tests, which is cheaper."""
    return emptied_database_url


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    shop = Inprocess(database_url, broker_url)
    yield shop
    shop.close()


@pytest.fixture
def checkout(shop: Inprocess) -> Any:
    """A workflow that says its number."""

    @shop.workflow(name="checkout")
    def checkout(number: int = 0) -> int:
        return number

    return checkout


def nothing() -> None:
    """A workflow that does nothing."""


def double(number: int) -> int:
    return 2 * number


def told(shop: Inprocess, workflow_id: str) -> durable.WorkflowStatus:
    return durable.get_workflow_status(workflow_id, app=shop.app)


def sent_by_sweep(shop: Inprocess) -> list[str]:
    """The workflows whose messages a sweep sends."""
    sent: list[str] = []

    def send(messages: Any) -> list[str]:
        sent.extend(message.workflow_id for message in messages)
        return []

    shop.installation.recovery(send, patience=0).sweep()
    return sent


def test_handles_are_in_the_order_of_the_signatures(shop: Inprocess, checkout: Any) -> None:
    """Each is that of its own workflow."""
    handles = durable.enqueue_many(checkout.s(number) for number in range(10))
    assert [told(shop, each.id).args for each in handles] == [(number,) for number in range(10)]
    assert shop.run(handles[7].id) == handles[7].get(timeout=10) == 7


def test_many_are_started(shop: Inprocess, checkout: Any, sql: Sql) -> None:
    """More than one statement takes; all messages are on their way."""
    handles = durable.enqueue_many(checkout.s(number) for number in range(2500))
    assert len({each.id for each in handles}) == 2500
    assert sql.value(f"{COUNT} AND state = 'ENQUEUED' AND published_at IS NOT NULL") == 2500
    assert told(shop, handles[2499].id).args == (2499,)
    assert sent_by_sweep(shop) == []


def test_ten_thousand_cost_ten_inserts(proxy: PostgresProxy, broker: Broker, sql: Sql) -> None:
    """And ten looks at who has the ids; each has its message on its way, within a minute on a slow machine."""
    shop = Inprocess(proxy.url, broker.url)
    order = shop.workflow(nothing, name="checkout")
    durable.enqueue_many([order.s()])
    proxy.reset()
    began = time.monotonic()
    durable.enqueue_many(order.s() for _ in range(10_000))
    assert time.monotonic() - began < 60
    statements = proxy.statements()
    assert sum("INSERT INTO" in each for each in statements) == 10
    assert len(statements) <= 20
    assert sql.value(f"{COUNT} AND published_at IS NOT NULL") == 10_001
    with shop.app.connection_for_write() as connection:
        assert connection.default_channel.queue_declare("celery", passive=True).message_count == 10_001
    shop.close()


def test_none_are_started(shop: Inprocess) -> None:
    """That is no error."""
    assert durable.enqueue_many([]) == []


def test_options_of_the_signatures_count(shop: Inprocess, checkout: Any) -> None:
    """The queue, the delay, the limit, the id."""
    one, _ = durable.enqueue_many([
        checkout.s(1).set(queue="vip", task_id="one", workflow_timeout=60),
        checkout.s(2).set(countdown=1000),
    ])  # fmt: skip
    assert (one.id, told(shop, "one").queue) == ("one", "vip")
    shop.run("one")
    assert told(shop, "one").deadline is not None
    assert sent_by_sweep(shop) == []


def test_a_signature_says_what_compensates(shop: Inprocess, checkout: Any) -> None:
    """`on_cancel` in the options of a signature, as in a call."""
    refund = shop.workflow(nothing, name="refund")
    (handle,) = durable.enqueue_many([checkout.s(1).set(on_cancel=refund.s())])
    durable.cancel_workflow(handle.id, app=shop.app)
    assert [each.name for each in durable.list_workflows(parent_id=handle.id, app=shop.app)] == ["refund"]


def test_signatures_stay_as_they_are(shop: Inprocess, checkout: Any) -> None:
    """The same one twice is two workflows."""
    signature = checkout.s(1)
    one, two = durable.enqueue_many([signature, signature])
    assert one.id != two.id
    assert signature.options == {}


def test_again_with_the_same_ids_starts_nothing_twice(shop: Inprocess, checkout: Any, sql: Sql) -> None:
    """After an error one starts all of them again; those that are there stay as they are."""

    def start(numbers: range) -> list[str]:
        return [each.id for each in durable.enqueue_many(checkout.s(n).set(task_id=f"order-{n}") for n in numbers)]

    start(range(5))
    shop.run("order-3")
    assert start(range(10)) == [f"order-{number}" for number in range(10)]
    assert sql.value(COUNT) == 10
    assert (told(shop, "order-3").state, told(shop, "order-4").attempt) == ("SUCCESS", 0)


def test_one_id_twice_is_one_workflow(shop: Inprocess, checkout: Any, sql: Sql) -> None:
    """In one call as in two."""
    one, two = durable.enqueue_many([checkout.s(1).set(task_id="one"), checkout.s(1).set(task_id="one")])
    assert one.id == two.id == "one"
    assert sql.value(COUNT) == 1


def test_an_id_of_another_task_is_an_error(shop: Inprocess, checkout: Any) -> None:
    """It is named."""
    order(shop, nothing)
    with pytest.raises(WorkflowConflict, match="w1"):
        durable.enqueue_many([checkout.s(1), checkout.s(2).set(task_id="w1")])
    assert status(shop).name == "order"


def test_what_an_error_has_left_behind_was_sent(shop: Inprocess, checkout: Any, sql: Sql) -> None:
    """One id was taken: what was written nevertheless needn't wait for a message that nobody has sent."""
    order(shop, nothing)
    with pytest.raises(WorkflowConflict):
        durable.enqueue_many([checkout.s(1).set(task_id="one"), checkout.s(2).set(task_id="w1")])
    sent = "SELECT id FROM celery_durable.workflow WHERE name = 'checkout' AND published_at IS NOT NULL"
    assert [row.id for row in sql.all(sent)] == ["one"]


@pytest.mark.parametrize("wrong", ["group", "chain", "name", "task", "tuple"])
def test_only_signatures_are_started(shop: Inprocess, checkout: Any, sql: Sql, wrong: str) -> None:
    """Of one task each; the error says what it got, and nothing is started."""
    given = {
        "group": group(checkout.s(1), checkout.s(2)),
        "chain": chain(checkout.s(1), checkout.s(2)),
        "name": "checkout",
        "task": checkout,
        "tuple": (checkout, 1),
    }[wrong]
    with pytest.raises(ConfigurationError, match="signature"):
        durable.enqueue_many([checkout.s(1), given])
    assert sql.value(COUNT) == 0


def test_arguments_that_cannot_be_kept_start_nothing(shop: Inprocess, checkout: Any, sql: Sql) -> None:
    """As by `delay`."""
    with pytest.raises(SerializationError):
        durable.enqueue_many([checkout.s(1), checkout.s(object())])
    assert sql.value(COUNT) == 0


def test_two_apps_are_an_error(shop: Inprocess, checkout: Any, database_url: str, broker_url: str, sql: Sql) -> None:
    """One call is for one app."""
    other = Inprocess(database_url, broker_url)
    try:
        foreign = other.workflow(nothing, name="foreign")
        with pytest.raises(ConfigurationError, match="one app"):
            durable.enqueue_many([checkout.s(1), foreign.s()])
        assert sql.value(COUNT) == 0
    finally:
        other.close()


@pytest.mark.parametrize("kind", ["step", "task"])
def test_steps_and_plain_tasks_are_started_as_durably(shop: Inprocess, kind: str) -> None:
    """As workflows of nothing but that; the handles read Postgres, as all do."""
    declare = {"step": shop.step, "task": shop.app.task}[kind]
    task = declare(double, name="double", **({} if kind == "step" else {"shared": False}))
    (handle,) = durable.enqueue_many([task.s(21)])
    assert told(shop, handle.id).name == "celery_durable.step"
    assert shop.run(handle.id) == 42
    assert isinstance(handle, WorkflowHandle)
    assert handle.get(timeout=10) == 42


def test_a_broker_that_is_away_only_delays_them(database_url: str, sql: Sql) -> None:
    """The next sweep sends what couldn't be sent."""
    shop = Inprocess(database_url, "redis://localhost:1/0")
    try:
        task = shop.workflow(double, name="checkout")
        handles = durable.enqueue_many(task.s(number) for number in range(5))
        assert sql.value(COUNT) == 5
        assert set(sent_by_sweep(shop)) == {each.id for each in handles}
    finally:
        shop.close()


def test_they_belong_to_the_callers_transaction(shop: Inprocess, checkout: Any, database_url: str, sql: Sql) -> None:
    """In an outbox they are started by its commit, and a rollback leaves nothing."""
    with psycopg.connect(database_url) as connection:
        for end in (connection.rollback, connection.commit):
            with durable.outbox(connection):
                handles = durable.enqueue_many(checkout.s(number) for number in range(20))
            assert sql.value(COUNT) == 0
            end()
    assert sql.value(COUNT) == 20
    assert [told(shop, each.id).args for each in handles] == [(number,) for number in range(20)]
    assert set(sent_by_sweep(shop)) == {each.id for each in handles}


def test_an_id_of_another_task_is_an_error_in_an_outbox_too(shop: Inprocess, checkout: Any, database_url: str) -> None:
    """Its handle would be that of somebody else's workflow."""
    order(shop, nothing)
    with (
        psycopg.connect(database_url) as connection,
        durable.outbox(connection),
        pytest.raises(WorkflowConflict, match="w1"),
    ):
        durable.enqueue_many([checkout.s(1).set(task_id="w1")])


def test_in_a_workflow_they_are_children(shop: Inprocess, checkout: Any) -> None:
    """Of it, in order, and found again by a replay."""

    def body() -> list[str]:
        handles = durable.enqueue_many(checkout.s(number) for number in range(5))
        durable.recv()
        return [each.id for each in handles]

    order(shop, body)
    shop.run("w1")
    children = {each.id: each for each in durable.list_workflows(parent_id="w1", app=shop.app)}
    assert len(children) == 5
    durable.send("w1", "go", app=shop.app)
    ids = shop.run("w1")
    assert [children[each].args for each in ids] == [(number,) for number in range(5)]
    assert len(durable.list_workflows(parent_id="w1", app=shop.app)) == 5


def test_children_that_a_crash_has_interrupted_start_once(shop: Inprocess, checkout: Any, sql: Sql) -> None:
    """The next attempt finds those of the first one, and starts the rest."""
    attempts = []

    def body() -> list[str]:
        attempts.append(1)

        def signatures() -> Iterator[Any]:
            yield checkout.s(0)
            yield checkout.s(1)
            if len(attempts) == 1:
                raise SystemExit(9 - 256)
            yield checkout.s(2)

        return [each.id for each in durable.enqueue_many(signatures())]

    order(shop, body)
    with pytest.raises(SystemExit):
        shop.run("w1")
    assert sql.value(COUNT) == 2
    shop.installation.recovery(lambda messages: [], patience=0).rescue(shop.node, ["w1"])
    assert len(set(shop.run("w1"))) == 3
    assert sql.value(COUNT) == 3


@pytest.mark.parametrize("kind", ["step", "task"])
def test_in_a_workflow_steps_and_plain_tasks_are_children_too(shop: Inprocess, kind: str) -> None:
    """Started once in all attempts, as it is promised."""
    declare = {"step": shop.step, "task": shop.app.task}[kind]
    task = declare(double, name="double", **({} if kind == "step" else {"shared": False}))

    def body() -> list[Any]:
        return durable.gather(*durable.enqueue_many([task.s(1), task.s(2)]))

    order(shop, body)
    shop.run("w1")
    children = durable.list_workflows(parent_id="w1", app=shop.app)
    assert [each.name for each in children] == ["celery_durable.step"] * 2
    for child in children:
        shop.run(child.id)
    assert shop.run("w1") == [2, 4]


def test_a_step_cannot_start_them(shop: Inprocess, checkout: Any, sql: Sql) -> None:
    """What a step did would be done again by its next try."""
    order(shop, lambda: durable.as_step(durable.enqueue_many, name="start")([checkout.s(1)]))
    shop.run("w1")
    assert isinstance(status(shop).error, NotAllowedInStep)
    assert sql.value(COUNT) == 0


def test_a_deduplication_id_has_one_unfinished_workflow(shop: Inprocess, checkout: Any, sql: Sql) -> None:
    """A second start returns the handle of the first one, with its arguments."""
    one = checkout.apply_async((1,), deduplication_id="a")
    two = checkout.apply_async((2,), deduplication_id="a")
    assert (two.id, told(shop, two.id).args) == (one.id, (1,))
    assert sql.value(COUNT) == 1


@pytest.mark.parametrize("state", ["RUNNING", "SUSPENDED"])
def test_what_has_begun_is_unfinished(shop: Inprocess, state: str) -> None:
    """Whether it runs or waits."""
    task = shop.workflow(nap, name="order")
    task.apply_async(task_id="w1", deduplication_id="a")
    if state == "RUNNING":
        begin(shop)
    else:
        shop.run("w1")
    assert status(shop).state == state
    assert task.apply_async(deduplication_id="a").id == "w1"


def nap() -> None:
    durable.sleep(1000)


@pytest.mark.parametrize("end", ["SUCCESS", "FAILURE", "CANCELLED", "DEAD"])
def test_another_one_starts_when_it_has_finished(shop: Inprocess, checkout: Any, sql: Sql, end: str) -> None:
    """However it has ended."""
    one = checkout.apply_async(("x",), deduplication_id="a")
    if end == "CANCELLED":
        durable.cancel_workflow(one.id, app=shop.app)
    else:
        shop.run(one.id)
        sql.execute("UPDATE celery_durable.workflow SET state = %s", end)
    assert told(shop, one.id).state == end
    two = checkout.apply_async(deduplication_id="a")
    assert two.id != one.id
    assert sql.value(COUNT) == 2


def test_deduplication_ids_are_told_apart(shop: Inprocess, checkout: Any) -> None:
    """By themselves, and by their tasks."""
    other = shop.workflow(nothing, name="other")
    handles = [
        checkout.apply_async(deduplication_id="a"),
        checkout.apply_async(deduplication_id="b"),
        checkout.apply_async(),
        other.apply_async(deduplication_id="a"),
    ]
    assert len({each.id for each in handles}) == 4


@pytest.mark.parametrize("wrong", ["", 42, "a\x00b", "x" * 10_000])
def test_a_wrong_deduplication_id_starts_nothing(shop: Inprocess, checkout: Any, sql: Sql, wrong: Any) -> None:
    """The error names the option."""
    with pytest.raises((ConfigurationError, ValueError, TypeError), match="deduplication_id"):
        checkout.apply_async(deduplication_id=wrong)
    assert sql.value(COUNT) == 0


def test_two_starts_at_the_same_moment_are_one(shop: Inprocess, checkout: Any, sql: Sql) -> None:
    """Both have the same handle, whoever was first."""
    rounds, together = 10, threading.Barrier(2)

    def start() -> list[str]:
        ids = []
        for number in range(rounds):
            together.wait(timeout=30)
            ids.append(checkout.apply_async(deduplication_id=f"a-{number}").id)
        return ids

    with ThreadPoolExecutor(2) as threads:
        one, two = (threads.submit(start) for _ in range(2))
        assert one.result() == two.result()
    assert sql.value(COUNT) == rounds


def test_a_deduplication_id_counts_in_many_starts(shop: Inprocess, checkout: Any, sql: Sql) -> None:
    """Within a call, and against what was there."""
    first = checkout.apply_async(deduplication_id="a")
    handles = durable.enqueue_many(checkout.s().set(deduplication_id=each) for each in ("a", "b", "b"))
    assert handles[0].id == first.id
    assert handles[1].id == handles[2].id
    assert sql.value(COUNT) == 2


def test_a_deduplication_id_counts_in_a_workflow(shop: Inprocess, checkout: Any) -> None:
    """The child is somebody else's workflow then: it is awaited as one's own, also by a replay."""
    first = checkout.apply_async((42,), deduplication_id="a")
    order(shop, lambda: checkout.apply_async((1,), deduplication_id="a").get())
    shop.run("w1")
    assert status(shop).state == "SUSPENDED"
    shop.run(first.id)
    assert shop.run("w1") == 42


def test_a_resume_does_not_make_a_second_one(shop: Inprocess, checkout: Any) -> None:
    """While another one holds the id; after that has ended it may go on."""
    one = checkout.apply_async(deduplication_id="a")
    durable.cancel_workflow(one.id, app=shop.app)
    two = checkout.apply_async(deduplication_id="a")
    with pytest.raises(WorkflowConflict, match="deduplication_id"):
        durable.resume_workflow(one.id, app=shop.app)
    assert told(shop, one.id).state == "CANCELLED"
    shop.run(two.id)
    durable.resume_workflow(one.id, app=shop.app)
    assert shop.run(one.id) == 0


def test_a_crash_keeps_the_deduplication_id(shop: Inprocess) -> None:
    """What is enqueued again is unfinished."""
    task = shop.workflow(nothing, name="order")
    task.apply_async(task_id="w1", deduplication_id="a")
    assert crash(shop, begin(shop)) == "ENQUEUED"
    assert task.apply_async(deduplication_id="a").id == "w1"
