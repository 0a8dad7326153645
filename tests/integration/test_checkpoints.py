"""Checkpoints: written once, under the fence, and loaded by every later attempt."""

from __future__ import annotations

import uuid
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from uuid import UUID

import psycopg
import pytest

from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.rig import Rig

pytestmark = pytest.mark.matrix


def test_a_step_is_recorded_and_loaded_by_the_next_attempt(rig: Rig) -> None:
    """Value, place, tries, arguments and fingerprint come with the claim."""
    fence = rig.run()
    assert rig.save(fence, "charge", {"paid": 5}, seq=1)
    assert rig.save(fence, "ship", None, seq=2)
    rig.workflows.release(fence, 60, patience=0)
    claim = rig.claim("w1", rig.node())
    assert claim is not None
    assert {key: step.seq for key, step in claim.history.items()} == {"charge": 1, "ship": 2}
    charge = claim.history["charge"]
    assert (charge.seq, charge.tries, charge.ok, charge.args, charge.fingerprint) == (1, 1, True, "1", b"fp")
    assert rig.outcomes() == {"charge": {"paid": 5}, "ship": None}


@pytest.mark.parametrize("statement", ["save", "save_slow", "save_try"])
def test_no_statement_writes_without_the_fence(rig: Rig, statement: str) -> None:
    """Another token, another attempt or another workflow: nothing is written, and the answer says so."""
    fence = rig.run()
    for wrong in (
        replace(fence, token=uuid.uuid4()),
        replace(fence, attempt=fence.attempt + 1),
        replace(fence, id="w2"),
    ):
        assert not getattr(rig, statement)(wrong)
    assert rig.sql.value("SELECT count(*) FROM celery_durable.checkpoint") == 0


@pytest.mark.parametrize("statement", ["save", "save_slow", "save_try"])
def test_a_zombie_writes_nothing_after_its_workflow_was_taken_over(rig: Rig, statement: str) -> None:
    """The new owner's history is the only one."""
    zombie = rig.run()
    rig.workflows.release(zombie, 60, patience=0)
    owner = rig.run()
    assert owner.attempt == 2
    assert not getattr(rig, statement)(zombie)
    assert rig.save(owner, value="new")
    assert not getattr(rig, statement)(zombie)
    assert rig.outcomes() == {"charge": "new"}


@pytest.mark.parametrize("state", ["SUCCESS", "FAILURE", "SUSPENDED", "ENQUEUED"])
def test_nothing_is_recorded_after_the_attempt_has_ended(rig: Rig, state: str) -> None:
    """However it ended, save for a cancellation."""
    fence = rig.run()
    if state == "SUSPENDED":
        rig.suspend(fence)
    elif state == "ENQUEUED":
        rig.workflows.release(fence, 60, patience=0)
    else:
        rig.finish(fence, state, dispatched=False)
    assert not rig.save(fence)
    assert rig.save_slow(fence) is None
    assert rig.save_try(fence) is None
    assert rig.outcomes() == {}


def test_an_outcome_never_changes(rig: Rig) -> None:
    """The first one is adopted by whoever writes it again."""
    fence = rig.run()
    assert rig.save(fence, value="first")
    assert not rig.save(fence, value="second")
    standing = rig.save_slow(fence, value="second")
    assert standing.state == "RUNNING"
    assert standing.settled.payload.data == b'"first"'
    rig.save_try(fence, tries=9)
    assert rig.outcomes() == {"charge": "first"}
    assert rig.sql.value("SELECT tries FROM celery_durable.checkpoint") == 1


def test_a_refused_duplicate_does_not_spoil_the_connection(rig: Rig) -> None:
    """The first use of the statement on a connection may be the one that fails."""
    fence = rig.run()
    rig.save_slow(fence)
    assert not rig.save(fence)
    assert rig.save(fence, "ship", seq=2)
    assert not rig.save(fence, "ship", seq=2)
    assert rig.save(fence, "notify", seq=3)


def test_a_draining_node_stops_the_fast_statement(rig: Rig) -> None:
    """The slow one records what has been done, and says that the run must be handed over."""
    fence = rig.run()
    rig.drain(fence.node)
    assert not rig.save(fence)
    standing = rig.save_slow(fence)
    assert (standing.state, standing.draining, standing.late, standing.settled) == ("RUNNING", True, False, None)
    assert rig.outcomes() == {"charge": 1}


def test_a_deadline_stops_the_fast_statement(rig: Rig) -> None:
    """The step that was running is recorded all the same."""
    fence = rig.run(timeout=3600)
    rig.age("w1", "deadline", 7200)
    assert not rig.save(fence)
    assert rig.save_slow(fence).late
    assert rig.outcomes() == {"charge": 1}


def test_a_cancellation_lets_the_running_step_record(rig: Rig) -> None:
    """Its effect has happened; the state says that nothing new may start."""
    fence = rig.run()
    assert rig.cancel() == ["w1"]
    assert not rig.save(fence)
    assert rig.save_slow(fence).state == "CANCELLED"
    assert rig.outcomes() == {"charge": 1}


def test_a_node_that_is_gone_stops_the_fast_statement_only(rig: Rig) -> None:
    """Its row may be missing after a restore: the token decides."""
    fence = rig.run()
    rig.sql.execute("DELETE FROM celery_durable.node")
    assert not rig.save(fence)
    assert rig.save_slow(fence).state == "RUNNING"


def test_failed_tries_are_kept_with_the_time_of_the_next(rig: Rig) -> None:
    """A later attempt goes on counting, and waits for what is left."""
    fence = rig.run()
    assert rig.save_try(fence, tries=1, delay=5).state == "RUNNING"
    assert rig.save_try(fence, tries=2, delay=100).state == "RUNNING"
    rig.workflows.release(fence, 60, patience=0)
    claim = rig.claim("w1", rig.node())
    assert claim is not None
    step = claim.history["charge"]
    assert (step.ok, step.tries, step.payload) == (None, 2, None)
    assert 90 < step.due_in <= 100


def test_a_settled_try_keeps_its_first_place(rig: Rig) -> None:
    """The slow statement turns the row of the tries into the outcome."""
    fence = rig.run()
    rig.save_try(fence, tries=2, delay=None)
    standing = rig.save_slow(fence, value="done")
    assert standing.settled is None
    (row,) = rig.checkpoints.of_workflow("w1", patience=0)
    assert (row.seq, row.tries, row.ok, row.wake_at) == (1, 1, True, None)


def test_an_outcome_needs_a_value(sql: Sql) -> None:
    """The database refuses a settled checkpoint without one, and an unsettled one with one."""
    insert = (
        "INSERT INTO celery_durable.checkpoint (workflow, key, seq, attempt, tries, ok, value, started_at, at)"
        " VALUES ('w', 'k', 1, 1, 1, %s, %s, clock_timestamp(), clock_timestamp())"
    )
    for ok, value in ((True, None), (False, None), (None, b"1")):
        with pytest.raises(psycopg.errors.CheckViolation, match="checkpoint_settled"):
            sql.execute(insert, ok, value)


def test_steps_of_one_workflow_at_once_do_not_wait_for_each_other(rig: Rig) -> None:
    """The lock on the workflow's row is shared."""
    fence = rig.run()
    holder = psycopg.connect(rig.sql.connection.info.dsn)
    with holder, holder.transaction():
        holder.execute("SELECT FROM celery_durable.workflow WHERE id = 'w1' FOR KEY SHARE")
        assert rig.save(fence)


def test_an_end_waits_for_a_checkpoint_on_its_way(rig: Rig) -> None:
    """So the next owner loads everything that was recorded before."""
    fence = rig.run()
    holder = psycopg.connect(rig.sql.connection.info.dsn)
    with ThreadPoolExecutor(1) as threads, holder:
        holder.execute("SELECT FROM celery_durable.workflow WHERE id = 'w1' FOR KEY SHARE")
        ending = threads.submit(rig.workflows.release, fence, 60, patience=0)
        wait_until(lambda: rig.waiting() == 1, message="the release waits for the lock")
        assert rig.state() == "RUNNING"
        holder.commit()
        assert ending.result(20) is not None
    assert rig.state() == "ENQUEUED"


def test_no_attempt_misses_an_outcome_of_an_earlier_one(rig: Rig) -> None:
    """Claims, checkpoints and releases of many workers at once, each checkpoint racing its own release."""
    nodes = [rig.node() for _ in range(4)]
    rig.start(max_crashes=1000)
    loaded: dict[int, set[str]] = {}

    def work(node: UUID) -> None:
        with ThreadPoolExecutor(1) as racing:
            while len(loaded) < 100:
                claim = rig.claim("w1", node)
                if claim is not None:
                    loaded[claim.fence.attempt] = set(claim.history)
                    late = racing.submit(rig.save, claim.fence, f"step {claim.fence.attempt}", seq=claim.fence.attempt)
                    rig.workflows.release(claim.fence, 60, patience=0)
                    late.result()

    with ThreadPoolExecutor(len(nodes)) as threads:
        for done in [threads.submit(work, node) for node in nodes]:
            done.result(60)
    recorded = {row.key: row.attempt for row in rig.checkpoints.of_workflow("w1", patience=0)}
    assert recorded, "some checkpoints came before their releases"
    for attempt, known in loaded.items():
        assert known == {key for key, recorded_by in recorded.items() if recorded_by < attempt}
