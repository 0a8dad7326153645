"""Workflows steered from outside: resumed past their completed steps."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from typing import Any

import pytest

import celery_durable as durable
from celery_durable.exceptions import NotAllowedInStep, WorkflowConflict, WorkflowNotFound
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.inprocess import Inprocess

pytestmark = pytest.mark.oldest


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    shop = Inprocess(database_url, broker_url)
    yield shop
    shop.close()


@pytest.fixture
def order(shop: Inprocess) -> Any:
    """A workflow that charges, then ships; shipping fails until it is mended."""

    @shop.app.task(name="order", base=durable.Workflow, shared=False)
    def order() -> list[str]:
        return [charge(), ship()]

    charge = durable.as_step(lambda: order.calls.append("charge") or "charged", name="charge")
    ship = durable.as_step(lambda: order.calls.append("ship") or shipped(), name="ship")

    def shipped() -> str:
        if not order.mended:
            raise OSError("no ship")
        return "shipped"

    order.calls, order.mended = [], False
    return order


def fail(shop: Inprocess, order: Any) -> Any:
    handle = order.delay()
    shop.run(handle.id)
    assert durable.get_workflow_status(handle.id, app=shop.app).state == "FAILURE"
    return handle


def test_a_failed_workflow_goes_on_past_its_completed_steps(shop: Inprocess, order: Any) -> None:
    """The step that had failed runs anew, the others don't."""
    handle = fail(shop, order)
    order.mended = True
    assert durable.resume_workflow(handle.id, app=shop.app).id == handle.id
    assert shop.run(handle.id) == ["charged", "shipped"]
    assert order.calls == ["charge", "ship", "ship"]
    status = durable.get_workflow_status(handle.id, app=shop.app)
    assert (status.state, status.attempt, status.error) == ("SUCCESS", 2, None)


def test_a_resumed_workflow_waits_for_its_message(shop: Inprocess, order: Any) -> None:
    """It is as new: no outcome, no error, no crash, no deadline."""
    handle = fail(shop, order)
    durable.resume_workflow(handle.id, app=shop.app)
    status = durable.get_workflow_status(handle.id, app=shop.app)
    assert (status.state, status.error, status.crashes, status.deadline) == ("ENQUEUED", None, 0, None)
    assert status.finished_at is status.dispatched is None


def test_no_deadline_holds_after_a_resume(shop: Inprocess, order: Any, sql: Sql) -> None:
    """A workflow whose time was up gets all the time that it needs."""
    handle = order.apply_async(workflow_timeout=3600)
    sql.execute("UPDATE celery_durable.workflow SET deadline = clock_timestamp() - interval '1 s'")
    verdict = shop.installation.codec.encode_error(TimeoutError())
    assert shop.installation.store.workflows.expire(verdict=verdict, limit=9, patience=0) == [handle.id]
    order.mended = True
    durable.resume_workflow(handle.id, app=shop.app)
    assert shop.run(handle.id) == ["charged", "shipped"]
    assert durable.get_workflow_status(handle.id, app=shop.app).deadline is None


def test_an_owner_that_still_delivers_the_old_end_is_waited_for(shop: Inprocess, order: Any, sql: Sql) -> None:
    """Nobody can claim the workflow before its last owner has let it go, or is gone."""
    handle = fail(shop, order)
    owner = shop.node
    update = "UPDATE celery_durable.workflow SET node = %s, dispatched = false, claimed_at = clock_timestamp()"
    sql.execute(update, owner)
    durable.resume_workflow(handle.id, app=shop.app)
    workflows = shop.installation.store.workflows

    def claim() -> Any:
        return workflows.claim(handle.id, "order", uuid.uuid4(), owner, retries=0, patience=0)

    assert claim() is None
    workflows.confirm(owner, [handle.id], patience=0)
    assert claim() is not None


@pytest.mark.parametrize("state", ["ENQUEUED", "SUCCESS"])
def test_what_lives_or_has_succeeded_cannot_be_resumed(shop: Inprocess, order: Any, state: str) -> None:
    """The error says how it stands."""
    order.mended = True
    handle = order.delay()
    if state == "SUCCESS":
        shop.run(handle.id)
    with pytest.raises(WorkflowConflict, match=state):
        durable.resume_workflow(handle.id, app=shop.app)


def test_an_unknown_workflow_cannot_be_resumed(shop: Inprocess) -> None:
    """Its id is named."""
    with pytest.raises(WorkflowNotFound, match="nothing-like-it"):
        durable.resume_workflow("nothing-like-it", app=shop.app)


def test_a_step_cannot_resume_a_workflow(shop: Inprocess, order: Any) -> None:
    """What a step did would be done again by its next try."""
    failed = fail(shop, order)

    @shop.app.task(name="meddler", base=durable.Workflow, shared=False)
    def meddler() -> None:
        durable.as_step(durable.resume_workflow, name="resume")(failed.id)

    handle = meddler.delay()
    shop.run(handle.id)
    assert isinstance(durable.get_workflow_status(handle.id, app=shop.app).error, NotAllowedInStep)
