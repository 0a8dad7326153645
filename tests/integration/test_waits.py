"""Waits whose statements meet others in the middle: repeated ones, arrivals, cancellations and resumes."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import closing

import pytest

from celery_durable.serialization import Payload
from celery_durable.states import FINAL
from tests.fixtures.fix_postgres import Sql
from tests.integration.parties import VERDICT, Race


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """One database for all of these tests, which is cheaper."""
    return emptied_database_url


@pytest.fixture
def race(database_url: str, sql: Sql) -> Iterator[Race]:
    with closing(Race(database_url, sql)) as race:
        yield race


def test_a_sleep_that_is_repeated_has_the_first_ones_time(race: Race) -> None:
    """Its answer was lost while it was still on its way: the second statement waits, and no sleep is skipped."""
    fence, twin = race.claimed(), race.b
    with race.a.transaction():
        race.a.sleep(fence, 3600)
        again = race.blocked(twin, lambda: twin.sleep(fence, 5))
    assert 3500 < again.result().due_in <= 3600


def test_a_recv_that_is_repeated_has_the_first_ones_message(race: Race) -> None:
    """Whether another one is there or not; none is taken twice, and none is lost."""
    fence, twin = race.claimed(), race.b
    for more in (b"2", None):
        race.sql.execute("TRUNCATE celery_durable.message, celery_durable.checkpoint")
        race.c.send(race.id, b"1")
        if more:
            race.c.send(race.id, more)
        with race.a.transaction():
            race.a.receive(fence)
            again = race.blocked(twin, lambda: twin.receive(fence))
        assert again.result().checkpoint.payload.data == b"1"
        left = [
            bytes(row.body) for row in race.sql.all("SELECT body FROM celery_durable.message WHERE taken_by IS NULL")
        ]
        assert left == ([more] if more else [])


def test_a_default_that_is_repeated(race: Race) -> None:
    """A recv whose time has passed has its outcome once, too."""
    fence, twin = race.claimed(), race.b
    with race.a.transaction():
        race.a.receive(fence, 0)
        again = race.blocked(twin, lambda: twin.receive(fence, 0))
    assert again.result().checkpoint.payload.data == b"null"


def test_what_arrives_while_it_suspends(race: Race) -> None:
    """A message whose commit comes between the suspension's snapshot and its lock makes it runnable at once."""
    fence = race.claimed()
    with race.b.transaction():
        race.b.send(race.id, b"1")
        suspended = race.blocked(race.a, lambda: race.a.listen(fence))
    done, message = suspended.result()
    assert (done, message is not None, race.row().state) == (True, True, "ENQUEUED")


def test_what_arrives_after_it_has_suspended(race: Race) -> None:
    """The sender waits for the suspension, and wakes it."""
    fence = race.claimed()
    with race.a.transaction():
        race.a.listen(fence)
        sent = race.blocked(race.b, lambda: race.b.send(race.id, b"1"))
    assert sent.result()
    assert race.row().state == "ENQUEUED"


def test_no_child_escapes_a_cancellation(race: Race) -> None:
    """A start that is on its way is waited for, and its child is found."""
    fence = race.claimed()
    with race.a.transaction():
        race.a.bear(fence, "child")
        cancelled = race.blocked(race.b, lambda: race.b.workflows.cancel([race.id], verdict=VERDICT, patience=0))
    assert cancelled.result() == [race.id]
    assert race.b.workflows.family([race.id], patience=0) == ["child"]


def test_a_start_that_is_repeated_finds_the_first_ones_child(race: Race) -> None:
    """Also one that another workflow's deduplication id had led to, which has ended meanwhile."""
    fence = race.claimed()
    race.c.bear(fence, "first", "42")
    race.sql.execute("DELETE FROM celery_durable.checkpoint")
    assert race.a.bear(fence, "second", "42").child_id == "first"
    race.sql.execute("UPDATE celery_durable.workflow SET deduplication_id = NULL WHERE id = 'first'")
    again = race.a.bear(fence, "second", "42")
    assert (again.child_id, again.is_new) == ("first", False)
    assert race.sql.value("SELECT count(*) FROM celery_durable.workflow WHERE id = 'second'") == 0


def test_a_resume_keeps_what_the_running_step_records(race: Race) -> None:
    """It was cancelled and resumed while a step ran: that may record, and nobody else starts before it has let go."""
    fence = race.claimed()
    assert race.b.workflows.cancel([race.id], verdict=VERDICT, patience=0) == [race.id]
    assert race.b.workflows.resume([race.id], 60, patience=0)
    race.a.beat()
    assert race.b.claim(race.id) is None
    standing = race.a.save_slow(fence, b"7")
    assert (standing.state, race.outcomes()) == ("ENQUEUED", {"one": b"7"})
    race.a.workflows.confirm(fence.node, [race.id], patience=0)
    claim = race.b.claim(race.id, uuid.uuid4())
    assert claim is not None
    assert claim.history["one"].payload == Payload(b"7")


def test_a_message_in_an_open_transaction_locks_no_workflow(race: Race) -> None:
    """Somebody sends one with the same key: it waits for that transaction, and a cancellation doesn't wait for it."""
    with race.b.transaction():
        race.b.connection.execute(
            "INSERT INTO celery_durable.message (workflow, topic, idempotency_key, body, told) "
            "VALUES (%s, '', 'k', '1', false)",
            [race.id],
        )
        sent = race.blocked(race.a, lambda: race.a.send(race.id, b"2", "k"))
        assert race.c.workflows.cancel([race.id], verdict=VERDICT, patience=0) == [race.id]
    assert not sent.result()


def test_the_awaited_are_not_pruned(race: Race) -> None:
    """However long ago they finished: who awaits them hasn't been told."""
    fence = race.claimed()
    race.b.publish("target")
    race.a.awaits.register(fence, ["target"], ["get"], patience=0)
    race.sql.execute(
        "UPDATE celery_durable.workflow SET state = 'SUCCESS', publish_at = NULL, dispatched = true, "
        "finished_at = clock_timestamp() - interval '1 year' WHERE id = 'target'"
    )
    assert race.b.workflows.prune(kept=dict.fromkeys(FINAL, 1), limit=9, patience=0) == []
    race.b.awaits.notify(["target"], 60, patience=0)
    assert race.b.workflows.prune(kept=dict.fromkeys(FINAL, 1), limit=9, patience=0) == ["target"]
