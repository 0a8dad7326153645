"""Durable sleep: when it ends is fixed once, it never ends early, and what can't be slept is refused."""

from __future__ import annotations

import asyncio
import contextvars
import math
import threading
import time
from collections.abc import Iterator
from datetime import date, datetime, timedelta, timezone
from typing import Any

import pytest
from celery.exceptions import Ignore, Retry

import celery_durable as durable
from celery_durable.engine.context import Attempt, boot_time, running
from celery_durable.exceptions import NotAllowedInStep, NotInWorkflow, Suspended, WorkflowCancelledError
from tests.crash.statements import text_of
from tests.fixtures.fix_postgres import Sql, _new_database
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.proxy import PostgresProxy
from tests.integration.attempts import DUE, begin, clear, crash, order, release, status, steps

WAKE = "UPDATE celery_durable.workflow SET wake_at = clock_timestamp()"
ENDS = "SELECT wake_at FROM celery_durable.checkpoint WHERE key = 'durable.sleep'"
IS_OVER = "SELECT clock_timestamp() >= wake_at FROM celery_durable.checkpoint WHERE key = 'durable.sleep'"
CENTURY = timedelta(days=36525)


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
    shop = Inprocess(database_url, broker_url, suspend_after=2)
    yield shop
    shop.close()


@pytest.fixture
def patient(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    """A shop whose workflows sleep in place for long."""
    shop = Inprocess(database_url, broker_url, suspend_after=60)
    yield shop
    shop.close()


def wake(shop: Inprocess, sql: Sql) -> None:
    """Let the time of every sleep have come."""
    sql.execute(DUE)
    sql.execute(WAKE)
    assert shop.installation.store.workflows.wake(limit=9, patience=0)


def in_a_moment() -> datetime:
    return datetime.now(timezone.utc) + timedelta(seconds=100)


# Waking


def test_a_sleep_gives_the_worker_back(shop: Inprocess, sql: Sql) -> None:
    """Nothing of it stays: no claim, no message; the row says when it ends and what it waits for."""
    order(shop, lambda: durable.sleep(100))
    before = sql.value("SELECT clock_timestamp()")
    assert isinstance(shop.run("w1"), Retry)
    found = status(shop)
    assert (found.state, found.waiting_for, found.node) == ("SUSPENDED", "sleep", None)
    assert found.wake_at is not None
    assert timedelta(seconds=99) < found.wake_at - before < timedelta(seconds=110)


def test_a_sleeper_goes_on_when_its_time_has_come(shop: Inprocess, sql: Sql) -> None:
    """Behind the sleep, in a new attempt."""
    order(shop, lambda: durable.sleep(timedelta(minutes=2)) or "woke")
    shop.run("w1")
    assert shop.installation.store.workflows.wake(limit=9, patience=0) == []
    wake(shop, sql)
    assert shop.run("w1") == "woke"
    assert status(shop).attempt == 2


def test_the_wake_time_is_kept_over_a_crash(shop: Inprocess, sql: Sql) -> None:
    """A worker that died after the first call changes nothing: the sleep doesn't begin again."""
    order(shop, lambda: durable.sleep(100))
    attempt = begin(shop)
    with running(attempt), pytest.raises(Suspended):
        durable.sleep(100)
    ends = sql.value(ENDS)
    crash(shop, attempt)
    assert isinstance(shop.run("w1"), Retry)
    assert sql.value(ENDS) == ends
    wake_at = status(shop).wake_at
    assert wake_at is not None
    assert abs(wake_at - ends) < timedelta(seconds=2)


def test_a_sleep_that_ended_during_a_crash_takes_no_time(shop: Inprocess, sql: Sql) -> None:
    """What the worker was away for counts."""
    order(shop, lambda: durable.sleep(100) or "woke")
    attempt = begin(shop)
    with running(attempt), pytest.raises(Suspended):
        durable.sleep(100)
    sql.execute(DUE)
    crash(shop, attempt)
    assert shop.run("w1") == "woke"


def test_a_lost_answer_does_not_move_the_wake_time(proxy: PostgresProxy, broker_url: str, sql: Sql) -> None:
    """The statement is repeated, and finds the time that it has fixed."""
    shop = Inprocess(proxy.url, broker_url)
    order(shop, lambda: durable.sleep(100))
    held = proxy.hold(text_of("awaits.sleep"), "after")
    runner = threading.Thread(target=shop.run, args=("w1",), daemon=True)
    runner.start()
    held.wait_reached()
    ends = sql.value(ENDS)
    proxy.disconnect()
    held.release()
    runner.join(20)
    assert status(shop).state == "SUSPENDED"
    assert sql.value(ENDS) == ends
    shop.close()


def test_the_first_duration_counts(shop: Inprocess, sql: Sql) -> None:
    """One that a replay computes otherwise is no other sleep."""
    durations = iter([100, 5000])
    order(shop, lambda: durable.sleep(next(durations)))
    shop.run("w1")
    ends = sql.value(ENDS)
    sql.execute(WAKE)
    shop.installation.store.workflows.wake(limit=9, patience=0)
    assert isinstance(shop.run("w1"), Retry)
    assert sql.value(ENDS) == ends


def test_a_workflow_that_is_woken_early_sleeps_on(shop: Inprocess, sql: Sql) -> None:
    """Until the time that was fixed at first."""
    order(shop, lambda: durable.sleep(100) or "woke")
    shop.run("w1")
    ends = sql.value(ENDS)
    for _ in range(2):
        sql.execute(WAKE)
        assert shop.installation.store.workflows.wake(limit=9, patience=0) == ["w1"]
        assert isinstance(shop.run("w1"), Retry)
        wake_at = status(shop).wake_at
        assert wake_at is not None
        assert abs(wake_at - ends) < timedelta(seconds=2)
    assert sql.value(ENDS) == ends


# Never early


@pytest.mark.parametrize("duration", [0.01, 0.15, timedelta(milliseconds=300)], ids=str)
def test_a_short_sleep_stays_in_place(shop: Inprocess, sql: Sql, duration: Any) -> None:
    """It ends in the attempt that began it, and not before its time."""
    seen = []
    order(shop, lambda: durable.sleep(duration) or seen.append(sql.value(IS_OVER)))
    assert shop.run("w1") is None
    assert seen == [True]
    assert (status(shop).state, status(shop).attempt) == ("SUCCESS", 1)


def test_the_rest_of_a_sleep_is_not_cut_short(shop: Inprocess, sql: Sql) -> None:
    """A replay sleeps on in place when little is left, by the database's clock."""
    order(shop, lambda: durable.sleep(100))
    shop.run("w1")
    sql.execute("UPDATE celery_durable.checkpoint SET wake_at = clock_timestamp() + interval '0.4 s'")
    sql.execute(WAKE)
    shop.installation.store.workflows.wake(limit=9, patience=0)
    attempt = begin(shop)
    with running(attempt):
        durable.sleep(100)
    assert sql.value(IS_OVER)


def test_a_claim_that_took_long_does_not_shorten_a_sleep(shop: Inprocess, sql: Sql) -> None:
    """What is left was measured when the database answered, not when it was asked."""
    order(shop, lambda: durable.sleep(100))
    shop.run("w1")
    sql.execute("UPDATE celery_durable.checkpoint SET wake_at = clock_timestamp() + interval '0.6 s'")
    sql.execute(WAKE)
    shop.installation.store.workflows.wake(limit=9, patience=0)
    quick = begin(shop)
    slow = claimed_slowly(shop, quick)
    with running(slow):
        durable.sleep(100)
    assert sql.value(IS_OVER)


def claimed_slowly(shop: Inprocess, attempt: Attempt) -> Attempt:
    """The same run, as if its claim had been under way for ten seconds before the database took it."""
    fence = attempt.fence
    claim = shop.installation.store.workflows.claim("w1", "order", fence.token, shop.node, retries=0, patience=0)
    assert claim is not None
    return Attempt.of(shop.installation.engine, "order", claim, boot_time() - 10)


def test_no_duration_is_no_sleep(shop: Inprocess) -> None:
    """It is kept like any other, so that replays agree."""
    order(shop, lambda: durable.sleep(0) or "on")
    assert shop.run("w1") == "on"
    assert list(steps(shop)) == ["durable.sleep"]


def test_each_sleep_is_its_own(shop: Inprocess, sql: Sql) -> None:
    """A loop sleeps as often as it calls."""

    def body() -> str:
        for _ in range(3):
            durable.sleep(100)
        return "thrice"

    order(shop, body)
    for _ in range(3):
        assert isinstance(shop.run("w1"), Retry)
        wake(shop, sql)
    assert shop.run("w1") == "thrice"
    assert list(steps(shop)) == ["durable.sleep", "durable.sleep#2", "durable.sleep#3"]


# Until a moment


@pytest.mark.parametrize("offset", [0, 5.5, -11], ids=str)
def test_until_a_moment(shop: Inprocess, sql: Sql, offset: float) -> None:
    """Exactly that one, whatever its time zone."""
    moment = in_a_moment().astimezone(timezone(timedelta(hours=offset)))
    order(shop, lambda: durable.sleep_until(moment) or "woke")
    assert isinstance(shop.run("w1"), Retry)
    assert sql.value(ENDS) == moment
    wake(shop, sql)
    assert shop.run("w1") == "woke"


@pytest.mark.parametrize(
    "moment", [datetime(2000, 1, 1, tzinfo=timezone.utc), datetime.min.replace(tzinfo=timezone.utc)]
)
def test_a_moment_in_the_past_is_no_sleep(shop: Inprocess, moment: datetime) -> None:
    """The workflow goes on at once."""
    order(shop, lambda: durable.sleep_until(moment) or "on")
    assert shop.run("w1") == "on"
    assert status(shop).attempt == 1


def test_the_first_moment_counts(shop: Inprocess, sql: Sql) -> None:
    """One that a replay reads from the clock anew is no other sleep."""
    order(shop, lambda: durable.sleep_until(in_a_moment()) or "woke")
    shop.run("w1")
    ends = sql.value(ENDS)
    sql.execute(WAKE)
    shop.installation.store.workflows.wake(limit=9, patience=0)
    assert isinstance(shop.run("w1"), Retry)
    assert sql.value(ENDS) == ends


# In place


def test_a_cancelled_workflow_does_not_sleep_to_its_end(patient: Inprocess) -> None:
    """A sleep in place hears of it within a second or two."""
    order(patient, lambda: durable.sleep(50))
    found: list[Any] = []
    runner = threading.Thread(target=lambda: found.append(patient.run("w1")), daemon=True)
    runner.start()
    wait_until(lambda: "durable.sleep" in steps(patient), message="the workflow sleeps")
    verdict = patient.installation.codec.encode_error(WorkflowCancelledError())
    patient.installation.store.workflows.cancel(["w1"], verdict=verdict, patience=0)
    runner.join(20)
    assert isinstance(found[0], Ignore)
    assert status(patient).state == "CANCELLED"


def test_a_worker_that_shuts_down_does_not_wait_for_a_sleep(patient: Inprocess, sql: Sql) -> None:
    """The workflow is handed over with its wake time."""
    order(patient, lambda: durable.sleep(50))
    found: list[Any] = []
    runner = threading.Thread(target=lambda: found.append(patient.run("w1")), daemon=True)
    runner.start()
    ends = wait_until(lambda: [row[0] for row in sql.all(ENDS)], message="the workflow sleeps")
    patient.drain()
    runner.join(20)
    assert isinstance(found[0], Retry)
    assert status(patient).state == "ENQUEUED"
    assert [sql.value(ENDS)] == ends


# Without a database


def test_no_time_passes_in_a_direct_call(shop: Inprocess) -> None:
    """A workflow function is a plain function then."""

    def body() -> str:
        durable.sleep(10**6)
        durable.sleep_until(in_a_moment())
        return "at once"

    began = time.monotonic()
    assert order(shop, body)() == "at once"
    assert time.monotonic() - began < 50


def test_no_time_passes_in_a_direct_call_of_an_async_function(shop: Inprocess) -> None:
    """Awaited on a loop of the caller's own."""

    @shop.workflow(name="async order")
    async def body() -> str:
        await durable.asleep(10**6)
        await durable.asleep_until(in_a_moment())
        return "at once"

    assert asyncio.run(asyncio.wait_for(body(), 50)) == "at once"


def test_no_time_passes_in_eager_mode(shop: Inprocess, sql: Sql) -> None:
    """And nothing is written."""

    @shop.workflow(name="eager order")
    def body() -> str:
        durable.sleep(10**6)
        return "at once"

    shop.app.conf.task_always_eager = True
    assert body.delay().get() == "at once"
    assert sql.value("SELECT count(*) FROM celery_durable.workflow") == 0


# What can't be slept


BAD_DURATIONS = [
    -1, -0.001, timedelta(seconds=-1), math.nan, math.inf, -math.inf, 10**400, CENTURY + timedelta(seconds=1),
]  # fmt: skip


@pytest.mark.parametrize("duration", BAD_DURATIONS, ids=lambda value: f"{value!r:.40}")
def test_an_impossible_duration(shop: Inprocess, duration: Any) -> None:
    """It is a ValueError, and nothing is kept; directly called functions are told the same."""

    def body() -> None:
        durable.sleep(duration)

    task = order(shop, body)
    told = shop.run("w1")
    assert isinstance(told, ValueError)
    assert "duration" in str(told)
    assert steps(shop) == {}
    with pytest.raises(ValueError, match="duration"):
        task()


@pytest.mark.parametrize("duration", ["5", None, True, datetime(2000, 1, 1)], ids=str)
def test_what_is_no_duration(shop: Inprocess, duration: Any) -> None:
    """The error says what to pass, and nothing is kept."""
    order(shop, lambda: durable.sleep(duration))
    assert "must be seconds or a timedelta" in str(shop.run("w1"))
    assert status(shop).state == "FAILURE"
    assert steps(shop) == {}


def test_a_hundred_years(shop: Inprocess) -> None:
    """They are the most, and can be read back."""
    order(shop, lambda: durable.sleep(CENTURY))
    assert isinstance(shop.run("w1"), Retry)
    wake_at = status(shop).wake_at
    assert wake_at is not None
    assert abs(wake_at - datetime.now(timezone.utc) - CENTURY) < timedelta(minutes=1)


@pytest.mark.parametrize(
    "moment", [datetime(2030, 1, 1), datetime.max, date(2030, 1, 1), "2030-01-01T00:00:00Z", 1e9, None], ids=str
)
def test_what_is_no_moment(shop: Inprocess, moment: Any) -> None:
    """A naive datetime means another time on each machine; the error says what to pass."""

    def body() -> None:
        durable.sleep_until(moment)

    task = order(shop, body)
    told = shop.run("w1")
    assert isinstance(told, ValueError)
    assert "time zone" in str(told)
    assert steps(shop) == {}
    with pytest.raises(ValueError, match="time zone"):
        task()


@pytest.mark.parametrize("moment", [
    datetime.max.replace(tzinfo=timezone.utc), datetime.max.replace(tzinfo=timezone(timedelta(hours=-12))),
], ids=str)  # fmt: skip
def test_a_moment_at_the_end_of_time(shop: Inprocess, moment: datetime) -> None:
    """Whether it is refused or slept for: the workflow can be read by Python afterwards."""
    order(shop, lambda: durable.sleep_until(moment))
    shop.run("w1")
    assert status(shop).state in ("SUSPENDED", "FAILURE")
    assert [found.id for found in durable.list_workflows(app=shop.app)] == ["w1"]


# Where


@pytest.mark.parametrize("sleep", [lambda: durable.sleep(1), lambda: durable.sleep_until(in_a_moment())])
def test_only_in_a_workflow(shop: Inprocess, sleep: Any) -> None:
    """Not outside, not in a step, not in a thread of the user."""
    with pytest.raises(NotInWorkflow, match="sleep durably"):
        sleep()
    order(shop, durable.as_step(sleep, name="step"))
    assert isinstance(shop.run("w1"), NotAllowedInStep)


@pytest.mark.parametrize("context", [contextvars.Context, contextvars.copy_context])
def test_not_in_a_thread_of_the_user(shop: Inprocess, context: Any) -> None:
    """Whether it has the workflow's context variables or not."""
    seen: list[BaseException] = []

    def sleep() -> None:
        try:
            durable.sleep(0)
        except NotInWorkflow as error:
            seen.append(error)

    def body() -> None:
        thread = threading.Thread(target=context().run, args=(sleep,))
        thread.start()
        thread.join()

    order(shop, body)
    shop.run("w1")
    assert len(seen) == 1
    assert steps(shop) == {}


def test_each_name_is_for_its_kind_of_function(shop: Inprocess) -> None:
    """The error says what to write instead."""

    async def asynchronous() -> str:
        with pytest.raises(NotInWorkflow, match=r"await durable\.asleep\(…\)"):
            durable.sleep(0)
        with pytest.raises(NotInWorkflow, match=r"await durable\.asleep_until\(…\)"):
            durable.sleep_until(in_a_moment())
        return "refused"

    order(shop, asynchronous)
    assert shop.run("w1") == "refused"


def test_the_async_names_in_a_sync_function(shop: Inprocess) -> None:
    """The error says what to write instead."""

    def synchronous() -> str:
        with pytest.raises(NotInWorkflow, match=r"durable\.sleep\(…\)"):
            durable.asleep(0)
        with pytest.raises(NotInWorkflow, match=r"durable\.sleep_until\(…\)"):
            durable.asleep_until(in_a_moment())
        return "refused"

    order(shop, synchronous)
    assert shop.run("w1") == "refused"


# On the event loop


def test_an_async_workflow_sleeps(shop: Inprocess, sql: Sql) -> None:
    """It gives the worker back, and goes on behind the sleep."""

    async def body() -> str:
        await durable.asleep(100)
        await durable.asleep_until(datetime(2000, 1, 1, tzinfo=timezone.utc))
        return "woke"

    order(shop, body)
    assert isinstance(shop.run("w1"), Retry)
    assert status(shop).waiting_for == "sleep"
    wake(shop, sql)
    assert shop.run("w1") == "woke"


def test_two_sleeps_at_once(shop: Inprocess, sql: Sql) -> None:
    """The workflow suspends once, until the earlier one ends; the later one keeps its time."""

    async def body() -> str:
        await asyncio.gather(durable.asleep(5000), durable.asleep(100))
        return "both"

    order(shop, body)
    assert isinstance(shop.run("w1"), Retry)
    wake_at = status(shop).wake_at
    assert wake_at is not None
    assert wake_at - datetime.now(timezone.utc) < timedelta(seconds=200)
    sql.execute(f"{DUE} WHERE key = 'durable.sleep#2'")
    sql.execute(WAKE)
    shop.installation.store.workflows.wake(limit=9, patience=0)
    assert isinstance(shop.run("w1"), Retry)
    wake_at = status(shop).wake_at
    assert wake_at is not None
    assert wake_at - datetime.now(timezone.utc) > timedelta(seconds=4000)
    wake(shop, sql)
    assert shop.run("w1") == "both"
    assert status(shop).attempt == 3


def test_an_async_workflow_sleeps_in_place_while_a_step_runs(shop: Inprocess, sql: Sql) -> None:
    """A long sleep doesn't cut the step off: the worker is given back when that has ended."""
    ended = []

    async def work() -> None:
        await asyncio.sleep(0.1)
        ended.append(sql.value("SELECT state FROM celery_durable.workflow"))

    async def body() -> str:
        await asyncio.gather(durable.asleep(100), durable.as_step(work, name="work")())
        return "both"

    order(shop, body)
    assert isinstance(shop.run("w1"), Retry)
    assert ended == ["RUNNING"]
    wake(shop, sql)
    assert shop.run("w1") == "both"
    assert len(ended) == 1


def test_an_async_sleep_is_never_early(shop: Inprocess, sql: Sql) -> None:
    """Short ones stay in place."""

    async def body() -> bool:
        await durable.asleep(0.2)
        return bool(sql.value(IS_OVER))

    order(shop, body)
    assert shop.run("w1") is True
    assert status(shop).attempt == 1


@pytest.mark.parametrize("duration", [-1, math.nan, CENTURY * 2], ids=str)
def test_an_impossible_async_sleep(shop: Inprocess, duration: Any) -> None:
    """It is refused where it is called."""

    async def body() -> None:
        await durable.asleep(duration)

    order(shop, body)
    assert isinstance(shop.run("w1"), ValueError)
    assert steps(shop) == {}


def test_a_hand_over_keeps_the_wake_time(shop: Inprocess, sql: Sql) -> None:
    """As a crash does."""
    order(shop, lambda: durable.sleep(100))
    attempt = begin(shop)
    with running(attempt), pytest.raises(Suspended):
        durable.sleep(100)
    ends = sql.value(ENDS)
    release(shop, attempt)
    shop.run("w1")
    assert sql.value(ENDS) == ends
