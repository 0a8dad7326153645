"""Time limits and cancellation of steps, in one process: what is recorded, and what the workflow makes of it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import Any

import pytest
from celery.exceptions import Ignore

import celery_durable as durable
from celery_durable.engine.context import Attempt, current_attempt, running
from celery_durable.engine.observer import Observer
from celery_durable.exceptions import Cancelled, OwnershipLost, SoftTimeLimitExceeded, StepLost, StepTimeout
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.proxy import PostgresProxy
from tests.fixtures.rig import Rig
from tests.fixtures.workers import ROOT
from tests.integration.attempts import LATE, Killed, begin, crash, order, release, status, steps

pytestmark = pytest.mark.oldest

#: Long enough to be never reached.
LIMIT = 600.0
REACHED = "UPDATE celery_durable.checkpoint SET kill_at = clock_timestamp() WHERE kill_at IS NOT NULL"
OURS = "SELECT FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'celery_durable'"
CANCEL = (
    "UPDATE celery_durable.workflow SET state = 'CANCELLED', finished_at = clock_timestamp(), dispatched = false, "
    "publish_at = NULL WHERE id = 'w1'"
)


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """One database for all tests here."""
    return emptied_database_url


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    shop = Inprocess(database_url, broker_url, suspend_after=2)
    yield shop
    shop.close()


@pytest.fixture
def calls() -> list[Any]:
    """What bodies did, in order."""
    return []


def linger(seconds: float = 30) -> None:
    threading.Event().wait(seconds)


def watch_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "watch" in thread.name]


# What the rescue makes of a try with a hard limit.


def limited(rig: Rig, *, kill_in: float, spent: bool = False, tries: int = 0) -> Any:
    """A workflow whose step runs under a hard limit that ends in so many seconds."""
    fence = rig.run()
    record = rig.record("charge", 1)
    starting = type(record)(record.key, record.seq, tries + spent, record.args, record.fingerprint, None)
    rig.checkpoints.save_try(fence, starting, None, spent=spent, kill_in=kill_in, patience=0)
    return fence


def judged(rig: Rig) -> tuple[int, bool, int]:
    """The workflow's crashes, and its step's: whether it has overrun its limit, and its failed tries."""
    rows = rig.sql.one("SELECT overran, tries FROM celery_durable.checkpoint")
    assert rig.state() == "ENQUEUED"
    return rig.row().crashes, rows.overran, rows.tries


@pytest.mark.parametrize(("kill_in", "expected"), [(-0.001, (0, True, 0)), (60, (1, False, 0))])
def test_a_process_lost_after_the_limit_was_ended_by_it(
    rig: Rig, kill_in: float, expected: tuple[int, bool, int]
) -> None:
    """That is no crash; one that is lost before it has crashed, and takes no try."""
    fence = limited(rig, kill_in=kill_in)
    assert rig.rescue(fence.node, [fence.id]) == [("w1", "ENQUEUED")]
    assert judged(rig) == expected


@pytest.mark.parametrize(("last_beat", "expected"), [(1, (1, False, 0)), (3, (0, True, 0))])
def test_a_host_that_was_last_seen_before_the_limit_has_crashed(
    rig: Rig, last_beat: float, expected: tuple[int, bool, int]
) -> None:
    """However late it is found: what had to end the process was gone itself by then."""
    fence = limited(rig, kill_in=2)
    rig.silence(fence.node)
    rig.sql.execute("UPDATE celery_durable.checkpoint SET kill_at = kill_at - interval '1 hour'")
    rig.sql.execute(
        "UPDATE celery_durable.node SET seen = seen + make_interval(secs => %s) WHERE id = %s", last_beat, fence.node
    )
    rig.witness()
    assert rig.rescue() == [("w1", "ENQUEUED")]
    assert judged(rig) == expected


def test_a_host_that_nobody_knows_any_more_has_crashed(rig: Rig) -> None:
    """When it was last seen can't be told."""
    fence = limited(rig, kill_in=-1)
    rig.silence(fence.node)
    rig.nodes.leave(fence.node, patience=0)
    rig.witness()
    assert rig.rescue() == [("w1", "ENQUEUED")]
    assert judged(rig) == (1, False, 0)


def test_a_limit_of_an_earlier_attempt_does_not_count(rig: Rig) -> None:
    """The next one has crashed before it came to the step."""
    fence = limited(rig, kill_in=0.01)
    assert rig.workflows.hand_over(fence.node, ["w1"], patience=0) == ["w1"]
    wait_until(
        lambda: rig.sql.value("SELECT kill_at < clock_timestamp() FROM celery_durable.checkpoint"),
        message="the limit is over",
    )
    claim = rig.claim("w1", fence.node)
    assert claim is not None
    assert not claim.history["charge"].overran
    rig.rescue(fence.node, ["w1"])
    assert judged(rig) == (1, False, 0)


def test_a_step_that_is_settled_or_failed_in_time_has_not_overrun(rig: Rig) -> None:
    """A crash after the outcome, or during the wait for the next try, is one."""
    fence = limited(rig, kill_in=-1)
    rig.save_try(fence, tries=1)
    rig.rescue(fence.node, ["w1"])
    assert judged(rig) == (1, False, 1)
    claim = rig.claim("w1", fence.node)
    assert claim is not None
    rig.checkpoints.save_try(claim.fence, rig.record("charge", 1), None, kill_in=-1, patience=0)
    rig.save_slow(claim.fence)
    rig.rescue(fence.node, ["w1"])
    assert judged(rig) == (1, False, 1)


def test_a_try_that_was_counted_before_it_began_is_counted_once(rig: Rig) -> None:
    """As the first one after a crash is."""
    fence = limited(rig, kill_in=-1, spent=True, tries=2)
    rig.rescue(fence.node, ["w1"])
    assert judged(rig) == (0, True, 2)


def test_a_crash_spends_the_try_that_was_counted_before(rig: Rig) -> None:
    """It isn't given back."""
    fence = limited(rig, kill_in=60, spent=True, tries=2)
    rig.rescue(fence.node, ["w1"])
    assert judged(rig) == (1, False, 3)


def test_a_cold_shutdown_gives_the_try_back_that_was_counted_before(rig: Rig) -> None:
    """The process was ended by somebody else than the step."""
    fence = limited(rig, kill_in=60, spent=True, tries=2)
    rig.workflows.hand_over(fence.node, ["w1"], patience=0)
    assert judged(rig) == (0, False, 2)
    claim = rig.claim("w1", fence.node)
    assert claim is not None
    rig.workflows.hand_over(fence.node, ["w1"], patience=0)
    assert judged(rig) == (0, False, 2)


# What the workflow makes of it.


def overrun(shop: Inprocess, sql: Sql, step: Any) -> None:
    """Let an attempt come to its limited step, and its process be ended there."""
    attempt = begin(shop)
    attempt.killable = True
    with running(attempt), pytest.raises(Killed):
        step()
    assert sql.execute(REACHED) == 1
    assert crash(shop, attempt) == "ENQUEUED"


def killing(calls: list[Any], times: int) -> Any:
    """A body in which its process dies so often."""

    def body() -> str:
        calls.append(durable.current.step.attempt)
        if len(calls) <= times:
            raise Killed
        return "in time"

    return body


def test_an_overrun_is_tried_again(shop: Inprocess, sql: Sql, calls: list[Any]) -> None:
    """Each counts against the step's retries; none is a crash, however many they are."""
    step = durable.as_step(
        killing(calls, 12), name="slow", time_limit=LIMIT, autoretry_for=(TimeoutError,), max_retries=12,
        default_retry_delay=0,
    )  # fmt: skip
    order(shop, step, max_recovery_attempts=1)
    for _ in range(12):
        overrun(shop, sql, step)
    assert shop.run("w1") == "in time"
    assert calls == list(range(1, 14))
    assert (status(shop).crashes, status(shop).attempt) == (0, 13)
    info = steps(shop)["slow"]
    assert info.tries == 13
    assert len(info.errors) == 12
    assert {error.type for error in info.errors} == {"celery_durable.exceptions.StepTimeout"}
    assert "longer than its time_limit" in info.errors[-1].message


def test_an_overrun_without_retries_left_is_the_steps_error(shop: Inprocess, sql: Sql, calls: list[Any]) -> None:
    """Which the workflow can catch, to fall back."""
    step = durable.as_step(killing(calls, 9), name="slow", time_limit=LIMIT)

    def body() -> str:
        try:
            return step()
        except TimeoutError as error:
            return type(error).__name__

    order(shop, body)
    overrun(shop, sql, step)
    assert shop.run("w1") == "StepTimeout"
    assert calls == [1]
    assert isinstance(steps(shop)["slow"].error, StepTimeout)
    assert steps(shop)["slow"].tries == 1


def test_an_overrun_after_a_crash_counts_once(shop: Inprocess, sql: Sql, calls: list[Any]) -> None:
    """The first step after a crash counts its try beforehand, which the limit doesn't count again."""
    step = durable.as_step(
        killing(calls, 3), name="slow", time_limit=LIMIT, max_retries=2, default_retry_delay=0
    )  # fmt: skip
    order(shop, step)
    attempt = begin(shop)
    attempt.killable = True
    with running(attempt), pytest.raises(Killed):
        step()
    assert crash(shop, attempt) == "ENQUEUED"
    overrun(shop, sql, step)
    overrun(shop, sql, step)
    assert shop.run("w1") == "in time"
    assert calls == [1, 1, 2, 3]
    assert status(shop).crashes == 1


def test_a_limited_step_that_crashes_its_process_each_time_is_lost(shop: Inprocess, calls: list[Any]) -> None:
    """Before its limit comes."""
    step = durable.as_step(killing(calls, 9), name="die", time_limit=LIMIT, max_retries=1)
    order(shop, step, max_recovery_attempts=10)
    for _ in range(3):
        attempt = begin(shop)
        attempt.killable = True
        with running(attempt), pytest.raises(Killed):
            step()
        assert crash(shop, attempt) == "ENQUEUED"
    shop.run("w1")
    assert isinstance(status(shop).error, StepLost)
    assert calls == [1, 1, 2]


def test_a_hand_over_of_a_limited_step_takes_no_try(shop: Inprocess, sql: Sql, calls: list[Any]) -> None:
    """A cold shutdown isn't the step's fault, even when its limit has passed since."""
    step = durable.as_step(killing(calls, 1), name="slow", time_limit=LIMIT)
    order(shop, step)
    attempt = begin(shop)
    attempt.killable = True
    with running(attempt), pytest.raises(Killed):
        step()
    shop.installation.store.workflows.hand_over(shop.node, ["w1"], patience=0)
    sql.execute(REACHED)
    assert shop.run("w1") == "in time"
    assert calls == [1, 1]
    assert status(shop).crashes == 0


def test_a_hard_limit_costs_one_round_trip(proxy: PostgresProxy, broker_url: str) -> None:
    """Before the body, of each try; a step without one pays nothing."""
    shop = Inprocess(proxy.url, broker_url)
    limited = durable.as_step(int, name="limited", time_limit=LIMIT)
    free = durable.as_step(int, name="free", soft_time_limit=LIMIT)
    order(shop, int)
    attempt = begin(shop)
    attempt.killable = True
    with running(attempt):
        free()
        proxy.reset()
        free()
        assert proxy.round_trips() == 1
        limited()
        assert proxy.round_trips() == 3
    attempt.killable = False
    with running(attempt):
        limited()
        assert proxy.round_trips() == 4
    shop.close()


class Deadlines(Observer):
    """Notes whether the process would be ended at each hook."""

    def __init__(self) -> None:
        self.armed: dict[str, bool] = {}

    def step_starting(self, workflow_id: str, key: str) -> None:
        self.armed["starting"] = is_armed()

    def step_returned(self, workflow_id: str, key: str) -> None:
        self.armed["returned"] = is_armed()


def is_armed() -> bool:
    from celery_durable.engine.limits import _watchdog

    return bool(_watchdog._deadlines)


@pytest.mark.parametrize("kind", ["sync", "atomic", "async"])
def test_only_the_body_is_under_the_hard_limit(shop: Inprocess, kind: str) -> None:
    """The statements around it aren't: a commit is never cut off by it."""
    deadlines = Deadlines()
    shop.installation.observers.add(deadlines)

    def body() -> None:
        deadlines.armed["body"] = is_armed()

    async def abody() -> None:
        await asyncio.sleep(0)
        body()

    step: Any = durable.as_step(abody if kind == "async" else body, name="s", time_limit=LIMIT, atomic=kind == "atomic")
    order(shop, step)
    attempt = begin(shop)
    attempt.killable = True
    with running(attempt):
        step()
    assert deadlines.armed == {"starting": False, "body": True, "returned": False}


def test_where_nothing_can_end_the_process_a_hard_limit_acts_as_a_soft_one(shop: Inprocess) -> None:
    """And says which of the two it was."""
    slow = durable.as_step(linger, name="slow", time_limit=0.05)
    both = durable.as_step(linger, name="both", time_limit=30, soft_time_limit=0.05)
    order(shop, lambda: [error_of(slow), error_of(both)])
    hard, soft = shop.run("w1")
    assert "ran longer than its time_limit of 0.05 s" in hard
    assert "ran longer than its soft_time_limit of 0.05 s" in soft


def error_of(step: Any, *args: Any) -> str:
    try:
        return str(step(*args))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


# Soft limits.


@pytest.mark.parametrize("retried", [(TimeoutError,), (Exception,), (SoftTimeLimitExceeded,)])
def test_a_timeout_is_an_error_like_others(shop: Inprocess, calls: list[Any], retried: Any) -> None:
    """It is retried by any of its bases."""

    def slow() -> int:
        calls.append(durable.current.step.attempt)
        if len(calls) < 3:
            linger()
        return len(calls)

    order(shop, durable.as_step(
        slow, name="slow", soft_time_limit=0.1, autoretry_for=retried, max_retries=2, retry_backoff=0.01
    ))  # fmt: skip
    assert shop.run("w1") == 3
    assert calls == [1, 2, 3]
    assert [error.type.rpartition(".")[2] for error in steps(shop)["slow"].errors] == ["StepTimeout"] * 2


def test_a_body_may_catch_its_timeout_and_return(shop: Inprocess) -> None:
    """What it returns is the outcome, as with Celery's own soft limit."""

    def careful() -> str:
        try:
            linger()
        except SoftTimeLimitExceeded:
            return "partial"
        return "whole"

    order(shop, durable.as_step(careful, name="careful", soft_time_limit=0.05))
    assert shop.run("w1") == "partial"


def test_the_limit_of_a_nested_step_holds_in_the_outer_one(shop: Inprocess, calls: list[Any]) -> None:
    """The outer body sees the inner deadline while the inner one runs, and its own again after it."""
    inner = durable.as_step(linger, name="inner", soft_time_limit=0.1)

    def outer() -> str:
        mine = durable.current.step.deadline
        error = error_of(inner)
        assert durable.current.step.deadline == mine
        return error

    order(shop, durable.as_step(outer, name="outer", soft_time_limit=30))
    assert "inner" in shop.run("w1")


def test_the_limit_of_an_outer_step_holds_in_a_nested_one(shop: Inprocess) -> None:
    """And is the outer one's outcome."""
    inner = durable.as_step(linger, name="inner", soft_time_limit=30)
    outer = durable.as_step(lambda: inner(), name="outer", soft_time_limit=0.1)
    order(shop, lambda: error_of(outer))
    assert "'outer'" in shop.run("w1")


@contextlib.contextmanager
def celerys_soft_limit() -> Iterator[None]:
    """What a pool process does with SIGUSR1."""

    def ring(signum: int, frame: Any) -> None:
        raise SoftTimeLimitExceeded

    handler = signal.signal(signal.SIGUSR1, ring)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, handler)


@pytest.mark.parametrize("options", [{}, {"autoretry_for": (Exception,), "max_retries": 5}, {"atomic": True}])
def test_celerys_limit_of_the_task_is_no_outcome_of_the_step(
    shop: Inprocess, calls: list[Any], options: dict[str, Any]
) -> None:
    """It is raised in the workflow function; the step isn't settled, no try is spent, and it runs again."""

    def slow() -> str:
        calls.append(durable.current.step.attempt)
        if len(calls) == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return "done"

    step = durable.as_step(slow, name="slow", soft_time_limit=30, **options)
    order(shop, step)
    attempt = begin(shop)
    with celerys_soft_limit(), running(attempt), pytest.raises(SoftTimeLimitExceeded) as caught:
        step()
    assert not isinstance(caught.value, StepTimeout)
    assert steps(shop) == {}
    release(shop, attempt)
    assert shop.run("w1") == "done"
    assert calls == [1, 1]


def test_celerys_own_autoretry_does_not_take_that_limit_for_the_steps(shop: Inprocess, calls: list[Any]) -> None:
    """An unmodified task may retry any error."""

    @shop.app.task(shared=False, autoretry_for=(Exception,), default_retry_delay=0)
    def slow() -> str:
        calls.append("slow")
        os.kill(os.getpid(), signal.SIGUSR1)
        return "done"

    step = durable.as_step(slow)
    order(shop, step)
    attempt = begin(shop)
    with celerys_soft_limit(), running(attempt), pytest.raises(SoftTimeLimitExceeded):
        step()
    assert calls == ["slow"]
    assert steps(shop) == {}


class Struck(Observer):
    """Is met by the limit of the task when the end of an attempt is told, the first time."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def attempt_ended(self, report: Any, ending: str) -> None:
        self.told.append(ending)
        if len(self.told) == 1:
            raise SoftTimeLimitExceeded


def test_celerys_limit_after_the_end_changes_nothing(shop: Inprocess) -> None:
    """What is committed is what Celery is told, and whoever watches."""
    observer = Struck()
    shop.installation.observers.add(observer)
    order(shop, lambda: "done")
    assert shop.run("w1") == "done"
    assert observer.told == ["SUCCESS", "SUCCESS"]
    assert status(shop).state == "SUCCESS"


class Interruptions(Observer):
    """Notes after which steps connections are closed."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def step_interrupted(self, workflow_id: str, key: str) -> None:
        self.seen.append((key, threading.get_ident()))


def test_every_interruption_is_told(shop: Inprocess) -> None:
    """In the body's thread, whatever the body makes of it: its connections are closed then."""
    observer = Interruptions()
    shop.installation.observers.add(observer)

    def wraps() -> None:
        try:
            linger()
        except StepTimeout as error:
            raise ValueError("wrapped") from error

    def swallows() -> None:
        with contextlib.suppress(StepTimeout):
            linger()

    nested = durable.as_step(linger, name="nested", soft_time_limit=0.05)
    bodies = {"plain": linger, "wraps": wraps, "swallows": swallows, "quick": int, "fails": lambda: 1 / 0}
    limited = [durable.as_step(body, name=name, soft_time_limit=0.1) for name, body in bodies.items()]
    outer = durable.as_step(lambda: nested(), name="outer", soft_time_limit=30)
    bold = durable.as_step(lambda: error_of(nested), name="bold")
    order(shop, lambda: [*[error_of(step) for step in (*limited, outer)], bold()][-1])
    assert shop.run("w1").startswith("StepTimeout: ")
    expected = ("plain", "wraps", "swallows", "outer", "bold")
    assert observer.seen == [(name, threading.get_ident()) for name in expected]


def test_the_limit_of_a_nested_async_step_holds(shop: Inprocess) -> None:
    """Its body is cancelled, and the outer one may go on; in time it returns as ever."""

    async def dawdle(seconds: float) -> float:
        await asyncio.sleep(seconds)
        return seconds

    nested = durable.as_step(dawdle, name="nested", soft_time_limit=0.1)

    async def outer() -> list[Any]:
        try:
            await nested(30)
        except StepTimeout as error:
            return [str(error), await nested(0)]
        return []

    async def body() -> Any:
        return await durable.as_step(outer, name="outer")()

    order(shop, body)
    message, value = shop.run("w1")
    assert ("soft_time_limit of 0.1 s" in message, value) == (True, 0)


def test_an_async_step_of_a_sync_workflow_is_cancelled_in_a_thread(shop: Inprocess, sql: Sql) -> None:
    """Its body is on the event loop, where it can be interrupted, whatever thread waits for it."""
    seen: list[type[BaseException]] = []

    async def body() -> None:
        sql.execute(CANCEL)
        try:
            await asyncio.sleep(30)
        except asyncio.CancelledError as error:
            seen.append(type(error))
            raise

    order(shop, durable.as_step(body, name="wait", cancellable=True))
    with ThreadPoolExecutor(1) as thread:
        assert isinstance(thread.submit(shop.run, "w1").result(timeout=20), Ignore)
    assert seen == [asyncio.CancelledError]


def test_a_read_in_a_step_is_not_cut_in_two(shop: Inprocess, sql: Sql) -> None:
    """The alarm waits for the answer, and the connection goes on."""
    blocker = Sql(sql.connection.info.dsn)
    lock_held, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        with blocker.connection.transaction():
            blocker.execute("LOCK TABLE celery_durable.output")
            lock_held.set()
            may_end.wait(20)

    def body() -> str:
        thread = threading.Thread(target=hold)
        thread.start()
        lock_held.wait(20)
        threading.Timer(0.3, may_end.set).start()
        try:
            return status(shop).state
        finally:
            assert may_end.is_set(), "the statement was cut off"
            thread.join()

    order(shop, lambda: [error_of(durable.as_step(body, name="body", soft_time_limit=0.1)), status(shop).state])
    message, state = shop.run("w1")
    assert "StepTimeout" in message
    assert state == "RUNNING"
    assert sql.value(f"SELECT count(*) FROM ({OURS}) AS ours") == 1, "the connection was kept"
    blocker.close()


# Other threads.


def in_thread(attempt: Attempt, function: Any) -> Any:
    """Run the workflow in a thread, as the threads pool does."""

    def run() -> Any:
        attempt.thread = threading.get_ident()
        with running(attempt):
            return function()

    with ThreadPoolExecutor(1) as threads:
        return threads.submit(run).result(30)


def test_in_a_thread_a_limit_is_for_the_body_to_see(shop: Inprocess) -> None:
    """Nothing interrupts it; what it returns too late doesn't count."""

    def polls() -> float:
        left = durable.current.step.remaining()
        assert left is not None
        while (left := durable.current.step.remaining()) > 0.05:
            linger(0.01)
        return left

    def late() -> None:
        while durable.current.step.remaining() > 0:
            linger(0.01)

    steps_ = [durable.as_step(body, name=body.__name__, soft_time_limit=0.2) for body in (polls, late)]
    order(shop, int)
    results = in_thread(begin(shop), lambda: [error_of(step) for step in steps_])
    assert float(results[0]) > 0
    assert results[1].startswith("StepTimeout")


# Cancellation.


def over_soon(sql: Sql, statement: str, seconds: float = 0.1) -> None:
    threading.Timer(seconds, sql.execute, [statement]).start()


@pytest.mark.parametrize("how", [CANCEL, LATE])
def test_a_cancellable_step_is_interrupted(shop: Inprocess, sql: Sql, calls: list[Any], how: str) -> None:
    """Within about a second; it cleans up, nothing of it is recorded, and the workflow ends."""

    def body() -> None:
        over_soon(sql, how)
        try:
            linger()
        except Exception:
            calls.append("swallowed")
        finally:
            calls.append("cleaned up")

    order(shop, durable.as_step(body, name="body", cancellable=True), workflow_timeout=60)
    began = time.monotonic()
    assert isinstance(shop.run("w1"), Ignore)
    assert time.monotonic() - began < 5
    assert calls == ["cleaned up"]
    assert steps(shop) == {}
    wait_until(lambda: not watch_threads(), message="nobody watches any more")


def test_a_step_that_is_not_cancellable_runs_to_its_end(shop: Inprocess, sql: Sql, calls: list[Any]) -> None:
    """Its outcome is recorded, and the next one doesn't start."""

    def body() -> str:
        sql.execute(CANCEL)
        return "done"

    first = durable.as_step(body, name="first")
    second = durable.as_step(lambda: calls.append("second"), name="second")
    order(shop, lambda: [first(), second()])
    assert isinstance(shop.run("w1"), Ignore)
    assert steps(shop)["first"].output == "done"
    assert "second" not in steps(shop)
    assert not calls


def test_a_step_that_is_taken_over_is_no_cancellation(shop: Inprocess, sql: Sql) -> None:
    """The other worker's run isn't told to be revoked."""

    def body() -> None:
        sql.execute("UPDATE celery_durable.workflow SET token = %s", uuid.uuid4())
        linger()

    step = durable.as_step(body, name="body", cancellable=True)
    order(shop, step)
    attempt = begin(shop)
    with running(attempt), pytest.raises(OwnershipLost):
        step()
    assert isinstance(attempt.unwinding, OwnershipLost)


def test_a_cancelled_step_that_returns_all_the_same_is_recorded(shop: Inprocess, sql: Sql) -> None:
    """As of one that can't be cancelled: its effect has happened."""

    def stubborn() -> str:
        over_soon(sql, CANCEL)
        try:
            linger()
        except BaseException:
            return "done"
        return "early"

    order(shop, durable.as_step(stubborn, name="stubborn", cancellable=True))
    assert isinstance(shop.run("w1"), Ignore)
    assert steps(shop)["stubborn"].output == "done"
    assert status(shop).state == "CANCELLED"


def test_a_cancellable_step_that_nothing_cancels(shop: Inprocess, calls: list[Any]) -> None:
    """Watching it leaves nothing behind, nor does a body that ends while it is looked at."""
    order(shop, lambda: [durable.as_step(linger, name=f"s{n}", cancellable=True)(0.005) for n in range(20)])
    assert shop.run("w1") == [None] * 20
    wait_until(lambda: not watch_threads(), message="nobody watches any more")
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_where_nothing_can_interrupt_nobody_watches(shop: Inprocess, sql: Sql) -> None:
    """In a thread, a cancellable step sees for itself."""

    def body() -> bool:
        assert not watch_threads()
        sql.execute(CANCEL)
        wait_until(lambda: durable.current.cancelled, message="it is seen")
        return True

    order(shop, int)
    with pytest.raises(Cancelled):
        in_thread(begin(shop), lambda: durable.as_step(body, name="body", cancellable=True)())
    assert steps(shop)["body"].output is True


def test_current_cancelled_asks_at_most_once_a_second(proxy: PostgresProxy, broker_url: str, sql: Sql) -> None:
    """Read as often as a loop likes; unread, it costs nothing."""
    shop = Inprocess(proxy.url, broker_url)

    def loops() -> int:
        proxy.reset()
        end = time.monotonic() + 0.5
        while time.monotonic() < end:
            assert not durable.current.cancelled
        asked = proxy.round_trips()
        sql.execute(CANCEL)
        wait_until(lambda: durable.current.cancelled, 5, "the cancellation is seen")
        proxy.reset()
        assert durable.current.cancelled
        assert proxy.round_trips() == 0, "it can't be undone for this attempt"
        return asked

    order(shop, durable.as_step(loops, name="loops"))
    shop.run("w1")
    assert steps(shop)["loops"].output == 1
    shop.close()


def test_current_cancelled_while_the_database_is_away(
    proxy: PostgresProxy, broker_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It says no, soon, and the step goes on; its outcome is recorded when the database is back."""
    shop = Inprocess(proxy.url, broker_url)

    def loops() -> float:
        proxy.refuse()
        proxy.disconnect()
        began = time.monotonic()
        while time.monotonic() - began < 1.5:
            assert not durable.current.cancelled
        proxy.accept()
        return time.monotonic() - began

    order(shop, durable.as_step(loops, name="loops"))
    with caplog.at_level(logging.WARNING):
        assert shop.run("w1") < 3
    assert caplog.text.count("can't be seen now") == 2
    shop.close()


def test_current_cancelled_does_not_wait_for_a_database_that_hangs(
    proxy: PostgresProxy, broker_url: str, sql: Sql
) -> None:
    """Its answer counts when it comes."""
    shop = Inprocess(proxy.url, broker_url)

    def loops() -> float:
        held = proxy.hold("-- How a workflow stands")
        sql.execute(CANCEL)
        began = time.monotonic()
        while time.monotonic() - began < 1.5:
            assert not durable.current.cancelled
            asked.append(time.monotonic())
        held.release()
        wait_until(lambda: durable.current.cancelled, 0.9, "the late answer counts")
        return max(later - sooner for sooner, later in itertools.pairwise(asked))

    asked: list[float] = []
    order(shop, durable.as_step(loops, name="loops"))
    shop.run("w1")
    assert steps(shop)["loops"].output < 1
    shop.close()


def test_current_cancelled_in_a_thread_of_the_step(shop: Inprocess, sql: Sql) -> None:
    """A thread that has the step's context sees it, any other one says no."""

    def body() -> list[bool]:
        sql.execute(CANCEL)
        with ThreadPoolExecutor(1) as threads:
            plainly = threads.submit(see).result()
            return [plainly, threads.submit(copy_context().run, see).result()]

    def see() -> bool:
        return durable.current.cancelled

    order(shop, durable.as_step(body, name="body"))
    shop.run("w1")
    assert steps(shop)["body"].output == [False, True]
    assert current_attempt() is None
    assert not durable.current.cancelled


GREEN = """
from gevent import monkey
monkey.patch_all()
import asyncio, sys, time
import celery_durable as durable
from tests.fixtures.inprocess import Inprocess
from tests.integration.attempts import order
how, *urls = sys.argv[1:]
seen = []
def slow():
    try:
        time.sleep(600)
    except TimeoutError:
        seen.append("interrupted")
        raise
step = durable.as_step(slow, name="slow", soft_time_limit=0.3)
def gather():
    return [type(each).__name__ for each in durable.gather(step.s(), step.s(), return_exceptions=True)]
async def acall():
    found = await asyncio.gather(step.acall(), step.acall(), return_exceptions=True)
    return [type(each).__name__ for each in found]
shop = Inprocess(*urls)
order(shop, globals()[how])
assert shop.run("w1") == ["StepTimeout"] * 2
assert seen == ["interrupted"] * 2
"""


@pytest.mark.parametrize("how", ["gather", "acall"])
def test_under_gevent_what_runs_beside_others_is_interrupted(database_url: str, broker_url: str, how: str) -> None:
    """Its threads are greenlets there, each with a limit of its own."""
    command = [sys.executable, "-W", "ignore", "-c", GREEN, how, database_url, broker_url]
    subprocess.run(command, cwd=ROOT, check=True, timeout=60)
