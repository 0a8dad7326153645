"""Several steps at once in one attempt: outcomes, errors, waits, and what is kept when it ends in the middle."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import signal
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import chain, group, signature
from celery.exceptions import CDeprecationWarning, Ignore, Retry, SoftTimeLimitExceeded

import celery_durable as durable
from celery_durable.engine.context import Attempt, current_attempt, running
from celery_durable.engine.gathering import Gathering, _Branch
from celery_durable.engine.observer import Observer
from celery_durable.engine.process import Threads
from celery_durable.exceptions import (
    Cancelled,
    HandedOver,
    NotAllowedInStep,
    NotInWorkflow,
    OwnershipLost,
    SerializationError,
    StepLost,
    StepTimeout,
)
from tests.fixtures.fix_postgres import Sql, _new_database
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.proxy import PostgresProxy
from tests.integration.attempts import DUE, LATE, Killed, begin, clear, crash, order, refusing, release, status, steps

pytestmark = pytest.mark.oldest


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
def calls() -> list[Any]:
    """What bodies did, in order."""
    return []


@pytest.fixture(autouse=True)
def no_threads_are_left() -> Iterator[None]:
    """Whatever a gather ends with, its threads end."""
    yield
    wait_until(lambda: not branches_alive(), message="the threads of the gather have ended")


def branches_alive() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "celery_durable branch"]


def named(name: str, body: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """The signature of a step."""
    return durable.as_step(body, name=name, **options).s(*args)


def fail(error: BaseException) -> Any:
    raise error


# Values, errors, arguments


def test_values_come_in_the_order_of_the_arguments(shop: Inprocess) -> None:
    """Whichever is ready first; the steps really run at once."""
    second_is_done = threading.Event()

    def first() -> int:
        assert second_is_done.wait(20)
        return 1

    def second() -> int:
        second_is_done.set()
        return 2

    order(shop, lambda: durable.gather(named("first", first), named("second", second)))
    assert shop.run("w1") == [1, 2]
    assert {key: step.seq for key, step in steps(shop).items()} == {"first": 1, "second": 2}


@pytest.mark.parametrize("most", [1, 2, 5])
def test_no_more_than_max_concurrency_run_at_a_time(shop: Inprocess, calls: list[Any], most: int) -> None:
    """And all of these do."""
    full = threading.Barrier(most)

    def work() -> None:
        calls.append(1)
        full.wait(20)
        assert len(calls) <= most
        full.wait(20)
        calls.pop()

    order(shop, lambda: durable.gather(*(named("work", work) for _ in range(2 * most)), max_concurrency=most))
    assert shop.run("w1") == [None] * (2 * most)


@pytest.mark.parametrize("most", [0, -1, True, None, 1.5, "2"], ids=repr)
def test_an_impossible_max_concurrency(most: Any) -> None:
    """It is refused whatever there is to run."""
    with pytest.raises(ValueError, match="max_concurrency must be a whole number from 1, not"):
        durable.gather(max_concurrency=most)


def test_nothing_gives_nothing(shop: Inprocess) -> None:
    """In a workflow and outside."""
    order(shop, lambda: durable.gather())
    assert shop.run("w1") == durable.gather() == []


def failing(calls: list[Any], return_exceptions: bool = False) -> Callable[[], list[Any]]:
    """A gather whose second error comes first, and whose last step ends last."""
    failed, ended = threading.Event(), threading.Event()

    def late() -> None:
        assert failed.wait(20)
        raise KeyError("late")

    def early() -> None:
        failed.set()
        raise ValueError("early")

    def last() -> int:
        assert failed.wait(20)
        calls.append("last")
        ended.set()
        return 3

    signatures = [named("late", late), named("early", early), named("last", last)]
    return lambda: durable.gather(*signatures, return_exceptions=return_exceptions)


def test_the_first_error_by_argument_is_raised_when_all_have_run(shop: Inprocess, calls: list[Any]) -> None:
    """Alike on a replay, which runs none of them; on the first run the live error is its cause."""
    body = failing(calls)
    order(shop, body)
    attempt = begin(shop)
    with running(attempt), pytest.raises(KeyError, match="late") as caught:
        body()
    assert calls == ["last"]
    assert isinstance(caught.value.__cause__, KeyError)
    release(shop, attempt)
    told = shop.run("w1")
    assert (type(told), told.args, told.__notes__) == (KeyError, ("late",), caught.value.__notes__)  # type: ignore[attr-defined]
    assert calls == ["last"]


def test_errors_among_the_values(shop: Inprocess, calls: list[Any]) -> None:
    """Alike on the first run and on a replay."""
    body = failing(calls, return_exceptions=True)
    seen = []

    def shown() -> None:
        seen.append([repr(value) for value in body()])

    order(shop, shown)
    attempt = begin(shop)
    with running(attempt):
        shown()
    release(shop, attempt)
    shop.run("w1")
    assert seen == [["KeyError('late')", "ValueError('early')", "3"]] * 2


def test_what_may_be_gathered(shop: Inprocess) -> None:
    """Signatures with positional and keyword arguments, immutable ones, those of functions and of unmodified tasks."""

    @shop.step(name="add")
    def add(one: int, other: int = 10) -> int:
        return one + other

    @shop.app.task(name="plain", bind=True, shared=False)
    def plain(self: Any, text: str) -> list[Any]:
        return [text, self.request.parent_id, self.request.id == durable.current.idempotency_key]

    class Adder:
        async def __call__(self, number: int) -> int:
            return number + 1

    order(shop, lambda: durable.gather(
        add.s(1), add.s(1, other=2), add.si(1, 3), add.signature((1,), {"other": 4}), durable.as_step(plain).s("x"),
        durable.as_step(Adder(), name="adder").s(5), durable.as_step(len).s("four"),
    ))  # fmt: skip
    assert shop.run("w1") == [11, 3, 4, 5, ["x", "w1", True], 6, 4]
    assert list(steps(shop)) == ["add", "add#2", "add#3", "add#4", "plain", "adder", "builtins.len"]


def test_what_may_not(shop: Inprocess) -> None:
    """The error says what to write."""

    @shop.step(name="add")
    def add(one: int) -> int:
        return one

    @shop.app.task(name="plain", shared=False)
    def plain() -> None: ...

    coroutine = asyncio.sleep(0)
    as_a_function = "a sequence becomes a step as a function"
    for thing, advice in [
        (5, as_a_function),
        (add, as_a_function),
        (durable.as_step(len), as_a_function),
        (chain(add.s(1), add.s()), as_a_function),
        (group(add.s(1), add.s(2)), as_a_function),
        (signature("unknown", app=shop.app), as_a_function),
        (plain.s(), r"durable\.as_step\(task\)\.s\(…\)"),
        ([add.s(1)], r"write gather\(\*signatures\)"),
        ((add.s(1) for _ in "a"), r"write gather\(\*signatures\)"),
        (coroutine, r"write fetch\.s\(1\) for fetch\(1\)"),
    ]:
        with pytest.raises(TypeError, match=advice):
            durable.gather(add.s(1), thing)
    coroutine.close()


# Where


def test_a_step_cannot_gather(shop: Inprocess) -> None:
    """Not even nothing."""
    order(shop, durable.as_step(lambda: durable.gather(), name="outer"))
    assert isinstance(shop.run("w1"), NotAllowedInStep)


@pytest.mark.parametrize("context", [contextvars.Context, contextvars.copy_context])
def test_a_thread_of_the_workflow_cannot_gather(shop: Inprocess, context: Any) -> None:
    """With the workflow's context variables or without; the error isn't taken for one of the steps."""
    seen: list[BaseException] = []

    def gather() -> None:
        try:
            durable.gather(named("work", int), return_exceptions=True)
        except NotInWorkflow as error:
            seen.append(error)

    def body() -> None:
        thread = threading.Thread(target=context().run, args=(gather,))
        thread.start()
        thread.join()

    order(shop, body)
    shop.run("w1")
    assert len(seen) == 1
    assert steps(shop) == {}


def test_the_async_names(shop: Inprocess) -> None:
    """gather() would block the event loop, and agather() needs one."""

    async def body() -> str:
        with pytest.raises(NotInWorkflow, match=r"await durable\.agather"):
            durable.gather(named("work", int))
        return "refused"

    order(shop, body)
    assert shop.run("w1") == "refused"


def test_agather_in_a_sync_workflow(shop: Inprocess) -> None:
    """It says what to call."""

    def body() -> Any:
        return asyncio.run(durable.agather(named("work", int)))

    order(shop, body)
    told = shop.run("w1")
    assert isinstance(told, NotInWorkflow)
    assert "call durable.gather(…)" in str(told)


def test_outside_a_workflow_steps_are_called_one_after_the_other(calls: list[Any]) -> None:
    """All of them, in their order; async ones are run to their end."""

    async def fetch(number: int) -> int:
        calls.append(number)
        return number

    def work(number: int) -> int:
        calls.append(number)
        return number if number else fail(ValueError(number))

    signatures = [named("work", work, 0), named("fetch", fetch, 1), named("work", work, 2)]
    assert durable.gather(*signatures[1:]) == [1, 2]
    with pytest.raises(ValueError, match="0"):
        durable.gather(*signatures)
    error, *values = durable.gather(*signatures, return_exceptions=True)
    assert (type(error), values) == (ValueError, [1, 2])
    assert calls == [1, 2, 0, 1, 2, 0, 1, 2]


def test_context_variables_are_those_of_the_workflow(shop: Inprocess) -> None:
    """Each step has a copy."""
    variable = contextvars.ContextVar("variable", default="unset")

    def work(text: str) -> str:
        before = variable.get()
        variable.set(text)
        return before

    def body() -> list[Any]:
        variable.set("workflow")
        return [*durable.gather(named("work", work, "one"), named("work", work, "other")), variable.get()]

    order(shop, body)
    assert shop.run("w1") == ["workflow"] * 3


@pytest.fixture
def queues(shop: Inprocess) -> Iterator[Callable[..., list[str]]]:
    """Runs a gather of steps in a workflow, and returns what that has warned of."""

    def run(make: Callable[[], list[Any]], **options: Any) -> list[str]:
        order(shop, lambda: durable.gather(*make()), **options)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            shop.run("w1")
        assert status(shop).state == "SUCCESS"
        # Celery has its own to say of tasks with a queue.
        ours = [warning for warning in caught if not issubclass(warning.category, CDeprecationWarning)]
        assert {warning.filename for warning in ours} <= {__file__}
        return [str(warning.message) for warning in ours]

    yield run
    durable.gather.__globals__["_warned"].clear()


def test_a_step_with_a_place_of_its_own_is_warned_of_once(shop: Inprocess, queues: Any) -> None:
    """It runs here, whatever its task, its route or its signature says."""

    def nothing() -> None: ...

    slow = shop.step(nothing, name="slow", queue="slow")
    routed = shop.step(nothing, name="routed")
    sent = shop.step(nothing, name="sent")
    here = shop.step(nothing, name="here", priority=5)
    shop.app.conf.task_routes = {"rou*": {"queue": "far"}, "here": {"priority": 3}}
    found = queues(lambda: [slow.s(), routed.s(), sent.s().set(queue="other"), here.s(), slow.s()])
    assert [text.split(":")[0] for text in found] == [
        "gather() runs the step slow in this worker, although its own place is 'slow'",
        "gather() runs the step routed in this worker, although its own place is 'far'",
        "gather() runs the step sent in this worker, although its own place is 'other'",
    ]


def test_a_step_that_has_the_place_of_its_workflow_is_not_warned_of(shop: Inprocess, queues: Any) -> None:
    """Declared on both, or by one route for all of an app's tasks."""

    def nothing() -> None: ...

    work = shop.step(nothing, name="shop.work", queue="shop")
    routed = shop.step(nothing, name="routed")

    def route(name: str, args: Any, kwargs: Any, options: Any, task: Any = None, **_: Any) -> Any:
        assert len(args) + len(kwargs) == 0
        return {"queue": "shop"}

    shop.app.conf.task_routes = (route,)
    assert queues(lambda: [work.s(), routed.s()], queue="shop") == []


# Ends in the middle


def test_what_has_finished_is_kept_when_the_worker_dies(shop: Inprocess, calls: list[Any]) -> None:
    """It doesn't run again; what was running does."""

    def work(number: int) -> int:
        calls.append(number)
        if number == 1 and calls.count(1) == 1:
            wait_until(lambda: "work" in steps(shop), message="the other one is recorded")
            raise Killed
        return number

    def body() -> Any:
        return durable.gather(*(named("work", work, number) for number in range(3)), max_concurrency=2)

    order(shop, body)
    attempt = begin(shop)
    with running(attempt), pytest.raises(Killed):
        body()
    assert crash(shop, attempt) == "ENQUEUED"
    assert shop.run("w1") == [0, 1, 2]
    assert (calls.count(0), calls.count(1)) == (1, 2)


@pytest.mark.parametrize("exit_", [KeyboardInterrupt, Killed])
def test_an_exit_in_a_step_ends_the_gather(shop: Inprocess, calls: list[Any], exit_: type[BaseException]) -> None:
    """As in a step that runs alone: it is no outcome, what runs is kept, and nothing else starts."""
    release_other = threading.Event()

    def work(number: int) -> int:
        calls.append(number)
        if number == 0:
            release_other.set()
            raise exit_
        assert release_other.wait(20)
        return number

    def body() -> Any:
        return durable.gather(*(named("work", work, number) for number in range(5)), max_concurrency=2)

    order(shop, body)
    with running(begin(shop)), pytest.raises(exit_):
        body()
    assert calls in ([0, 1], [1, 0], [0, 1, 2], [1, 0, 2])
    assert "work" not in steps(shop)
    assert steps(shop)["work#2"].output == 1


@pytest.mark.parametrize(
    ("end", "told"),
    [("drain", HandedOver), ("late", Cancelled), ("lost", OwnershipLost)],
)
def test_a_run_that_is_over_starts_no_further_step(
    shop: Inprocess, sql: Sql, calls: list[Any], end: str, told: type[BaseException]
) -> None:
    """A shutdown, a deadline or another owner: what runs is recorded, unless the workflow is another's now."""
    both = threading.Barrier(2)

    def work(number: int) -> int:
        calls.append(number)
        if number < 2:
            both.wait(20)
            if number == 0:
                finish_off()
            both.wait(20)
        return number

    def finish_off() -> None:
        if end == "drain":
            shop.drain()
        elif end == "late":
            sql.execute(LATE)
        else:
            attempt = current_attempt()
            assert attempt is not None
            crash(shop, attempt)
            begin(shop)

    def body() -> Any:
        return durable.gather(*(named("work", work, number) for number in range(4)), max_concurrency=2)

    order(shop, body)
    attempt = begin(shop)
    with running(attempt), pytest.raises(told):
        body()
    assert sorted(calls) == [0, 1]
    assert sorted(steps(shop)) == ([] if end == "lost" else ["work", "work#2"])
    if end == "drain":
        release(shop, attempt)
        assert shop.run("w1", shop.new_node()) == [0, 1, 2, 3]
        assert sorted(calls) == [0, 1, 2, 3]


def test_a_workflow_that_is_handed_over_or_lost_says_so_to_celery(shop: Inprocess) -> None:
    """And not one of the steps' errors."""
    order(shop, lambda: durable.gather(named("drain", shop.drain), named("fails", fail, ValueError())))
    assert isinstance(shop.run("w1"), Retry)
    assert status(shop).state == "ENQUEUED"
    assert isinstance(shop.run("w1"), Ignore), "this node drains"


# Retries, waits, limits


def test_each_step_has_its_own_retries(shop: Inprocess, calls: list[Any]) -> None:
    """Recorded like those of a step that runs alone."""

    def flaky(number: int) -> int:
        calls.append(number)
        return number if calls.count(number) > number else fail(ConnectionError())

    order(shop, lambda: durable.gather(
        *(named(f"flaky{number}", flaky, number, max_retries=3, retry_backoff=0.01) for number in range(3))
    ))  # fmt: skip
    assert shop.run("w1") == [0, 1, 2]
    assert [step.tries for step in steps(shop).values()] == [1, 2, 3]


def backing_off(calls: list[Any], name: str, seconds: float) -> Any:
    def body() -> str:
        calls.append(name)
        return name if calls.count(name) > 1 else fail(ConnectionError())

    return named(name, body, max_retries=1, retry_backoff=seconds, retry_jitter=False)


def test_a_long_backoff_lets_the_others_go_on(shop: Inprocess, sql: Sql, calls: list[Any]) -> None:
    """Then the worker is given back until the first one is due; what has finished doesn't run again."""

    def body() -> Any:
        return durable.gather(
            backing_off(calls, "slow", 500), backing_off(calls, "slower", 900),
            *(named("work", calls.append, number) for number in range(5)), max_concurrency=2,
        )  # fmt: skip

    order(shop, body)
    assert isinstance(shop.run("w1"), Retry)
    found = status(shop)
    assert (found.state, found.waiting_for) == ("SUSPENDED", "retry of step slow")
    assert sorted(calls, key=str) == [0, 1, 2, 3, 4, "slow", "slower"]
    due = shop.installation.store.workflows.next_due(patience=0)
    assert due is not None
    assert 490 < due <= 500
    sql.execute(f"{DUE} WHERE key = 'slow'")
    sql.execute("UPDATE celery_durable.workflow SET wake_at = clock_timestamp()")
    shop.installation.store.workflows.wake(limit=9, patience=0)
    assert isinstance(shop.run("w1"), Retry)
    assert status(shop).waiting_for == "retry of step slower"
    assert calls[7:] == ["slow"]


def test_a_step_that_is_due_goes_on_while_others_run(shop: Inprocess, calls: list[Any]) -> None:
    """Whether there is a free place for it at once, or later."""
    retried = threading.Event()

    def flaky() -> str:
        calls.append("flaky")
        if len(calls) > 1:
            retried.set()
        return "done" if len(calls) > 1 else fail(ConnectionError())

    step = named("flaky", flaky, max_retries=1, retry_backoff=0.2, retry_jitter=False)
    order(shop, lambda: durable.gather(step, named("long", retried.wait, 20)))
    shop.installation.settings["suspend_after"] = 0.1
    assert shop.run("w1") == ["done", True]
    assert steps(shop)["flaky"].tries == 2


def test_a_soft_limit_in_a_thread_is_seen_at_the_end(shop: Inprocess) -> None:
    """The body can look for itself; a value that comes too late doesn't count."""

    def late() -> str:
        step = durable.current.step
        while (step.remaining() or 0) > 0:
            time.sleep(0.01)
        return "too late"

    order(shop, lambda: durable.gather(named("late", late, soft_time_limit=0.1), named("other", int)))
    assert isinstance(shop.run("w1"), StepTimeout)
    assert steps(shop)["other"].output == 0


@pytest.mark.parametrize("limit", [{"soft_time_limit": 0.1}, {"cancellable": True}], ids=["timeout", "cancelled"])
def test_an_async_step_in_a_thread_is_interrupted(shop: Inprocess, sql: Sql, calls: list[Any], limit: Any) -> None:
    """By its limit, and by the cancellation of the workflow."""

    async def endless() -> None:
        sql.execute("UPDATE celery_durable.workflow SET deadline = clock_timestamp() + interval '0.1 s'")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            calls.append("interrupted")
            raise

    order(shop, lambda: durable.gather(named("endless", endless, **limit), named("other", int)))
    told = shop.run("w1")
    assert calls == ["interrupted"]
    if "soft_time_limit" in limit:
        assert isinstance(steps(shop)["endless"].error, StepTimeout)
    else:
        assert isinstance(told, Ignore)
    assert steps(shop)["other"].output == 0


@pytest.mark.parametrize(
    "make",
    [lambda: fail(StopIteration(5)), lambda: next(iter([]))],
)
def test_a_stop_iteration_is_an_error_like_another(shop: Inprocess, make: Any) -> None:
    """It doesn't end the coroutine that runs the step."""
    order(shop, lambda: durable.gather(named("stops", make), return_exceptions=True)[0].args)
    assert isinstance(shop.run("w1"), list | tuple)
    assert type(steps(shop)["stops"].error) is StopIteration


# The whole task's limit, and signals


@pytest.fixture
def soft_limit() -> Iterator[Callable[[], None]]:
    """Celery's soft time limit strikes when this is called, from any thread."""
    main = threading.get_ident()

    def strike(signum: int, frame: Any) -> None:
        raise SoftTimeLimitExceeded

    before = signal.signal(signal.SIGUSR1, strike)
    yield lambda: signal.pthread_kill(main, signal.SIGUSR1)
    signal.signal(signal.SIGUSR1, before)


def test_the_limit_of_the_task_interrupts_the_wait(
    shop: Inprocess, calls: list[Any], soft_limit: Callable[[], None]
) -> None:
    """The function can catch it and go on; steps that still run are kept, those that haven't started never do."""
    go_on = threading.Event()

    def long(number: int) -> int:
        calls.append(number)
        if number == 1:
            soft_limit()
        assert go_on.wait(20)
        return number

    def body() -> Any:
        try:
            return durable.gather(*(named("long", long, number) for number in range(3)), max_concurrency=2)
        except SoftTimeLimitExceeded:
            go_on.set()
            wait_until(lambda: len(steps(shop)) == 2, message="both are recorded")
            return named_step()

    named_step = durable.as_step(lambda: "fallback", name="fallback")
    order(shop, body)
    assert shop.run("w1") == "fallback"
    assert calls == [0, 1]
    assert [step.output for step in steps(shop).values()] == [0, 1, "fallback"]


def test_a_step_that_is_left_behind_makes_no_further_try(
    shop: Inprocess, calls: list[Any], soft_limit: Callable[[], None]
) -> None:
    """Its try was recorded; nobody waits for another one."""
    go_on = threading.Event()

    def flaky() -> None:
        calls.append(1)
        soft_limit()
        go_on.wait(20)
        raise ConnectionError

    def body() -> None:
        try:
            durable.gather(named("flaky", flaky, max_retries=5, retry_backoff=0.01))
        except SoftTimeLimitExceeded:
            go_on.set()
            wait_until(lambda: not branches_alive(), message="the thread has ended")

    order(shop, body)
    shop.run("w1")
    assert calls == [1]
    assert (steps(shop)["flaky"].state, steps(shop)["flaky"].tries) == ("RETRY", 1)


def test_where_there_is_room_for_one_thread_only(shop: Inprocess, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes one step after the other."""
    start = threading.Thread.start

    def start_one(thread: threading.Thread) -> None:
        if thread.name == "celery_durable branch" and branches_alive():
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", start_one)
    order(shop, lambda: durable.gather(*(named("work", lambda number: number, number) for number in range(3))))
    assert shop.run("w1") == [0, 1, 2]


@pytest.fixture
def proxied(proxy: PostgresProxy, broker_url: str) -> Iterator[Inprocess]:
    shop = Inprocess(proxy.url, broker_url)
    yield shop
    shop.close()


def test_the_limit_of_the_task_in_the_middle_of_a_checkpoint(
    proxied: Inprocess, proxy: PostgresProxy, soft_limit: Callable[[], None]
) -> None:
    """It waits for the answer; what was recorded is kept, and no thread waits for ever."""

    def strike() -> None:
        held.wait_reached()
        soft_limit()
        held.release()

    def body() -> str:
        try:
            durable.gather(named("work", int), named("other", int))
        except SoftTimeLimitExceeded:
            wait_until(lambda: not branches_alive(), message="the threads have ended")
            wait_until(lambda: len(steps(proxied)) == 2, message="both are recorded")
            return "caught"
        return "missed"

    order(proxied, body)
    held = proxy.hold("INSERT INTO")
    helper = threading.Thread(target=strike)
    helper.start()
    assert proxied.run("w1") == "caught"
    helper.join()
    assert {key: step.output for key, step in steps(proxied).items()} == {"work": 0, "other": 0}


def interrupted(shop: Inprocess, prepare: Callable[[], None], unwound: Callable[[], None] = lambda: None) -> None:
    """Run a workflow whose gather is interrupted after its bodies, and see that both outcomes are recorded."""

    def body() -> str:
        prepare()
        with pytest.raises(SoftTimeLimitExceeded):
            durable.gather(*(named("work", bodies_at_once.wait) for _ in range(2)))
        unwound()
        wait_until(lambda: len(steps(shop)) == 2, message="both are recorded")
        return "caught"

    bodies_at_once = threading.Barrier(2)
    order(shop, body)
    assert shop.run("w1") == "caught"


@pytest.mark.parametrize("place", ["_take", "_record", "_save_together", "go_on"])
def test_the_limit_of_the_task_anywhere_after_a_body(
    shop: Inprocess, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Who was about to record it is interrupted; it is recorded all the same."""
    owner: Any = _Branch if place == "go_on" else Gathering
    real = getattr(owner, place)

    def struck(*args: Any) -> None:
        monkeypatch.setattr(owner, place, real)
        raise SoftTimeLimitExceeded

    interrupted(shop, lambda: monkeypatch.setattr(owner, place, struck))


def test_what_waits_for_a_thread_leaves_no_trace(
    shop: Inprocess, monkeypatch: pytest.MonkeyPatch, soft_limit: Callable[[], None]
) -> None:
    """A step that was to start, when the gather was interrupted, isn't noted as one that was started."""
    unwound = threading.Event()

    def work() -> None:
        soft_limit()
        assert unwound.wait(20)

    def body() -> Any:
        return durable.gather(*(named("work", work, time_limit=30) for _ in range(3)))

    order(shop, body)
    attempt = begin(shop)
    attempt.killable = True
    monkeypatch.setattr(Threads, "grow", lambda threads: None)  # the limit comes before there is a thread for each
    with running(attempt), pytest.raises(SoftTimeLimitExceeded):
        body()
    unwound.set()
    wait_until(lambda: not branches_alive(), message="the threads have ended")
    assert list(steps(shop)) == ["work"]


def test_the_slow_way_is_not_interrupted(
    shop: Inprocess, calls: list[Any], monkeypatch: pytest.MonkeyPatch, soft_limit: Callable[[], None]
) -> None:
    """Where outcomes can't be recorded together, each has a statement of its own, whatever becomes of the workflow."""
    checkpoints = shop.installation.store.checkpoints
    save_slow, unwound = checkpoints.save_slow, threading.Event()

    def struck(*args: Any, **kwargs: Any) -> Any:
        if not calls:
            calls.append("struck")
            soft_limit()
            assert unwound.wait(20), "the workflow's thread doesn't wait for this statement any more"
        return save_slow(*args, **kwargs)

    def prepare() -> None:
        monkeypatch.setattr(Attempt, "save", lambda *args: False)
        monkeypatch.setattr(type(checkpoints), "save_slow", staticmethod(struck))

    interrupted(shop, prepare, unwound.set)


def test_an_exit_on_the_slow_way_ends_the_gather(
    shop: Inprocess, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    """It comes up in the thread that records, and the thread of the workflow raises it."""

    def body() -> Any:
        return durable.gather(*(named("work", int) for _ in range(3)))

    def exits(*args: Any, **kwargs: Any) -> Any:
        raise Killed

    order(shop, body)
    attempt = begin(shop)
    monkeypatch.setattr(Attempt, "save", lambda *args: False)
    monkeypatch.setattr(type(shop.installation.store.checkpoints), "save_slow", staticmethod(exits))
    with running(attempt), pytest.raises(Killed):
        body()
    assert not [warned for warned in recwarn if "thread" in str(warned.message)]


# Crashes in a row


def test_a_single_crash_changes_nothing(shop: Inprocess) -> None:
    """Most have other reasons: the steps run at once again, and none spends a try."""
    both = threading.Barrier(2)

    def work() -> None:
        both.wait(20)

    order(shop, lambda: durable.gather(*(named("work", work, max_retries=5) for _ in range(2))))
    crash(shop, begin(shop))
    assert shop.run("w1") == [None, None]
    assert [step.tries for step in steps(shop).values()] == [1, 1]


def test_a_step_that_kills_its_worker_is_found(shop: Inprocess, calls: list[Any]) -> None:
    """After two crashes in a row steps run one at a time; the killer ends in StepLost, the others complete."""
    dead = threading.Event()

    def work(number: int) -> int:
        if dead.is_set():
            raise Killed  # the process is gone
        calls.append(number)
        if number == 2:
            dead.set()
            raise Killed
        if crashes < 2:
            assert dead.wait(20)
            raise Killed
        return number

    def body() -> list[Any]:
        signatures = (named("work", work, number, max_retries=1) for number in range(6))
        return durable.gather(*signatures, return_exceptions=True, max_concurrency=4)

    order(shop, body, max_recovery_attempts=3)
    crashes = 0
    while status(shop).state == "ENQUEUED" and crashes < 10:
        attempt = begin(shop)
        dead.clear()
        with running(attempt):
            try:
                found = body()
            except Killed:
                crash(shop, attempt)
                crashes += 1
                continue
        break
    assert [value for value in found if not isinstance(value, Exception)] == [0, 1, 3, 4, 5]
    assert isinstance(found[2], StepLost)
    assert crashes == 4, "two until steps run one at a time, and two tries of the killer"
    assert sorted(calls[-3:]) == [3, 4, 5]
    assert {step.tries for step in steps(shop).values()} == {1, 2}


def test_steps_run_at_once_again_when_the_suspects_are_through(shop: Inprocess) -> None:
    """Only so many can have been running at the crash."""
    most, running_now, seen = 2, [0], []
    lock = threading.Lock()
    full = threading.Barrier(2)

    def work(number: int) -> None:
        with lock:
            running_now[0] += 1
            seen.append((number, running_now[0]))
        if number >= most:
            full.wait(20)
        with lock:
            running_now[0] -= 1

    order(shop, lambda: durable.gather(*(named("work", work, number) for number in range(4)), max_concurrency=most))
    for _ in range(2):
        crash(shop, begin(shop))
    shop.run("w1")
    assert seen[:2] == [(0, 1), (1, 1)]
    assert max(count for _, count in seen[2:]) == 2


# Statements


def test_checkpoints_that_are_ready_together_go_in_one_statement(proxied: Inprocess, proxy: PostgresProxy) -> None:
    """A hundred trivial steps cost far fewer round trips."""
    order(proxied, lambda: durable.gather(*(named("work", abs, number) for number in range(100))))
    message = proxied.message("w1")
    proxy.reset()
    assert proxied.deliver("w1", message) == list(range(100))
    assert proxy.round_trips() < 40
    assert len(steps(proxied)) == 100


@pytest.mark.parametrize("by", ["constraint", "trigger"])
def test_a_row_that_postgres_refuses_does_not_take_others_along(shop: Inprocess, sql: Sql, by: str) -> None:
    """They go one by one then, and the workflow gets the error of the bad one."""
    ready = threading.Barrier(3)

    def work(number: int) -> int:
        ready.wait(20)
        return number

    order(shop, lambda: durable.gather(named("one", work, 1), named("bad", work, 2), named("other", work, 3)))
    with refusing(sql, by):
        told = shop.run("w1")
    assert type(told).__module__.startswith("psycopg")
    assert {key: step.output for key, step in steps(shop).items()} == {"one": 1, "other": 3}


def test_an_outcome_that_is_there_already_is_kept(shop: Inprocess, sql: Sql) -> None:
    """As after a lost answer; the others are recorded."""
    ready = threading.Barrier(2)
    insert = """
        INSERT INTO celery_durable.checkpoint (workflow, key, seq, attempt, tries, ok, value, started_at, at)
        VALUES ('w1', 'one', 1, 1, 1, true, '5', clock_timestamp(), clock_timestamp())
    """

    def one() -> int:
        sql.execute(insert)
        ready.wait(20)
        return 1

    def other() -> int:
        ready.wait(20)
        return 2

    order(shop, lambda: durable.gather(named("one", one), named("other", other)))
    assert shop.run("w1") == [5, 2]
    assert steps(shop)["other"].output == 2


def test_a_kept_value_that_cannot_be_read_is_the_error_of_its_step(shop: Inprocess, sql: Sql, calls: list[Any]) -> None:
    """The others run all the same."""

    def body() -> list[Any]:
        return durable.gather(named("one", int), named("other", calls.append, 1), return_exceptions=True)

    order(shop, lambda: [type(value).__name__ for value in body()])
    attempt = begin(shop)
    with running(attempt):
        durable.as_step(int, name="one")()
    release(shop, attempt)
    sql.execute("UPDATE celery_durable.checkpoint SET value = '\\x80ff'")
    assert shop.run("w1") == [SerializationError.__name__, "NoneType"]
    assert calls == [1]


def test_a_step_that_is_replayed_in_a_gather_starts_no_thread(shop: Inprocess) -> None:
    """Nothing is left to run."""
    threads: list[int] = []

    class Count(Observer):
        def step_replayed(self, workflow_id: str, key: str) -> None:
            threads.append(len(branches_alive()))

    shop.installation.observers.add(Count())
    body = lambda: durable.gather(*(named("work", abs, number) for number in range(3)))  # noqa: E731
    order(shop, body)
    attempt = begin(shop)
    with running(attempt):
        body()
    release(shop, attempt)
    wait_until(lambda: not branches_alive())
    assert shop.run("w1") == [0, 1, 2]
    assert threads == [0, 0, 0]
    assert sys.getrefcount(body) < 10


class Connection:
    """Something that code keeps for its thread."""


def test_what_a_branch_keeps_for_its_thread_dies_with_it(shop: Inprocess) -> None:
    """A session or a connection in a thread-local doesn't outlive the gather."""
    local, made = threading.local(), []

    def connect() -> None:
        local.connection = Connection()
        made.append(weakref.ref(local.connection))

    step = named("connect", connect)
    order(shop, lambda: durable.gather(step, step))
    shop.run("w1")
    wait_until(lambda: gc.collect() is not None and not any(ref() for ref in made), message="they are gone")
    assert len(made) == 2
