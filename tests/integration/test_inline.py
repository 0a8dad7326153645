"""Celery tasks as the bodies of steps: what they see of themselves, and what their control flow comes to."""

from __future__ import annotations

import asyncio
import functools
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery import Task
from celery.exceptions import Ignore, Reject, Retry

import celery_durable as durable
from celery_durable.engine.context import running
from celery_durable.exceptions import (
    ConfigurationError,
    MaxRetriesExceededError,
    NotAllowedInStep,
    NotInWorkflow,
    SoftTimeLimitExceeded,
    StepError,
    StepLost,
)
from tests.fixtures.brokers import isolated
from tests.fixtures.fix_postgres import Sql, _new_database
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.tables import TRUNCATE
from tests.integration.attempts import DUE, Killed, begin, crash, order, status, steps

pytestmark = pytest.mark.oldest

Maker = Callable[..., Any]


class Refused(Exception):
    """An error that pickle can't rebuild."""

    def __init__(self, *, code: int) -> None:
        super().__init__(f"refused with {code}")
        self.code = code


class Empty(Exception):
    """An error that is false."""

    def __len__(self) -> int:
        return 0


@pytest.fixture(scope="module")
def servers(postgres_server: str, template_database: str, broker_server: str) -> Iterator[tuple[str, str]]:
    """A database and a broker for all tests here."""
    with _new_database(postgres_server, template_database) as url, isolated(broker_server) as broker:
        yield url, broker.url


@pytest.fixture
def sql(servers: tuple[str, str]) -> Iterator[Sql]:
    with closing(Sql(servers[0])) as helper:
        yield helper


@pytest.fixture
def shop(servers: tuple[str, str], sql: Sql) -> Iterator[Inprocess]:
    """An app as a worker has it: its tasks are made at once, and Celery's tracer has prepared them."""
    sql.execute(TRUNCATE)
    with closing(Inprocess(*servers, suspend_after=2)) as shop:
        shop.app.finalize()
        yield shop


@pytest.fixture
def calls() -> list[Any]:
    """What bodies did, in order."""
    return []


@pytest.fixture(params=["step", "task"])
def bound(request: pytest.FixtureRequest, shop: Inprocess) -> Maker:
    """Makes a bound step of a function: a task that is based on Step, or one that isn't touched, under as_step."""

    def step(function: Any, **options: Any) -> Any:
        return shop.step(function, **{"name": "bound", "bind": True, **options})

    def task(function: Any, **options: Any) -> Any:
        return durable.as_step(shop.app.task(function, **{"name": "bound", "bind": True, "shared": False, **options}))

    return step if request.param == "step" else task


def outcome(shop: Inprocess, step: Any, *args: Any, **kwargs: Any) -> Any:
    """Run a workflow that calls this step: what it returned, or the error that it raised."""
    order(shop, lambda: step(*args, **kwargs))
    shop.run("w1")
    found = status(shop)
    assert found.state in ("SUCCESS", "FAILURE")
    return found.result if found.error is None else found.error


def only_step(shop: Inprocess) -> durable.StepInfo:
    (info,) = steps(shop).values()
    return info


def due_in(shop: Inprocess) -> float:
    """Seconds until the suspended workflow goes on."""
    due = shop.installation.store.workflows.next_due(patience=0)
    assert due is not None
    return due


def wake(shop: Inprocess, sql: Sql) -> None:
    """Let the time of the next try come."""
    sql.execute(DUE)
    sql.execute("UPDATE celery_durable.workflow SET wake_at = clock_timestamp()")
    shop.installation.store.workflows.wake(limit=9, patience=0)


# self.retry


def test_self_retry_tries_again(shop: Inprocess, bound: Maker) -> None:
    """The step runs anew after each self.retry, and the errors given to it are kept."""
    tries: list[int] = []

    def body(self: Any) -> str:
        tries.append(self.request.retries)
        if len(tries) < 3:
            raise self.retry(exc=ValueError(f"no {len(tries)}"), countdown=0)
        return "done"

    assert outcome(shop, bound(body)) == "done"
    assert tries == [0, 1, 2]
    assert (only_step(shop).tries, [error.message for error in only_step(shop).errors]) == (3, ["no 1", "no 2"])


def test_self_retry_raises_its_error_when_no_tries_are_left(shop: Inprocess, bound: Maker) -> None:
    """After max_retries the error that was given to it comes out, without a wait."""
    tries: list[int] = []

    def body(self: Any) -> None:
        tries.append(self.request.retries)
        raise self.retry(exc=Refused(code=len(tries)), countdown=0)

    error = outcome(shop, bound(body, max_retries=2))
    assert isinstance(error, Refused)
    assert (error.code, tries) == (3, [0, 1, 2])
    assert only_step(shop).tries == 3
    assert [each.type.rpartition(".")[2] for each in only_step(shop).errors] == ["Refused"] * 3


def test_self_retry_without_an_error(shop: Inprocess, bound: Maker) -> None:
    """Then it is MaxRetriesExceededError in the end, as in Celery; of each try the error in hand is kept."""

    def body(self: Any) -> None:
        try:
            raise Refused(code=503)
        except Refused:
            self.retry(countdown=0)

    error = outcome(shop, bound(body, max_retries=1))
    assert isinstance(error, MaxRetriesExceededError)
    first, last = only_step(shop).errors
    assert (first.type.rpartition(".")[2], first.message) == ("Refused", "refused with 503")
    assert "in body" in first.traceback
    assert last.type.endswith("MaxRetriesExceededError")


def test_self_retry_without_any_error(shop: Inprocess, bound: Maker) -> None:
    """An error that the workflow handles while it calls the step isn't the step's."""

    def body(self: Any) -> str:
        if not self.request.retries:
            self.retry(countdown=0)
        return "done"

    step = bound(body)

    def workflow() -> Any:
        try:
            raise LookupError("the workflow's own")
        except LookupError:
            return step()

    order(shop, workflow)
    assert shop.run("w1") == "done"
    assert [error.message for error in only_step(shop).errors] == ["The step asked for another try."]


@pytest.mark.parametrize(("asked", "runs"), [(1, 2), (5, 6)])
@pytest.mark.parametrize("options", [{}, {"autoretry_for": (ValueError,), "default_retry_delay": 0}], ids=["", "auto"])
def test_self_retry_has_its_own_maximum(
    shop: Inprocess, bound: Maker, calls: list[Any], asked: int, runs: int, options: Any
) -> None:
    """max_retries of the call wins over the task's, in both directions, whatever autoretry_for says."""

    def body(self: Any) -> None:
        calls.append(1)
        raise self.retry(exc=ValueError("no"), countdown=0, max_retries=asked)

    step = bound(body, **{"max_retries": 3, **options})
    assert isinstance(outcome(shop, step), ValueError)
    assert len(calls) == runs
    task = shop.app.tasks["bound"]
    assert not hasattr(task, "override_max_retries"), "the next call of the task has its own"


def test_max_retries_of_as_step_count_for_self_retry(shop: Inprocess, calls: list[Any]) -> None:
    """They stand in the place of the task's own."""

    def body(self: Any) -> int:
        calls.append(1)
        if len(calls) < 6:
            raise self.retry(exc=ValueError("no"), countdown=0)
        return len(calls)

    task = shop.app.task(body, name="bound", bind=True, shared=False)
    assert outcome(shop, durable.as_step(task, max_retries=5)) == 6
    assert task.max_retries == 3


@pytest.mark.parametrize("limit", [1, None])
def test_as_step_may_lower_or_lift_the_limit_of_self_retry(
    shop: Inprocess, calls: list[Any], limit: int | None
) -> None:
    """None means for ever."""

    def body(self: Any) -> int:
        calls.append(1)
        if len(calls) < 9:
            raise self.retry(exc=ValueError("no"), countdown=0)
        return len(calls)

    task = shop.app.task(body, name="bound", bind=True, shared=False, autoretry_for=(ValueError,))
    found = outcome(shop, durable.as_step(task, max_retries=limit))
    assert found == 9 if limit is None else isinstance(found, ValueError)
    assert len(calls) == (9 if limit is None else 2)


@pytest.mark.parametrize(
    "when",
    [
        {"countdown": 100},
        {"eta": lambda: datetime.now(timezone.utc) + timedelta(seconds=100)},
        {"eta": lambda: datetime.now(timezone(timedelta(hours=5))) + timedelta(seconds=100)},
        {"eta": lambda: datetime.now(timezone.utc).replace(tzinfo=None) + timedelta(seconds=100)},
        {},
    ],
    ids=["countdown", "eta", "eta elsewhere", "naive eta", "default_retry_delay"],
)
def test_self_retry_says_when(shop: Inprocess, bound: Maker, when: Any) -> None:
    """A naive eta is UTC, as in Celery. A long delay gives the worker back."""

    def body(self: Any) -> None:
        raise self.retry(**{name: value() if callable(value) else value for name, value in when.items()})

    order(shop, bound(body, default_retry_delay=100))
    assert isinstance(shop.run("w1"), Retry)
    assert 90 < due_in(shop) <= 100


def test_self_retry_at_a_time_that_has_passed(shop: Inprocess, bound: Maker, calls: list[Any]) -> None:
    """It is now."""

    def body(self: Any) -> str:
        calls.append(1)
        if len(calls) < 2:
            raise self.retry(eta=datetime(2001, 1, 1, tzinfo=timezone.utc))
        if len(calls) < 3:
            raise self.retry(countdown=-5)
        return "done"

    assert outcome(shop, bound(body)) == "done"


@pytest.mark.parametrize(
    ("countdown", "told"), [("soon", "seconds"), (math.nan, "a positive duration"), (math.inf, "a positive duration")]
)
def test_self_retry_after_nonsense(shop: Inprocess, bound: Maker, countdown: Any, told: str) -> None:
    """A delay that can't be one is an error that says so."""

    def body(self: Any) -> None:
        raise self.retry(countdown=countdown)

    error = outcome(shop, bound(body))
    assert isinstance(error, ConfigurationError)
    assert f"countdown must be {told}" in str(error)


def test_self_retry_that_does_not_throw(shop: Inprocess, bound: Maker, calls: list[Any]) -> None:
    """Then what the body returns or raises counts, as Celery says; a Retry that it returns is a retry."""

    def body(self: Any, how: str) -> Any:
        calls.append(how)
        retry = self.retry(countdown=0, throw=False)
        assert isinstance(retry, Retry)
        return retry if how == "returns it" and len(calls) < 4 else how

    step = bound(body)
    order(shop, lambda: [step("goes on"), step("returns it")])
    assert shop.run("w1") == ["goes on", "returns it"]
    assert calls == ["goes on", "returns it", "returns it", "returns it"]


def test_self_retry_with_other_arguments(shop: Inprocess, bound: Maker, calls: list[Any]) -> None:
    """They can't change under a step; the same ones again are no matter."""

    def body(self: Any, page: int) -> int:
        calls.append(page)
        if len(calls) == 1:
            raise self.retry(args=[page], kwargs={}, countdown=0)
        raise self.retry(args=(page + 1,), countdown=0)

    error = outcome(shop, bound(body), 1)
    assert isinstance(error, NotAllowedInStep)
    assert "other arguments" in str(error)
    assert calls == [1, 1]


def test_a_retry_that_nobody_has_counted(shop: Inprocess, bound: Maker, calls: list[Any]) -> None:
    """A Retry of the body's own making is bounded by the step's max_retries."""

    def body(self: Any) -> None:
        calls.append(1)
        raise Retry("again", when=0)

    assert isinstance(outcome(shop, bound(body, max_retries=2)), MaxRetriesExceededError)
    assert len(calls) == 3


def test_autoretry_beside_self_retry(shop: Inprocess, calls: list[Any]) -> None:
    """In one body: the retry that it asks for is Celery's, the automatic one is the policy's, fractions included."""
    began = time.monotonic()

    def body(self: Any) -> str:
        calls.append(self.request.retries)
        if len(calls) == 1:
            raise Refused(code=503)
        if len(calls) == 2:
            raise self.retry(exc=ValueError("explicit"), countdown=0.01)
        if len(calls) == 3:
            raise Refused(code=504)
        return "done"

    step = shop.step(
        body, name="bound", bind=True, autoretry_for=(Refused,), retry_backoff=0.01, retry_jitter=False, max_retries=3
    )
    assert outcome(shop, step) == "done"
    assert time.monotonic() - began < 0.9, "Celery's own arithmetic knows whole seconds only"
    assert calls == [0, 1, 2, 3]
    assert [error.message for error in only_step(shop).errors] == [
        "refused with 503", "explicit", "refused with 504",
    ]  # fmt: skip


def test_the_policys_delays_are_exact(shop: Inprocess, caplog: pytest.LogCaptureFixture) -> None:
    """Celery's wrapper asks for the retry, but the step's own fractional backoff says when."""

    def body(self: Any) -> None:
        raise Refused(code=503)

    step = shop.step(
        body, name="bound", bind=True, autoretry_for=(Refused,), max_retries=3,
        retry_backoff=0.01, retry_backoff_rate=3.0, retry_backoff_max=0.05, retry_jitter=False,
    )  # fmt: skip
    with caplog.at_level(logging.WARNING, "celery_durable"):
        assert isinstance(outcome(shop, step), Refused)
    assert [record.getMessage().rpartition("next in ")[2] for record in caplog.records if "next in" in record.msg] == [
        "0.01 s.", "0.03 s.", "0.05 s.",
    ]  # fmt: skip


def test_celerys_arithmetic_for_an_unmodified_task(shop: Inprocess, sql: Sql) -> None:
    """Whole seconds, at least one."""

    def body() -> None:
        raise Refused(code=503)

    task = shop.app.task(
        body, name="plain", shared=False, autoretry_for=(Refused,), retry_backoff=60.9, retry_jitter=False
    )
    order(shop, durable.as_step(task))
    delays = []
    for _ in range(3):
        shop.run("w1")
        delays.append(due_in(shop))
        wake(shop, sql)
    shop.run("w1")
    assert [round(delay) for delay in delays] == [60, 120, 240]
    assert isinstance(status(shop).error, Refused)


def test_an_app_with_its_own_task_class(shop: Inprocess, calls: list[Any]) -> None:
    """Its retry() and __call__ are part of the step; its handlers aren't called, as by no direct call of a task."""

    class ShopTask(Task):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append("call")
            return super().__call__(*args, **kwargs)

        def retry(self, exc: Any = None, countdown: int = 0) -> Any:  # type: ignore[override]
            calls.append("retry")
            return super().retry(exc=exc, countdown=countdown // 1000)

        def _handler(self, *args: Any, **kwargs: Any) -> None:
            calls.append("handler")

        before_start = on_success = on_failure = on_retry = after_return = _handler

    def body(self: Any, name: str) -> str:
        if not self.request.retries:
            raise ValueError(name)
        if self.request.retries == 1:
            raise self.retry(KeyError(name), countdown=1)
        return name

    options: dict[str, Any] = {"bind": True, "shared": False, "autoretry_for": (ValueError,), "default_retry_delay": 0}
    order(shop, lambda: [task("task"), step("step")])
    shop.app.Task = ShopTask
    task = durable.as_step(shop.app.task(body, name="task", **options))
    step = shop.app.task(body, name="step", base=durable.Step, **options)
    assert isinstance(step, ShopTask)
    assert shop.run("w1") == ["task", "step"]
    assert calls == ["call", "retry", "call", "retry", "call"] * 2
    assert [info.tries for info in steps(shop).values()] == [3, 3]


def test_class_based_tasks(shop: Inprocess) -> None:
    """A registered instance is a task like any other."""

    class Charge(Task):
        name = "charge"

        def run(self, cents: int) -> list[Any]:
            if self.request.retries < 2:
                raise self.retry(exc=ValueError("later"), countdown=0)
            return [self.request.retries, cents]

    class Ship(durable.Step[..., Any]):
        name = "ship"
        autoretry_for = (ValueError,)
        retry_backoff = 0.01

        def run(self, cents: int) -> list[Any]:
            if self.request.retries < 2:
                raise ValueError("later")
            return [self.request.retries, cents]

    charge = durable.as_step(shop.app.register_task(Charge()))
    ship = shop.app.register_task(Ship())
    order(shop, lambda: [charge(1), ship(2)])
    assert shop.run("w1") == [[2, 1], [2, 2]]


# self.request


def test_what_a_bound_task_sees_of_itself(shop: Inprocess, bound: Maker) -> None:
    """In each try, and after a crash: the same id, the tries that have failed, and where it belongs."""
    seen: list[Any] = []

    def body(self: Any, first: int, second: int = 0) -> None:
        request = self.request
        assert request.id == durable.current.idempotency_key
        assert (request.parent_id, request.root_id, request.hostname) == ("w1", "w1", "worker@test")
        assert (list(request.args), request.kwargs) == ([1], {"second": 2})
        assert request.is_eager
        assert not request.called_directly
        assert (request.group, request.chord, request.callbacks, request.headers) == (None, None, None, {})
        seen.append((request.id, request.retries))
        if len(seen) == 2:
            raise Killed
        if len(seen) < 4:
            raise self.retry(exc=ValueError("again"), countdown=0)

    step = bound(body)
    order(shop, lambda: step(1, second=2))
    attempt = begin(shop)
    attempt.root_id, attempt.worker = "w1", "worker@test"
    with running(attempt), pytest.raises(Killed):
        step(1, second=2)
    assert crash(shop, attempt) == "ENQUEUED"
    shop.run("w1")
    assert status(shop).state == "SUCCESS"
    assert [retries for _, retries in seen] == [0, 1, 1, 2]
    assert len({request_id for request_id, _ in seen}) == 1


def test_a_task_that_calls_itself(shop: Inprocess, bound: Maker, calls: list[Any]) -> None:
    """The inner calls are part of the one step, and their self.retry is the step's."""

    def body(self: Any, depth: int) -> int:
        calls.append((depth, self.request.id == durable.current.idempotency_key, list(self.request.args)))
        if depth == 0 and len(calls) == 3:
            raise self.retry(exc=ValueError("again"), countdown=0)
        return 1 + self(depth - 1) if depth else 0

    assert outcome(shop, bound(body), 2) == 2
    assert calls == [(2, True, [2]), (1, True, [1]), (0, True, [0])] * 2
    assert (only_step(shop).key, only_step(shop).tries) == ("bound", 2)


class Wrapper:
    """A method as tracers wrap it by wrapt: it has all that the method has, its own name and globals among it."""

    def __init__(self, method: Any, seen: Callable[[], Any]) -> None:
        self._method = method
        self._seen = seen

    def __get__(self, task: Any, kind: Any) -> Wrapper:
        return Wrapper(self._method.__get__(task, kind), self._seen)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._method, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._seen()
        return self._method(*args, **kwargs)


@pytest.mark.parametrize("place", ["the class", "the class, as wrapt does", "the task"])
def test_what_a_tracer_puts_around_a_body_is_called(
    shop: Inprocess, bound: Maker, calls: list[Any], monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """In Celery's own ``__call__``, as some do, or around the task's ``run``, as a test may at any time."""

    def around(body: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(body)
        def traced(*args: Any, **kwargs: Any) -> Any:
            calls.append(place)
            return body(*args, **kwargs)

        return traced

    def body() -> Any:
        if place == "the class":
            monkeypatch.setattr(Task, "__call__", around(Task.__call__))
            return step(1)
        if place == "the class, as wrapt does":
            monkeypatch.setattr(Task, "__call__", Wrapper(Task.__call__, lambda: calls.append(place)))
            return step(1)
        task = shop.app.tasks["bound"]
        first = step(1)
        monkeypatch.setattr(task, "run", around(task.run))
        return first + step(1)

    def arguments(self: Any, number: int) -> list[int]:
        return list(self.request.args)

    step = bound(arguments)
    order(shop, body)
    assert set(shop.run("w1")) == {1}
    assert place in calls


def test_the_workflows_own_request_is_intact(shop: Inprocess, bound: Maker) -> None:
    """After a step that returned, one that failed, and one that was tried again."""

    def body(self: Any, how: str) -> None:
        if how == "fails":
            raise ValueError(how)
        if how == "retries" and not self.request.retries:
            raise self.retry(countdown=0)

    step = bound(body)
    seen = []

    def workflow(self: Any, name: str) -> None:
        for how in ("returns", "fails", "retries"):
            with suppress(ValueError):
                step(how)
            seen.append((self.request.id, list(self.request.args), self.request.retries, self.request.is_eager))

    shop.workflow(workflow, name="order", bind=True).apply_async(("a",), task_id="w1")
    shop.run("w1")
    assert seen == [("w1", ["a"], 0, False)] * 3


def test_bound_tasks_in_a_gather(shop: Inprocess) -> None:
    """Each thread's task sees its own request."""
    seen: dict[int, Any] = {}

    def body(self: Any, number: int) -> int:
        if not self.request.retries:
            raise self.retry(exc=ValueError(number), countdown=0)
        seen[number] = (self.request.id == durable.current.idempotency_key, list(self.request.args))
        return number

    step = shop.step(body, name="bound", bind=True)
    task = durable.as_step(shop.app.task(body, name="task", bind=True, shared=False))
    order(shop, lambda: durable.gather(step.s(1), task.s(2), step.s(3), task.s(4)))
    assert shop.run("w1") == [1, 2, 3, 4]
    assert seen == {number: (True, [number]) for number in (1, 2, 3, 4)}


@pytest.mark.parametrize("how", ["retry", "ignore", "reject", "autoretry", "current"])
def test_async_bound_steps(shop: Inprocess, how: str) -> None:
    """Control flow in a coroutine means what it means in a function."""

    async def body(self: Any) -> str:
        assert self.request.id == durable.current.idempotency_key
        if self.request.retries:
            return how
        if how == "retry":
            raise self.retry(exc=Refused(code=1), countdown=0)
        if how == "ignore":
            raise Ignore
        if how == "reject":
            raise Reject("no")
        if how == "current":
            durable.current.step.retry(countdown=0)
        raise Refused(code=2)

    step = shop.step(body, name="bound", bind=True, autoretry_for=(Refused,), retry_backoff=0.01)

    async def workflow() -> Any:
        return await step()

    shop.workflow(workflow, name="order").apply_async(task_id="w1")
    shop.run("w1")
    found = status(shop)
    if how == "reject":
        assert isinstance(found.error, StepError)
    else:
        assert found.result == (None if how == "ignore" else how)


# Ignore, Reject, replace, throws


@pytest.mark.parametrize("options", [{}, {"autoretry_for": (Exception,), "default_retry_delay": 0}], ids=["", "auto"])
def test_ignore_is_no_value(shop: Inprocess, bound: Maker, calls: list[Any], options: Any) -> None:
    """The step is done, at once."""

    def body(self: Any) -> None:
        calls.append(1)
        raise Ignore("nothing to do")

    assert outcome(shop, bound(body, **options)) is None
    assert (len(calls), only_step(shop).state) == (1, "SUCCESS")


def test_reject_is_a_failure(shop: Inprocess, bound: Maker, calls: list[Any]) -> None:
    """With the reason, and no further try."""

    def body(self: Any) -> None:
        calls.append(1)
        raise Reject("malformed", requeue=False)

    error = outcome(shop, bound(body, max_retries=5))
    assert isinstance(error, StepError)
    assert "malformed" in str(error)
    assert len(calls) == 1


def test_reject_is_final_whatever_is_retried(shop: Inprocess, calls: list[Any]) -> None:
    """A body that rejects has decided, even if any error is worth another try."""

    def body(self: Any) -> None:
        calls.append(1)
        raise Reject("malformed")

    step = shop.step(body, name="bound", bind=True, autoretry_for=(Exception,), default_retry_delay=0)
    assert isinstance(outcome(shop, step), StepError)
    assert len(calls) == 1


def test_reject_under_celerys_own_autoretry(shop: Inprocess, calls: list[Any]) -> None:
    """Celery's wrapper takes it for an error like others; in the end it is a StepError."""

    def body() -> None:
        calls.append(1)
        raise Reject("malformed")

    task = shop.app.task(
        body, name="plain", shared=False, autoretry_for=(Exception,), default_retry_delay=0, max_retries=2
    )
    error = outcome(shop, durable.as_step(task))
    assert isinstance(error, StepError)
    assert "malformed" in str(error)
    assert len(calls) == 3


@pytest.mark.parametrize(("options", "runs"), [({}, 4), ({"max_retries": 1}, 2), ({"max_retries": 0}, 1)])
def test_a_requeue_is_bounded(shop: Inprocess, bound: Maker, calls: list[Any], options: Any, runs: int) -> None:
    """It is tried again as often as max_retries says; Celery itself would go on for ever."""

    def body(self: Any) -> None:
        calls.append(1)
        raise Reject("busy", requeue=True)

    error = outcome(shop, bound(body, **{"default_retry_delay": 0, **options}))
    assert isinstance(error, StepError)
    assert "busy" in str(error)
    assert len(calls) == only_step(shop).tries == runs


@pytest.mark.parametrize("options", [{}, {"autoretry_for": (Exception,)}], ids=["", "auto"])
def test_a_requeue_may_succeed(shop: Inprocess, bound: Maker, calls: list[Any], options: Any) -> None:
    """In a later try."""

    def body(self: Any) -> str:
        calls.append(1)
        if len(calls) < 3:
            raise Reject("busy", requeue=True)
        return "done"

    assert outcome(shop, bound(body, **{"default_retry_delay": 0, **options})) == "done"


def test_replace_is_refused(shop: Inprocess, bound: Maker, calls: list[Any]) -> None:
    """A step that replaces itself would run another task in its place, unseen: the error says what to do."""

    def body(self: Any) -> Any:
        raise self.replace(other.s())

    def instead() -> None:
        calls.append("other")

    other = shop.app.task(instead, name="other", shared=False)
    error = outcome(shop, bound(body))
    assert isinstance(error, NotAllowedInStep)
    assert "call the other task in the workflow" in str(error)
    assert calls == []


def test_replace_elsewhere_is_celerys(shop: Inprocess) -> None:
    """A task that is also a step replaces itself where Celery runs it."""

    def body(self: Any) -> Any:
        return self.replace(other.s())

    def instead() -> str:
        return "other"

    other = shop.app.task(instead, name="other", shared=False)
    task = shop.app.task(body, name="task", bind=True, shared=False)
    durable.as_step(task)
    step = shop.step(body, name="step", bind=True)
    assert (task.apply().get(), step.apply().get()) == ("other", "other")


@pytest.mark.parametrize(("throws", "level"), [((Refused,), logging.INFO), ((), logging.WARNING)])
def test_expected_errors_raise_no_alarm(
    shop: Inprocess, bound: Maker, caplog: pytest.LogCaptureFixture, throws: Any, level: int
) -> None:
    """What is in throws is logged at INFO, and without a traceback; it is tried again all the same."""

    def body(self: Any) -> None:
        raise Refused(code=402)

    with caplog.at_level(logging.DEBUG, "celery_durable"):
        step = bound(body, throws=throws, autoretry_for=(Refused,), max_retries=1, default_retry_delay=0)
        assert isinstance(outcome(shop, step), Refused)
    told = [record for record in caplog.records if "refused" in record.getMessage()]
    assert [(each.levelno, each.exc_info) for each in told if each.name == "celery_durable"] == [(level, None)]


def test_the_workflows_soft_limit_is_not_retried(shop: Inprocess, calls: list[Any]) -> None:
    """Celery's limit of the whole task may be raised in a body that retries any error: it isn't the step's."""

    def body() -> None:
        calls.append(1)
        raise SoftTimeLimitExceeded

    options: dict[str, Any] = {"name": "plain", "shared": False, "autoretry_for": (Exception,)}
    order(shop, durable.as_step(shop.app.task(body, default_retry_delay=0, **options)))
    assert isinstance(shop.run("w1"), SoftTimeLimitExceeded)
    assert len(calls) == 1


# durable.current.step.retry


def flaky(calls: list[Any], failures: int, **asked: Any) -> Any:
    """A function that asks for another try so often."""

    def body() -> int:
        calls.append(durable.current.step.attempt)
        if len(calls) <= failures:
            try:
                raise Refused(code=len(calls))
            except Refused as error:
                extra = {"exc": error} if asked.get("exc") else {}
                try:
                    raise durable.current.step.retry(**{**asked, **extra})
                except Exception:
                    raise AssertionError("an except Exception has swallowed it") from None
        return len(calls)

    return body


@pytest.mark.parametrize("asked", [{"countdown": 0}, {"countdown": timedelta(0)}, {"countdown": 0, "exc": True}, {}])
def test_a_function_asks_for_another_try(shop: Inprocess, calls: list[Any], asked: Any) -> None:
    """With or without an error, which is the one in hand then; no except Exception of the body swallows it."""
    step = durable.as_step(flaky(calls, 2, **asked), name="flaky", default_retry_delay=0)
    assert outcome(shop, step) == 3
    assert calls == [1, 2, 3]
    assert [error.message for error in only_step(shop).errors] == ["refused with 1", "refused with 2"]


@pytest.mark.filterwarnings("ignore:The step flaky has retry options:UserWarning")
@pytest.mark.parametrize("kind", ["function", "step"])
@pytest.mark.parametrize(("options", "runs"), [({}, 4), ({"max_retries": 1}, 2), ({"max_retries": 0}, 1)])
def test_a_function_has_asked_too_often(shop: Inprocess, calls: list[Any], kind: str, options: Any, runs: int) -> None:
    """max_retries counts, 3 without any option; then the error in hand is the step's."""

    def body() -> None:
        calls.append(1)
        try:
            raise Refused(code=503)
        except Refused:
            durable.current.step.retry(countdown=0)

    function = durable.as_step(body, name="flaky", **options)
    step = function if kind == "function" else shop.step(body, name="flaky", **options)
    assert isinstance(outcome(shop, step), Refused)
    assert len(calls) == only_step(shop).tries == runs


def test_a_function_that_gives_no_reason(shop: Inprocess) -> None:
    """The last word is MaxRetriesExceededError; what the workflow handles meanwhile isn't the step's error."""
    step = durable.as_step(lambda: durable.current.step.retry(countdown=0), name="flaky", max_retries=1)

    def workflow() -> Any:
        try:
            raise LookupError("the workflow's own")
        except LookupError:
            return step()

    order(shop, workflow)
    shop.run("w1")
    assert isinstance(status(shop).error, MaxRetriesExceededError)
    first, _ = only_step(shop).errors
    assert first.message == "The step asked for another try."


def test_an_error_that_is_false_is_an_error(shop: Inprocess, calls: list[Any]) -> None:
    """Nobody asks an exception for its length."""

    def body() -> None:
        durable.current.step.retry(Empty("nothing"), countdown=0)

    assert isinstance(outcome(shop, durable.as_step(body, name="flaky", max_retries=1)), Empty)
    assert [error.message for error in only_step(shop).errors] == ["nothing", "nothing"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.TaskGroup is new in Python 3.11")
@pytest.mark.parametrize("on_loop", [True, False], ids=["async", "sync"])
def test_a_task_of_a_group_asks_for_another_try(shop: Inprocess, calls: list[Any], on_loop: bool) -> None:
    """What it raises comes out of the group among others' errors, and is understood all the same."""

    async def inner() -> None:
        durable.current.step.retry(ValueError("busy"), countdown=0)

    async def body() -> str:
        calls.append(1)
        if len(calls) < 3:
            async with asyncio.TaskGroup() as group:
                group.create_task(inner())
        return "done"

    step = durable.as_step(body if on_loop else lambda: asyncio.run(body()), name="grouped")
    assert outcome(shop, step) == "done"
    assert [error.message for error in only_step(shop).errors] == ["busy", "busy"]


def test_a_long_countdown_gives_the_worker_back(shop: Inprocess, calls: list[Any]) -> None:
    """Retry-After may be long."""
    order(shop, durable.as_step(flaky(calls, 9, countdown=timedelta(minutes=2)), name="flaky", retry_backoff=1))
    assert isinstance(shop.run("w1"), Retry)
    assert 115 < due_in(shop) <= 120


@pytest.mark.parametrize("countdown", [-1, float("nan"), float("inf"), "soon", True, timedelta(-1)])
def test_a_countdown_that_cannot_be_one(shop: Inprocess, countdown: Any) -> None:
    """It is an error of the body that says so."""
    step = durable.as_step(lambda: durable.current.step.retry(countdown=countdown), name="flaky")
    error = outcome(shop, step)
    assert isinstance(error, ConfigurationError)
    assert "countdown must be" in str(error)


@pytest.mark.parametrize("exc", ["busy", 503, ValueError])
def test_a_reason_that_is_no_error(shop: Inprocess, exc: Any) -> None:
    """It takes an exception."""
    step = durable.as_step(lambda: durable.current.step.retry(exc, countdown=0), name="flaky")
    error = outcome(shop, step)
    assert isinstance(error, TypeError)
    assert "exception" in str(error)


def test_a_plain_task_asks_celery(shop: Inprocess, calls: list[Any]) -> None:
    """Where Celery runs the step as a task, the same line is Celery's own retry, with the same last error."""

    def body() -> None:
        calls.append(durable.current.step.attempt)
        try:
            raise LookupError("busy")
        except LookupError:
            durable.current.step.retry(countdown=timedelta(0))

    step = shop.step(body, name="plain")
    with pytest.raises(LookupError):
        step.apply().get()
    assert calls == [1, 2, 3, 4]


@pytest.mark.parametrize("asked", [{"countdown": -1}, {"countdown": "soon"}, {"exc": "busy"}])
def test_a_plain_task_asks_nonsense(shop: Inprocess, asked: Any) -> None:
    """It is the same error as in a workflow."""

    def body() -> None:
        durable.current.step.retry(**asked)

    step = shop.step(body, name="plain")
    with pytest.raises((ConfigurationError, TypeError)):
        step.apply().get()


def test_there_is_no_step_to_retry_elsewhere() -> None:
    """The error says where there is one."""
    with pytest.raises(NotInWorkflow, match="only there in a step"):
        durable.current.step.retry(countdown=1)


# What tries of earlier attempts count


@pytest.mark.parametrize("how", ["self.retry", "current.step.retry", "requeue", "retry_kwargs"])
def test_tries_that_a_body_has_asked_for_are_no_deaths(shop: Inprocess, sql: Sql, calls: list[Any], how: str) -> None:
    """More tries than the step's own max_retries, with suspensions between: the step isn't lost."""

    def body(self: Any) -> str:
        calls.append(self.request.retries)
        if len(calls) == 5:
            return "done"
        if how == "self.retry":
            raise self.retry(countdown=100, max_retries=9)
        if how == "current.step.retry":
            raise durable.current.step.retry(countdown=100)
        if how == "requeue":
            raise Reject("busy", requeue=True)
        raise ValueError("again")

    options: dict[str, Any] = {"name": "bound", "bind": True, "shared": False, "default_retry_delay": 100}
    if how in ("current.step.retry", "requeue"):
        options["max_retries"] = 4
    if how == "retry_kwargs":
        options |= {"autoretry_for": (ValueError,), "retry_kwargs": {"max_retries": 4}}
    order(shop, durable.as_step(shop.app.task(body, **options)))
    for _ in range(4):
        assert isinstance(shop.run("w1"), Retry)
        wake(shop, sql)
    assert shop.run("w1") == "done"
    assert calls == [0, 1, 2, 3, 4]


def test_a_killer_is_lost_even_after_tries_that_it_has_asked_for(shop: Inprocess, calls: list[Any]) -> None:
    """Its own budget is used up already: the second death in a row is its last."""

    def body(self: Any) -> None:
        calls.append(1)
        if len(calls) > 3:
            raise Killed
        raise self.retry(countdown=0, max_retries=9)

    step = shop.step(body, name="bound", bind=True, autoretry_for=(ValueError,), max_retries=1)
    order(shop, lambda: step())
    for runs in (4, 5):
        attempt = begin(shop)
        with running(attempt), pytest.raises(Killed):
            step()
        assert len(calls) == runs
        assert crash(shop, attempt) == "ENQUEUED"
    shop.run("w1")
    assert isinstance(status(shop).error, StepLost)
    assert len(calls) == 5


def test_the_errors_of_many_tries(shop: Inprocess, calls: list[Any]) -> None:
    """Of more than twenty failed tries the first and the last ones are told; all are counted."""

    def body() -> None:
        calls.append(1)
        raise ValueError(f"failure {len(calls)}")

    step = durable.as_step(body, name="fail", max_retries=29, default_retry_delay=0)
    assert isinstance(outcome(shop, step), ValueError)
    info = only_step(shop)
    assert info.tries == 30
    numbers = [int(error.message.split()[1]) for error in info.errors]
    assert numbers == [*range(1, 11), *range(20, 31)]
    times = [error.at for error in info.errors]
    assert all(times)
    assert times == sorted(times)  # type: ignore[type-var]
    assert all("ValueError" in error.type and "in body" in error.traceback for error in info.errors)
