"""Starts, messages and cancellations in the caller's own transaction: they happen with its commit, or not at all."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import psycopg
import pytest
from psycopg.rows import dict_row

import celery_durable as durable
from celery_durable.exceptions import (
    ConfigurationError,
    NotAllowedInStep,
    SerializationError,
    WorkflowConflict,
    WorkflowFinished,
    WorkflowNotFound,
)
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.inprocess import Inprocess
from tests.integration.attempts import order, status

pytestmark = pytest.mark.oldest

OURS = ("workflow", "input", "message", "cancellation", "on_cancel")


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
def connection(database_url: str) -> Iterator[psycopg.Connection[Any]]:
    """A connection of the caller's own, with a table of the caller's own."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("CREATE TABLE IF NOT EXISTS sale (number integer); TRUNCATE sale")
        connection.autocommit = False
        yield connection
        connection.rollback()


@pytest.fixture
def checkout(shop: Inprocess) -> Any:
    """A workflow that says its number."""

    @shop.workflow(name="checkout")
    def checkout(number: int = 0) -> int:
        return number

    return checkout


def listen() -> Any:
    """A workflow that returns its first message."""
    return durable.recv("topic")


def sold(sql: Sql) -> int:
    return int(sql.value("SELECT count(*) FROM sale"))


def rows(sql: Sql) -> dict[str, int]:
    """How many rows we have written, by table."""
    return {table: sql.value(f"SELECT count(*) FROM celery_durable.{table}") for table in OURS}


def sent_by_sweep(shop: Inprocess) -> list[str]:
    """The workflows whose messages a sweep sends."""
    sent: list[str] = []

    def send(messages: Any) -> list[str]:
        sent.extend(message.workflow_id for message in messages)
        return []

    shop.installation.recovery(send, patience=0).sweep()
    return sent


def told(shop: Inprocess, workflow_id: str) -> durable.WorkflowStatus:
    return durable.get_workflow_status(workflow_id, app=shop.app)


def lock_timeout(connection: Any) -> str:
    return str(connection.execute("SHOW lock_timeout").fetchone()[0])


def exists(shop: Inprocess, workflow_id: str) -> bool:
    with suppress(WorkflowNotFound):
        told(shop, workflow_id)
        return True
    return False


def test_a_commit_starts(shop: Inprocess, connection: Any, checkout: Any, sql: Sql) -> None:
    """With what the caller has written; nobody sees either before."""
    connection.execute("INSERT INTO sale VALUES (42)")
    with durable.outbox(connection):
        handle = checkout.delay(42)
    assert not exists(shop, handle.id)
    assert sent_by_sweep(shop) == []
    connection.commit()
    assert sold(sql) == 1
    assert told(shop, handle.id).args == (42,)
    assert sent_by_sweep(shop) == [handle.id]
    assert shop.run(handle.id) == 42


def test_a_commit_is_heard_of(shop: Inprocess, connection: Any, checkout: Any, sql: Sql) -> None:
    """Who listens needn't wait for the sweep; once is enough."""
    sql.execute("LISTEN celery_durable")
    with durable.outbox(connection):
        checkout.delay()
        checkout.delay()
    assert list(sql.connection.notifies(timeout=0.05)) == []
    connection.commit()
    assert [each.channel for each in sql.connection.notifies(timeout=10, stop_after=1)] == ["celery_durable"]


def test_a_rollback_leaves_nothing(shop: Inprocess, connection: Any, checkout: Any, sql: Sql) -> None:
    """No start, no message, no cancellation, no compensation."""
    order(shop, listen)
    before = rows(sql)
    with durable.outbox(connection):
        checkout.apply_async((1,), on_cancel=checkout.s(2))
        durable.send("w1", "hello", "topic", app=shop.app)
        durable.cancel_workflow("w1", app=shop.app)
    connection.rollback()
    assert rows(sql) == before
    assert status(shop).state == "ENQUEUED"
    assert sent_by_sweep(shop) == []


def test_a_rollback_to_a_savepoint_leaves_nothing(shop: Inprocess, connection: Any, checkout: Any) -> None:
    """What was started before it is started; what came after it, and was undone, is not."""
    with durable.outbox(connection):
        kept = checkout.delay(1)
        with suppress(OSError), connection.transaction():
            undone = checkout.delay(2)
            raise OSError("no")
        later = checkout.delay(3)
    connection.commit()
    assert [exists(shop, each.id) for each in (kept, undone, later)] == [True, False, True]


def test_an_exception_in_the_block_is_the_callers(shop: Inprocess, connection: Any, checkout: Any) -> None:
    """The outbox neither commits nor rolls back: here the caller commits nevertheless."""
    with suppress(OSError), durable.outbox(connection):
        handle = checkout.delay(1)
        raise OSError("no")
    connection.commit()
    assert exists(shop, handle.id)


def test_after_the_block_starts_are_as_ever(shop: Inprocess, connection: Any, checkout: Any) -> None:
    """They are committed at once."""
    with durable.outbox(connection):
        inside = checkout.delay()
    outside = checkout.delay()
    assert [exists(shop, each.id) for each in (inside, outside)] == [False, True]


def test_a_transaction_block_of_an_autocommit_connection_will_do(
    shop: Inprocess, database_url: str, checkout: Any
) -> None:
    """As `with connection.transaction():`."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        with connection.transaction(), durable.outbox(connection):
            handle = checkout.delay(1)
            assert not exists(shop, handle.id)
        assert exists(shop, handle.id)


def test_a_delay_counts_from_the_call(shop: Inprocess, connection: Any, checkout: Any) -> None:
    """`countdown` is kept by the database, as ever."""
    with durable.outbox(connection):
        checkout.apply_async(countdown=1000)
    connection.commit()
    assert sent_by_sweep(shop) == []


def test_a_message_is_sent_by_the_commit(shop: Inprocess, connection: Any) -> None:
    """It wakes the workflow that waits for it."""
    order(shop, listen)
    shop.run("w1")
    with durable.outbox(connection):
        durable.send("w1", "hello", "topic", app=shop.app)
    sent_by_sweep(shop)
    assert status(shop).state == "SUSPENDED"
    connection.commit()
    assert sent_by_sweep(shop) == ["w1"]
    assert shop.run("w1") == "hello"


def test_messages_are_sent_in_order(shop: Inprocess, connection: Any) -> None:
    """As they were put into the outbox."""
    order(shop, lambda: [durable.recv("topic") for _ in range(3)])
    with durable.outbox(connection):
        for number in range(3):
            durable.send("w1", number, "topic", app=shop.app)
    connection.commit()
    sent_by_sweep(shop)
    assert shop.run("w1") == [0, 1, 2]


def test_a_message_is_sent_to_what_the_same_outbox_has_started(shop: Inprocess, connection: Any, sql: Sql) -> None:
    """Both exist by the commit."""
    listener = shop.workflow(listen, name="listener")
    with durable.outbox(connection):
        handle = listener.delay()
        durable.send(handle.id, "hello", "topic", app=shop.app)
    connection.commit()
    assert shop.run(handle.id) == "hello"


def test_the_same_idempotency_key_is_one_message(shop: Inprocess, connection: Any, sql: Sql) -> None:
    """In an outbox and out of it."""
    order(shop, listen)
    durable.send("w1", 1, "topic", idempotency_key="one", app=shop.app)
    with durable.outbox(connection):
        for _ in range(2):
            durable.send("w1", 1, "topic", idempotency_key="one", app=shop.app)
    connection.commit()
    assert rows(sql)["message"] == 1


def test_a_message_to_nobody_is_an_error(shop: Inprocess, connection: Any, sql: Sql) -> None:
    """Unknown or finished: it raises at once, and the caller's transaction goes on."""
    order(shop, lambda: None)
    shop.run("w1")
    connection.execute("INSERT INTO sale VALUES (1)")
    with durable.outbox(connection):
        with pytest.raises(WorkflowNotFound):
            durable.send("nothing-like-it", 1, app=shop.app)
        with pytest.raises(WorkflowFinished):
            durable.send("w1", 1, app=shop.app)
    connection.commit()
    assert sold(sql) == 1


def test_a_message_that_cannot_be_kept_spoils_nothing(shop: Inprocess, connection: Any, sql: Sql) -> None:
    """The error is the caller's, who may commit the rest."""
    order(shop, listen)
    connection.execute("INSERT INTO sale VALUES (1)")
    with durable.outbox(connection), pytest.raises(SerializationError):
        durable.send("w1", object(), app=shop.app)
    connection.commit()
    assert sold(sql) == 1


@pytest.mark.parametrize("many", [False, True])
def test_a_cancellation_happens_by_the_commit(shop: Inprocess, connection: Any, many: bool) -> None:
    """Not before; the sweep does it."""
    order(shop, listen)
    shop.run("w1")
    with durable.outbox(connection):
        if many:
            durable.cancel_workflows(["w1"], app=shop.app)
        else:
            durable.cancel_workflow("w1", app=shop.app)
    sent_by_sweep(shop)
    assert status(shop).state == "SUSPENDED"
    connection.commit()
    sent_by_sweep(shop)
    assert status(shop).state == "CANCELLED"


@pytest.mark.parametrize("children", [False, True])
def test_a_cancellation_knows_of_children(shop: Inprocess, connection: Any, checkout: Any, children: bool) -> None:
    """They are spared unless they are meant."""
    order(shop, lambda: checkout.delay().get())
    shop.run("w1")
    with durable.outbox(connection):
        durable.cancel_workflow("w1", children=children, app=shop.app)
    connection.commit()
    sent_by_sweep(shop)
    (child,) = durable.list_workflows(parent_id="w1", app=shop.app)
    assert (status(shop).state, child.state) == ("CANCELLED", "CANCELLED" if children else "ENQUEUED")


def test_a_cancellation_tells_those_that_wait(shop: Inprocess, connection: Any, checkout: Any) -> None:
    """A parent sees it at the same sweep."""
    order(shop, lambda: checkout.delay().get())
    shop.run("w1")
    (child,) = durable.list_workflows(parent_id="w1", app=shop.app)
    with durable.outbox(connection):
        durable.cancel_workflow(child.id, app=shop.app)
    connection.commit()
    assert "w1" in sent_by_sweep(shop)
    assert status(shop).state == "ENQUEUED"


def test_a_cancellation_locks_no_workflow(shop: Inprocess, connection: Any) -> None:
    """While the caller's transaction is open the workflow goes on, and ends: then there is nothing to cancel."""
    order(shop, lambda: "done")
    with durable.outbox(connection):
        durable.cancel_workflow("w1", app=shop.app)
        durable.send("w1", 1, app=shop.app)
    assert shop.run("w1") == "done"
    connection.commit()
    sent_by_sweep(shop)
    assert status(shop).state == "SUCCESS"


def test_a_handle_cannot_be_waited_for(shop: Inprocess, connection: Any, checkout: Any) -> None:
    """The workflow can't start before the commit: that would wait for ever."""
    with durable.outbox(connection):
        handle = checkout.delay()
        with pytest.raises(NotAllowedInStep, match="outbox"):
            handle.get(timeout=1)
        with pytest.raises(NotAllowedInStep, match="outbox"):
            asyncio.run(handle.aget(timeout=1))
    connection.commit()
    shop.run(handle.id)
    assert handle.get(timeout=10) == 0


@pytest.mark.parametrize("what", ["resume", "fork"])
def test_nothing_is_resumed_or_forked_in_it(shop: Inprocess, connection: Any, what: str) -> None:
    """Those can't wait for a commit."""
    order(shop, listen)
    durable.cancel_workflow("w1", app=shop.app)
    with durable.outbox(connection), pytest.raises(NotAllowedInStep, match="outbox"):
        getattr(durable, f"{what}_workflow")("w1", app=shop.app)
    assert status(shop).state == "CANCELLED"


@pytest.mark.parametrize("place", ["workflow", "step"])
def test_a_workflow_and_a_step_have_none(shop: Inprocess, connection: Any, place: str) -> None:
    """A workflow's starts are kept with its own checkpoints."""

    def use() -> None:
        with durable.outbox(connection):
            raise AssertionError("never")

    order(shop, use if place == "workflow" else durable.as_step(use, name="use"))
    shop.run("w1")
    assert isinstance(status(shop).error, NotAllowedInStep)


def test_without_a_transaction_it_is_an_error(shop: Inprocess, database_url: str, checkout: Any, sql: Sql) -> None:
    """An autocommit connection would start at once, which nobody wants who takes an outbox."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        with durable.outbox(connection), pytest.raises(ConfigurationError, match="transaction"):
            checkout.delay()
        assert rows(sql)["workflow"] == 0


def test_an_async_connection_is_an_error(shop: Inprocess, database_url: str, checkout: Any) -> None:
    """`delay()` can't await."""

    async def use() -> None:
        async with await psycopg.AsyncConnection.connect(database_url) as connection:
            with pytest.raises(TypeError, match="AsyncConnection"), durable.outbox(connection):
                checkout.delay()

    asyncio.run(use())


@pytest.mark.parametrize("wrong", [None, "postgresql://localhost", object()])
def test_anything_else_is_an_error(shop: Inprocess, checkout: Any, sql: Sql, wrong: Any) -> None:
    """It says what is wanted; nothing is started."""
    with pytest.raises(TypeError, match=r"psycopg\.Connection"), durable.outbox(wrong):
        checkout.delay()
    assert rows(sql)["workflow"] == 0


def test_rows_may_be_dicts(shop: Inprocess, database_url: str, checkout: Any) -> None:
    """A row factory of the caller's is the caller's."""
    with psycopg.connect(database_url, row_factory=dict_row) as connection:
        with durable.outbox(connection):
            handle = checkout.delay(1)
            durable.send(handle.id, "hello", app=shop.app)
            durable.cancel_workflow(handle.id, app=shop.app)
        assert connection.execute("SELECT 1 AS one").fetchone() == {"one": 1}
    assert told(shop, handle.id).args == (1,)


def test_another_database_is_an_error(shop: Inprocess, empty_database_url: str, checkout: Any, sql: Sql) -> None:
    """A clear one, and the caller's transaction goes on."""
    with psycopg.connect(empty_database_url) as connection:
        connection.execute("CREATE TABLE sale (number integer)")
        for act in (
            checkout.delay,
            lambda: durable.send("w1", 1, app=shop.app),
            lambda: durable.cancel_workflow("w1", app=shop.app),
        ):
            with durable.outbox(connection), pytest.raises(ConfigurationError, match="durable_database_url"):
                act()
        connection.execute("INSERT INTO sale VALUES (1)")
        connection.commit()
        assert connection.execute("SELECT count(*) FROM sale").fetchone() == (1,)
    assert rows(sql)["workflow"] == 0


def test_an_id_that_another_open_transaction_starts_is_an_error(
    shop: Inprocess, connection: Any, database_url: str, checkout: Any, sql: Sql
) -> None:
    """After a bounded wait; the caller's transaction goes on, with its own lock_timeout."""
    with psycopg.connect(database_url) as other:
        with durable.outbox(other):
            checkout.apply_async(task_id="one")
        connection.execute("SET LOCAL lock_timeout = '1234ms'")
        connection.execute("INSERT INTO sale VALUES (1)")
        began = time.monotonic()
        with durable.outbox(connection), pytest.raises(WorkflowConflict, match="transaction"):
            checkout.apply_async(task_id="one")
        assert time.monotonic() - began < 10
        assert lock_timeout(connection) == "1234ms"
        connection.commit()
    assert sold(sql) == 1
    assert exists(shop, "one")


@pytest.mark.parametrize("before", ["0", "1234ms"])
def test_the_callers_lock_timeout_is_as_before(shop: Inprocess, connection: Any, checkout: Any, before: str) -> None:
    """After each thing that is done in an outbox."""
    connection.execute(f"SET LOCAL lock_timeout = '{before}'")
    with durable.outbox(connection):
        handle = checkout.delay()
        durable.send(handle.id, 1, app=shop.app)
        durable.cancel_workflow(handle.id, app=shop.app)
    assert lock_timeout(connection) == before


@pytest.mark.parametrize("option", ["task_id", "deduplication_id"])
def test_what_another_transaction_commits_meanwhile_is_found(
    shop: Inprocess, connection: Any, database_url: str, checkout: Any, sql: Sql, option: str
) -> None:
    """The start waits for it, and then has its handle."""

    def start() -> str:
        with durable.outbox(connection):
            return str(checkout.apply_async(**{option: "one"}).id)

    blocked = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    with ThreadPoolExecutor(1) as threads, psycopg.connect(database_url) as other:
        with durable.outbox(other):
            first = checkout.apply_async(**{option: "one"}).id
        second = threads.submit(start)
        wait_until(lambda: sql.value(blocked) == 1, message="the second start waits for the first one")
        other.commit()
        assert second.result() == first
    connection.commit()
    assert rows(sql)["workflow"] == 1


def test_an_id_that_is_there_already_is_not_started_again(shop: Inprocess, connection: Any, checkout: Any) -> None:
    """As ever: the handle of the one that is there."""
    checkout.apply_async((1,), task_id="one")
    with durable.outbox(connection):
        assert checkout.apply_async((2,), task_id="one").id == "one"
    connection.commit()
    assert told(shop, "one").args == (1,)


def test_an_id_of_another_task_is_an_error(shop: Inprocess, connection: Any, checkout: Any) -> None:
    """As ever."""
    order(shop, listen)
    with durable.outbox(connection), pytest.raises(WorkflowConflict, match="order"):
        checkout.apply_async(task_id="w1")


def test_an_id_of_another_task_in_the_same_transaction_is_an_error(
    shop: Inprocess, connection: Any, checkout: Any
) -> None:
    """Though nobody else can see it yet."""
    listener = shop.workflow(listen, name="listener")
    with durable.outbox(connection):
        listener.apply_async(task_id="one")
        with pytest.raises(WorkflowConflict, match="listener"):
            checkout.apply_async(task_id="one")


def test_a_deduplication_id_counts_in_it(shop: Inprocess, connection: Any, checkout: Any) -> None:
    """The handle is that of the unfinished one, whether that was started in the same transaction or before."""
    first = checkout.apply_async(deduplication_id="a")
    with durable.outbox(connection):
        assert checkout.apply_async(deduplication_id="a").id == first.id
        second = checkout.apply_async(deduplication_id="b")
        assert checkout.apply_async(deduplication_id="b").id == second.id
    connection.commit()
    assert len(durable.list_workflows(name="checkout", app=shop.app)) == 2


def test_two_open_transactions_with_one_deduplication_id(
    shop: Inprocess, connection: Any, database_url: str, checkout: Any
) -> None:
    """The second one can't know how the first one ends: an error after a bounded wait."""
    with psycopg.connect(database_url) as other:
        with durable.outbox(other):
            checkout.apply_async(deduplication_id="a")
        with durable.outbox(connection), pytest.raises(WorkflowConflict):
            checkout.apply_async(deduplication_id="a")
    connection.commit()
    assert len(durable.list_workflows(name="checkout", app=shop.app)) == 1


def test_a_deduplication_id_that_is_committed_meanwhile(
    shop: Inprocess, connection: Any, database_url: str, checkout: Any
) -> None:
    """A transaction whose snapshot is older can't see the other one: an error of ours, and it goes on."""
    connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
    connection.execute("SELECT 1 FROM sale")
    checkout.apply_async(deduplication_id="a")
    with durable.outbox(connection), pytest.raises(WorkflowConflict):
        checkout.apply_async(deduplication_id="a")
    connection.execute("INSERT INTO sale VALUES (1)")
    connection.commit()


def test_outboxes_nest(shop: Inprocess, connection: Any, database_url: str, checkout: Any) -> None:
    """The inner one counts in its block, the outer one after it."""
    with psycopg.connect(database_url) as other, durable.outbox(connection):
        outer = checkout.delay(1)
        with durable.outbox(other):
            inner = checkout.delay(2)
        outer_again = checkout.delay(3)
        other.commit()
        assert [exists(shop, each.id) for each in (outer, inner, outer_again)] == [False, True, False]


def test_an_outbox_is_for_one_app(
    shop: Inprocess, connection: Any, database_url: str, broker_url: str, checkout: Any
) -> None:
    """Another app's workflows may live elsewhere."""
    other = Inprocess(database_url, broker_url)
    try:
        foreign = other.workflow(listen, name="foreign")
        with durable.outbox(connection):
            checkout.delay()
            with pytest.raises(ConfigurationError, match="one app"):
                foreign.delay()
    finally:
        other.close()
