"""What workflows publish: the latest value of each key, read from anywhere, awaited without a worker."""

from __future__ import annotations

import asyncio
import contextvars
import random
import string
import threading
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from celery.exceptions import Retry

import celery_durable as durable
from celery_durable.engine.context import running
from celery_durable.exceptions import (
    NotAllowedInStep,
    NotInWorkflow,
    PayloadTooLarge,
    SerializationError,
    Suspended,
    WorkflowNotFound,
)
from tests.crash.statements import text_of
from tests.fixtures.fix_postgres import Sql, _new_database
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.proxy import PostgresProxy
from tests.integration.attempts import DUE, begin, clear, crash, order, status, steps

WAKE = "UPDATE celery_durable.workflow SET wake_at = clock_timestamp()"
EVENT = "INSERT INTO celery_durable.event (workflow, key, value, at) VALUES ('source', 'key', '5', clock_timestamp())"
TEN_KB = "".join(random.Random(5).choices(string.ascii_letters, k=10_240))
whenever = pytest.mark.parametrize("when", ["before", "during", "after"])


@pytest.fixture(scope="module")
def database_url(postgres_server: str, template_database: str) -> Iterator[str]:
    """One database for all of these tests, which is cheaper; each begins with empty tables."""
    with _new_database(postgres_server, template_database) as url:
        yield url


@pytest.fixture(autouse=True)
def empty_tables(sql: Sql) -> None:
    clear(sql)


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    shop = Inprocess(database_url, broker_url, max_payload=10_000)
    yield shop
    shop.close()


@pytest.fixture
def proxied(proxy: PostgresProxy, broker_url: str) -> Iterator[Inprocess]:
    shop = Inprocess(proxy.url, broker_url)
    yield shop
    shop.close()


def source(shop: Inprocess, *values: Any, rests: bool = True) -> str:
    """Start a workflow that publishes these values under ``key``, each when it gets a message, and then rests."""

    @shop.workflow(name="source")
    def body() -> None:
        for value in values:
            durable.recv()
            durable.set_event("key", value)
        if rests:
            durable.sleep(10_000)

    body.apply_async(task_id="source")
    shop.run("source")
    return "source"


def publish_next(shop: Inprocess) -> None:
    """Let the source publish its next value."""
    durable.send("source", None, app=shop.app)
    shop.run("source")


def state(shop: Inprocess, workflow_id: str = "w1") -> str:
    return durable.get_workflow_status(workflow_id, app=shop.app).state


def read(shop: Inprocess, workflow_id: str = "source", timeout: float = 0, default: Any = None) -> Any:
    return durable.get_event(workflow_id, "key", timeout, default, app=shop.app)


def wake(shop: Inprocess, sql: Sql) -> None:
    """Let the time of every wait have come."""
    sql.execute(DUE)
    sql.execute(WAKE)
    assert shop.installation.store.workflows.wake(limit=9, patience=0)


# Published


def test_the_latest_value_counts(shop: Inprocess) -> None:
    """From outside it is read at once."""
    source(shop, 1, {"two": 2}, None)
    for value in (1, {"two": 2}, None):
        publish_next(shop)
        assert read(shop, default="nothing") == value


def test_all_events_are_listed(shop: Inprocess) -> None:
    """By their keys; of a finished workflow as of a running one."""

    def body() -> None:
        for key, value in [("b", 1), ("a", 2), ("b", 3)]:
            durable.set_event(key, value)
        durable.recv()

    order(shop, body)
    assert durable.list_workflow_events("w1", app=shop.app) == {}
    shop.run("w1")
    assert durable.list_workflow_events("w1", app=shop.app) == {"a": 2, "b": 3}
    durable.send("w1", None, app=shop.app)
    shop.run("w1")
    assert state(shop) == "SUCCESS"
    assert durable.list_workflow_events("w1", app=shop.app) == {"a": 2, "b": 3}


def test_events_of_an_unknown_workflow(shop: Inprocess) -> None:
    """The error names the id."""
    with pytest.raises(WorkflowNotFound, match="nobody"):
        durable.list_workflow_events("nobody", app=shop.app)
    with pytest.raises(WorkflowNotFound, match="nobody"):
        read(shop, "nobody")


def test_set_once(shop: Inprocess, sql: Sql) -> None:
    """A replay doesn't bring an older value back."""

    def body() -> None:
        durable.set_event("key", "old")
        durable.set_event("key", "new")
        durable.recv()

    order(shop, body)
    attempt = begin(shop)
    with running(attempt), pytest.raises(Suspended):
        body()
    at = sql.value("SELECT at FROM celery_durable.event")
    crash(shop, attempt)
    shop.run("w1")
    assert read(shop, "w1") == "new"
    assert sql.value("SELECT at FROM celery_durable.event") == at


@whenever
def test_a_set_event_whose_connection_is_lost(proxied: Inprocess, proxy: PostgresProxy, when: Any) -> None:
    """It publishes, and goes on."""
    order(proxied, lambda: durable.set_event("key", 1) or "on")
    cut = proxy.cut(text_of("events.set"), when)
    assert proxied.run("w1") == "on"
    cut.wait_reached(0)
    assert read(proxied, "w1") == 1


def test_an_attempt_that_was_taken_over_publishes_nothing(shop: Inprocess) -> None:
    """It stops there."""
    order(shop, lambda: None)
    zombie = begin(shop)
    crash(shop, zombie)
    with running(zombie), pytest.raises(durable.exceptions.OwnershipLost):
        durable.set_event("key", 1)
    assert durable.list_workflow_events("w1", app=shop.app) == {}


# Awaited by a workflow


def test_an_event_that_is_there(shop: Inprocess) -> None:
    """Nothing is waited for."""
    source(shop, "there")
    publish_next(shop)
    order(shop, lambda: durable.get_event("source", "key"))
    assert shop.run("w1") == "there"
    assert status(shop).attempt == 1


def test_an_event_is_awaited_without_a_worker(shop: Inprocess, sql: Sql) -> None:
    """The one who publishes it wakes the workflow, and nothing of the wait is left."""
    source(shop, "now")
    order(shop, lambda: durable.get_event("source", "key"))
    assert isinstance(shop.run("w1"), Retry)
    assert (status(shop).state, status(shop).waiting_for) == ("SUSPENDED", "event key of source")
    publish_next(shop)
    assert state(shop) == "ENQUEUED"
    assert shop.run("w1") == "now"
    assert sql.value("SELECT count(*) FROM celery_durable.awaiting") == 0


def test_all_that_await_it_are_woken(shop: Inprocess) -> None:
    """Each of them, by one event."""
    source(shop, "now")

    @shop.workflow(name="waits")
    def waits() -> Any:
        return durable.get_event("source", "key")

    ids = [f"waiter {number}" for number in range(5)]
    for workflow_id in ids:
        waits.apply_async(task_id=workflow_id)
        shop.run(workflow_id)
    publish_next(shop)
    assert [shop.run(workflow_id) for workflow_id in ids] == ["now"] * 5


def test_another_key_wakes_nobody(shop: Inprocess) -> None:
    """Only the one that is awaited does."""
    source(shop, "now")
    order(shop, lambda: durable.get_event("source", "other key"))
    shop.run("w1")
    publish_next(shop)
    assert state(shop) == "SUSPENDED"


def test_the_same_value_on_every_replay(shop: Inprocess) -> None:
    """A later one is seen by the next call only."""
    source(shop, "first", "second")
    order(shop, lambda: [durable.get_event("source", "key"), durable.recv(), durable.get_event("source", "key")])
    publish_next(shop)
    shop.run("w1")
    publish_next(shop)
    durable.send("w1", "go on", app=shop.app)
    assert shop.run("w1") == ["first", "go on", "second"]


def test_an_event_between_the_last_look_and_the_suspension(proxied: Inprocess, proxy: PostgresProxy) -> None:
    """The workflow doesn't sleep through it."""
    source(proxied, "now")
    order(proxied, lambda: durable.get_event("source", "key"))
    durable.send("source", None, app=proxied.app)
    held = proxy.hold(text_of("workflows.suspend"), "before")
    runner = threading.Thread(target=proxied.run, args=("w1",), daemon=True)
    runner.start()
    held.wait_reached()
    proxied.run("source")
    held.release()
    runner.join(20)
    assert state(proxied) == "ENQUEUED"
    assert proxied.run("w1") == "now"


def test_of_a_finished_workflow(shop: Inprocess) -> None:
    """Its last value stays; what it hasn't published it never will."""
    source(shop, "last", rests=False)
    publish_next(shop)
    assert state(shop, "source") == "SUCCESS"
    order(shop, lambda: [durable.get_event("source", key, default="never") for key in ("key", "other")])
    assert shop.run("w1") == ["last", "never"]
    assert read(shop) == "last"
    assert durable.get_event("source", "other", default="never", app=shop.app) == "never"


@pytest.mark.parametrize("end", ["SUCCESS", "CANCELLED"])
def test_a_workflow_that_ends_without_the_event(shop: Inprocess, end: str) -> None:
    """Those that await it get their default, though they wait for ever."""
    shop.workflow(durable.recv, name="source").apply_async(task_id="source")
    order(shop, lambda: durable.get_event("source", "key", default="never"))
    shop.run("w1")
    if end == "SUCCESS":
        durable.send("source", None, app=shop.app)
        shop.run("source")
    else:
        durable.cancel_workflow("source", app=shop.app)
        shop.installation.recovery(lambda messages: [], patience=0).sweep()
    assert state(shop, "source") == end
    assert state(shop) == "ENQUEUED"
    assert shop.run("w1") == "never"


def test_of_an_unknown_workflow(shop: Inprocess) -> None:
    """The error names the id."""
    order(shop, lambda: durable.get_event("nobody", "key"))
    told = shop.run("w1")
    assert isinstance(told, WorkflowNotFound)
    assert "nobody" in str(told)


def test_of_oneself(shop: Inprocess) -> None:
    """What was published before can be read."""
    order(shop, lambda: durable.set_event("key", 1) or durable.get_event("w1", "key"))
    assert shop.run("w1") == 1


def test_of_oneself_that_was_not_set(shop: Inprocess, sql: Sql) -> None:
    """Nobody else can set it, so the wait ends by its timeout alone; with none, by a cancellation."""
    order(shop, lambda: [durable.get_event("w1", "key", timeout=1000), durable.get_event("w1", "key")])
    assert isinstance(shop.run("w1"), Retry)
    wake(shop, sql)
    assert isinstance(shop.run("w1"), Retry)
    status = durable.get_workflow_status("w1", app=shop.app)
    assert (status.state, status.waiting_for, status.wake_at) == ("SUSPENDED", "event key of w1", None)
    assert durable.cancel_workflow("w1", app=shop.app)


# Timeouts


def test_a_timeout_gives_the_default(shop: Inprocess, sql: Sql) -> None:
    """It counts from the first call, over a crash; a later event doesn't change the answer."""
    source(shop, "late")
    order(shop, lambda: [durable.get_event("source", "key", timeout=100, default="none"), durable.recv()])
    attempt = begin(shop)
    with running(attempt), pytest.raises(Suspended):
        durable.get_event("source", "key", timeout=100, default="none")
    ends = sql.value("SELECT wake_at FROM celery_durable.checkpoint WHERE workflow = 'w1'")
    crash(shop, attempt)
    assert isinstance(shop.run("w1"), Retry)
    assert sql.value("SELECT wake_at FROM celery_durable.checkpoint WHERE workflow = 'w1'") == ends
    sql.execute(f"{DUE} WHERE workflow = 'w1'")
    sql.execute(f"{WAKE} WHERE id = 'w1'")
    shop.installation.store.workflows.wake(limit=9, patience=0)
    shop.run("w1")
    publish_next(shop)
    durable.send("w1", "go on", app=shop.app)
    assert shop.run("w1") == ["none", "go on"]


def test_no_time_at_all(shop: Inprocess) -> None:
    """The default at once, in a workflow and outside."""
    source(shop, "late")
    order(shop, lambda: durable.get_event("source", "key", timeout=0, default="none"))
    assert shop.run("w1") == "none"
    assert read(shop, default="none") == "none"


def test_from_outside_it_is_awaited(shop: Inprocess, sql: Sql) -> None:
    """The database is asked until the value is there."""
    source(shop, "never")
    found: list[Any] = []
    reader = threading.Thread(target=lambda: found.append(read(shop, timeout=20)), daemon=True)
    reader.start()
    sql.execute(EVENT)
    reader.join(20)
    assert found == [5]


def test_from_outside_on_a_loop(shop: Inprocess) -> None:
    """``aget_event`` doesn't block it."""
    source(shop, "there")
    publish_next(shop)
    assert asyncio.run(durable.aget_event("source", "key", app=shop.app)) == "there"
    assert asyncio.run(durable.aget_event("source", "other", timeout=0, default="none", app=shop.app)) == "none"


@pytest.mark.parametrize("timeout", [-1, float("nan"), "5", True], ids=str)
def test_an_impossible_timeout(shop: Inprocess, timeout: Any) -> None:
    """The error names it."""
    order(shop, lambda: durable.get_event("w1", "key", timeout=timeout))
    assert "timeout must be" in str(shop.run("w1"))
    with pytest.raises(Exception, match="timeout must be"):
        read(shop, "w1", timeout=timeout)


# A publisher that dies between its commit and the telling


def test_an_event_that_nobody_was_told_of(shop: Inprocess, sql: Sql) -> None:
    """The sweep wakes those that await it; once."""
    source(shop, "never")
    order(shop, lambda: durable.get_event("source", "key"))
    shop.run("w1")
    sql.execute(EVENT)
    recovery = shop.installation.recovery(lambda messages: [], patience=0)
    assert recovery.sweep()["notify"] == 1
    assert state(shop) == "ENQUEUED"
    assert recovery.sweep()["notify"] == 0
    assert shop.run("w1") == 5


def test_an_end_that_nobody_was_told_of(shop: Inprocess, sql: Sql) -> None:
    """As an event: the row of who awaits it is found, and gone."""
    source(shop, "never")
    order(shop, lambda: durable.get_event("source", "key", default="none"))
    shop.run("w1")
    sql.execute(
        "UPDATE celery_durable.workflow SET state = 'CANCELLED', finished_at = clock_timestamp(), dispatched = true "
        "WHERE id = 'source'"
    )
    assert shop.installation.recovery(lambda messages: [], patience=0).sweep()["notify"] == 1
    assert sql.value("SELECT count(*) FROM celery_durable.awaiting") == 0
    assert shop.run("w1") == "none"


def test_a_wait_that_goes_on_is_left_alone(shop: Inprocess, sql: Sql) -> None:
    """A sweep wakes nobody too early."""
    source(shop, "never")
    order(shop, lambda: durable.get_event("source", "key"))
    shop.run("w1")
    assert shop.installation.recovery(lambda messages: [], patience=0).sweep()["notify"] == 0
    assert state(shop) == "SUSPENDED"
    assert sql.value("SELECT count(*) FROM celery_durable.awaiting") == 1


# What can't be published


BAD_KEYS = ["", TEN_KB, "a\x00b", "\ud800", 5, None]


@pytest.mark.parametrize("key", BAD_KEYS, ids=lambda key: f"{key!r:.12}")
@pytest.mark.parametrize("call", [
    lambda key: durable.set_event(key, 1), lambda key: durable.get_event("w1", key),
], ids=["set_event", "get_event"])  # fmt: skip
def test_an_impossible_key(shop: Inprocess, call: Any, key: Any) -> None:
    """It is refused before anything is written."""
    order(shop, lambda: call(key))
    told = shop.run("w1")
    assert isinstance(told, TypeError | ValueError)
    assert "key" in str(told)
    assert steps(shop) == {}


@pytest.mark.parametrize("key", BAD_KEYS, ids=lambda key: f"{key!r:.12}")
def test_an_impossible_key_from_outside(shop: Inprocess, key: Any) -> None:
    """It is refused as in a workflow."""
    with pytest.raises((TypeError, ValueError), match="key"):
        durable.get_event("w1", key, app=shop.app)


@pytest.mark.parametrize("workflow_id", ["", "a\x00b", TEN_KB, None], ids=lambda each: f"{each!r:.12}")
def test_an_impossible_id(shop: Inprocess, workflow_id: Any) -> None:
    """It is a ValueError, outside and in a workflow."""
    with pytest.raises(ValueError, match="workflow"):
        read(shop, workflow_id)
    order(shop, lambda: durable.get_event(workflow_id, "key"))
    assert isinstance(shop.run("w1"), ValueError)


@pytest.mark.parametrize(
    ("value", "error"), [(object(), SerializationError), ("x" * 20_000, PayloadTooLarge)], ids=["object", "large"]
)
def test_an_impossible_value(shop: Inprocess, value: Any, error: Any) -> None:
    """Nothing is published, and the workflow may handle the error and go on."""

    def body() -> str:
        with suppress(error):
            durable.set_event("key", value)
            return "published"
        return "refused"

    order(shop, body)
    assert shop.run("w1") == "refused"
    assert durable.list_workflow_events("w1", app=shop.app) == {}


# Where


def test_only_a_workflow_publishes(shop: Inprocess) -> None:
    """It is its own state."""
    with pytest.raises(NotInWorkflow, match="Only a workflow can publish events"):
        durable.set_event("key", 1)


@pytest.mark.parametrize("call", [
    lambda: durable.set_event("key", 1), lambda: durable.get_event("w1", "key", timeout=0),
], ids=["set_event", "get_event"])  # fmt: skip
def test_not_in_a_step(shop: Inprocess, call: Any) -> None:
    """Its next try would do it again."""
    order(shop, durable.as_step(call, name="step"))
    assert isinstance(shop.run("w1"), NotAllowedInStep)
    assert durable.list_workflow_events("w1", app=shop.app) == {}


def test_a_step_may_list_events(shop: Inprocess) -> None:
    """It is a read of how a workflow stands."""
    order(shop, lambda: durable.set_event("key", 1) or durable.as_step(durable.list_workflow_events, name="read")("w1"))
    assert shop.run("w1") == {"key": 1}


@pytest.mark.parametrize("call", [
    lambda: durable.set_event("key", 1), lambda: durable.get_event("w1", "key", timeout=0),
], ids=["set_event", "get_event"])  # fmt: skip
def test_not_in_a_thread_of_the_user(shop: Inprocess, call: Any) -> None:
    """The order of its calls isn't the same on every replay."""
    seen: list[BaseException] = []

    def caught() -> None:
        try:
            call()
        except NotInWorkflow as error:
            seen.append(error)

    def body() -> None:
        thread = threading.Thread(target=contextvars.copy_context().run, args=(caught,))
        thread.start()
        thread.join()

    order(shop, body)
    shop.run("w1")
    assert len(seen) == 1
    assert steps(shop) == {}


def test_in_a_direct_call(shop: Inprocess, sql: Sql) -> None:
    """Publishing does nothing; awaiting raises NotInWorkflow, with a pointer to the test kit."""

    @shop.workflow(name="publishes")
    def publishes() -> str:
        durable.set_event("key", 1)
        return "on"

    @shop.workflow(name="awaits")
    def awaits() -> Any:
        return durable.get_event("w1", "key")

    assert publishes() == publishes.apply().get() == "on"
    with pytest.raises(NotInWorkflow, match="durable_run"):
        awaits()
    with pytest.raises(NotInWorkflow, match="durable_run"):
        awaits.apply().get()
    assert sql.value("SELECT count(*) FROM celery_durable.event") == 0


# On the event loop


def test_async_events(shop: Inprocess) -> None:
    """``aset_event`` and ``aget_event`` do what ``set_event`` and ``get_event`` do."""
    source(shop, "now")

    async def body() -> list[Any]:
        await durable.aset_event("mine", 1)
        return [await durable.aget_event("w1", "mine"), await durable.aget_event("source", "key")]

    order(shop, body)
    assert isinstance(shop.run("w1"), Retry)
    assert durable.list_workflow_events("w1", app=shop.app) == {"mine": 1}
    publish_next(shop)
    assert shop.run("w1") == [1, "now"]


def test_another_task_sets_the_event_of_oneself(shop: Inprocess) -> None:
    """Which ends the wait: at once, or, if the workflow has just suspended, in the attempt that follows."""

    async def publish() -> None:
        await durable.aset_event("mine", await durable.arecv())

    async def body() -> Any:
        value, _ = await asyncio.gather(durable.aget_event("w1", "mine"), publish())
        return value

    order(shop, body)
    assert isinstance(shop.run("w1"), Retry)
    durable.send("w1", "hello", app=shop.app)
    told = shop.run("w1")
    while isinstance(told, Retry) and state(shop) == "ENQUEUED":
        told = shop.run("w1")
    assert told == "hello"


@pytest.mark.parametrize("first", ["event", "message"])
def test_an_event_beside_a_message(shop: Inprocess, first: str) -> None:
    """The workflow suspends once for both, and either wakes it."""
    source(shop, "event")

    async def body() -> list[Any]:
        return await asyncio.gather(durable.aget_event("source", "key"), durable.arecv())

    order(shop, body)
    assert isinstance(shop.run("w1"), Retry)
    come = {"event": lambda: publish_next(shop), "message": lambda: durable.send("w1", "message", app=shop.app)}
    come.pop(first)()
    assert state(shop) == "ENQUEUED"
    assert isinstance(shop.run("w1"), Retry)
    for arrives in come.values():
        arrives()
    assert shop.run("w1") == ["event", "message"]
    assert status(shop).attempt == 3


@pytest.mark.parametrize("first", ["one", "other"])
def test_two_events_at_once(shop: Inprocess, first: str) -> None:
    """Either of them wakes the workflow."""

    @shop.workflow(name="sources")
    def sources(value: str) -> None:
        durable.recv()
        durable.set_event("key", value)
        durable.sleep(10_000)

    for name in ("one", "other"):
        sources.apply_async((name,), task_id=name)
        shop.run(name)

    async def body() -> list[Any]:
        return await asyncio.gather(durable.aget_event("one", "key"), durable.aget_event("other", "key"))

    order(shop, body)
    assert isinstance(shop.run("w1"), Retry)
    for name in sorted(("one", "other"), key=lambda name: name != first):
        durable.send(name, None, app=shop.app)
        shop.run(name)
        assert state(shop) == "ENQUEUED"
        told = shop.run("w1")
    assert told == ["one", "other"]


def test_each_name_is_for_its_kind_of_function(shop: Inprocess) -> None:
    """The error says what to write instead."""

    async def body() -> str:
        with pytest.raises(NotInWorkflow, match=r"await durable\.aset_event"):
            durable.set_event("key", 1)
        with pytest.raises(NotInWorkflow, match=r"await durable\.aget_event"):
            durable.get_event("w1", "key", timeout=0)
        return "refused"

    order(shop, body)
    assert shop.run("w1") == "refused"
