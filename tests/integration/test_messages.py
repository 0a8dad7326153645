"""Messages: in order, each taken once, whatever dies or is lost between the sender and the one who takes it."""

from __future__ import annotations

import asyncio
import contextvars
import random
import string
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from datetime import timedelta
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
    WorkflowFinished,
    WorkflowNotFound,
)
from celery_durable.serialization import Payload
from celery_durable.store import Letter
from tests.crash.statements import text_of
from tests.fixtures.fix_postgres import Sql, _new_database
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.proxy import PostgresProxy
from tests.integration.attempts import DUE, begin, clear, crash, order, status, steps

WAKE = "UPDATE celery_durable.workflow SET wake_at = clock_timestamp()"
UNTOLD = """
    INSERT INTO celery_durable.message (workflow, topic, idempotency_key, body, told)
    VALUES ('w1', %s, gen_random_uuid()::text, '5', false)
"""
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


@pytest.fixture
def inbox(shop: Inprocess) -> Any:
    """A workflow, ``inbox``, that takes two messages without a topic."""

    @shop.workflow(name="inbox")
    def inbox() -> list[Any]:
        return [durable.recv(), durable.recv()]

    inbox.apply_async(task_id="inbox")
    return inbox


def send(shop: Inprocess, message: Any, topic: str | None = None, to: str = "w1", **options: Any) -> None:
    durable.send(to, message, topic, app=shop.app, **options)


def state(shop: Inprocess, workflow_id: str = "w1") -> str:
    return durable.get_workflow_status(workflow_id, app=shop.app).state


def wake(shop: Inprocess, sql: Sql) -> None:
    """Let the time of every wait have come."""
    sql.execute(DUE)
    sql.execute(WAKE)
    assert shop.installation.store.workflows.wake(limit=9, patience=0)


def sweep(shop: Inprocess) -> dict[str, int]:
    return shop.installation.recovery(lambda messages: [], patience=0).sweep()


# To a workflow in any state


def test_to_one_that_has_not_started(shop: Inprocess) -> None:
    """It finds its message, and doesn't wait."""
    order(shop, durable.recv)
    send(shop, {"paid": True})
    assert shop.run("w1") == {"paid": True}
    assert status(shop).attempt == 1


def test_to_a_suspended_one(shop: Inprocess) -> None:
    """It is enqueued at once; until then it holds no worker."""
    order(shop, durable.recv)
    assert isinstance(shop.run("w1"), Retry)
    assert (status(shop).state, status(shop).waiting_for, status(shop).node) == ("SUSPENDED", "message", None)
    send(shop, "paid")
    assert state(shop) == "ENQUEUED"
    assert shop.run("w1") == "paid"


def test_to_a_running_one(shop: Inprocess) -> None:
    """It takes the message where it receives."""
    order(shop, durable.recv)
    attempt = begin(shop)
    send(shop, "paid")
    with running(attempt):
        assert durable.recv() == "paid"
    assert state(shop) == "RUNNING"


def test_to_one_that_is_about_to_suspend(proxied: Inprocess, proxy: PostgresProxy) -> None:
    """Between its last look and its suspension: it is enqueued in spite of that."""
    order(proxied, lambda: durable.recv("paid"))
    held = proxy.hold(text_of("workflows.suspend"), "before")
    runner = threading.Thread(target=proxied.run, args=("w1",), daemon=True)
    runner.start()
    held.wait_reached()
    proxied.installation.store.messages.send(letter("w1", "paid"), 60, patience=3)
    held.release()
    runner.join(20)
    assert state(proxied) == "ENQUEUED"
    assert proxied.run("w1") == 5


def letter(workflow_id: str, topic: str) -> Letter:
    return Letter(workflow_id, topic, "key", Payload(b"5"))


def test_to_one_that_sleeps(shop: Inprocess, sql: Sql) -> None:
    """It sleeps on, and takes the message afterwards."""
    order(shop, lambda: durable.sleep(100) or durable.recv())
    shop.run("w1")
    send(shop, "paid")
    assert state(shop) == "SUSPENDED"
    wake(shop, sql)
    assert shop.run("w1") == "paid"


# Order and topics


def test_in_the_order_in_which_they_were_sent(shop: Inprocess) -> None:
    """Of each topic by itself."""

    def body() -> list[Any]:
        return [durable.recv("b"), durable.recv("a"), durable.recv(), durable.recv("a"), durable.recv("b")]

    order(shop, body)
    for number, topic in enumerate(["a", "b", None, "b", "a"]):
        send(shop, number, topic)
    assert shop.run("w1") == [1, 0, 2, 4, 3]


def test_equal_messages_are_different_ones(shop: Inprocess) -> None:
    """Each is received."""
    order(shop, lambda: [durable.recv() for _ in range(3)])
    for _ in range(3):
        send(shop, "again")
    assert shop.run("w1") == ["again"] * 3


def test_another_topic_does_not_wake_it(shop: Inprocess) -> None:
    """It is kept for the recv that asks for it."""
    order(shop, lambda: [durable.recv("paid"), durable.recv("shipped"), durable.recv()])
    shop.run("w1")
    assert status(shop).waiting_for == "message paid"
    send(shop, 2, "shipped")
    send(shop, 3)
    assert state(shop) == "SUSPENDED"
    send(shop, 1, "paid")
    assert shop.run("w1") == [1, 2, 3]


def test_of_another_workflow(shop: Inprocess, inbox: Any) -> None:
    """Nobody takes what was sent to somebody else."""
    order(shop, lambda: durable.recv(timeout=0, default="nothing"))
    send(shop, 1, to="inbox")
    assert shop.run("w1") == "nothing"
    send(shop, 2, to="inbox")
    assert shop.run("inbox") == [1, 2]


# Idempotency keys


def test_the_same_key_again_sends_nothing(shop: Inprocess) -> None:
    """Whatever its message, its topic, and whether the first one was taken already."""
    order(shop, lambda: [durable.recv(), durable.recv(timeout=0, default="nothing")])
    shop.run("w1")
    send(shop, "first", idempotency_key="k1")
    send(shop, "second", idempotency_key="k1")
    attempt = begin(shop)
    with running(attempt):
        assert durable.recv() == "first"
    send(shop, "third", "other topic", idempotency_key="k1")
    crash(shop, attempt)
    assert shop.run("w1") == ["first", "nothing"]


def test_a_key_is_that_of_one_workflow(shop: Inprocess, inbox: Any) -> None:
    """Another one gets its own message."""
    order(shop, durable.recv)
    for workflow_id in ("w1", "inbox"):
        send(shop, workflow_id, to=workflow_id, idempotency_key="k1")
    send(shop, "last", to="inbox", idempotency_key="k2")
    assert shop.run("w1") == "w1"
    assert shop.run("inbox") == ["inbox", "last"]


# Taken once, with its checkpoint


def test_a_crash_behind_a_recv_loses_nothing(shop: Inprocess, sql: Sql) -> None:
    """The message is the outcome of that recv for ever, and the next recv gets the next one."""
    order(shop, lambda: [durable.recv(), durable.recv()])
    send(shop, 1)
    send(shop, 2)
    attempt = begin(shop)
    with running(attempt):
        assert durable.recv() == 1
    crash(shop, attempt)
    assert shop.run("w1") == [1, 2]
    assert sql.all("SELECT taken_by FROM celery_durable.message ORDER BY seq") == [
        ("durable.recv",), ("durable.recv#2",),
    ]  # fmt: skip


def test_an_attempt_that_was_taken_over_takes_nothing(shop: Inprocess, sql: Sql) -> None:
    """The message is left to the one that has the workflow now."""
    order(shop, durable.recv)
    zombie = begin(shop)
    crash(shop, zombie)
    send(shop, "paid")
    with running(zombie), pytest.raises(durable.exceptions.OwnershipLost):
        durable.recv()
    assert sql.value("SELECT taken_by FROM celery_durable.message") is None
    assert shop.run("w1") == "paid"


@whenever
def test_a_recv_whose_connection_is_lost(proxied: Inprocess, proxy: PostgresProxy, sql: Sql, when: Any) -> None:
    """It takes one message, also if only its answer was lost."""
    order(proxied, lambda: [durable.recv(), durable.recv(timeout=0, default="nothing")])
    send(proxied, "only one")
    cut = proxy.cut(text_of("messages.receive"), when)
    assert proxied.run("w1") == ["only one", "nothing"]
    cut.wait_reached(0)
    assert sql.value("SELECT taken_by FROM celery_durable.message") == "durable.recv"


@whenever
def test_a_send_whose_connection_is_lost(proxied: Inprocess, proxy: PostgresProxy, sql: Sql, when: Any) -> None:
    """It sends one message, also if only its answer was lost."""
    order(proxied, durable.recv)
    cut = proxy.cut(text_of("messages.send"), when)
    send(proxied, "only one")
    cut.wait_reached(0)
    assert sql.value("SELECT count(*) FROM celery_durable.message") == 1
    assert proxied.run("w1") == "only one"


@whenever
@pytest.mark.parametrize("statement", ["messages.send_as_step", "messages.tell"])
def test_a_workflow_whose_send_loses_its_connection(
    proxied: Inprocess, proxy: PostgresProxy, sql: Sql, statement: str, when: Any
) -> None:
    """It sends one message, which wakes the other one."""
    proxied.workflow(durable.recv, name="inbox").apply_async(task_id="inbox")
    proxied.run("inbox")
    order(proxied, lambda: durable.send("inbox", "only one"))
    cut = proxy.cut(text_of(statement), when)
    assert proxied.run("w1") is None
    cut.wait_reached(0)
    assert sql.value("SELECT count(*) FROM celery_durable.message") == 1
    assert state(proxied, "inbox") == "ENQUEUED"
    assert proxied.run("inbox") == "only one"


def test_one_that_was_woken_by_a_lost_answer_is_sent_again(proxied: Inprocess, proxy: PostgresProxy, sql: Sql) -> None:
    """Its Celery message wasn't sent by anybody; the recovery does that."""
    order(proxied, durable.recv)
    proxied.run("w1")
    cut = proxy.cut(text_of("messages.send"), "after")
    send(proxied, "paid")
    cut.wait_reached(0)
    assert state(proxied) == "ENQUEUED"
    sql.execute("UPDATE celery_durable.workflow SET publish_at = clock_timestamp()")
    assert sweep(proxied)["republish"] == 1


# Timeouts


def test_a_timeout_gives_the_default(shop: Inprocess, sql: Sql) -> None:
    """When its time has come, and not before."""
    order(shop, lambda: durable.recv("paid", timeout=timedelta(minutes=5), default={"paid": False}))
    assert isinstance(shop.run("w1"), Retry)
    sql.execute(WAKE)
    shop.installation.store.workflows.wake(limit=9, patience=0)
    assert isinstance(shop.run("w1"), Retry)
    wake(shop, sql)
    assert shop.run("w1") == {"paid": False}


def test_a_timeout_is_kept_over_a_crash(shop: Inprocess, sql: Sql) -> None:
    """It counts from the first call."""
    order(shop, lambda: durable.recv(timeout=100, default="late"))
    attempt = begin(shop)
    with running(attempt), pytest.raises(Suspended):
        durable.recv(timeout=100, default="late")
    ends = sql.value("SELECT wake_at FROM celery_durable.checkpoint")
    crash(shop, attempt)
    assert isinstance(shop.run("w1"), Retry)
    assert sql.value("SELECT wake_at FROM celery_durable.checkpoint") == ends
    wake(shop, sql)
    assert shop.run("w1") == "late"


def test_a_message_in_time(shop: Inprocess) -> None:
    """It is taken, and no timer is left."""
    order(shop, lambda: durable.recv(timeout=100, default="late") + durable.recv())
    shop.run("w1")
    send(shop, "in time")
    assert isinstance(shop.run("w1"), Retry)
    assert status(shop).wake_at is None


def test_a_message_that_is_there_when_the_time_is_up(shop: Inprocess, sql: Sql) -> None:
    """It wins: the workflow hadn't been told that there is none."""
    order(shop, lambda: durable.recv(timeout=100, default="late"))
    shop.run("w1")
    sql.execute(DUE)
    send(shop, "just in time")
    assert shop.run("w1") == "just in time"


def test_a_late_message_is_for_the_next_recv(shop: Inprocess, sql: Sql) -> None:
    """The one that had timed out stays so on every replay."""
    order(shop, lambda: [durable.recv(timeout=100), durable.recv()])
    shop.run("w1")
    wake(shop, sql)
    assert isinstance(shop.run("w1"), Retry)
    send(shop, "late")
    assert shop.run("w1") == [None, "late"]


def test_no_time_at_all_takes_what_is_there(shop: Inprocess) -> None:
    """And doesn't suspend."""
    order(shop, lambda: [durable.recv(timeout=0, default="nothing") for _ in range(2)])
    send(shop, "there")
    assert shop.run("w1") == ["there", "nothing"]
    assert status(shop).attempt == 1


@pytest.mark.parametrize("timeout", [-1, float("nan"), timedelta(days=36526), "5", True], ids=str)
def test_an_impossible_timeout(shop: Inprocess, timeout: Any) -> None:
    """The error names it."""
    order(shop, lambda: durable.recv(timeout=timeout))
    assert "timeout must be" in str(shop.run("w1"))
    assert state(shop) == "FAILURE"
    assert steps(shop) == {}


def test_a_default_that_cannot_be_kept(shop: Inprocess) -> None:
    """It is refused before anything is waited for."""
    order(shop, lambda: durable.recv(timeout=100, default=object()))
    assert isinstance(shop.run("w1"), SerializationError)


# From workflows


def test_from_a_workflow(shop: Inprocess, inbox: Any) -> None:
    """It wakes the other one; a message to one that hasn't started is kept for it."""
    order(shop, lambda: [durable.send("inbox", number) for number in range(2)])
    shop.run("inbox")
    assert shop.run("w1") == [None, None]
    assert state(shop, "inbox") == "ENQUEUED"
    assert shop.run("inbox") == [0, 1]


def test_from_a_workflow_once(shop: Inprocess, inbox: Any, sql: Sql) -> None:
    """However many attempts there are; each call of it is a message."""

    def body() -> None:
        durable.send("inbox", "one")
        durable.send("inbox", "one")
        durable.recv()

    order(shop, body)
    for _ in range(2):
        attempt = begin(shop)
        with running(attempt), pytest.raises(Suspended):
            body()
        crash(shop, attempt)
    assert sql.value("SELECT count(*) FROM celery_durable.message") == 2
    assert shop.run("inbox") == ["one", "one"]


def test_a_key_of_a_workflow(shop: Inprocess, inbox: Any, sql: Sql) -> None:
    """It holds over all senders."""
    order(shop, lambda: [durable.send("inbox", number, idempotency_key="k1") for number in range(2)])
    send(shop, "outside", to="inbox", idempotency_key="k1")
    shop.run("w1")
    assert sql.value("SELECT convert_from(body, 'utf8') FROM celery_durable.message") == '"outside"'


def test_to_oneself(shop: Inprocess) -> None:
    """A note for later."""
    order(shop, lambda: durable.send("w1", "note") or durable.recv())
    assert shop.run("w1") == "note"


# Nobody there


def test_to_nobody(shop: Inprocess) -> None:
    """The error names the id."""
    with pytest.raises(WorkflowNotFound, match="nobody"):
        send(shop, 1, to="nobody")


@pytest.mark.parametrize("end", ["SUCCESS", "FAILURE", "CANCELLED"])
def test_to_a_finished_one(shop: Inprocess, sql: Sql, end: str) -> None:
    """The error says how it has ended, and nothing is kept."""
    order(shop, {"SUCCESS": int, "FAILURE": lambda: [][0], "CANCELLED": int}[end])
    durable.cancel_workflow("w1", app=shop.app) if end == "CANCELLED" else shop.run("w1")
    with pytest.raises(WorkflowFinished, match=f"w1 is {end}"):
        send(shop, 1)
    assert sql.value("SELECT count(*) FROM celery_durable.message") == 0


def refused(workflow_id: str) -> str:
    """A workflow's message that can't be delivered: the error, then a wait."""
    try:
        durable.send(workflow_id, 1)
        error = "sent"
    except (WorkflowNotFound, WorkflowFinished) as refusal:
        error = type(refusal).__name__
    durable.recv()
    return error


def test_from_a_workflow_to_nobody(shop: Inprocess, sql: Sql) -> None:
    """The same on every replay, though the other one has come meanwhile."""
    order(shop, refused, "late")
    shop.run("w1")
    shop.workflow(durable.recv, name="inbox").apply_async(task_id="late")
    send(shop, "go on")
    assert shop.run("w1") == "WorkflowNotFound"
    assert sql.value("SELECT count(*) FROM celery_durable.message WHERE workflow = 'late'") == 0


def test_from_a_workflow_to_a_finished_one(shop: Inprocess, sql: Sql) -> None:
    """The same on every replay, though the other one has been resumed meanwhile."""
    shop.workflow(durable.recv, name="inbox").apply_async(task_id="other")
    durable.cancel_workflow("other", app=shop.app)
    order(shop, refused, "other")
    shop.run("w1")
    durable.resume_workflow("other", app=shop.app)
    send(shop, "go on")
    assert shop.run("w1") == "WorkflowFinished"
    assert sql.value("SELECT count(*) FROM celery_durable.message WHERE workflow = 'other'") == 0


def test_messages_outlive_a_cancellation(shop: Inprocess) -> None:
    """A workflow that is resumed takes what it hadn't taken, and nothing twice."""
    order(shop, lambda: [durable.recv(), durable.recv("last"), durable.recv()])
    for number in (1, 2):
        send(shop, number)
    shop.run("w1")
    durable.cancel_workflow("w1", app=shop.app)
    durable.resume_workflow("w1", app=shop.app)
    send(shop, "last", "last")
    assert shop.run("w1") == [1, "last", 2]


# A sender that dies between its commit and the telling


def test_an_untold_message_is_found_by_the_sweep(shop: Inprocess, sql: Sql) -> None:
    """The waiting workflow is woken by whoever sweeps next; once."""
    order(shop, lambda: durable.recv("paid"))
    shop.run("w1")
    sql.execute(UNTOLD, "paid")
    assert sweep(shop)["tell"] == 1
    assert state(shop) == "ENQUEUED"
    assert sweep(shop)["tell"] == 0
    assert shop.run("w1") == 5


def test_an_untold_message_of_another_topic(shop: Inprocess, sql: Sql) -> None:
    """It wakes nobody, and is told of all the same."""
    order(shop, lambda: durable.recv("paid"))
    shop.run("w1")
    sql.execute(UNTOLD, "shipped")
    assert sweep(shop)["tell"] == 0
    assert state(shop) == "SUSPENDED"
    assert sql.value("SELECT told FROM celery_durable.message")


def test_an_untold_message_is_taken_without_a_sweep(shop: Inprocess, sql: Sql) -> None:
    """A recv finds it anyway."""
    order(shop, lambda: durable.recv("paid"))
    sql.execute(UNTOLD, "paid")
    assert shop.run("w1") == 5
    assert sweep(shop)["tell"] == 0


def test_a_workflow_that_dies_behind_its_send(shop: Inprocess, inbox: Any, sql: Sql) -> None:
    """Its replay doesn't send again; the sweep wakes the other one."""
    shop.run("inbox")
    order(shop, lambda: durable.send("inbox", 1))
    shop.run("w1")
    sql.execute("UPDATE celery_durable.message SET told = false")
    sql.execute("UPDATE celery_durable.workflow SET state = 'SUSPENDED', publish_at = NULL WHERE id = 'inbox'")
    sweep(shop)
    assert state(shop, "inbox") == "ENQUEUED"


# What can't be sent


BAD_NAMES = ["", TEN_KB, "a\x00b", "\ud800", 5, b"topic"]


@pytest.mark.parametrize("topic", BAD_NAMES, ids=lambda topic: f"{topic!r:.12}")
@pytest.mark.parametrize("call", [
    lambda topic: durable.recv(topic), lambda topic: durable.send("w1", 1, topic),
], ids=["recv", "send"])  # fmt: skip
def test_an_impossible_topic(shop: Inprocess, call: Any, topic: Any) -> None:
    """It is refused before anything is written."""
    order(shop, lambda: call(topic))
    told = shop.run("w1")
    assert isinstance(told, TypeError | ValueError)
    assert "topic" in str(told)
    assert steps(shop) == {}


@pytest.mark.parametrize("topic", BAD_NAMES, ids=lambda topic: f"{topic!r:.12}")
def test_an_impossible_topic_from_outside(shop: Inprocess, topic: Any) -> None:
    """It is refused as in a workflow."""
    order(shop, durable.recv)
    with pytest.raises((TypeError, ValueError), match="topic"):
        send(shop, 1, topic)


@pytest.mark.parametrize("topic", ["x" * 255, "\U0001f4b6" * 255, "with space", "'; --", "%s", "[a]#2"], ids=ascii)
def test_any_other_topic(shop: Inprocess, topic: str) -> None:
    """Text is text."""
    order(shop, lambda: durable.recv(topic))
    shop.run("w1")
    assert status(shop).waiting_for == f"message {topic}"
    send(shop, "found", topic)
    assert shop.run("w1") == "found"


bad_key = pytest.mark.parametrize("key", [TEN_KB, "a\x00b", "\ud800"], ids=lambda key: f"{key!r:.12}")


@bad_key
def test_an_impossible_key_from_outside(shop: Inprocess, key: str) -> None:
    """It is refused before Postgres is asked."""
    order(shop, durable.recv)
    with pytest.raises((TypeError, ValueError)):
        send(shop, 1, idempotency_key=key)


@bad_key
def test_an_impossible_key_of_a_workflow(shop: Inprocess, sql: Sql, key: str) -> None:
    """It is refused before anything is written."""
    order(shop, lambda: durable.send("w1", 1, idempotency_key=key))
    assert isinstance(shop.run("w1"), TypeError | ValueError)
    assert steps(shop) == {}
    assert sql.value("SELECT count(*) FROM celery_durable.message") == 0


@pytest.mark.parametrize("workflow_id", ["", "a\x00b", TEN_KB, None, 5], ids=lambda each: f"{each!r:.12}")
def test_an_impossible_id(shop: Inprocess, workflow_id: Any) -> None:
    """It is a ValueError, outside and in a workflow."""
    with pytest.raises(ValueError, match="workflow"):
        send(shop, 1, to=workflow_id)
    order(shop, lambda: durable.send(workflow_id, 1))
    assert isinstance(shop.run("w1"), ValueError)
    assert steps(shop) == {}


@pytest.mark.parametrize(
    ("message", "error"), [(object(), SerializationError), ("x" * 20_000, PayloadTooLarge)], ids=["object", "large"]
)
def test_an_impossible_message(shop: Inprocess, sql: Sql, message: Any, error: Any) -> None:
    """Nothing is sent, and a workflow may handle the error and go on."""

    def body() -> str:
        with suppress(error):
            durable.send("w1", message)
            return "sent"
        return str(durable.recv(timeout=0, default="refused"))

    order(shop, body)
    with pytest.raises(error, match="w1"):
        send(shop, message)
    assert shop.run("w1") == "refused"
    assert sql.value("SELECT count(*) FROM celery_durable.message") == 0


# Where


def test_no_recv_outside(shop: Inprocess) -> None:
    """Only a workflow has messages."""
    with pytest.raises(NotInWorkflow, match="Only a workflow can receive messages"):
        durable.recv()


@pytest.mark.parametrize("call", [durable.recv, lambda: durable.send("w1", 1)], ids=["recv", "send"])
def test_not_in_a_step(shop: Inprocess, sql: Sql, call: Any) -> None:
    """Its next try would do it again."""
    order(shop, durable.as_step(call, name="step"))
    assert isinstance(shop.run("w1"), NotAllowedInStep)
    assert sql.value("SELECT count(*) FROM celery_durable.message") == 0


@pytest.mark.parametrize("call", [durable.recv, lambda: durable.send("w1", 1)], ids=["recv", "send"])
@pytest.mark.parametrize("context", [contextvars.Context, contextvars.copy_context])
def test_not_in_a_thread_of_the_user(shop: Inprocess, sql: Sql, call: Any, context: Any) -> None:
    """Whether it has the workflow's context variables or not."""
    seen: list[BaseException] = []

    def caught() -> None:
        try:
            call()
        except NotInWorkflow as error:
            seen.append(error)

    def body() -> None:
        thread = threading.Thread(target=context().run, args=(caught,))
        thread.start()
        thread.join()

    order(shop, body)
    shop.run("w1")
    assert len(seen) == 1
    assert steps(shop) == {}
    assert sql.value("SELECT count(*) FROM celery_durable.message") == 0


@pytest.mark.parametrize("call", [durable.recv, lambda: durable.send("w1", 1)], ids=["recv", "send"])
def test_not_in_a_direct_call(shop: Inprocess, call: Callable[[], Any]) -> None:
    """There is no database then; the error points to the test kit, also in eager mode."""
    task = order(shop, call)
    with pytest.raises(NotInWorkflow, match="durable_run"):
        task()
    with pytest.raises(NotInWorkflow, match="durable_run"):
        task.apply().get()


# On the event loop


def test_async_messages(shop: Inprocess) -> None:
    """``asend`` and ``arecv`` do what ``send`` and ``recv`` do."""

    async def body() -> list[Any]:
        await durable.asend("w1", "note", topic="self")
        return [await durable.arecv("self"), await durable.arecv(timeout=0, default="nothing"), await durable.arecv()]

    order(shop, body)
    assert isinstance(shop.run("w1"), Retry)
    asyncio.run(durable.asend("w1", "from outside", app=shop.app))
    assert shop.run("w1") == ["note", "nothing", "from outside"]


@pytest.mark.parametrize("first", ["a", "b"])
def test_two_waits_at_once(shop: Inprocess, first: str) -> None:
    """The workflow suspends once, and a message of either topic wakes it."""
    second = {"a": "b", "b": "a"}[first]

    async def body() -> list[Any]:
        return await asyncio.gather(durable.arecv("a"), durable.arecv("b"))

    order(shop, body)
    assert isinstance(shop.run("w1"), Retry)
    send(shop, "other", "c")
    assert state(shop) == "SUSPENDED"
    send(shop, first, first)
    assert state(shop) == "ENQUEUED"
    assert isinstance(shop.run("w1"), Retry)
    send(shop, second, second)
    assert shop.run("w1") == ["a", "b"]
    assert status(shop).attempt == 3


def test_a_message_beside_a_sleep(shop: Inprocess, sql: Sql) -> None:
    """Either wakes the workflow."""

    async def body() -> list[Any]:
        return await asyncio.gather(durable.asleep(100), durable.arecv())

    order(shop, body)
    shop.run("w1")
    assert status(shop).wake_at is not None
    send(shop, "paid")
    assert isinstance(shop.run("w1"), Retry)
    wake(shop, sql)
    assert shop.run("w1") == [None, "paid"]


def test_a_message_that_comes_while_a_step_runs(shop: Inprocess, sql: Sql) -> None:
    """The wait has no worker's attention then; it is seen when the step has ended."""

    async def work() -> str:
        await asyncio.to_thread(sql.execute, UNTOLD, "paid")
        return "worked"

    async def body() -> list[Any]:
        return await asyncio.gather(durable.arecv("paid"), durable.as_step(work, name="work")())

    order(shop, body)
    if isinstance(shop.run("w1"), Retry):
        assert state(shop) == "ENQUEUED"
        assert shop.run("w1") == [5, "worked"]
    assert state(shop) == "SUCCESS"


def test_each_name_is_for_its_kind_of_function(shop: Inprocess) -> None:
    """The error says what to write instead."""

    async def body() -> str:
        with pytest.raises(NotInWorkflow, match=r"await durable\.arecv"):
            durable.recv()
        with pytest.raises(NotInWorkflow, match=r"await durable\.asend"):
            durable.send("w1", 1)
        return "refused"

    order(shop, body)
    assert shop.run("w1") == "refused"


def test_the_async_names_in_a_sync_function(shop: Inprocess) -> None:
    """The error says what to write instead."""

    def body() -> str:
        with pytest.raises(NotInWorkflow, match=r"durable\.recv"):
            durable.arecv()
        with pytest.raises(NotInWorkflow, match=r"durable\.send"):
            durable.asend("w1", 1)
        return "refused"

    order(shop, body)
    assert shop.run("w1") == "refused"
