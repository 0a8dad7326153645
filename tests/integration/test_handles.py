"""Handles that read Postgres, because their app has no result backend."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import TimeoutError as CeleryTimeoutError

import celery_durable as durable
from celery_durable.exceptions import DurableError, WorkflowCancelledError
from celery_durable.installation import installed_on
from tests.crash.statements import text_of
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.proxy import PostgresProxy


@pytest.fixture
def workflow(database_url: str) -> Iterator[Any]:
    """A workflow task of an app without a result backend and without a worker."""
    app = Celery("handles", broker="memory://", set_as_current=False)
    durable.install(app, database_url=database_url)

    @app.task(base=durable.Workflow, shared=False)
    def wait_for_a_worker() -> None: ...

    yield wait_for_a_worker
    installed_on(app).store.close()


def cancel(handle: durable.WorkflowHandle[Any]) -> None:
    """End a workflow as one that wasn't started before its ``expires``."""
    installation = installed_on(handle.app)
    verdict = installation.codec.encode_error(WorkflowCancelledError("too late"))
    installation.store.workflows.expired([handle.id], verdict=verdict, patience=3)


def test_get_raises(workflow: Any) -> None:
    """``get()`` raises the error with which the workflow has ended."""
    handle = workflow.delay()
    cancel(handle)
    with pytest.raises(WorkflowCancelledError, match="too late"):
        handle.get(timeout=10)


def test_get_returns_the_error(workflow: Any) -> None:
    """``get(propagate=False)`` returns the error, as Celery's does."""
    handle = workflow.delay()
    cancel(handle)
    assert isinstance(handle.get(timeout=10, propagate=False), WorkflowCancelledError)


def test_get_gives_up(workflow: Any) -> None:
    """``get(timeout=…)`` raises Celery's TimeoutError while the workflow goes on."""
    handle = workflow.delay()
    with pytest.raises(CeleryTimeoutError, match=handle.id):
        handle.get(timeout=0.1)
    assert handle.state == "PENDING"


def test_aget_waits_off_the_loop(workflow: Any) -> None:
    """It raises and gives up as ``get`` does, and other coroutines go on meanwhile."""
    handle, ticks = workflow.delay(), []

    async def wait() -> None:
        with pytest.raises(CeleryTimeoutError):
            await handle.aget(timeout=0.1)
        cancel(handle)
        with pytest.raises(WorkflowCancelledError):
            await handle.aget(timeout=10)

    async def tick() -> None:
        ticks.append(len(ticks))

    async def both() -> None:
        waiting = asyncio.ensure_future(wait())
        await tick()
        assert not waiting.done()
        await waiting

    asyncio.run(both())
    assert ticks == [0]


def wait_for_answers() -> Any:
    return durable.recv("answers")


@pytest.mark.parametrize("backend", [None, "cache+memory://"])
def test_why_a_workflow_waits(database_url: str, backend: str | None) -> None:
    """RETRY with the reason, the same with a result backend and without one."""
    with closing(Inprocess(database_url, "memory://")) as shop:
        shop.app.conf.result_backend = backend
        handle = shop.workflow(wait_for_answers, name="waits").delay()
        shop.run(handle.id, ignore_result=False)
        assert (handle.state, type(handle.info), str(handle.info)) == ("RETRY", DurableError, "message answers")
        assert durable.get_workflow_status(handle.id, app=shop.app).waiting_for == str(handle.info)
        durable.send(handle.id, 42, "answers", app=shop.app)
        shop.run(handle.id, ignore_result=False)
        assert (handle.state, handle.info) == ("SUCCESS", 42)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_wait_is_shown_before_it_can_end(proxy: PostgresProxy, when: Any) -> None:
    """RETRY is stored before the suspension, and not again after it: what goes on at once has shown its end by then."""
    with closing(Inprocess(proxy.url, "memory://")) as shop:
        shop.app.conf.result_backend = "cache+memory://"
        handle = shop.workflow(wait_for_answers, name="waits").delay()
        held = proxy.hold(text_of("workflows.suspend"), when)
        runner = threading.Thread(target=shop.run, args=(handle.id,), kwargs={"ignore_result": False}, daemon=True)
        runner.start()
        held.wait_reached()
        assert handle.state == "RETRY"
        assert handle.info.args == ("message answers",)
        if when == "before":
            held.release()
            runner.join(20)
        durable.send(handle.id, 42, "answers", app=shop.app)
        shop.run(handle.id, ignore_result=False)
        held.release()
        runner.join(20)
        assert (handle.state, handle.info) == ("SUCCESS", 42)
