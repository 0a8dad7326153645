"""Async functions in one process: their steps, tasks, waits, and what is kept when an attempt ends in the middle."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import logging
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
from celery.exceptions import Ignore, Retry, SoftTimeLimitExceeded

import celery_durable as durable
from celery_durable.engine.context import current_attempt, running
from celery_durable.engine.loop import run_function
from celery_durable.engine.process import process, run
from celery_durable.exceptions import (
    Cancelled,
    DurableError,
    HandedOver,
    NondeterminismError,
    NotInWorkflow,
    OwnershipLost,
    SerializationError,
    StepError,
    StepLost,
    StepTimeout,
    Suspended,
)
from tests.fixtures.fix_postgres import Sql, _new_database
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.proxy import PostgresProxy
from tests.integration.attempts import DUE, LATE, Killed, begin, clear, crash, order, refusing, release, status, steps

pytestmark = pytest.mark.oldest

#: Seconds after which a test has hung.
SOON = 20


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
def proxied(proxy: PostgresProxy, broker_url: str) -> Iterator[Inprocess]:
    shop = Inprocess(proxy.url, broker_url)
    yield shop
    shop.close()


@pytest.fixture
def calls() -> list[Any]:
    """What bodies did, in order."""
    return []


@pytest.fixture(autouse=True)
def nothing_is_left(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever a function ends with, its tasks end, its loop turns on, and asyncio has nothing to complain about."""
    yield
    wait_until(lambda: not asyncio.all_tasks(process().loop), message="all tasks have ended")
    assert run(alive()) == "alive"
    gc.collect()
    assert "never retrieved" not in caplog.text


async def alive() -> str:
    return "alive"


def named(name: str, body: Callable[..., Any], **options: Any) -> Any:
    """A step."""
    return durable.as_step(body, name=name, **options)


def fail(error: BaseException) -> Any:
    raise error


def attempted(shop: Inprocess, function: Any) -> Any:
    """Begin an attempt, and run the function in it; it is the attempt that is returned, and what it raised."""
    attempt = begin(shop)
    try:
        with running(attempt):
            run_function(attempt, function())
    except BaseException as error:
        return attempt, error
    return attempt, None


# Calls


def test_every_kind_of_step_in_an_async_workflow(shop: Inprocess) -> None:
    """Awaited, called, called in a thread, as a task; its values are kept like any other's."""

    @shop.step(name="fetch")
    async def fetch(number: int) -> int:
        await asyncio.sleep(0)
        return number

    @shop.step(name="work")
    def work(number: int) -> int:
        return number

    class Adder:
        async def __call__(self, number: int) -> int:
            return number + 1

    async def add(one: int, other: int) -> int:
        return one + other

    async def body() -> list[Any]:
        task, partial = asyncio.create_task(named("adder", Adder())(2)), functools.partial(add, 2)
        return [
            await fetch(0), work(1), await work.acall(2), await task, await named("partial", partial)(2),
            *await asyncio.gather(fetch(5), work.acall(6), named("add", add)(3, other=4)),
            *await durable.agather(fetch.s(8), work.s(9), durable.as_step(fetch).s(10)),
        ]  # fmt: skip

    order(shop, body)
    assert shop.run("w1") == list(range(11))
    assert {key: step.output for key, step in steps(shop).items()} == {
        "adder": 3, "fetch": 0, "work": 1, "work#2": 2, "partial": 4, "fetch#2": 5, "work#3": 6, "add": 7,
        "fetch#3": 8, "work#4": 9, "fetch#4": 10,
    }  # fmt: skip


def test_steps_run_at_once(shop: Inprocess) -> None:
    """Async ones take turns on the loop; their keys are settled in the order of the calls."""
    met: dict[int, asyncio.Event] = {}

    async def meet(number: int) -> int:
        met.setdefault(number, asyncio.Event()).set()
        await asyncio.wait_for(met.setdefault(1 - number, asyncio.Event()).wait(), SOON)
        return number

    async def body() -> list[int]:
        return await asyncio.gather(*map(named("meets", meet), range(2)))

    order(shop, body)
    assert shop.run("w1") == [0, 1]
    assert {key: step.output for key, step in steps(shop).items()} == {"meets": 0, "meets#2": 1}


def test_acall_does_not_block_the_loop(shop: Inprocess) -> None:
    """Another coroutine goes on meanwhile."""
    ticked = threading.Event()

    async def tick() -> None:
        ticked.set()

    async def body() -> bool:
        done, _ = await asyncio.gather(named("wait", ticked.wait).acall(SOON), tick())
        return bool(done)

    order(shop, body)
    assert shop.run("w1") is True


def test_acall_and_agather_outside_a_workflow(calls: list[Any]) -> None:
    """Plain calls: what would block is called in a thread, errors come in the order of the arguments."""

    async def fetch(number: int) -> int:
        calls.append(threading.get_ident())
        return number

    def work(number: int) -> int:
        calls.append(threading.get_ident())
        return number if number else fail(ValueError(number))

    async def body() -> list[Any]:
        with pytest.raises(ValueError, match="0"):
            await durable.agather(named("fetch", fetch).s(1), named("work", work).s(0))
        found = await durable.agather(named("work", work).s(0), named("work", work).s(2), return_exceptions=True)
        return [await named("fetch", fetch).acall(1), *found]

    one, error, two = asyncio.run(body())
    assert (one, type(error), two) == (1, ValueError, 2)
    assert calls.count(threading.get_ident()) == 2


@pytest.mark.parametrize("most", [0, -1, True, None])
def test_an_impossible_max_concurrency(most: Any) -> None:
    """As in gather()."""
    with pytest.raises(ValueError, match="max_concurrency must be a whole number from 1, not"):
        asyncio.run(durable.agather(max_concurrency=most))


def test_agather_runs_no_more_than_max_concurrency_at_a_time(shop: Inprocess, calls: list[Any]) -> None:
    """And all of these do; values come in the order of the arguments."""

    async def work(number: int) -> int:
        calls.append(number)
        assert len(calls) <= 2
        await asyncio.sleep(0.01 * (5 - number))
        calls.remove(number)
        return number

    async def body() -> list[int]:
        return await durable.agather(*(named("work", work).s(number) for number in range(5)), max_concurrency=2)

    order(shop, body)
    assert shop.run("w1") == list(range(5))
    assert list(steps(shop)) == ["work", "work#2", "work#3", "work#4", "work#5"]


def test_agather_raises_the_first_error_by_argument(shop: Inprocess, calls: list[Any]) -> None:
    """When all have run; alike on a replay, which runs none of them."""

    async def work(number: int) -> int:
        calls.append(number)
        await asyncio.sleep(0.05 - 0.02 * number)
        return number if number == 2 else fail(ValueError(number))

    async def body(**options: Any) -> Any:
        return await durable.agather(*(named("work", work).s(number) for number in range(3)), **options)

    order(shop, body)
    attempt, error = attempted(shop, body)
    release(shop, attempt)
    told = shop.run("w1")
    assert (error.args, told.args) == ((0,), (0,))
    assert error.__notes__ == told.__notes__
    assert sorted(calls) == [0, 1, 2]


def test_async_steps_in_steps(shop: Inprocess) -> None:
    """Part of the outer one, as any other."""

    async def inner() -> int:
        assert not durable.current.step.name.startswith("inner")
        return 5

    async def outer() -> int:
        found = await asyncio.gather(named("inner", inner)(), asyncio.create_task(named("inner2", inner)()))
        return sum(found) + named("work", abs)(-1) + await named("work", abs).acall(-2)

    async def body() -> int:
        return await named("outer", outer)()

    order(shop, body)
    assert shop.run("w1") == 13
    assert list(steps(shop)) == ["outer"]


def test_an_async_step_in_a_sync_workflow(shop: Inprocess) -> None:
    """It runs to its end, and its value is returned; in the workflow's thread or another one."""

    async def fetch(number: int) -> list[Any]:
        await asyncio.sleep(0)
        return [number, durable.current.workflow_id, durable.current.step.key]

    order(shop, lambda: [named("fetch", fetch)(1), named("fetch", fetch)(2)])
    expected = [[1, "w1", "fetch"], [2, "w1", "fetch#2"]]
    assert shop.run("w1") == expected


def test_an_async_step_as_a_plain_task(shop: Inprocess) -> None:
    """A worker runs it to its end; bound, it sees its own request."""

    @shop.step(name="fetch", bind=True)
    async def fetch(self: Any, number: int) -> list[Any]:
        await asyncio.sleep(0)
        return [number, self.request.id, self.request.retries]

    message = ("fetch", b"[[5], {}, {}]", "application/json", "utf-8")
    assert shop.deliver("t1", message) == [5, "t1", 0]


def test_a_function_that_only_returns_a_coroutine(shop: Inprocess) -> None:
    """A lambda isn't async itself: the error says what to declare."""
    order(shop, named("lambda", lambda: asyncio.sleep(1)))
    told = shop.run("w1")
    assert isinstance(told, SerializationError)
    assert "declare the step itself with async def" in str(told)


def test_a_call_that_cannot_be_made_is_the_steps_error(shop: Inprocess) -> None:
    """Wrong arguments are found when the body is called, and kept like any error."""

    async def fetch() -> None: ...

    order(shop, lambda: named("fetch", fetch)(1, 2))
    assert isinstance(shop.run("w1"), TypeError)
    assert isinstance(steps(shop)["fetch"].error, TypeError)


def test_a_durable_call_in_a_thread_is_an_error(shop: Inprocess) -> None:
    """asyncio.to_thread takes the context along, but not the order of the calls."""

    async def body() -> None:
        await asyncio.to_thread(named("work", int))

    order(shop, body)
    assert isinstance(shop.run("w1"), NotInWorkflow)


def test_the_loop_does_not_wait_for_itself() -> None:
    """Nothing would ever happen again in this process."""

    async def body() -> Any:
        return run(alive())

    with pytest.raises(RuntimeError, match="without await"):
        run(body())


# Tasks


def packing(calls: list[Any], gates: dict[str, asyncio.Event]) -> Callable[[], Any]:
    """Two sequences at once, each of two steps."""

    async def work(place: str) -> str:
        calls.append(place)
        if place in gates:
            await asyncio.wait_for(gates[place].wait(), SOON)
        if "die" in gates and place == "b2":
            raise Killed
        return place

    async def pack(name: str) -> str:
        step = named("work", work)
        return await step(f"{name}1") + await step(f"{name}2")

    async def body() -> list[str]:
        return await asyncio.gather(pack("a"), pack("b"))

    return body


def test_two_sequences_replay_whatever_order_they_ran_in(shop: Inprocess, calls: list[Any]) -> None:
    """Each counts its calls for itself: after a crash nothing that was kept runs again, or is mixed up."""
    gates = {"a1": asyncio.Event(), "die": asyncio.Event()}
    body = packing(calls, gates)
    order(shop, body)
    attempt, error = attempted(shop, body)
    assert isinstance(error, Killed)
    assert calls == ["a1", "b1", "b2"]
    crash(shop, attempt)
    gates.clear()
    assert shop.run("w1") == ["a1a2", "b1b2"]
    assert sorted(calls) == ["a1", "a1", "a2", "b1", "b2", "b2"]
    assert {key: step.output for key, step in steps(shop).items()} == {
        "work[pack]": "a1", "work[pack]#2": "a2", "work[pack:2]": "b1", "work[pack:2]#2": "b2",
    }  # fmt: skip


def test_tasks_in_tasks_and_shared_contexts(shop: Inprocess) -> None:
    """Each has its own keys, even if several are given one context."""
    work = named("work", lambda text: text)

    async def leaf(text: str) -> str:
        await asyncio.sleep(0)
        return str(await work.acall(text))

    async def node(text: str) -> list[str]:
        context = {"context": contextvars.copy_context()} if sys.version_info >= (3, 11) else {}
        tasks = [asyncio.create_task(leaf(f"{text}{number}"), **context) for number in range(2)]
        return [await task for task in tasks]

    async def body() -> list[Any]:
        return [await asyncio.create_task(node("a")), await asyncio.ensure_future(node("b"))]

    order(shop, body)
    assert shop.run("w1") == [["a0", "a1"], ["b0", "b1"]]
    assert {key: step.output for key, step in steps(shop).items()} == {
        "work[node/leaf]": "a0", "work[node/leaf:2]": "a1", "work[node:2/leaf]": "b0", "work[node:2/leaf:2]": "b1",
    }  # fmt: skip


@pytest.mark.skipif(sys.version_info < (3, 11), reason="task groups are new in Python 3.11")
def test_a_task_group(shop: Inprocess, calls: list[Any]) -> None:
    """An error cancels the others, and is raised in a group; alike on a replay."""

    async def work(number: int) -> None:
        calls.append(number)
        if number == 1:
            raise ValueError(number)
        try:
            await asyncio.sleep(SOON)
        except asyncio.CancelledError:
            calls.append("cancelled")
            raise

    async def body() -> str:
        try:
            async with asyncio.TaskGroup() as group:
                for number in range(2):
                    group.create_task(named("work", work)(number))
        except Exception as errors:  # a group, for which Python 3.10 has no syntax
            return repr([error.args for error in errors.exceptions])  # type: ignore[attr-defined]
        return "no error"

    order(shop, body)
    attempt = begin(shop)
    with running(attempt):
        assert run_function(attempt, body()) == "[(1,)]"
    assert calls == [0, 1, "cancelled"]
    release(shop, attempt)
    assert shop.run("w1") == "[(1,)]"
    assert calls in ([0, 1, "cancelled"], [0, 1, "cancelled", 0, "cancelled"])


def test_wait_for_cancels_a_step(shop: Inprocess, calls: list[Any]) -> None:
    """It has cleaned up by then, and nothing of it is kept."""

    async def work() -> None:
        try:
            await asyncio.sleep(SOON)
        finally:
            await asyncio.sleep(0.01)
            calls.append("cleaned up")

    async def body() -> str:
        try:
            await asyncio.wait_for(named("work", work)(), 0.05)
        except asyncio.TimeoutError:
            calls.append("timed out")
        return str(await named("fallback", lambda: "fallback").acall())

    order(shop, body)
    assert shop.run("w1") == "fallback"
    assert calls == ["cleaned up", "timed out"]
    assert list(steps(shop)) == ["fallback"]


def test_a_cancelled_step_in_a_thread_is_waited_for(shop: Inprocess, calls: list[Any]) -> None:
    """Nothing can interrupt it, and no other body of it may run beside it."""
    go_on = threading.Event()

    def work() -> None:
        go_on.wait(SOON)
        calls.append("work")

    async def body() -> None:
        task = asyncio.create_task(named("work", work).acall())
        await asyncio.sleep(0.05)
        task.cancel()
        asyncio.get_running_loop().call_later(0.05, go_on.set)
        with pytest.raises(asyncio.CancelledError):
            await task
        calls.append("cancelled")

    order(shop, body)
    shop.run("w1")
    assert calls == ["work", "cancelled"]


def test_tasks_that_nobody_awaits_are_cancelled_at_the_end(
    shop: Inprocess, calls: list[Any], caplog: pytest.LogCaptureFixture
) -> None:
    """A warning says so; what they hold is cleaned up."""

    async def work() -> None:
        try:
            await asyncio.sleep(SOON)
        except asyncio.CancelledError:
            calls.append("cancelled")
            raise

    kept = []

    async def body() -> str:
        kept.append(asyncio.create_task(named("work", work)()))
        await asyncio.sleep(0.02)
        return "done"

    order(shop, body)
    with caplog.at_level(logging.WARNING):
        assert shop.run("w1") == "done"
    assert calls == ["cancelled"]
    assert "workflow w1 returned while 1 asyncio tasks of it were still under way" in caplog.text
    assert steps(shop) == {}


def test_a_task_that_cannot_be_cancelled_has_no_more_to_say(
    shop: Inprocess, calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It doesn't hold up the end, and its later calls are refused."""
    monkeypatch.setattr("celery_durable.engine.loop.GRACE", 0.1)
    go_on = asyncio.Event()
    kept = []

    async def stubborn() -> None:
        try:
            await asyncio.sleep(SOON)
        except asyncio.CancelledError:
            await go_on.wait()
        try:
            await named("late", int).acall()
        except NotInWorkflow:
            calls.append("refused")

    async def body() -> None:
        kept.append(asyncio.create_task(stubborn()))
        await asyncio.sleep(0)

    order(shop, body)
    assert shop.run("w1") is None
    process().loop.call_soon_threadsafe(go_on.set)
    wait_until(lambda: calls == ["refused"])
    assert steps(shop) == {}


# Retries and waits


def test_retries_in_place(shop: Inprocess, calls: list[Any]) -> None:
    """Others go on meanwhile."""

    async def flaky(number: int) -> int:
        calls.append(number)
        return number if calls.count(number) > number else fail(ConnectionError())

    step = named("flaky", flaky, max_retries=3, retry_backoff=0.01)

    async def body() -> list[int]:
        return await asyncio.gather(*map(step, range(3)))

    order(shop, body)
    assert shop.run("w1") == [0, 1, 2]
    assert [step.tries for step in steps(shop).values()] == [1, 2, 3]


def test_the_worker_is_given_back_when_all_that_is_left_backs_off(shop: Inprocess, sql: Sql, calls: list[Any]) -> None:
    """Not before: other steps, and what follows them, run. Then it waits for what is due first."""

    async def failing(name: str) -> str:
        calls.append(name)
        return name if calls.count(name) > 1 else fail(ConnectionError())

    async def sequence() -> list[int]:
        return [await named("work", work)(number) for number in range(3)]

    async def work(number: int) -> int:
        await asyncio.sleep(0.02)
        return number

    def step(name: str, seconds: float) -> Any:
        return named(name, failing, max_retries=1, retry_backoff=seconds, retry_jitter=False)(name)

    async def body() -> Any:
        return await asyncio.gather(step("slower", 900), step("slow", 500), sequence(), return_exceptions=True)

    order(shop, body)
    assert isinstance(shop.run("w1"), Retry)
    found = status(shop)
    assert (found.state, found.waiting_for) == ("SUSPENDED", "retry of step slow")
    due = shop.installation.store.workflows.next_due(patience=0)
    assert due is not None
    assert 490 < due <= 500
    assert len([step for step in steps(shop).values() if step.state == "SUCCESS"]) == 3
    sql.execute(DUE)
    sql.execute("UPDATE celery_durable.workflow SET wake_at = clock_timestamp()")
    shop.installation.store.workflows.wake(limit=9, patience=0)
    assert shop.run("w1") == ["slower", "slow", [0, 1, 2]]
    assert calls == ["slower", "slow"] * 2


def test_a_backoff_that_ends_while_others_run(shop: Inprocess) -> None:
    """The step goes on in place."""
    retried = asyncio.Event()
    tries = []

    async def flaky() -> str:
        tries.append(1)
        if len(tries) > 1:
            retried.set()
        return "done" if len(tries) > 1 else fail(ConnectionError())

    async def long() -> bool:
        return await asyncio.wait_for(retried.wait(), SOON)

    shop.installation.settings["suspend_after"] = 0.1
    step = named("flaky", flaky, max_retries=1, retry_backoff=0.2, retry_jitter=False)

    async def body() -> list[Any]:
        return await asyncio.gather(step(), named("long", long)())

    order(shop, body)
    assert shop.run("w1") == ["done", True]


def test_a_suspension_in_a_task_group_is_one(shop: Inprocess) -> None:
    """In whatever group asyncio raises it."""
    if sys.version_info < (3, 11):
        pytest.skip("task groups are new in Python 3.11")

    backs_off = named("fails", fail, max_retries=1, retry_backoff=500, retry_jitter=False)

    async def body() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(2):
                group.create_task(backs_off.acall(OSError()))

    order(shop, body)
    assert isinstance(shop.run("w1"), Retry)
    assert status(shop).state == "SUSPENDED"


# Limits


@pytest.mark.parametrize("workflow", ["async", "sync", "thread"])
def test_a_soft_limit_interrupts_an_async_body(shop: Inprocess, calls: list[Any], workflow: str) -> None:
    """By cancelling it, wherever the workflow runs; the workflow gets a StepTimeout when the body has cleaned up."""

    async def endless() -> None:
        try:
            assert 0 < (durable.current.step.remaining() or 0) <= 0.1
            await asyncio.sleep(SOON)
        except asyncio.CancelledError:
            await asyncio.sleep(0.1)
            calls.append("cleaned up")
            raise

    step = named("endless", endless, soft_time_limit=0.1)

    async def body() -> Any:
        return await step()

    order(shop, body if workflow == "async" else step)
    if workflow == "thread":
        thread = threading.Thread(target=shop.run, args=("w1",))
        thread.start()
        thread.join()
    else:
        shop.run("w1")
    error = status(shop).error
    assert isinstance(error, StepTimeout)
    assert "The step 'endless' of workflow w1 ran longer than its soft_time_limit of 0.1 s" in str(error)
    assert calls == ["cleaned up"]


@pytest.mark.parametrize("workflow", ["async", "sync"])
def test_a_body_may_catch_its_limit_and_return(shop: Inprocess, workflow: str) -> None:
    """As a body that isn't async may."""

    async def stubborn() -> str:
        try:
            await asyncio.sleep(SOON)
        except asyncio.CancelledError:
            await asyncio.sleep(0.1)
        return "partly done"

    step = named("stubborn", stubborn, soft_time_limit=0.05)

    async def body() -> Any:
        return await step()

    order(shop, body if workflow == "async" else step)
    assert shop.run("w1") == "partly done"


def test_a_limit_holds_for_each_try(shop: Inprocess, calls: list[Any]) -> None:
    """A timeout is an error like others."""

    async def slow() -> str:
        calls.append(durable.current.step.attempt)
        await asyncio.sleep(0 if len(calls) > 2 else SOON)
        return "done"

    step = named("slow", slow, soft_time_limit=0.05, autoretry_for=(StepTimeout,), retry_backoff=0.01)

    async def body() -> Any:
        return await step()

    order(shop, body)
    assert shop.run("w1") == "done"
    assert calls == [1, 2, 3]


def test_a_cancellable_async_step(shop: Inprocess, sql: Sql, calls: list[Any]) -> None:
    """The end of the workflow interrupts it within about a second."""

    async def endless() -> None:
        sql.execute(LATE)
        try:
            await asyncio.sleep(SOON)
        finally:
            calls.append("interrupted")

    async def body() -> Any:
        return await named("endless", endless, cancellable=True)()

    order(shop, body)
    assert isinstance(shop.run("w1"), Ignore)
    assert calls == ["interrupted"]
    assert steps(shop) == {}


@pytest.fixture
def soft_limit() -> Iterator[Callable[[], None]]:
    """Celery's soft time limit strikes when this is called, from any thread."""
    main = threading.get_ident()

    def strike(signum: int, frame: Any) -> None:
        raise SoftTimeLimitExceeded

    before = signal.signal(signal.SIGUSR1, strike)
    yield lambda: signal.pthread_kill(main, signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("caught", [True, False])
def test_the_limit_of_the_task_cancels_the_function(
    shop: Inprocess, calls: list[Any], soft_limit: Callable[[], None], caught: bool
) -> None:
    """Which may clean up, and may catch it and return; if not, the workflow fails with the limit."""

    async def endless() -> None:
        asyncio.get_running_loop().call_later(0.05, soft_limit)
        try:
            await asyncio.sleep(SOON)
        finally:
            calls.append("step")

    async def body() -> str:
        try:
            await named("endless", endless)()
        except asyncio.CancelledError:
            calls.append("function")
            if not caught:
                raise
        return str(await named("fallback", lambda: "fallback").acall())

    order(shop, body)
    told = shop.run("w1")
    assert calls == ["step", "function"]
    if caught:
        assert told == "fallback"
    else:
        assert type(told) is SoftTimeLimitExceeded
        assert status(shop).state == "FAILURE"


# Ends in the middle


@pytest.mark.parametrize(("end", "told"), [("drain", HandedOver), ("late", Cancelled), ("lost", OwnershipLost)])
@pytest.mark.parametrize("together", ["gather", "exceptions", "group"])
def test_a_run_that_is_over_starts_no_further_step(
    shop: Inprocess, sql: Sql, calls: list[Any], end: str, told: type[BaseException], together: str
) -> None:
    """A shutdown, a deadline, another owner: what runs ends and is recorded, unless the workflow is another's now."""
    if together == "group" and sys.version_info < (3, 11):
        pytest.skip("task groups are new in Python 3.11")
    found_out = asyncio.Event()

    async def first() -> None:
        await asyncio.to_thread(finish_off)
        asyncio.get_running_loop().call_later(0.2, found_out.set)

    async def second() -> str:
        await asyncio.wait_for(found_out.wait(), SOON)
        calls.append("second")
        return "second"

    def finish_off() -> None:
        if end == "drain":
            shop.drain()
        elif end == "late":
            sql.execute(LATE)
        else:
            crash(shop, attempt)
            begin(shop)

    async def sequence(name: str, body: Any) -> Any:
        await named(name, body)()
        return await named(f"after {name}", calls.append).acall(f"after {name}")

    async def body() -> Any:
        parked = named("parked", fail, max_retries=1, retry_backoff=500)
        all_of_it = [sequence("first", first), sequence("second", second), parked.acall(OSError("parked"))]
        if together != "group":
            return await asyncio.gather(*all_of_it, return_exceptions=together == "exceptions")
        async with asyncio.TaskGroup() as group:
            return [group.create_task(each) for each in all_of_it]

    order(shop, body)
    attempt = begin(shop)
    began = time.monotonic()
    with suppress(BaseException), running(attempt):  # in whatever group asyncio puts it
        run_function(attempt, body())
    assert isinstance(attempt.unwinding, told)
    assert time.monotonic() - began < 10
    settled = {step.name for step in steps(shop).values() if step.state == "SUCCESS"}
    assert settled == (set() if end == "lost" else {"first", "second"})
    assert calls == ([] if end == "lost" and together != "exceptions" else ["second"])
    if end == "drain":
        release(shop, attempt)
        assert isinstance(shop.run("w1", shop.new_node()), Retry), "the step that backs off is all that is left"
        assert sorted(calls[1:]) == ["after first", "after second"]


def test_a_hand_over_is_told_to_celery(shop: Inprocess) -> None:
    """As such, whatever group it came in."""

    async def body() -> Any:
        return await asyncio.gather(named("drain", shop.drain).acall(), named("work", int).acall())

    order(shop, body)
    assert isinstance(shop.run("w1"), Retry)
    assert status(shop).state == "ENQUEUED"


def test_the_limit_of_the_task_ends_the_wait_for_running_steps(
    shop: Inprocess, calls: list[Any], soft_limit: Callable[[], None]
) -> None:
    """A hand-over leaves no body behind, beside which another worker would run it again."""

    async def endless() -> None:
        asyncio.get_running_loop().call_later(0.3, soft_limit)
        try:
            await asyncio.sleep(SOON)
        finally:
            calls.append("interrupted")

    async def body() -> Any:
        return await asyncio.gather(named("endless", endless)(), named("drain", shop.drain).acall())

    order(shop, body)
    assert isinstance(shop.run("w1"), Retry)
    assert status(shop).state == "ENQUEUED"
    assert calls == ["interrupted"]


def test_a_function_that_swallows_its_unwinding(shop: Inprocess, sql: Sql) -> None:
    """It is no success, and every durable call of it raises the same again."""
    seen = []

    async def body() -> str:
        for _ in range(2):
            try:
                await named("late", lambda: sql.execute(LATE)).acall()
            except BaseException as error:
                seen.append(type(error))
        return "swallowed"

    order(shop, body)
    assert isinstance(shop.run("w1"), Ignore)
    assert seen == [Cancelled, Cancelled]


@pytest.mark.parametrize("exit_", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
@pytest.mark.parametrize("place", ["body", "thread", "function", "task"])
def test_exits_do_not_end_the_loop(shop: Inprocess, exit_: type[BaseException], place: str) -> None:
    """Other workflows of the process go on; in a step, all but KeyboardInterrupt is how the step has ended."""

    async def leave() -> None:
        await asyncio.sleep(0)
        raise exit_

    def leave_now() -> None:
        raise exit_

    async def body() -> None:
        if place == "body":
            await named("leave", leave)()
        elif place == "thread":
            await named("leave", leave_now).acall()
        elif place == "function":
            raise exit_
        else:
            await asyncio.create_task(leave())

    order(shop, body)
    _, error = attempted(shop, body)
    if exit_ is asyncio.CancelledError:
        assert isinstance(error, DurableError)
        assert "CancelledError" in str(error)
    elif exit_ is SystemExit and place in ("body", "thread"):
        assert isinstance(error, StepError)
        assert error.type_name == "builtins.SystemExit"
    else:
        assert type(error) is exit_


@pytest.mark.parametrize("place", ["body", "thread"])
def test_a_stop_iteration_ends_the_step(shop: Inprocess, place: str) -> None:
    """As a durable error; asyncio itself would wait for ever, or raises it as a RuntimeError."""

    async def stop() -> None:
        raise StopIteration

    async def body() -> None:
        step = named("stop", stop if place == "body" else lambda: fail(StopIteration()))
        await step.acall()

    order(shop, body)
    assert isinstance(shop.run("w1"), RuntimeError)
    assert isinstance(steps(shop)["stop"].error, RuntimeError if place == "body" else StopIteration)


def test_nondeterminism_stops_an_async_workflow(shop: Inprocess) -> None:
    """DEAD, even if the error is swallowed."""
    numbers = iter([1, 2])

    async def body() -> Any:
        return await asyncio.gather(named("work", abs).acall(next(numbers)), return_exceptions=True)

    order(shop, body)
    attempt, _ = attempted(shop, body)
    release(shop, attempt)
    shop.run("w1")
    assert status(shop).state == "DEAD"
    assert isinstance(status(shop).error, NondeterminismError)


# Crashes in a row


def test_a_step_that_kills_its_worker_is_found(shop: Inprocess, calls: list[Any]) -> None:
    """After two crashes in a row steps run one at a time; the killer ends in StepLost, the others complete."""
    dead = asyncio.Event()

    async def work(number: int) -> int:
        if number == 2:
            await asyncio.to_thread(crash, shop, attempt)
            dead.set()
            raise Killed
        if crashes < 2:
            await asyncio.wait_for(dead.wait(), SOON)
            raise Killed
        return number

    async def body() -> list[Any]:
        step = named("work", work, max_retries=1)
        return await asyncio.gather(*map(step, range(5)), return_exceptions=True)

    order(shop, body, max_recovery_attempts=3)
    crashes, found = 0, []
    while not found or dead.is_set():
        dead.clear()
        attempt = begin(shop)
        with running(attempt):
            found = run_function(attempt, body())
        crashes += dead.is_set()
    assert [value for value in found if isinstance(value, int)] == [0, 1, 3, 4]
    assert isinstance(found[2], StepLost)
    assert crashes == 4, "two until steps run one at a time, and two tries of the killer"
    assert {step.tries for step in steps(shop).values()} == {1, 2}


def test_a_suspect_that_backs_off_lets_the_next_one_have_its_turn(shop: Inprocess, calls: list[Any]) -> None:
    """It has shown that it doesn't crash."""

    async def failing() -> None:
        raise ConnectionError

    async def work(number: int) -> int:
        calls.append(number)
        return number

    async def body() -> Any:
        backs_off = named("fails", failing, max_retries=1, retry_backoff=500)
        return await asyncio.gather(backs_off(), *map(named("work", work), range(3)))

    order(shop, body)
    for _ in range(2):
        crash(shop, begin(shop))
    assert isinstance(shop.run("w1"), Retry)
    assert status(shop).waiting_for == "retry of step fails"
    assert calls == [0, 1, 2]


# Statements


def test_checkpoints_that_are_ready_together_go_in_one_statement(proxied: Inprocess, proxy: PostgresProxy) -> None:
    """A hundred trivial steps cost a few round trips."""

    async def work(number: int) -> int:
        return number

    async def body() -> list[int]:
        return await asyncio.gather(*map(named("work", work), range(100)))

    order(proxied, body)
    message = proxied.message("w1")
    proxy.reset()
    assert proxied.deliver("w1", message) == list(range(100))
    assert proxy.round_trips() < 20
    assert len(steps(proxied)) == 100


@pytest.mark.parametrize("by", ["constraint", "trigger"])
def test_a_row_that_postgres_refuses_does_not_take_others_along(shop: Inprocess, sql: Sql, by: str) -> None:
    """They go one by one then, and the workflow gets the error of the bad one."""

    async def work(number: int) -> int:
        return number

    async def body() -> Any:
        calls = [named("one", work)(1), named("bad", work)(2), named("other", work)(3)]
        found = await asyncio.gather(*calls, return_exceptions=True)
        return [type(value).__module__.partition(".")[0] for value in found]

    order(shop, body)
    with refusing(sql, by):
        assert shop.run("w1") == ["builtins", "psycopg", "builtins"]
    assert {key: step.output for key, step in steps(shop).items()} == {"one": 1, "other": 3}


def test_an_atomic_step_off_the_loop(shop: Inprocess, sql: Sql) -> None:
    """Its transaction is that of its thread."""
    sql.execute("CREATE TABLE effect (number int)")

    def book(number: int) -> int:
        durable.current.connection.execute("INSERT INTO effect VALUES (%s)", [number])
        return number

    async def body() -> list[int]:
        return await asyncio.gather(*(named("book", book, atomic=True).acall(number) for number in range(3)))

    order(shop, body)
    assert shop.run("w1") == [0, 1, 2]
    assert sql.value("SELECT count(*) FROM effect") == 3


# What is there, and in whose name


def test_context_variables_and_what_runs_here(shop: Inprocess) -> None:
    """Those of the caller; a task's changes are its own."""
    variable = contextvars.ContextVar("variable", default="unset")

    async def look(text: str) -> list[Any]:
        before = variable.get()
        variable.set(text)
        await asyncio.sleep(0)
        return [before, variable.get(), durable.current.workflow_id, durable.current.step.key]

    def look_in_thread() -> list[Any]:
        return [variable.get(), durable.current.workflow_id, durable.current.step.key]

    async def body() -> list[Any]:
        assert durable.current
        with pytest.raises(NotInWorkflow):
            durable.current.step  # noqa: B018
        variable.set("function")
        step = named("look", look)
        thread = named("thread", look_in_thread)
        return [*await asyncio.gather(step("one"), step("two")), await thread.acall(), variable.get()]

    order(shop, body)
    assert shop.run("w1") == [
        ["function", "one", "w1", "look"], ["function", "two", "w1", "look#2"], ["function", "w1", "thread"],
        "function",
    ]  # fmt: skip


def test_requests_of_functions_that_take_turns(shop: Inprocess) -> None:
    """Each bound workflow and step sees its own, on one loop."""
    met = {"w1": asyncio.Event(), "w2": asyncio.Event()}

    async def meet(self: Any) -> list[Any]:
        seen = [self.request.parent_id, self.request.id == durable.current.idempotency_key, self.request.retries]
        met[durable.current.workflow_id].set()
        await asyncio.gather(*(asyncio.wait_for(event.wait(), SOON) for event in met.values()))
        assert seen[0] == self.request.parent_id
        return seen

    meets = shop.step(meet, name="meets", bind=True)

    @shop.workflow(name="order", bind=True)
    async def body(self: Any) -> list[Any]:
        before = self.request.id
        return [before, await meets(), self.request.id, durable.current.workflow_id]

    found: dict[str, Any] = {}
    threads = []
    for workflow_id in met:
        body.apply_async(task_id=workflow_id)
        threads.append(threading.Thread(target=lambda name=workflow_id: found.update({name: shop.run(name)})))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {name: [name, [name, True, 0], name, name] for name in met}


def test_a_bound_async_workflow_retries_itself(shop: Inprocess) -> None:
    """By Celery's own means."""

    async def body(self: Any) -> None:
        await asyncio.sleep(0)
        raise self.retry(exc=ValueError("again"), countdown=100)

    order(shop, body, bind=True, max_retries=2)
    assert isinstance(shop.run("w1"), Retry)
    assert (status(shop).state, status(shop).waiting_for) == ("SUSPENDED", "retry")


def test_one_loop_for_all(shop: Inprocess, calls: list[Any]) -> None:
    """Steps and functions of all workflows of a process share it, wherever they are called."""

    async def where() -> None:
        calls.append(asyncio.get_running_loop())

    async def body() -> None:
        await named("where", where)()
        await where()

    order(shop, body)
    shop.run("w1")
    run(where())
    assert set(calls) == {process().loop}
    assert sum(thread.name == "celery_durable loop" for thread in threading.enumerate()) == 1


BESIDE = """
import asyncio, time
from celery_durable.engine.process import process, run
async def work(number):
    for _ in range(20):
        await asyncio.sleep(0.002)
        assert asyncio.get_running_loop() is not None
    return number
found = []
def ours(number):
    found.append(run(work(number)))
def theirs(number):
    found.append(asyncio.run(work(number)))
wait_for(spawn(theirs, 0), spawn(ours, 1), spawn(ours, 2))
wait_for(spawn(ours, 3), spawn(theirs, 4))
theirs(5)
try:
    asyncio.get_running_loop()
except RuntimeError:
    assert sorted(found) == list(range(6)), found
else:
    raise AssertionError("a loop runs here")
"""
GREEN = {
    "gevent": "import gevent.monkey; gevent.monkey.patch_all(); from gevent import spawn\n"
    "def wait_for(*greenlets): [greenlet.get() for greenlet in greenlets]",
    "eventlet": "import eventlet; eventlet.monkey_patch(); from eventlet import spawn\n"
    "def wait_for(*greenlets): [greenlet.wait() for greenlet in greenlets]",
}


@pytest.mark.parametrize("pool", GREEN)
def test_other_greenlets_do_not_see_the_loop(pool: str) -> None:
    """asyncio.run() works in them, and so does Django, which looks for a running loop: before and beside ours."""
    script = f"{GREEN[pool]}\n{BESIDE}"
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60)


FORKED = """
import os, sys
from celery_durable.engine.process import process, run
async def ident():
    return os.getpid()
first = process()
assert run(ident()) == os.getpid()
child = os.fork()
if not child:
    code = 0 if run(ident()) == os.getpid() and process() is not first else 1
    sys.stdout.flush()
    os._exit(code)
assert os.waitpid(child, 0)[1] == 0
assert run(ident()) == os.getpid() and process() is first
"""


def test_a_forked_process_has_a_loop_of_its_own() -> None:
    """Made when it needs one; the parent's goes on."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], check=True, timeout=60)


STUCK = """
import threading, time
from celery_durable.engine.process import in_thread, process, run
async def stuck():
    return await in_thread(process().bodies, lambda: time.sleep(3600))
threading.Thread(target=run, args=(stuck(),), daemon=True).start()
time.sleep(0.2)
"""


def test_a_stuck_body_does_not_hold_up_the_end_of_the_process() -> None:
    """A cold shutdown of a worker without pool processes is one."""
    subprocess.run([sys.executable, "-c", STUCK], check=True, timeout=60)


def test_suspended_is_what_a_plain_backoff_raises(shop: Inprocess) -> None:
    """Without any other task the function unwinds at once."""

    async def body() -> None:
        await named("fails", fail, max_retries=1, retry_backoff=500).acall(OSError())

    order(shop, body)
    attempt, error = attempted(shop, body)
    assert isinstance(error, Suspended)
    assert current_attempt() is None
    release(shop, attempt)


def test_an_async_workflow_starts_each_child_once(shop: Inprocess) -> None:
    """adelay() off the loop: the same id on every replay, and the parent is known."""

    @shop.workflow(name="child")
    async def child(number: int) -> int:
        return number

    async def body() -> list[str]:
        return [(await child.adelay(number)).id for number in range(2)]

    order(shop, body)
    ids = shop.run("w1")
    children = {row.id: row for row in durable.list_workflows(parent_id="w1", app=shop.app)}
    assert set(children) == set(ids)
    assert {row.root_id for row in children.values()} == {"w1"}


def test_an_async_step_as_a_plain_task_sees_itself(shop: Inprocess) -> None:
    """Its idempotency key is the task's id, and its request is its own, on the event loop too."""

    @shop.step(name="look", bind=True)
    async def look(self: Any) -> Any:
        await asyncio.sleep(0)
        return [self.request.id, durable.current.idempotency_key, durable.current.step.name]

    body = b"[[], {}, {}]"
    assert shop.deliver("t1", ("look", body, "application/json", "utf-8")) == ["t1", "t1", "look"]
