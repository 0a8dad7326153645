"""What a workflow has done: its attempts, however they have ended, its messages, its steps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from typing import Any

import pytest

import celery_durable as durable
from celery_durable import Omitted
from celery_durable.exceptions import SerializationError, WorkflowNotFound
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.inprocess import Inprocess
from tests.integration.attempts import begin, crash, order, release

pytestmark = pytest.mark.matrix


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    with closing(Inprocess(database_url, broker_url)) as shop:
        yield shop


def endings(shop: Inprocess) -> list[tuple[int, str | None]]:
    attempts = durable.list_workflow_attempts("w1", app=shop.app)
    for each in attempts:
        assert each.worker == "worker@test"
        assert each.node == str(shop.node) or each.ending in ("SUCCESS", "FAILURE")  # whose node has let it go
        assert each.started_at is not None
        assert each.ended_at is None or each.ended_at >= each.started_at
    for one, other in pairwise(attempts):
        assert one.ended_at <= other.started_at  # type: ignore[operator]
    return [(each.attempt, each.ending) for each in attempts]


def test_every_ending_of_an_attempt(shop: Inprocess, sql: Sql) -> None:
    """A wait, a hand-over, a crash, a failure that was resumed, and the end."""
    outcomes: Iterator[Any] = iter([lambda: durable.recv(), lambda: 1 // 0, lambda: "done"])
    order(shop, lambda: next(outcomes)())
    assert endings(shop) == []
    shop.run("w1")
    assert endings(shop) == [(1, "suspended")]
    durable.send("w1", "go", app=shop.app)
    attempt = begin(shop)
    assert endings(shop)[-1] == (2, None)
    release(shop, attempt)
    crash(shop, begin(shop))
    sql.execute("UPDATE celery_durable.workflow SET published_at = clock_timestamp()")
    shop.run("w1")
    assert endings(shop)[1:] == [(2, "handed over"), (3, "crashed"), (4, "FAILURE")]
    durable.resume_workflow("w1", app=shop.app)
    assert endings(shop)[-1] == (4, "FAILURE")
    assert shop.run("w1") == "done"
    assert endings(shop)[3:] == [(4, "FAILURE"), (5, "SUCCESS")]


def test_a_retry_of_the_whole_workflow(shop: Inprocess) -> None:
    """Celery's own."""

    @shop.workflow(name="order", bind=True, max_retries=1, default_retry_delay=60)
    def body(self: Any) -> None:
        raise self.retry()

    body.apply_async(task_id="w1")
    shop.run("w1")
    assert endings(shop) == [(1, "retried")]


def test_a_crash_too_many(shop: Inprocess) -> None:
    """The attempt has crashed; the workflow is DEAD, and says so in its list."""
    order(shop, lambda: None, max_recovery_attempts=1)
    for _ in range(2):
        crash(shop, begin(shop))
    assert endings(shop) == [(1, "crashed"), (2, "crashed")]
    status = durable.get_workflow_status("w1", app=shop.app)
    assert status.state == "DEAD"
    assert status.error_text is not None


def test_a_cancelled_wait(shop: Inprocess) -> None:
    """It had given its worker back: no attempt was cancelled."""
    order(shop, lambda: durable.recv())
    shop.run("w1")
    durable.cancel_workflow("w1", app=shop.app)
    assert endings(shop) == [(1, "suspended")]
    durable.resume_workflow("w1", app=shop.app)
    assert endings(shop) == [(1, "suspended")]


def test_messages(shop: Inprocess, sql: Sql) -> None:
    """In their order, with who has them; one that can't be read hides no other."""
    order(shop, lambda: [durable.recv("a"), durable.recv()])
    durable.send("w1", {"no": 1}, topic="a", idempotency_key="first", app=shop.app)
    durable.send("w1", "x" * 1000, topic="b", app=shop.app)
    durable.send("w1", "bad", topic="b", app=shop.app)
    sql.execute("UPDATE celery_durable.message SET content_type = 'application/x-odd' WHERE octet_length(body) = 5")
    shop.run("w1")
    first, large, bad = durable.list_workflow_messages("w1", max_payload=100, app=shop.app)
    assert (first.message, first.topic, first.idempotency_key, first.taken_by) == (
        {"no": 1}, "a", "first", "durable.recv",
    )  # fmt: skip
    assert large.message == Omitted(1002)
    assert large.taken_by is None
    assert isinstance(bad.message, SerializationError)
    assert first.seq < large.seq < bad.seq
    assert len(durable.list_workflow_messages("w1", limit=1, app=shop.app)) == 1


def test_steps_tell_their_tries(shop: Inprocess) -> None:
    """When each failed try began and ended, in which attempt; large outputs stay where they are."""
    answers = iter([OSError("one"), OSError("two"), "x" * 1000])

    def body() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    step = durable.as_step(body, name="try", max_retries=5, retry_backoff=0.01, retry_jitter=False)
    order(shop, step)
    shop.run("w1")
    (info,) = durable.list_workflow_steps("w1", max_payload=100, app=shop.app)
    assert info.output == Omitted(1002)
    assert (info.attempt, info.tries, info.wake_at) == (1, 3, None)
    times = [time for error in info.errors for time in (error.started_at, error.at)]
    times += [info.started_at, info.finished_at]
    assert None not in times
    assert times == sorted(times)  # type: ignore[type-var]


def test_values_that_cannot_be_read_hide_no_event(shop: Inprocess, sql: Sql) -> None:
    """It says why."""

    def body() -> None:
        durable.set_event("good", 1)
        durable.set_event("bad", 2)
        durable.set_event("large", "x" * 1000)

    order(shop, body)
    shop.run("w1")
    sql.execute("UPDATE celery_durable.event SET content_type = 'application/x-odd' WHERE key = 'bad'")
    events = durable.list_workflow_events("w1", max_payload=100, app=shop.app)
    assert events["good"] == 1
    assert isinstance(events["bad"], SerializationError)
    assert events["large"] == Omitted(1002)


@pytest.mark.parametrize(
    "look", [durable.list_workflow_steps, durable.list_workflow_attempts, durable.list_workflow_messages]
)
@pytest.mark.parametrize("workflow_id", ["nobody", "\x00", "<b>'\"/../%"])
def test_no_such_workflow(shop: Inprocess, look: Any, workflow_id: str) -> None:
    """Told as such, also of what can't be an id."""
    with pytest.raises(WorkflowNotFound):
        look(workflow_id, app=shop.app)
