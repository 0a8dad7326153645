"""Steps and workflows called as the plain functions that they are: in a test, in eager mode, outside of everything."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import MaxRetriesExceededError

import celery_durable as durable
from celery_durable.exceptions import NotInWorkflow

pytestmark = pytest.mark.oldest


@pytest.fixture
def app() -> Iterator[Celery]:
    app = Celery("shop", broker="memory://", set_as_current=False)
    app.conf.task_always_eager = True
    durable.install(app, database_url="postgresql://nobody@localhost:1/nothing")
    yield app
    app.close()


def looks() -> tuple[int, Any, Any]:
    step = durable.current.step
    return step.attempt, step.deadline, step.remaining()


def test_a_plain_call_is_a_first_and_only_try(app: Celery) -> None:
    """Whatever a body reads of its step is there without a workflow."""

    @app.task(base=durable.Step, soft_time_limit=5)
    def look() -> Any:
        return looks()

    assert look() == (1, None, None)
    assert durable.as_step(looks)() == (1, None, None)
    with pytest.raises(NotInWorkflow):
        durable.current.step  # noqa: B018 - reading it is what raises


def test_an_async_step_sees_itself_too(app: Celery) -> None:
    """Until it has ended, not only until its coroutine is made."""

    @app.task(base=durable.Step)
    async def look() -> Any:
        await asyncio.sleep(0)
        return looks()

    assert asyncio.run(look()) == (1, None, None)


@pytest.mark.parametrize("given", [True, False])
def test_a_plain_call_has_no_other_try(given: bool) -> None:
    """The error is raised that the body gives, or handles."""

    def post() -> None:
        try:
            raise ConnectionError("busy")
        except ConnectionError as error:
            durable.current.step.retry(error if given else None, countdown=30)

    with pytest.raises(ConnectionError, match="busy"):
        durable.as_step(post)()
    with pytest.raises(MaxRetriesExceededError):
        durable.as_step(lambda: durable.current.step.retry(), name="ask")()


def test_an_eager_workflow_is_a_plain_function(app: Celery) -> None:
    """No database, sync or async, with all that it calls."""

    @app.task(base=durable.Step)
    def double(number: int) -> int:
        return 2 * number

    @app.task(base=durable.Step)
    async def fetch(number: int) -> int:
        await asyncio.sleep(0)
        return number

    @app.task(base=durable.Workflow)
    def order() -> Any:
        return [double(1), *durable.gather(double.s(2), double.s(3)), bool(durable.current), durable.current.cancelled]

    @app.task(base=durable.Workflow)
    async def aorder() -> Any:
        return [await fetch(1), await double.acall(1), *await durable.agather(double.s(2), fetch.s(3))]

    assert order.delay().get() == order.apply().get() == [2, 4, 6, False, False]
    assert aorder.delay().get() == aorder.apply().get() == [1, 2, 4, 3]


def test_an_app_runs_its_own_functions() -> None:
    """Two apps of one process declare tasks of equal names, as in tests; neither gets the other's."""
    apps = []
    for number in (1, 2):
        app = Celery("shop", set_as_current=False)
        durable.install(app, database_url="postgresql://nobody@localhost:1/nothing")

        @app.task(base=durable.Step, name="charge")
        def charge(number: int = number) -> int:
            return number

        @app.task(base=durable.Workflow, name="order")
        def order(charge: Any = charge) -> Any:
            return charge()

        app.finalize()
        apps.append((app, order))
    assert [order() for _, order in apps] == [1, 2]
    assert [app.tasks["order"]() for app, _ in apps] == [1, 2]
