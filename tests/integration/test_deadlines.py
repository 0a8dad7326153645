"""`workflow_timeout`: how long a workflow may take from its first start, whatever happens to it meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any

import pytest
from celery.exceptions import Ignore, Retry

import celery_durable as durable
from celery_durable.exceptions import ConfigurationError, WorkflowCancelledError
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.inprocess import Inprocess
from tests.integration.attempts import DUE, LATE, begin, crash, order, status, steps

WAKE = "UPDATE celery_durable.workflow SET wake_at = clock_timestamp() WHERE state = 'SUSPENDED'"
LATE_ONE = f"{LATE} WHERE id = %s"


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """One database for all of these tests, which is cheaper."""
    return emptied_database_url


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    shop = Inprocess(database_url, broker_url)
    yield shop
    shop.close()


def nap() -> str:
    """A workflow that sleeps for long."""
    durable.sleep(1000)
    return "rested"


def nothing() -> None:
    """A workflow, or a step, that does nothing."""


def told(shop: Inprocess, workflow_id: str) -> durable.WorkflowStatus:
    return durable.get_workflow_status(workflow_id, app=shop.app)


def expire(shop: Inprocess) -> int:
    """Let the recovery end what is late."""
    return shop.installation.recovery(lambda messages: [], patience=0).expire()


def started_and_deadline(shop: Inprocess, workflow_id: str = "w1") -> tuple[datetime, datetime]:
    row = told(shop, workflow_id)
    assert row.started_at is not None
    assert row.deadline is not None
    return row.started_at, row.deadline


def child_of(shop: Inprocess, parent_id: str) -> durable.WorkflowStatus:
    (child,) = durable.list_workflows(parent_id=parent_id, app=shop.app)
    return child


def test_a_task_says_how_long_its_workflows_may_take(shop: Inprocess) -> None:
    """The time counts from the first start, not from the call."""
    order(shop, nap, workflow_timeout=3600)
    assert status(shop).deadline is None
    shop.run("w1")
    started, deadline = started_and_deadline(shop)
    assert timedelta(seconds=3599) < deadline - started < timedelta(seconds=3601)


def test_a_call_says_otherwise(shop: Inprocess) -> None:
    """A timedelta will do, and it counts instead of the task's."""
    task = shop.workflow(nap, name="nap", workflow_timeout=3600)
    task.apply_async(task_id="w2", workflow_timeout=timedelta(minutes=1))
    shop.run("w2")
    started, deadline = started_and_deadline(shop, "w2")
    assert timedelta(seconds=59) < deadline - started < timedelta(seconds=61)


def test_a_call_lifts_the_limit_of_the_task(shop: Inprocess) -> None:
    """None is no limit."""
    task = shop.workflow(nap, name="nap", workflow_timeout=3600)
    task.apply_async(task_id="w2", workflow_timeout=None)
    shop.run("w2")
    assert told(shop, "w2").deadline is None


@pytest.mark.parametrize("value", [0, -1, float("nan"), "1 day"])
def test_a_call_with_a_wrong_limit_starts_nothing(shop: Inprocess, sql: Sql, value: Any) -> None:
    """The error names the option."""
    task = shop.workflow(nap, name="nap")
    with pytest.raises(ConfigurationError, match="workflow_timeout"):
        task.apply_async(workflow_timeout=value)
    assert sql.value("SELECT count(*) FROM celery_durable.workflow") == 0


def test_a_crash_gives_no_more_time(shop: Inprocess) -> None:
    """The next attempt has the deadline of the first one."""
    order(shop, nap, workflow_timeout=3600)
    attempt = begin(shop)
    before = status(shop).deadline
    assert crash(shop, attempt) == "ENQUEUED"
    shop.run("w1")
    assert before is not None
    assert (status(shop).attempt, status(shop).deadline) == (2, before)


def test_a_suspension_gives_no_more_time(shop: Inprocess, sql: Sql) -> None:
    """What waits, and goes on, has the deadline of its first start."""
    order(shop, nap, workflow_timeout=3600)
    shop.run("w1")
    before = status(shop).deadline
    sql.execute(DUE)
    sql.execute(WAKE)
    assert shop.installation.store.workflows.wake(limit=9, patience=0) == ["w1"]
    assert shop.run("w1") == "rested"
    assert before is not None
    assert status(shop).deadline == before


def test_a_retry_of_celery_gives_no_more_time(shop: Inprocess) -> None:
    """`self.retry` starts the function again, not the clock."""

    def again(self: Any) -> None:
        raise self.retry(countdown=1000)

    shop.workflow(again, name="order", bind=True, workflow_timeout=3600).apply_async(task_id="w1")
    assert isinstance(shop.run("w1"), Retry)
    started, deadline = started_and_deadline(shop)
    assert deadline - started < timedelta(seconds=3601)


@pytest.mark.parametrize("state", ["ENQUEUED", "RUNNING", "SUSPENDED"])
def test_a_late_workflow_is_cancelled_whatever_its_state(shop: Inprocess, sql: Sql, state: str) -> None:
    """At the next look of the recovery; its caller is told why."""
    task = order(shop, nap, workflow_timeout=3600)
    if state == "SUSPENDED":
        shop.run("w1")
    elif state == "ENQUEUED":
        crash(shop, begin(shop))
    else:
        begin(shop)
    assert status(shop).state == state
    sql.execute(LATE)
    assert expire(shop) == 1
    assert status(shop).state == "CANCELLED"
    with pytest.raises(WorkflowCancelledError, match="workflow_timeout"):
        task.AsyncResult("w1").get(timeout=10)


def test_a_timer_is_set_for_a_deadline(shop: Inprocess) -> None:
    """Nobody has to look before: the nodes know when the next one is due."""
    order(shop, nap, workflow_timeout=60)
    begin(shop)
    due = shop.installation.recovery(lambda messages: [], patience=0).next_due()
    assert due is not None
    assert 50 < due <= 60


def test_what_has_ended_in_time_stays_as_it_is(shop: Inprocess, sql: Sql) -> None:
    """A deadline is of no interest after the end."""
    order(shop, lambda: "done", workflow_timeout=3600)
    shop.run("w1")
    sql.execute(LATE)
    assert expire(shop) == 0
    assert (status(shop).state, status(shop).result) == ("SUCCESS", "done")


def test_a_running_step_may_still_be_recorded(shop: Inprocess, sql: Sql) -> None:
    """Its deadline passes and the workflow is cancelled while it works; no next step starts."""
    calls = []

    def work() -> str:
        sql.execute(LATE)
        assert expire(shop) == 1
        return "done"

    def body() -> None:
        durable.as_step(work, name="work")()
        durable.as_step(lambda: calls.append("next"), name="next")()

    order(shop, body, workflow_timeout=3600)
    assert isinstance(shop.run("w1"), Ignore)
    assert status(shop).state == "CANCELLED"
    assert {key: step.output for key, step in steps(shop).items()} == {"work": "done"}
    assert calls == []


@pytest.mark.parametrize("what", ["sleep", "child", "event", "send"])
def test_no_durable_call_is_made_after_the_deadline(shop: Inprocess, sql: Sql, what: str) -> None:
    """It leaves no checkpoint, no child, no event and no message."""
    child = shop.workflow(nothing, name="child")
    child.apply_async(task_id="other")
    made = {
        "sleep": lambda: durable.sleep(1),
        "child": child.delay,
        "event": lambda: durable.set_event("key", 1),
        "send": lambda: durable.send("other", 1, app=shop.app),
    }

    def body() -> None:
        durable.as_step(lambda: sql.execute(LATE_ONE, "w1"), name="late")()
        made[what]()

    order(shop, body, workflow_timeout=3600)
    assert isinstance(shop.run("w1"), Ignore)
    assert (status(shop).state, list(steps(shop))) == ("CANCELLED", ["late"])
    for table in ("message", "event"):
        assert sql.value(f"SELECT count(*) FROM celery_durable.{table}") == 0
    assert durable.list_workflows(parent_id="w1", app=shop.app) == []


def test_a_result_after_the_deadline_is_none(shop: Inprocess, sql: Sql) -> None:
    """The function has returned too late, and no recovery has looked yet: it is cancelled nevertheless."""

    def body() -> str:
        sql.execute(LATE)
        return "too late"

    task = order(shop, body, workflow_timeout=3600)
    assert isinstance(shop.run("w1"), Ignore)
    assert (status(shop).state, status(shop).result) == ("CANCELLED", None)
    with pytest.raises(WorkflowCancelledError):
        task.AsyncResult("w1").get(timeout=10)


def test_nobody_claims_a_late_workflow(shop: Inprocess, sql: Sql) -> None:
    """Its message comes after the deadline, and before the recovery: the function isn't called."""
    calls = []
    order(shop, lambda: calls.append(1), workflow_timeout=3600)
    crash(shop, begin(shop))
    sql.execute(LATE)
    assert isinstance(shop.run("w1"), Ignore)
    assert calls == []


def test_a_child_ends_with_its_parent_at_the_latest(shop: Inprocess) -> None:
    """It has the parent's deadline, though it has no limit of its own, from its birth on."""
    child = shop.workflow(nap, name="child")
    order(shop, lambda: child.delay().get(), workflow_timeout=3600)
    shop.run("w1")
    deadline = status(shop).deadline
    assert deadline is not None
    assert child_of(shop, "w1").deadline == deadline
    shop.run(child_of(shop, "w1").id)
    assert child_of(shop, "w1").deadline == deadline


@pytest.mark.parametrize(("own", "counts"), [(60, "own"), (7200, "parent")])
def test_of_two_deadlines_the_earlier_one_counts(shop: Inprocess, own: int, counts: str) -> None:
    """A child with a limit of its own still doesn't outlive its parent's."""
    child = shop.workflow(nap, name="child", workflow_timeout=own)
    order(shop, lambda: child.delay().get(), workflow_timeout=3600)
    shop.run("w1")
    child_id = child_of(shop, "w1").id
    shop.run(child_id)
    started, deadline = started_and_deadline(shop, child_id)
    if counts == "parent":
        assert deadline == status(shop).deadline
    else:
        assert timedelta(seconds=59) < deadline - started < timedelta(seconds=61)


def test_a_grandchild_has_the_deadline_too(shop: Inprocess) -> None:
    """It goes down the whole family."""
    grandchild = shop.workflow(nap, name="grandchild")

    def between() -> Any:
        return grandchild.delay().get()

    child = shop.workflow(between, name="child")
    order(shop, lambda: child.delay().get(), workflow_timeout=3600)
    shop.run("w1")
    child_id = child_of(shop, "w1").id
    shop.run(child_id)
    deadline = status(shop).deadline
    assert deadline is not None
    assert child_of(shop, child_id).deadline == deadline


def test_a_step_that_was_sent_away_has_the_deadline_too(shop: Inprocess) -> None:
    """`some_step.delay()` is a child as any other."""
    step = shop.step(nothing, name="work")
    order(shop, lambda: step.delay().get(), workflow_timeout=3600)
    shop.run("w1")
    assert child_of(shop, "w1").deadline == status(shop).deadline


def test_children_are_cancelled_by_the_same_look(shop: Inprocess, sql: Sql) -> None:
    """A parent's deadline ends the family, whatever each of them does."""
    child = shop.workflow(nap, name="child")
    order(shop, lambda: child.delay().get(), workflow_timeout=3600)
    shop.run("w1")
    shop.run(child_of(shop, "w1").id)
    sql.execute(LATE)
    assert expire(shop) == 2
    assert (status(shop).state, child_of(shop, "w1").state) == ("CANCELLED", "CANCELLED")


def test_a_parent_outlives_the_deadline_of_its_child(shop: Inprocess, sql: Sql) -> None:
    """It is woken, and sees that the child was cancelled."""
    child = shop.workflow(nap, name="child", workflow_timeout=60)

    def body() -> str:
        try:
            child.delay().get()
        except WorkflowCancelledError as error:
            return str(error)
        return "no error"

    order(shop, body)
    shop.run("w1")
    child_id = child_of(shop, "w1").id
    shop.run(child_id)
    sql.execute(LATE_ONE, child_id)
    shop.installation.recovery(lambda messages: [], patience=0).sweep()
    assert status(shop).state == "ENQUEUED"
    assert "workflow_timeout" in shop.run("w1")


def test_a_fork_has_a_time_of_its_own(shop: Inprocess) -> None:
    """The limit of the other one counts from the fork's own first start."""
    order(shop, nap, workflow_timeout=3600)
    shop.run("w1")
    forked = durable.fork_workflow("w1", app=shop.app)
    assert told(shop, forked.id).deadline is None
    shop.run(forked.id)
    started, deadline = started_and_deadline(shop, forked.id)
    assert timedelta(seconds=3599) < deadline - started < timedelta(seconds=3601)
    assert deadline > started_and_deadline(shop)[1]


def test_expires_is_about_the_start(shop: Inprocess) -> None:
    """Celery's option is no deadline: what has started in time may take as long as it likes."""
    task = shop.workflow(nap, name="nap")
    task.apply_async(task_id="w2", expires=3600)
    shop.run("w2")
    assert (told(shop, "w2").state, told(shop, "w2").deadline) == ("SUSPENDED", None)


def test_what_expires_before_its_start_is_cancelled(shop: Inprocess, sql: Sql) -> None:
    """Callers see that; its function isn't called, and its `on_cancel` is started."""
    calls = []
    refund = shop.workflow(nothing, name="refund")
    handle = order(shop, lambda: calls.append(1), on_cancel=refund.s(), expires=3600).AsyncResult("w1")
    verdict = shop.installation.codec.encode_error(WorkflowCancelledError("The workflow wasn't started: `expires`."))
    assert shop.installation.store.workflows.expired([handle.id], verdict=verdict, patience=0) == [handle.id]
    assert isinstance(shop.run(handle.id), Ignore)
    with pytest.raises(WorkflowCancelledError, match="expires"):
        handle.get(timeout=10)
    assert calls == []
    assert child_of(shop, handle.id).name == "refund"
