"""Attempts of one workflow, w1, that a test begins and ends as it likes."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import celery_durable as durable
from celery_durable.engine.context import Attempt, boot_time
from celery_durable.exceptions import WorkflowDead
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.tables import TRUNCATE

DUE = "UPDATE celery_durable.checkpoint SET wake_at = clock_timestamp()"
LATE = "UPDATE celery_durable.workflow SET deadline = clock_timestamp() - interval '1 s'"


_REFUSALS = {
    "constraint": ("ADD CONSTRAINT no_bad CHECK (key <> 'bad')", "DROP CONSTRAINT no_bad"),
    "trigger": ("ENABLE TRIGGER refuse", "DISABLE TRIGGER refuse"),
}
_TRIGGER = """
    CREATE OR REPLACE FUNCTION refuse() RETURNS trigger AS 'BEGIN RAISE EXCEPTION ''refused''; END' LANGUAGE plpgsql;
    CREATE OR REPLACE TRIGGER refuse BEFORE INSERT ON celery_durable.checkpoint
    FOR EACH ROW WHEN (NEW.key = 'bad') EXECUTE FUNCTION refuse();
    ALTER TABLE celery_durable.checkpoint DISABLE TRIGGER refuse
"""


class Killed(SystemExit):
    """Stands for SIGKILL: nothing after it is run. Raised as Celery's pool ends a process."""

    def __init__(self) -> None:
        super().__init__(9 - 256)


def order(shop: Inprocess, function: Any, *args: Any, **options: Any) -> Any:
    """Declare a workflow of this function, and start it."""

    def body(*args: Any) -> Any:
        return function(*args)

    task = shop.workflow(body, name="order", **options)
    task.apply_async(args, task_id="w1")
    return task


def begin(shop: Inprocess) -> Attempt:
    """Claim as a worker does, and stop there: the attempt is the test's."""
    workflows = shop.installation.store.workflows
    claim = workflows.claim("w1", "order", uuid.uuid4(), shop.node, retries=0, patience=0)
    assert claim is not None
    return Attempt.of(shop.installation.engine, "order", claim, boot_time())


def release(shop: Inprocess, attempt: Attempt) -> None:
    """Hand an attempt over."""
    assert shop.installation.store.workflows.release(attempt.fence, 60, patience=0)


def crash(shop: Inprocess, attempt: Attempt) -> str:
    """Let an attempt have died; the state that its workflow is in then."""
    verdict = shop.installation.codec.encode_error(WorkflowDead("too many"))

    def rescue() -> Any:
        return shop.installation.store.workflows.rescue(
            attempt.fence.node, [attempt.id], lease=15, verdict=verdict, error="no", limit=9, patience=0
        )

    # One whose row a checkpoint has locked that is on its way is left to the next sweep.
    ((_, state),) = wait_until(rescue, message="the workflow is rescued")
    return str(state)


def status(shop: Inprocess) -> durable.WorkflowStatus:
    """How the workflow stands."""
    return durable.get_workflow_status("w1", app=shop.app)


def steps(shop: Inprocess) -> dict[str, durable.StepInfo]:
    """Its steps by their keys."""
    return {step.key: step for step in durable.list_workflow_steps("w1", app=shop.app)}


def clear(sql: Sql) -> None:
    """Remove all workflows and nodes."""
    sql.execute(TRUNCATE)


@contextmanager
def refusing(sql: Sql, by: Literal["constraint", "trigger"]) -> Iterator[None]:
    """Let Postgres refuse the outcome of a step named `bad`: by an error of the data, or by any other."""
    sql.execute(_TRIGGER)
    begin, end = _REFUSALS[by]
    sql.execute(f"ALTER TABLE celery_durable.checkpoint {begin}")
    try:
        yield
    finally:
        sql.execute(f"ALTER TABLE celery_durable.checkpoint {end}")
