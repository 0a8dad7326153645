"""Steps of all kinds in a running workflow."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Iterator
from typing import Any

import pytest
from asgiref.sync import async_to_sync, sync_to_async
from celery import Celery
from celery.app.trace import _install_stack_protection

import celery_durable as durable
from tests.fixtures.inprocess import Inprocess

pytestmark = pytest.mark.oldest


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    _install_stack_protection()  # as in a worker
    shop = Inprocess(database_url, broker_url, suspend_after=2)
    yield shop
    shop.close()


def run(shop: Inprocess, body: Any) -> durable.WorkflowStatus:
    """Run this as a workflow; how it stands then."""

    def order() -> Any:
        return body()

    async def aorder() -> Any:
        return await body()

    task = shop.workflow(aorder if getattr(body, "is_async", False) else order, name="order")
    task.apply_async(task_id="w1")
    shop.run("w1")
    return durable.get_workflow_status("w1", app=shop.app)


def in_async_workflow(body: Any) -> Any:
    body.is_async = True
    return body


def tries(shop: Inprocess) -> list[tuple[str, int | None]]:
    return [(step.key, step.tries) for step in durable.list_workflow_steps("w1", app=shop.app)]


class Client:
    def fetch(self, url: str) -> str:
        return url.upper()

    async def afetch(self, url: str) -> str:
        return url.upper()

    def __call__(self, url: str) -> str:
        return url.upper()


class AsyncClient:
    async def __call__(self, url: str) -> str:
        return url.upper()


async def afetch(url: str) -> str:
    return url.upper()


def characters(url: str) -> Iterator[str]:
    yield from url.upper()


@functools.wraps(afetch)
def run_to_its_end(url: str) -> str:
    return asyncio.run(afetch(url))


@functools.wraps(afetch)
def passed_on(url: str) -> Any:
    return afetch(url)


@functools.wraps(str.upper)
async def off_the_loop(url: str) -> str:
    return await asyncio.to_thread(str.upper, url)


@functools.wraps(characters)
def joined(url: str) -> str:
    return "".join(characters(url))


#: Decorated, so that what is called isn't of the kind of what it wraps.
DECORATED = {
    "async run to its end": run_to_its_end,
    "async passed on": passed_on,
    "sync made async": off_the_loop,
    "sync made async by asgiref": sync_to_async(str.upper),
    "async made sync by asgiref": async_to_sync(afetch),
    "generator made a value": joined,
}


@pytest.mark.parametrize(
    "target",
    [
        Client().fetch, Client(), functools.partial(Client().fetch), str.upper, lambda url: url.upper(),
        functools.lru_cache(str.upper), Client().afetch, AsyncClient(), functools.partial(Client().afetch),
        *DECORATED.values(),
    ],
    ids=[
        "method", "object", "partial", "builtin", "lambda", "cached", "async method", "async object", "async partial",
        *DECORATED,
    ],
)  # fmt: skip
def test_any_callable_runs_as_a_step(shop: Inprocess, target: Any) -> None:
    """It is kept under its name; an async one runs in a workflow that isn't, too."""
    step = durable.as_step(target, name="fetch")
    assert run(shop, lambda: step("url")).result == "URL"
    assert tries(shop) == [("fetch", 1)]


@pytest.mark.parametrize(
    "target", [Client().fetch, Client().afetch, *DECORATED.values()], ids=["sync", "async", *DECORATED]
)
def test_any_callable_is_awaited_in_an_async_workflow(shop: Inprocess, target: Any) -> None:
    """By acall, whatever it is."""
    step = durable.as_step(target, name="fetch")
    assert run(shop, in_async_workflow(lambda: step.acall("url"))).result == "URL"
    assert tries(shop) == [("fetch", 1)]


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_a_decorated_coroutine_function_is_within_its_limit(shop: Inprocess, is_async: bool) -> None:
    """In a workflow of either kind, what it has returned is interrupted where it waits."""

    async def waits() -> None:
        await asyncio.get_running_loop().create_future()

    @functools.wraps(waits)
    def passed_on() -> Any:
        return waits()

    step = durable.as_step(passed_on, name="waits", soft_time_limit=0.2)

    def body() -> Any:
        return step()

    error = run(shop, in_async_workflow(body) if is_async else body).error
    assert isinstance(error, durable.exceptions.StepTimeout)


def test_a_table_of_lambdas_is_kept_by_name_and_number(shop: Inprocess) -> None:
    """As an agent calls its tools."""

    def body() -> list[int]:
        return [durable.as_step(lambda number=number: number, name="tool")() for number in range(3)]

    assert run(shop, body).result == [0, 1, 2]
    assert [key for key, _ in tries(shop)] == ["tool", "tool#2", "tool#3"]


def test_a_task_that_was_not_made_when_it_was_wrapped(shop: Inprocess) -> None:
    """At the top of a module; the workflow makes it."""
    seen: list[tuple[str, int]] = []
    app = Celery("library", set_as_current=False)

    def old(self: Any, url: str) -> str:
        seen.append((self.request.parent_id, self.request.retries))
        if len(seen) == 1:
            raise OSError("once")
        return url.upper()

    task: Any = app.task(name="old", bind=True, shared=False, autoretry_for=(OSError,), default_retry_delay=0)(old)
    step = durable.as_step(task)
    assert not task.__evaluated__()
    assert run(shop, lambda: step("url")).result == "URL"
    assert seen == [("w1", 0), ("w1", 1)]
    app.close()


def test_a_step_wrapped_under_another_name_is_kept_under_that(shop: Inprocess) -> None:
    """And has its own policy still."""
    calls: list[int] = []

    def charge() -> int:
        calls.append(1)
        if len(calls) < 3:
            raise OSError("again")
        return len(calls)

    step = shop.step(charge, name="charge", autoretry_for=(OSError,), retry_backoff=0.01)
    assert run(shop, lambda: durable.as_step(step, name="again")()).result == 3
    assert tries(shop) == [("again", 3)]


def test_a_predicate_that_raises_is_the_steps_error(shop: Inprocess) -> None:
    """With the error that it was asked about in its context, and no further try."""

    def fetch() -> None:
        raise ConnectionError("reset")

    def is_worth_it(error: BaseException) -> bool:
        return bool(error.code)  # type: ignore[attr-defined]

    seen: list[BaseException] = []

    def body() -> None:
        try:
            durable.as_step(fetch, name="fetch", retry_if=is_worth_it, max_retries=5)()
        except AttributeError as error:
            seen.append(error)
            raise

    status = run(shop, body)
    assert isinstance(status.error, AttributeError)
    assert "has no attribute 'code'" in str(status.error)
    assert tries(shop) == [("fetch", 1)]
    (error,) = seen
    assert isinstance(error.__cause__, AttributeError)
    assert isinstance(error.__cause__.__context__, ConnectionError)
