"""Workflows that are cancelled from outside, with and without their children, and what is started then: `on_cancel`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import psycopg
import pytest
from celery.exceptions import Ignore

import celery_durable as durable
from celery_durable.cancellation import cancel_all
from celery_durable.exceptions import (
    ConfigurationError,
    NotAllowedInStep,
    WorkflowCancelledError,
    WorkflowNotFound,
)
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.inprocess import Inprocess
from tests.integration.attempts import LATE, begin, crash, order, status, steps

pytestmark = pytest.mark.oldest


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """One database for all of these tests, which is cheaper."""
    return emptied_database_url


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    shop = Inprocess(database_url, broker_url, max_recovery_attempts=1, nondeterminism="error")
    yield shop
    shop.close()


def nap() -> str:
    """A workflow that sleeps for long."""
    durable.sleep(1000)
    return "rested"


def nothing() -> None:
    """A workflow that does nothing."""


def told(shop: Inprocess, workflow_id: str) -> durable.WorkflowStatus:
    return durable.get_workflow_status(workflow_id, app=shop.app)


def cancel(shop: Inprocess, workflow_id: str = "w1", **options: Any) -> bool:
    return durable.cancel_workflow(workflow_id, app=shop.app, **options)


def children_of(shop: Inprocess, parent_id: str = "w1") -> list[durable.WorkflowStatus]:
    return durable.list_workflows(parent_id=parent_id, app=shop.app)


def sweep(shop: Inprocess) -> dict[str, int]:
    return shop.installation.recovery(lambda messages: [], patience=0).sweep()


def die(shop: Inprocess) -> None:
    """Let the worker die once more than it may."""
    assert [crash(shop, begin(shop)) for _ in range(2)] == ["ENQUEUED", "DEAD"]


@pytest.fixture
def family(shop: Inprocess) -> tuple[str, str, str]:
    """A workflow that waits for its child, which waits for its own; their ids."""
    youngest = shop.workflow(nap, name="youngest")

    def between() -> Any:
        return youngest.delay().get()

    middle = shop.workflow(between, name="middle")
    order(shop, lambda: middle.delay().get())
    shop.run("w1")
    (child,) = children_of(shop)
    shop.run(child.id)
    (grandchild,) = children_of(shop, child.id)
    shop.run(grandchild.id)
    return "w1", child.id, grandchild.id


@pytest.mark.parametrize("state", ["ENQUEUED", "RUNNING", "SUSPENDED"])
def test_a_workflow_is_cancelled_whatever_its_state(shop: Inprocess, state: str) -> None:
    """At once; its callers see WorkflowCancelledError."""
    task = order(shop, nap)
    if state == "RUNNING":
        begin(shop)
    elif state == "SUSPENDED":
        shop.run("w1")
    assert status(shop).state == state
    assert cancel(shop) is True
    assert (status(shop).state, status(shop).wake_at) == ("CANCELLED", None)
    with pytest.raises(WorkflowCancelledError):
        task.AsyncResult("w1").get(timeout=10)
    assert task.AsyncResult("w1").state == "REVOKED"


@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE", "CANCELLED", "DEAD"])
def test_what_has_ended_cannot_be_cancelled(shop: Inprocess, state: str) -> None:
    """It stays as it is, and the answer says so."""

    def body() -> str:
        if state == "FAILURE":
            raise OSError("no")
        return "done"

    order(shop, body)
    if state == "CANCELLED":
        cancel(shop)
    elif state == "DEAD":
        die(shop)
    else:
        shop.run("w1")
    before = status(shop)
    assert before.state == state
    assert cancel(shop) is False
    assert (status(shop).state, status(shop).finished_at) == (state, before.finished_at)
    assert status(shop).result == before.result


def test_an_unknown_workflow_cannot_be_cancelled(shop: Inprocess) -> None:
    """Its id is named."""
    with pytest.raises(WorkflowNotFound, match="nothing-like-it"):
        cancel(shop, "nothing-like-it")


def test_a_message_of_a_cancelled_workflow_starts_nothing(shop: Inprocess) -> None:
    """It was on its way already."""
    calls = []
    order(shop, lambda: calls.append(1))
    cancel(shop)
    assert isinstance(shop.run("w1"), Ignore)
    sweep(shop)
    assert (status(shop).state, calls) == ("CANCELLED", [])


def test_a_running_step_may_still_be_recorded(shop: Inprocess) -> None:
    """It ends by itself, and no next one starts."""
    calls = []

    def work() -> str:
        cancel_all(shop.installation, ["w1"], children=False)
        return "done"

    def body() -> None:
        durable.as_step(work, name="work")()
        durable.as_step(lambda: calls.append("next"), name="next")()

    order(shop, body)
    assert isinstance(shop.run("w1"), Ignore)
    assert status(shop).state == "CANCELLED"
    assert {key: step.output for key, step in steps(shop).items()} == {"work": "done"}
    assert calls == []


def test_a_workflow_that_was_cancelled_before_its_end_has_no_result(shop: Inprocess) -> None:
    """The function has returned, but too late."""

    def body() -> str:
        cancel_all(shop.installation, ["w1"], children=False)
        return "too late"

    order(shop, body)
    assert isinstance(shop.run("w1"), Ignore)
    assert (status(shop).state, status(shop).result) == ("CANCELLED", None)


def test_a_dead_worker_does_not_bring_a_cancelled_workflow_back(shop: Inprocess, sql: Sql) -> None:
    """The recovery has nothing to rescue."""
    order(shop, nap)
    begin(shop)
    cancel(shop)
    sql.execute("DELETE FROM celery_durable.node")
    assert sweep(shop)["rescue"] == 0
    assert status(shop).state == "CANCELLED"


def test_children_are_left_alone(shop: Inprocess, family: tuple[str, str, str]) -> None:
    """Without `children` only the workflow itself ends."""
    assert cancel(shop) is True
    assert [told(shop, each).state for each in family] == ["CANCELLED", "SUSPENDED", "SUSPENDED"]


def test_children_are_cancelled_with_their_parent(shop: Inprocess, family: tuple[str, str, str]) -> None:
    """With `children` all that it has started ends, and all that those have."""
    assert cancel(shop, children=True) is True
    assert [told(shop, each).state for each in family] == ["CANCELLED"] * 3


def test_children_of_a_finished_workflow_are_cancelled(shop: Inprocess) -> None:
    """It had ended before, so the answer is False; what it has left running ends."""
    child = shop.workflow(nap, name="child")
    order(shop, lambda: child.delay().id)
    shop.run("w1")
    assert cancel(shop, children=True) is False
    assert (status(shop).state, [each.state for each in children_of(shop)]) == ("SUCCESS", ["CANCELLED"])


def test_grandchildren_are_found_past_a_finished_child(shop: Inprocess) -> None:
    """A child that has ended may have left some of its own."""
    youngest = shop.workflow(nap, name="youngest")

    def between() -> Any:
        return youngest.delay().id

    middle = shop.workflow(between, name="middle")

    def oldest() -> None:
        middle.delay()
        durable.sleep(1000)

    order(shop, oldest)
    shop.run("w1")
    (child,) = children_of(shop)
    shop.run(child.id)
    assert told(shop, child.id).state == "SUCCESS"
    cancel(shop, children=True)
    assert [each.state for each in children_of(shop, child.id)] == ["CANCELLED"]


def test_a_cancelled_child_wakes_its_parent(shop: Inprocess, family: tuple[str, str, str]) -> None:
    """The parent sees WorkflowCancelledError, at once and without a recovery."""
    _, child, _ = family
    cancel(shop, child)
    assert status(shop).state == "ENQUEUED"
    shop.run("w1")
    assert isinstance(status(shop).error, WorkflowCancelledError)


def test_many_are_cancelled_by_their_ids(shop: Inprocess) -> None:
    """The answer names those that hadn't ended before."""
    task = shop.workflow(nothing, name="plain")
    first, second, third = (task.delay().id for _ in range(3))
    shop.run(first)
    assert sorted(durable.cancel_workflows([first, second, third], app=shop.app)) == sorted([second, third])
    assert [told(shop, each).state for each in (first, second, third)] == ["SUCCESS", "CANCELLED", "CANCELLED"]


def test_many_are_cancelled_by_a_filter(shop: Inprocess) -> None:
    """Only those that fit, and that haven't ended."""
    plain, other = shop.workflow(nothing, name="plain"), shop.workflow(nap, name="other")
    ids, spared = {plain.delay().id for _ in range(3)}, other.delay().id
    assert set(durable.cancel_workflows(name="plain", app=shop.app)) == ids
    assert told(shop, spared).state == "ENQUEUED"


def test_more_are_cancelled_by_a_filter_than_a_list_shows(shop: Inprocess) -> None:
    """`list_workflows` stops at 100, this doesn't."""
    task = shop.workflow(nothing, name="plain")
    durable.enqueue_many([task.s() for _ in range(120)])
    assert len(durable.cancel_workflows(name="plain", app=shop.app)) == 120


def test_one_unknown_id_and_none_is_cancelled(shop: Inprocess) -> None:
    """All of them or none; the error names it."""
    order(shop, nap)
    with pytest.raises(WorkflowNotFound, match="nothing-like-it"):
        durable.cancel_workflows(["w1", "nothing-like-it"], app=shop.app)
    assert status(shop).state == "ENQUEUED"


def test_no_ids_and_no_filters_mean_none(shop: Inprocess) -> None:
    """Nobody cancels everything by a mistake."""
    order(shop, nap)
    with pytest.raises(ValueError, match="filters"):
        durable.cancel_workflows(app=shop.app)
    with pytest.raises(ValueError, match="not by both"):
        durable.cancel_workflows(["w1"], name="order", app=shop.app)
    assert durable.cancel_workflows([], app=shop.app) == []
    assert status(shop).state == "ENQUEUED"


def test_a_filter_that_nobody_fits_cancels_nothing(shop: Inprocess) -> None:
    """That is no error."""
    assert durable.cancel_workflows(name="nothing-like-it", app=shop.app) == []


def test_many_are_cancelled_with_their_children(shop: Inprocess, family: tuple[str, str, str]) -> None:
    """As by `cancel_workflow`; the answer names the children, too."""
    assert set(durable.cancel_workflows(["w1"], children=True, app=shop.app)) == set(family)


def test_a_revoke_cancels(shop: Inprocess) -> None:
    """`AsyncResult.revoke()` means the same."""
    task = order(shop, nap)
    task.AsyncResult("w1").revoke()
    assert status(shop).state == "CANCELLED"


def test_a_workflow_cancels_another_one_once(shop: Inprocess) -> None:
    """A replay knows the answer of the first time, and doesn't cancel what was resumed meanwhile."""
    shop.workflow(nap, name="other").apply_async(task_id="other")

    def body() -> bool:
        answer = durable.cancel_workflow("other", app=shop.app)
        durable.recv()
        return answer

    order(shop, body)
    shop.run("w1")
    assert told(shop, "other").state == "CANCELLED"
    durable.resume_workflow("other", app=shop.app)
    durable.send("w1", "go", app=shop.app)
    assert shop.run("w1") is True
    assert told(shop, "other").state == "ENQUEUED"


def test_a_workflow_cancels_itself(shop: Inprocess) -> None:
    """It ends there."""
    calls = []

    def body() -> None:
        durable.cancel_workflow(durable.current.workflow_id, app=shop.app)
        durable.as_step(lambda: calls.append(1), name="next")()

    order(shop, body)
    assert isinstance(shop.run("w1"), Ignore)
    assert (status(shop).state, calls) == ("CANCELLED", [])


@pytest.mark.parametrize("name", ["cancel_workflow", "cancel_workflows"])
def test_a_step_cannot_cancel(shop: Inprocess, name: str) -> None:
    """What a step did would be done again by its next try."""
    shop.workflow(nap, name="other").apply_async(task_id="other")
    chosen = "other" if name == "cancel_workflow" else ["other"]
    order(shop, lambda: durable.as_step(getattr(durable, name), name="meddle")(chosen, app=shop.app))
    shop.run("w1")
    assert isinstance(status(shop).error, NotAllowedInStep)
    assert told(shop, "other").state == "ENQUEUED"


def by_cancel(shop: Inprocess, sql: Sql) -> None:
    cancel(shop)


def by_deadline(shop: Inprocess, sql: Sql) -> None:
    begin(shop)
    sql.execute(LATE)
    assert shop.installation.recovery(lambda messages: [], patience=0).expire() == 1


def by_crashes(shop: Inprocess, sql: Sql) -> None:
    die(shop)


def test_children_are_found_when_their_parent_has_ended_before(shop: Inprocess, family: tuple[str, str, str]) -> None:
    """As after a crash between its end and theirs: cancelling it again is cancelling them."""
    assert cancel(shop) is True
    assert [told(shop, each).state for each in family] == ["CANCELLED", "SUSPENDED", "SUSPENDED"]
    assert cancel(shop, children=True) is False
    assert [told(shop, each).state for each in family] == ["CANCELLED"] * 3


@pytest.mark.parametrize("end", [by_cancel, by_deadline, by_crashes])
def test_on_cancel_is_started_with_the_end(shop: Inprocess, sql: Sql, end: Callable[..., None]) -> None:
    """In the same statement, with its arguments, as a child of the workflow; the next sweep sends its message."""

    def undo(order_id: int) -> str:
        return f"undone {order_id}"

    refund = shop.workflow(undo, name="refund")
    order(shop, nap, on_cancel=refund.s(42), workflow_timeout=3600)
    assert children_of(shop) == []
    end(shop, sql)
    (compensation,) = children_of(shop)
    assert (compensation.name, compensation.state, compensation.args) == ("refund", "ENQUEUED", (42,))
    assert sweep(shop)["republish"] == 1
    assert shop.run(compensation.id) == "undone 42"


def test_on_cancel_is_started_when_the_code_does_not_fit(shop: Inprocess, sql: Sql) -> None:
    """DEAD for another reason than crashes: the replay calls a step with other arguments."""
    refund, numbers = shop.workflow(nothing, name="refund"), iter([1, 2])

    def body() -> None:
        durable.as_step(lambda number: number, name="work")(next(numbers))
        durable.sleep(1000)

    order(shop, body, on_cancel=refund.s())
    shop.run("w1")
    sql.execute("UPDATE celery_durable.workflow SET wake_at = clock_timestamp()")
    assert shop.installation.store.workflows.wake(limit=9, patience=0) == ["w1"]
    shop.run("w1")
    assert status(shop).state == "DEAD"
    assert [each.name for each in children_of(shop)] == ["refund"]


@pytest.mark.parametrize("end", ["SUCCESS", "FAILURE"])
def test_on_cancel_is_not_started_by_any_other_end(shop: Inprocess, end: str) -> None:
    """Whoever fails can compensate in the function."""
    refund = shop.workflow(nothing, name="refund")

    def body() -> None:
        if end == "FAILURE":
            raise OSError("no")

    order(shop, body, on_cancel=refund.s())
    shop.run("w1")
    assert status(shop).state == end
    assert cancel(shop) is False
    sweep(shop)
    assert children_of(shop) == []


def test_on_cancel_is_started_once(shop: Inprocess) -> None:
    """A second cancel finds nothing to do."""
    refund = shop.workflow(nothing, name="refund")
    order(shop, nap, on_cancel=refund.s())
    assert [cancel(shop), cancel(shop)] == [True, False]
    assert len(children_of(shop)) == 1


def test_on_cancel_is_started_once_however_often_it_is_cancelled(shop: Inprocess) -> None:
    """What was resumed, and is cancelled again, has its compensation already."""
    refund = shop.workflow(nothing, name="refund")
    order(shop, nap, on_cancel=refund.s())
    assert cancel(shop)
    durable.resume_workflow("w1", app=shop.app)
    assert cancel(shop)
    assert [each.name for each in children_of(shop)] == ["refund"]


def test_a_fork_has_a_compensation_of_its_own(shop: Inprocess) -> None:
    """Of the same kind, with the same arguments; each end starts the one that belongs to it."""

    def refund(order_id: int) -> int:
        return order_id

    compensation = shop.workflow(refund, name="refund")
    order(shop, nap, on_cancel=compensation.s(42))
    assert cancel(shop)
    forks = [durable.fork_workflow("w1", app=shop.app).id for _ in range(2)]
    for fork in forks:
        assert durable.cancel_workflow(fork, app=shop.app)
    started = [durable.list_workflows(parent_id=each, app=shop.app) for each in ("w1", *forks)]
    assert [[each.name for each in them] for them in started] == [["refund"]] * 3
    assert len({them[0].id for them in started}) == 3
    assert [them[0].root_id for them in started] == ["w1", *forks]
    for (each,) in started:
        (message,) = shop.installation.store.workflows.messages_of([each.id], patience=0)
        assert json.loads(message.envelope)["headers"]["id"] == each.id
        assert shop.run(each.id) == 42


def test_on_cancel_of_a_call_replaces_that_of_the_task(shop: Inprocess) -> None:
    """The call knows better."""
    refund, apology = shop.workflow(nothing, name="refund"), shop.workflow(nothing, name="apology")
    task = shop.workflow(nap, name="order", on_cancel=refund.s())
    task.apply_async(task_id="w1", on_cancel=apology.s())
    cancel(shop)
    assert [each.name for each in children_of(shop)] == ["apology"]


@pytest.mark.parametrize("kind", ["step", "task"])
def test_on_cancel_of_a_step_or_a_plain_task_is_as_durable(shop: Inprocess, kind: str) -> None:
    """It runs as a workflow of nothing but that, on its own queue."""
    done = []

    def undo(order_id: int) -> str:
        done.append(order_id)
        return "undone"

    declare = shop.step if kind == "step" else partial(shop.app.task, shared=False)
    refund = declare(undo, name="refund", queue="money")
    order(shop, nap, on_cancel=refund.s(42))
    cancel(shop)
    (compensation,) = children_of(shop)
    assert (compensation.name, compensation.queue) == ("celery_durable.step", "money")
    assert shop.run(compensation.id) == "undone"
    assert done == [42]


def test_on_cancel_of_a_child_is_started_with_its_end(shop: Inprocess) -> None:
    """A child may have one as any other workflow."""
    refund = shop.workflow(nothing, name="refund")
    child = shop.workflow(nap, name="child", on_cancel=refund.s())
    order(shop, lambda: child.delay().get())
    shop.run("w1")
    (started,) = children_of(shop)
    cancel(shop, started.id)
    assert [each.name for each in children_of(shop, started.id)] == ["refund"]


def test_on_cancel_outlives_a_cancel_with_children(shop: Inprocess) -> None:
    """What compensates is started by the cancel, not ended by it."""
    refund = shop.workflow(nothing, name="refund")
    child = shop.workflow(nap, name="child", on_cancel=refund.s())
    order(shop, lambda: child.delay().get(), on_cancel=refund.s())
    shop.run("w1")
    cancel(shop, children=True)
    refunds = durable.list_workflows(name="refund", app=shop.app)
    assert [each.state for each in refunds] == ["ENQUEUED", "ENQUEUED"]


def test_on_cancel_outlives_a_second_cancel_with_children(shop: Inprocess) -> None:
    """There is nothing left to cancel: the answer says so, and what compensates goes on."""
    refund = shop.workflow(nothing, name="refund")
    order(shop, nap, on_cancel=refund.s())
    assert [cancel(shop), cancel(shop, children=True)] == [True, False]
    assert [each.state for each in children_of(shop)] == ["ENQUEUED"]


def test_on_cancel_outlives_a_cancel_with_children_in_an_outbox(shop: Inprocess, database_url: str) -> None:
    """As any other; that is the sweep's to do."""
    refund = shop.workflow(nothing, name="refund")
    order(shop, nap, on_cancel=refund.s())
    with psycopg.connect(database_url) as connection, durable.outbox(connection):
        cancel(shop, children=True)
    sweep(shop)
    assert status(shop).state == "CANCELLED"
    assert [each.state for each in children_of(shop)] == ["ENQUEUED"]


def test_on_cancel_has_no_deadline_of_the_workflow_that_was_late(shop: Inprocess, sql: Sql) -> None:
    """Else it would be too late itself."""
    refund = shop.workflow(nothing, name="refund")
    order(shop, nap, on_cancel=refund.s(), workflow_timeout=3600)
    by_deadline(shop, sql)
    (compensation,) = children_of(shop)
    shop.run(compensation.id)
    assert (told(shop, compensation.id).state, told(shop, compensation.id).deadline) == ("SUCCESS", None)


def test_on_cancel_of_what_was_there_already_is_not_kept(shop: Inprocess, sql: Sql) -> None:
    """A second start under the same deduplication id starts nothing, so nothing is to be compensated."""
    refund = shop.workflow(nothing, name="refund")
    task = shop.workflow(nap, name="order")
    for _ in range(2):
        task.apply_async(on_cancel=refund.s(), deduplication_id="one")
    assert sql.value("SELECT count(*) FROM celery_durable.on_cancel") == 1


@pytest.mark.parametrize("value", ["refund", 42, ("refund", 1)])
def test_on_cancel_must_be_a_signature(shop: Inprocess, sql: Sql, value: Any) -> None:
    """A call with anything else starts nothing."""
    task = shop.workflow(nap, name="order")
    with pytest.raises(ConfigurationError, match="on_cancel"):
        task.apply_async(on_cancel=value)
    assert sql.value("SELECT count(*) FROM celery_durable.workflow") == 0
