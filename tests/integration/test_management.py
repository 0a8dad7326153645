"""Workflows steered from outside: resumed past their completed steps, forked from one of them, one or many."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from kombu.serialization import loads

import celery_durable as durable
from celery_durable.exceptions import ConfigurationError, NotAllowedInStep, WorkflowConflict, WorkflowNotFound
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.inprocess import Inprocess

pytestmark = pytest.mark.oldest

MANY = """
    WITH born AS (
        INSERT INTO celery_durable.workflow (id, name, queue, state, max_crashes, publish_at, finished_at, dispatched)
        SELECT 'many' || n, 'many', 'celery', s.state, 10, CASE s.state WHEN 'ENQUEUED' THEN clock_timestamp() END,
            CASE s.state WHEN 'FAILURE' THEN clock_timestamp() END, CASE s.state WHEN 'FAILURE' THEN true END
        FROM generate_series(1, 10001) AS n, (VALUES (%s)) AS s (state)
        RETURNING id
    )
    INSERT INTO celery_durable.input (workflow, envelope, body, content_type, content_encoding)
    SELECT born.id, i.envelope, i.body, i.content_type, i.content_encoding
    FROM born, celery_durable.input i
"""


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """One database for all of these tests, which is cheaper."""
    return emptied_database_url


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


def told(shop: Inprocess, workflow_id: str) -> durable.WorkflowStatus:
    return durable.get_workflow_status(workflow_id, app=shop.app)


def keys(shop: Inprocess, workflow_id: str) -> list[str]:
    return [step.key for step in durable.list_workflow_steps(workflow_id, app=shop.app)]


def wait_for_it() -> Any:
    """A workflow that returns its first message."""
    return durable.recv("topic")


def test_a_cancelled_workflow_goes_on(shop: Inprocess) -> None:
    """Where it was: it waits again for what it waited for, and has what was sent before."""
    handle = shop.workflow(wait_for_it, name="waits").delay()
    shop.run(handle.id)
    durable.send(handle.id, "hello", "topic", app=shop.app)
    durable.cancel_workflow(handle.id, app=shop.app)
    durable.resume_workflow(handle.id, app=shop.app)
    assert shop.run(handle.id) == "hello"
    assert handle.get(timeout=10) == "hello"


def test_a_dead_workflow_goes_on(shop: Inprocess, order: Any, sql: Sql) -> None:
    """With all its crashes forgiven."""
    handle = order.delay()
    shop.run(handle.id)
    sql.execute("UPDATE celery_durable.workflow SET state = 'DEAD', crashes = 11")
    order.mended = True
    durable.resume_workflow(handle.id, app=shop.app)
    assert told(shop, handle.id).crashes == 0
    assert shop.run(handle.id) == ["charged", "shipped"]
    assert order.calls == ["charge", "ship", "ship"]


def test_a_failed_step_has_all_its_tries_again(shop: Inprocess) -> None:
    """Those that it had before don't count."""
    calls: list[int] = []

    def work() -> None:
        calls.append(1)
        raise OSError("no")

    def body() -> None:
        durable.as_step(work, name="work", autoretry_for=(OSError,), max_retries=1, retry_backoff=0.001)()

    handle = shop.workflow(body, name="tries").delay()
    shop.run(handle.id)
    assert len(calls) == 2
    durable.resume_workflow(handle.id, app=shop.app)
    shop.run(handle.id)
    assert len(calls) == 4


def test_a_sleep_that_was_cancelled_keeps_its_end(shop: Inprocess, sql: Sql) -> None:
    """A resume begins no other one."""

    def body() -> str:
        durable.sleep(1000)
        return "rested"

    handle = shop.workflow(body, name="sleeps").delay()
    shop.run(handle.id)
    before = told(shop, handle.id).wake_at
    durable.cancel_workflow(handle.id, app=shop.app)
    durable.resume_workflow(handle.id, app=shop.app)
    shop.run(handle.id)
    after = told(shop, handle.id)
    assert before is not None
    assert after.wake_at is not None
    assert abs((after.wake_at - before).total_seconds()) < 0.5


def test_a_running_workflow_cannot_be_resumed(shop: Inprocess) -> None:
    """It runs already; nor can one that waits."""
    errors: list[str] = []

    def body() -> None:
        with pytest.raises(WorkflowConflict) as caught:
            durable.resume_workflow(durable.current.workflow_id, app=shop.app)
        errors.append(str(caught.value))
        durable.recv()

    handle = shop.workflow(body, name="runs").delay()
    shop.run(handle.id)
    assert "RUNNING" in errors[0]
    with pytest.raises(WorkflowConflict, match="SUSPENDED"):
        durable.resume_workflow(handle.id, app=shop.app)


def test_many_are_resumed_by_their_ids(shop: Inprocess, order: Any) -> None:
    """Their handles say which."""
    ids = [fail(shop, order).id for _ in range(3)]
    handles = durable.resume_workflows(ids[:2], app=shop.app)
    assert {each.id for each in handles} == set(ids[:2])
    assert [told(shop, each).state for each in ids] == ["ENQUEUED", "ENQUEUED", "FAILURE"]


def test_many_are_resumed_by_a_filter(shop: Inprocess, order: Any) -> None:
    """Those that fit and can be resumed: what lives, or has succeeded, isn't meant."""
    failed, alive = fail(shop, order), order.delay()
    order.mended = True
    shop.run(order.apply_async(task_id="fine").id)
    assert [each.id for each in durable.resume_workflows(name="order", app=shop.app)] == [failed.id]
    assert (told(shop, alive.id).attempt, told(shop, "fine").state) == (0, "SUCCESS")


def test_one_that_cannot_be_resumed_and_none_is(shop: Inprocess, order: Any) -> None:
    """All of them or none; the error names it."""
    failed, alive = fail(shop, order), order.delay()
    with pytest.raises(WorkflowConflict, match=alive.id):
        durable.resume_workflows([failed.id, alive.id], app=shop.app)
    with pytest.raises(WorkflowNotFound, match="nothing-like-it"):
        durable.resume_workflows([failed.id, "nothing-like-it"], app=shop.app)
    assert told(shop, failed.id).state == "FAILURE"


def test_a_resume_has_no_compensation_of_the_end_before(shop: Inprocess, order: Any) -> None:
    """What it is to start when it is cancelled is kept: a workflow that then succeeds starts nothing."""
    refund = shop.workflow(wait_for_it, name="refund")
    handle = order.apply_async(on_cancel=refund.s())
    shop.run(handle.id)
    order.mended = True
    durable.resume_workflow(handle.id, app=shop.app)
    shop.run(handle.id)
    assert durable.list_workflows(name="refund", app=shop.app) == []


@pytest.mark.parametrize("what", ["resume", "fork"])
@pytest.mark.parametrize("wrong", [{}, {"ids": ["a"], "name": "order"}])
def test_it_must_be_clear_which_are_meant(shop: Inprocess, order: Any, what: str, wrong: dict[str, Any]) -> None:
    """By ids or by filters, and by one of them."""
    failed = fail(shop, order)
    with pytest.raises(ValueError, match="filters"):
        getattr(durable, f"{what}_workflows")(app=shop.app, **wrong)
    assert told(shop, failed.id).state == "FAILURE"


@pytest.mark.parametrize("what", ["resume", "fork", "cancel"])
def test_a_filter_that_means_too_many(shop: Inprocess, order: Any, sql: Sql, what: str) -> None:
    """Is refused, for a part of them would be neither all nor none; who names a limit gets the newest."""
    order.delay()  # whose message they all have
    state = "ENQUEUED" if what == "cancel" else "FAILURE"
    sql.execute(MANY, state)
    with pytest.raises(ValueError, match=r"More than 10,000 workflows match.*limit="):
        getattr(durable, f"{what}_workflows")(name="many", app=shop.app)
    states = "SELECT state, count(*) FROM celery_durable.workflow WHERE name <> 'order' GROUP BY state"
    assert sql.all(states) == [(state, 10001)]
    assert len(getattr(durable, f"{what}_workflows")(name="many", limit=3, app=shop.app)) == 3


@pytest.mark.parametrize("what", ["resume", "fork", "cancel"])
def test_no_ids_are_none(shop: Inprocess, order: Any, what: str) -> None:
    """An empty list isn't everything."""
    failed = fail(shop, order)
    assert getattr(durable, f"{what}_workflows")([], app=shop.app) == []
    assert told(shop, failed.id).state == "FAILURE"
    assert len(durable.list_workflows(app=shop.app)) == 1


def test_a_fork_begins_with_the_steps_before_one(shop: Inprocess, order: Any) -> None:
    """Those don't run again; the step itself does. The other workflow stays as it is."""
    order.mended = True
    handle = order.delay()
    shop.run(handle.id)
    forked = durable.fork_workflow(handle.id, from_step="ship", app=shop.app)
    assert keys(shop, forked.id) == ["charge"]
    status = told(shop, forked.id)
    assert (status.state, status.forked_from, status.args, status.attempt) == ("ENQUEUED", handle.id, (), 0)
    assert shop.run(forked.id) == ["charged", "shipped"]
    assert order.calls == ["charge", "ship", "ship"]
    assert told(shop, handle.id).state == "SUCCESS"


@pytest.mark.parametrize("from_step", [None, "charge"])
def test_a_fork_from_the_beginning_runs_all(shop: Inprocess, order: Any, from_step: str | None) -> None:
    """With the arguments of the other one, and nothing else of it."""
    order.mended = True
    handle = order.delay()
    shop.run(handle.id)
    forked = durable.fork_workflow(handle.id, from_step=from_step, app=shop.app)
    assert keys(shop, forked.id) == []
    assert shop.run(forked.id) == ["charged", "shipped"]
    assert order.calls == ["charge", "ship"] * 2


def test_a_fork_has_the_arguments(shop: Inprocess) -> None:
    """Positional ones and keywords."""

    def body(a: int, b: int) -> int:
        return a - b

    handle = shop.workflow(body, name="less").delay(5, b=3)
    forked = durable.fork_workflow(handle.id, app=shop.app)
    assert shop.run(forked.id) == 2


def test_steps_of_a_fork_have_keys_of_their_own(shop: Inprocess) -> None:
    """An idempotency key that another service knows would make it answer with the old outcome."""
    seen = []

    def body() -> None:
        durable.as_step(lambda: seen.append(durable.current.idempotency_key), name="pay")()

    handle = shop.workflow(body, name="pays").delay()
    shop.run(handle.id)
    shop.run(durable.fork_workflow(handle.id, app=shop.app).id)
    assert len(set(seen)) == 2


def test_a_fork_from_a_child_has_the_child(shop: Inprocess) -> None:
    """What was started before the step isn't started again: its outcome is there."""

    def inner() -> int:
        return 1

    child = shop.workflow(inner, name="child")

    def body() -> list[int]:
        value = child.delay().get()
        return [value, durable.as_step(lambda: 2, name="next")()]

    handle = shop.workflow(body, name="parent").delay()
    shop.run(handle.id)
    (born,) = durable.list_workflows(parent_id=handle.id, app=shop.app)
    shop.run(born.id)
    shop.run(handle.id)
    forked = durable.fork_workflow(handle.id, from_step="next", app=shop.app)
    assert shop.run(forked.id) == [1, 2]
    assert durable.list_workflows(parent_id=forked.id, app=shop.app) == []


def test_the_step_that_there_is_not_is_an_error(shop: Inprocess, order: Any) -> None:
    """It lists those that there are; nothing is started."""
    failed = fail(shop, order)
    with pytest.raises(ValueError, match=r"'chargg'.*charge, ship"):
        durable.fork_workflow(failed.id, from_step="chargg", app=shop.app)
    assert len(durable.list_workflows(app=shop.app)) == 1


def test_a_fork_has_the_id_that_it_is_given(shop: Inprocess, order: Any) -> None:
    """If that is free; else it is an error, and the workflow with that id stays as it is."""
    failed = fail(shop, order)
    assert durable.fork_workflow(failed.id, new_id="second", app=shop.app).id == "second"
    order.mended = True
    shop.run("second")
    with pytest.raises(WorkflowConflict, match="new_id"):
        durable.fork_workflow(failed.id, new_id="second", app=shop.app)
    assert told(shop, "second").state == "SUCCESS"
    assert len(durable.list_workflows(app=shop.app)) == 2


def test_an_unknown_workflow_cannot_be_forked(shop: Inprocess) -> None:
    """Its id is named."""
    with pytest.raises(WorkflowNotFound, match="nothing-like-it"):
        durable.fork_workflow("nothing-like-it", app=shop.app)


@pytest.mark.parametrize("state", ["ENQUEUED", "SUSPENDED", "CANCELLED"])
def test_a_workflow_is_forked_whatever_its_state(shop: Inprocess, state: str) -> None:
    """The other one goes on, or doesn't, as before."""
    handle = shop.workflow(wait_for_it, name="waits").delay()
    if state == "SUSPENDED":
        shop.run(handle.id)
    elif state == "CANCELLED":
        durable.cancel_workflow(handle.id, app=shop.app)
    forked = durable.fork_workflow(handle.id, app=shop.app)
    durable.send(forked.id, "hello", "topic", app=shop.app)
    assert shop.run(forked.id) == "hello"
    assert told(shop, handle.id).state == state


def test_a_fork_of_a_member_is_no_member(shop: Inprocess) -> None:
    """The chord of the other one has counted that; what follows in a chain, and the links, follow the fork, too."""

    def inner() -> int:
        return 1

    member = shop.workflow(inner, name="member")
    gathered = shop.app.task(take_all, name="gathered", shared=False)
    # What Celery sends for the header of a chord, without a backend that counts.
    handle = member.apply_async(chord=gathered.s(), group_id="g", group_index=0, link=gathered.si())
    forked = durable.fork_workflow(handle.id, app=shop.app)
    envelope, embed = stored(shop, forked.id)
    assert (envelope.get("group"), envelope.get("group_index"), embed["chord"]) == (None, None, None)
    assert [each["task"] for each in embed["callbacks"]] == ["gathered"]
    assert stored(shop, handle.id)[1]["chord"]["task"] == "gathered"


def take_all(*args: Any) -> None:
    """A task that takes what there is."""


def stored(shop: Inprocess, workflow_id: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The headers of a workflow's message, and what its body says of its place in a canvas."""
    (message,) = shop.installation.store.workflows.messages_of([workflow_id], patience=0)
    _, _, embed = loads(message.body, message.content_type, message.content_encoding, accept={message.content_type})
    return json.loads(message.envelope)["headers"], embed


def test_many_are_forked(shop: Inprocess, order: Any) -> None:
    """By ids or by filters; each from the same step."""
    ids = [fail(shop, order).id for _ in range(2)]
    by_ids = durable.fork_workflows(ids, from_step="ship", app=shop.app)
    assert sorted(str(told(shop, each.id).forked_from) for each in by_ids) == sorted(ids)
    assert [keys(shop, each.id) for each in by_ids] == [["charge"]] * 2
    assert len(durable.fork_workflows(state="FAILURE", app=shop.app)) == 2


def test_one_that_has_no_such_step_and_none_is_forked(shop: Inprocess, order: Any) -> None:
    """All of them or none."""
    failed, fresh = fail(shop, order), order.delay()
    with pytest.raises(ValueError, match=fresh.id):
        durable.fork_workflows([failed.id, fresh.id], from_step="ship", app=shop.app)
    with pytest.raises(WorkflowNotFound, match="nothing-like-it"):
        durable.fork_workflows([failed.id, "nothing-like-it"], app=shop.app)
    assert len(durable.list_workflows(app=shop.app)) == 2


@pytest.mark.parametrize("what", ["resume", "fork"])
@pytest.mark.parametrize("many", [False, True])
def test_a_workflow_steers_another_one_once(shop: Inprocess, order: Any, what: str, many: bool) -> None:
    """A replay knows what was done, and does nothing."""
    failed = fail(shop, order)

    def steer() -> Any:
        if many:
            (handle,) = getattr(durable, f"{what}_workflows")([failed.id], app=shop.app)
        else:
            handle = getattr(durable, f"{what}_workflow")(failed.id, app=shop.app)
        durable.recv()
        return handle.id

    handle = shop.workflow(steer, name="steers").delay()
    shop.run(handle.id)
    durable.cancel_workflows(name="order", app=shop.app)
    before = {each.id: each.state for each in durable.list_workflows(name="order", app=shop.app)}
    durable.send(handle.id, "go", app=shop.app)
    steered = shop.run(handle.id)
    assert {each.id: each.state for each in durable.list_workflows(name="order", app=shop.app)} == before
    assert steered in before
    assert (steered == failed.id) is (what == "resume")


@pytest.mark.parametrize("name", ["resume_workflow", "resume_workflows", "fork_workflow", "fork_workflows"])
def test_a_step_cannot_steer(shop: Inprocess, order: Any, name: str) -> None:
    """What a step did would be done again by its next try."""
    failed = fail(shop, order)
    chosen = [failed.id] if name.endswith("s") else failed.id

    def meddle() -> None:
        durable.as_step(getattr(durable, name), name="meddle")(chosen, app=shop.app)

    handle = shop.workflow(meddle, name="meddles").delay()
    shop.run(handle.id)
    assert isinstance(told(shop, handle.id).error, NotAllowedInStep)
    assert told(shop, failed.id).state == "FAILURE"
    assert len(durable.list_workflows(app=shop.app)) == 2


@pytest.mark.parametrize("what", ["cancel_workflow", "resume_workflow", "fork_workflow"])
@pytest.mark.parametrize("wrong", ["", 42, None, "a\x00b", "x" * 10_000])
def test_a_wrong_id_is_an_error(shop: Inprocess, what: str, wrong: Any) -> None:
    """It is told before the database is asked."""
    with pytest.raises((ValueError, TypeError, ConfigurationError)):
        getattr(durable, what)(wrong, app=shop.app)
