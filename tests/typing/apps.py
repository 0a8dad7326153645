"""An existing app that adopts the library, and reads what it did. Checked by mypy and pyright, never run."""

# pyright: basic
# Celery itself is untyped, so that strict mode has much to say of ``@app.task``, and nothing of ours.

from __future__ import annotations

from typing import Generic, ParamSpec, TypeVar

from celery import Celery, shared_task
from typing_extensions import assert_type

import celery_durable as durable

P = ParamSpec("P")
R = TypeVar("R")

app = Celery("shop")
assert_type(durable.install(app, database_url="postgresql://localhost/shop", lease=30), None)


class Audited(durable.Workflow[P, R], Generic[P, R]):
    """A base of the app's own."""

    abstract = True


@app.task(base=durable.Workflow)
def checkout(order_id: str) -> str:
    """Celery's own decorators accept the bases."""
    return str(charge(order_id))


@app.task(base=durable.Step, autoretry_for=(ConnectionError,), max_retries=10)
def charge(order_id: str) -> str:
    """With options."""
    return order_id


@shared_task(base=durable.Workflow, name="refund")
def refund(order_id: str) -> str:
    """In a reusable app."""
    return order_id


@app.task(base=Audited)
def audit(order_id: str) -> str:
    """On the app's own base."""
    return order_id


def read() -> None:
    """What is read from Postgres is typed."""
    status = durable.get_workflow_status("order-1")
    assert_type(status, durable.WorkflowStatus)
    assert_type(status.state, str)
    assert_type(status.error, "Exception | None")
    assert_type(durable.list_workflows(state=["DEAD", "FAILURE"], limit=10), list[durable.WorkflowStatus])
    assert_type(durable.list_workflow_steps("order-1"), list[durable.StepInfo])
    durable.list_workflows(states=["DEAD"])  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    handle: durable.WorkflowHandle[str] = durable.WorkflowHandle("order-1")
    assert_type(handle.get(), str)
    try:
        handle.get(timeout=1)
    except durable.exceptions.WorkflowDead as error:
        assert_type(error, durable.exceptions.WorkflowDead)
