"""The life of a workflow: every arrow of the state machine by its statement, and no other."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import psycopg
import pytest

from celery_durable import states
from celery_durable.serialization import Payload
from celery_durable.store import Letter
from celery_durable.store.rows import Fence, Published, StoredMessage, Wakers
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.rig import CODEC, VERDICT, Rig

pytestmark = pytest.mark.matrix


def reach(rig: Rig, state: str, **facts: Any) -> Fence:
    """Bring the workflow w1 into a state; the fence is that of its last attempt."""
    node = rig.node()
    rig.start(**facts)
    if state == states.ENQUEUED:
        return Fence("w1", 0, uuid.uuid4(), node)
    fence = rig.run(node=node)
    if state == states.SUSPENDED:
        assert rig.suspend(fence, 0)
    elif state == states.CANCELLED:
        assert rig.cancel() == ["w1"]
    elif state != states.RUNNING:
        assert rig.finish(fence, state, dispatched=False)
    assert rig.state() == state
    return fence


def again(rig: Rig, fence: Fence, seconds: float = 0) -> bool:
    message = StoredMessage("w1", None, fence.attempt, '{"new": 1}', b"[1]", "application/json", "utf-8")
    return rig.workflows.again(fence, message, 0, seconds, patience=0)


def rescue_of_a_silent_node(rig: Rig, fence: Fence) -> Any:
    rig.witness()
    rig.silence(fence.node)
    return rig.rescue()


def suspend_after_an_arrival(rig: Rig, fence: Fence) -> Any:
    letter = Letter("w1", "t", uuid.uuid4().hex, Payload(b"1"))
    rig.store.messages.send(letter, 60, patience=0)
    return rig.suspend(fence, wakers=Wakers(topics=frozenset({"t"})))


def send(rig: Rig, topic: str = "t") -> None:
    letter = Letter("w1", topic, uuid.uuid4().hex, Payload(b"1"))
    assert rig.store.messages.send(letter, 60, patience=0)[0]


def rescue_once_too_often(rig: Rig, fence: Fence) -> Any:
    rig.update("w1", "max_crashes = 0")
    return rig.rescue(fence.node, ["w1"])


STATEMENTS: dict[str, Callable[[Rig, Fence], Any]] = {
    "publish": lambda rig, fence: rig.publish(),
    "unsent": lambda rig, fence: rig.workflows.unsent(["w1"], patience=0),
    "leave_to_others": lambda rig, fence: rig.workflows.leave_to_others({"w1": 3.0}, patience=0),
    "claim": lambda rig, fence: rig.claim("w1", fence.node),
    "finish as SUCCESS": lambda rig, fence: rig.finish(fence, "SUCCESS"),
    "finish as FAILURE": lambda rig, fence: rig.finish(fence, "FAILURE"),
    "finish as DEAD": lambda rig, fence: rig.finish(fence, "DEAD"),
    "suspend": lambda rig, fence: rig.suspend(fence),
    "suspend after an arrival": suspend_after_an_arrival,
    "release": lambda rig, fence: rig.workflows.release(fence, 60, patience=0),
    "again": again,
    "expired": lambda rig, fence: rig.workflows.expired(["w1"], verdict=VERDICT, patience=0),
    "rescue of a silent node": rescue_of_a_silent_node,
    "rescue of a lost process": lambda rig, fence: rig.rescue(fence.node, ["w1"]),
    "rescue once too often": rescue_once_too_often,
    "hand over": lambda rig, fence: rig.workflows.hand_over(fence.node, ["w1"], patience=0),
    "wake": lambda rig, fence: rig.workflows.wake(limit=100, patience=0),
    "expire": lambda rig, fence: rig.cancel(),
    "republish": lambda rig, fence: rig.republish(),
    "redispatch": lambda rig, fence: rig.redispatch(),
}
MOVES = {
    ("claim", "ENQUEUED"): "RUNNING",
    ("finish as SUCCESS", "RUNNING"): "SUCCESS",
    ("finish as FAILURE", "RUNNING"): "FAILURE",
    ("finish as DEAD", "RUNNING"): "DEAD",
    ("suspend", "RUNNING"): "SUSPENDED",
    ("suspend after an arrival", "RUNNING"): "ENQUEUED",
    ("release", "RUNNING"): "ENQUEUED",
    ("again", "RUNNING"): "SUSPENDED",
    ("expired", "ENQUEUED"): "CANCELLED",
    ("rescue of a silent node", "RUNNING"): "ENQUEUED",
    ("rescue of a lost process", "RUNNING"): "ENQUEUED",
    ("rescue once too often", "RUNNING"): "DEAD",
    ("hand over", "RUNNING"): "ENQUEUED",
    ("wake", "SUSPENDED"): "ENQUEUED",
    ("expire", "ENQUEUED"): "CANCELLED",
    ("expire", "RUNNING"): "CANCELLED",
    ("expire", "SUSPENDED"): "CANCELLED",
}
#: The way back from these ends has no statement yet.
RESUMABLE = {states.FAILURE, states.CANCELLED, states.DEAD}


def test_the_statements_make_every_allowed_transition() -> None:
    """And the table below tries none that isn't allowed."""
    made = {(old, new) for (_, old), new in MOVES.items()}
    allowed = {(old, new) for old, news in states.TRANSITIONS.items() for new in news if old not in RESUMABLE | {None}}
    assert made == allowed


@pytest.mark.parametrize("statement", STATEMENTS)
def test_a_statement_moves_a_workflow_only_along_its_arrow(rig: Rig, statement: str) -> None:
    """In every other state it does nothing, even with the fence of the last attempt."""
    for state in sorted(states.ALL):
        fence = reach(rig, state)
        before = rig.row()
        STATEMENTS[statement](rig, fence)
        after, expected = rig.row(), MOVES.get((statement, state), state)
        assert after.state == expected, f"{statement} of a workflow that is {state}"
        if expected == state:
            unchanged = after.attempt == before.attempt and (after.finished_at is None) == (before.finished_at is None)
            assert unchanged, f"{statement} of a workflow that is {state}"
        rig.clear()


@pytest.mark.parametrize("statement", ["finish as SUCCESS", "suspend", "release", "again"])
def test_what_ends_an_attempt_needs_its_fence(rig: Rig, statement: str) -> None:
    """Another token or attempt ends nothing."""
    fence = reach(rig, states.RUNNING)
    assert not STATEMENTS[statement](rig, replace(fence, token=uuid.uuid4()))
    assert not STATEMENTS[statement](rig, replace(fence, attempt=9))
    assert rig.state() == states.RUNNING
    assert STATEMENTS[statement](rig, fence)


IMPOSSIBLE = [
    ("ENQUEUED", "state = 'LOST', publish_at = NULL", "workflow_state"),
    ("ENQUEUED", "publish_at = NULL", "workflow_enqueued"),
    ("ENQUEUED", "state = 'RUNNING', publish_at = NULL", "workflow_running"),
    ("RUNNING", "publish_at = clock_timestamp()", "workflow_enqueued"),
    ("RUNNING", "node = NULL", "workflow_running"),
    ("RUNNING", "token = NULL", "workflow_running"),
    ("RUNNING", "claimed_at = NULL", "workflow_running"),
    ("RUNNING", "state = 'SUSPENDED'", "workflow_suspended"),
    ("RUNNING", "state = 'SUCCESS'", "workflow_final"),
    ("RUNNING", "finished_at = clock_timestamp(), dispatched = true", "workflow_final"),
    ("RUNNING", "state = 'SUCCESS', finished_at = clock_timestamp()", "workflow_dispatched"),
    ("SUCCESS", "finished_at = NULL, dispatched = NULL", "workflow_final"),
    ("SUCCESS", "dispatched = NULL", "workflow_dispatched"),
]


def test_the_database_itself_refuses_an_impossible_row(rig: Rig) -> None:
    """Whatever code writes it."""
    for state, change, constraint in IMPOSSIBLE:
        reach(rig, state)
        with pytest.raises(psycopg.errors.CheckViolation, match=constraint):
            rig.update("w1", change)
        rig.clear()


# Publish


def test_an_id_starts_one_workflow(rig: Rig) -> None:
    """The second start changes nothing of the first, not even its message."""
    first = rig.publish(body=b"first")
    assert first.born
    assert first.published_at is not None
    assert rig.publish(body=b"second") == Published(born=False)
    assert rig.sql.value("SELECT body FROM celery_durable.input") == b"first"
    assert rig.workflows.names_of(["w1", "w2"], patience=0) == {"w1": "order"}


def test_many_callers_start_one_workflow(rig: Rig) -> None:
    """At the same moment, from any number of connections."""
    with ThreadPoolExecutor(10) as threads:
        answers = list(threads.map(lambda number: rig.publish(body=b"%d" % number), range(10)))
    assert sum(answer.born for answer in answers) == 1


def test_a_delayed_start_is_sent_when_it_is_due(rig: Rig) -> None:
    """Until then no message is on its way; the database waits."""
    assert rig.publish(delay=100) == Published(born=True)
    assert rig.republish() == []
    due = rig.workflows.next_due(patience=0)
    assert due is not None
    assert 90 < due <= 100
    rig.age("w1", "publish_at", 101)
    assert rig.republish() == ["w1"]


def test_a_refused_message_is_sent_at_the_next_sweep(rig: Rig) -> None:
    """It isn't waited for as one that is on its way."""
    rig.start()
    assert rig.republish() == []
    rig.workflows.unsent(["w1"], patience=0)
    assert rig.republish() == ["w1"]
    assert rig.republish() == []


def test_a_message_that_was_left_to_others_is_sent_once_more(rig: Rig) -> None:
    """After its delay, and not after that which has doubled while its messages seemed to be lost."""
    rig.start()
    rig.update("w1", "publishes = 5")
    rig.workflows.leave_to_others({"w1": 100.0, "unknown": 100.0}, patience=0)
    assert rig.republish() == []
    assert 90 < (rig.workflows.next_due(patience=0) or 0) <= 100
    rig.age("w1", "publish_at", 101)
    assert rig.republish(republish_after=60) == ["w1"]
    assert rig.sql.value("SELECT publish_at - published_at < interval '61 s' FROM celery_durable.workflow")


def test_an_outcome_whose_message_was_left_to_others_is_sent_at_the_next_sweep(rig: Rig) -> None:
    """Whether it is to be delivered, or has been, a final state stays."""
    rig.finish(rig.run(), dispatched=False)
    rig.update("w1", "node = NULL, published_at = clock_timestamp(), publishes = 5")
    assert rig.redispatch() == []
    rig.workflows.leave_to_others({"w1": 3.0}, patience=0)
    assert (rig.state(), rig.redispatch()) == ("SUCCESS", ["w1"])
    rig.update("w1", "dispatched = true")
    rig.workflows.leave_to_others({"w1": 3.0}, patience=0)
    assert rig.row().published_at is not None


def test_a_stale_message_that_was_left_to_others_leaves_a_run_alone(rig: Rig) -> None:
    """Its workflow runs, or waits, by now."""
    fence = rig.run()
    rig.workflows.leave_to_others({"w1": 3.0}, patience=0)
    assert rig.state() == "RUNNING"
    rig.suspend(fence, 100)
    rig.workflows.leave_to_others({"w1": 3.0}, patience=0)
    assert (rig.state(), rig.row().publish_at) == ("SUSPENDED", None)


# Claim


def test_a_claim_counts_and_marks_the_attempt(rig: Rig) -> None:
    """The message needs no second sending, and the first start is kept."""
    node = rig.node()
    rig.start()
    first = rig.claim("w1", node)
    assert first is not None
    assert (first.fence.attempt, first.crashes, first.history) == (1, 0, {})
    row = rig.row()
    assert (row.node, row.token, row.publish_at, row.published_at) == (node, first.fence.token, None, None)
    rig.workflows.release(first.fence, 60, patience=0)
    assert rig.run().attempt == 2
    assert rig.row().started_at == row.started_at


def test_the_same_token_again_is_the_same_attempt(rig: Rig) -> None:
    """A claim whose answer was lost is made again, and loads what it would have loaded."""
    node = rig.node()
    rig.start()
    token = uuid.uuid4()
    first, again = rig.claim("w1", node, token), rig.claim("w1", node, token)
    assert first == again
    assert rig.claim("w1", node) is None
    assert rig.row().attempt == 1


def test_the_same_token_is_void_once_the_attempt_has_ended(rig: Rig) -> None:
    """It doesn't claim a second time."""
    node, token = rig.node(), uuid.uuid4()
    rig.start()
    claim = rig.claim("w1", node, token)
    assert claim is not None
    rig.finish(claim.fence)
    assert rig.claim("w1", node, token) is None


def test_one_of_many_gets_the_claim(rig: Rig) -> None:
    """A doubled message runs once."""
    nodes = [rig.node() for _ in range(10)]
    rig.start()
    with ThreadPoolExecutor(10) as threads:
        claims = list(threads.map(lambda node: rig.claim("w1", node), nodes))
    assert sum(claim is not None for claim in claims) == 1


def test_a_claim_that_waited_for_another_attempt_is_refused(rig: Rig) -> None:
    """Its snapshot is older than that attempt's checkpoints."""
    rig.start()
    node = rig.node()
    holder = psycopg.connect(rig.sql.connection.info.dsn)
    with ThreadPoolExecutor(1) as threads, holder:
        holder.execute("UPDATE celery_durable.workflow SET attempt = attempt + 1 WHERE id = 'w1'")
        claiming = threads.submit(rig.claim, "w1", node)
        wait_until(lambda: rig.waiting() == 1, message="the claim waits for the row")
        holder.commit()
        assert claiming.result(20) is None
    assert rig.claim("w1", node) is not None


def test_a_draining_or_unknown_node_claims_nothing(rig: Rig) -> None:
    """The message goes to a worker that stays."""
    rig.start()
    draining = rig.node()
    rig.drain(draining)
    assert rig.claim("w1", draining) is None
    assert rig.claim("w1", uuid.uuid4()) is None
    assert rig.state() == states.ENQUEUED


def test_a_claim_is_for_a_task(rig: Rig) -> None:
    """A message of another task with this id gets nothing."""
    rig.start()
    assert rig.claim("w1", rig.node(), name="refund") is None


def test_a_late_workflow_is_not_claimed(rig: Rig) -> None:
    """Its deadline is kept from the first start on, and a new attempt doesn't prolong it."""
    fence = rig.run(timeout=100)
    deadline = rig.row().deadline
    rig.workflows.release(fence, 60, patience=0)
    fence = rig.run()
    assert rig.row().deadline == deadline
    rig.workflows.release(fence, 60, patience=0)
    rig.age("w1", "deadline", 101)
    assert rig.claim("w1", rig.node()) is None


def test_a_row_that_still_has_a_runner_is_not_claimed(rig: Rig) -> None:
    """At most one body at a time: only when that runner's node is silent is it taken away, and can be had."""
    rig.start()
    owner = rig.node()
    rig.update("w1", "node = %s", owner)
    assert rig.claim("w1", rig.node()) is None
    assert rig.row().node == owner
    rig.silence(owner)
    assert rig.claim("w1", rig.node()) is None
    assert rig.row().node is None
    assert rig.claim("w1", rig.node()) is not None


def test_a_look_tells_how_a_run_stands(rig: Rig) -> None:
    """Whose it is, and what its node and deadline say."""
    fence = rig.run(timeout=100)
    look = rig.workflows.look(fence, patience=0)
    assert look is not None
    assert (look.name, look.state, look.mine, look.beating, look.draining, look.late, look.undelivered) == (
        "order", "RUNNING", True, True, False, False, False,
    )  # fmt: skip
    other = rig.workflows.look(replace(fence, token=uuid.uuid4(), node=uuid.uuid4()), patience=0)
    assert other is not None
    assert (other.mine, other.beating) == (False, False)
    rig.drain(fence.node)
    rig.age("w1", "deadline", 101)
    late = rig.workflows.look(fence, patience=0)
    assert late is not None
    assert (late.draining, late.late) == (True, True)
    assert rig.workflows.look(replace(fence, id="w2"), patience=0) is None


# The end of an attempt


def test_an_outcome_is_kept_and_never_changed(rig: Rig) -> None:
    """The second finish is told that the run isn't its own any more."""
    fence = rig.run()
    assert rig.finish(fence, value={"paid": 5})
    assert not rig.finish(fence, value="other")
    assert not rig.finish(fence, "FAILURE", "other")
    row = rig.workflows.by_id("w1", patience=0)
    assert row is not None
    assert row.payload is not None
    assert (row.ok, CODEC.decode(row.payload, "it")) == (True, {"paid": 5})
    assert (row.dispatched, row.node) == (True, None)


def test_an_outcome_that_celery_has_to_deliver_keeps_its_node(rig: Rig) -> None:
    """The node confirms it, or is found to be gone."""
    fence = rig.run()
    rig.finish(fence, dispatched=False)
    assert (rig.row().dispatched, rig.row().node) == (False, fence.node)


def test_a_run_past_its_deadline_has_no_other_outcome(rig: Rig) -> None:
    """It is cancelled, even if its last statement would have been a moment later."""
    fence = rig.run(timeout=100)
    rig.age("w1", "deadline", 101)
    assert not rig.finish(fence)
    assert rig.workflows.expire(verdict=VERDICT, limit=10, patience=0) == ["w1"]
    row = rig.workflows.by_id("w1", patience=0)
    assert row is not None
    assert (row.state, row.ok, row.payload) == ("CANCELLED", False, VERDICT)


def test_a_cancelled_run_keeps_its_node_and_token(rig: Rig) -> None:
    """So that its running step may be recorded."""
    fence = reach(rig, states.CANCELLED)
    assert (rig.row().node, rig.row().token, rig.row().dispatched) == (fence.node, fence.token, False)


def test_a_suspension_gives_the_node_back(rig: Rig) -> None:
    """And says for what and until when it waits."""
    fence = rig.run()
    assert rig.suspend(fence, 100)
    row = rig.row()
    assert (row.node, row.token, row.waiting_for, row.publish_at) == (None, None, "sleep", None)
    assert rig.workflows.wake(limit=10, patience=0) == []
    due = rig.workflows.next_due(patience=0)
    assert due is not None
    assert 90 < due <= 100
    rig.age("w1", "wake_at", 101)
    assert rig.workflows.wake(limit=10, patience=0) == ["w1"]
    assert rig.republish() == ["w1"]
    assert rig.run().attempt == 2
    assert (rig.row().wake_at, rig.row().waiting_for) == (None, None)


def test_a_suspension_that_has_missed_an_arrival_goes_on_at_once(rig: Rig) -> None:
    """No wake-up is lost between the last look and the suspension."""
    fence = rig.run()
    send(rig)
    assert rig.suspend(fence, wakers=Wakers(topics=frozenset({"t"})))
    assert rig.state() == states.ENQUEUED


def test_a_suspension_is_not_ended_by_what_it_does_not_wait_for(rig: Rig) -> None:
    """A message of another topic stays where it is."""
    fence = rig.run()
    send(rig, "other")
    assert rig.suspend(fence, wakers=Wakers(topics=frozenset({"t"})))
    assert rig.state() == states.SUSPENDED
    send(rig, "other")
    assert rig.state() == states.SUSPENDED
    send(rig)
    assert rig.state() == states.ENQUEUED


def test_a_wait_without_an_end_is_woken_by_nobody(rig: Rig) -> None:
    """It has no time."""
    rig.suspend(rig.run(), None)
    assert rig.workflows.wake(limit=10, patience=0) == []
    assert rig.workflows.next_due(patience=0) is None


def test_a_release_returns_the_message_that_goes_on(rig: Rig) -> None:
    """It is sent by the one who releases, and again by recovery if it gets lost."""
    rig.start(body=b"[42]", envelope='{"headers": 1}')
    fence = rig.run()
    message = rig.workflows.release(fence, 30, patience=0)
    assert message is not None
    assert (message.workflow_id, message.attempt, message.body, message.envelope) == (
        "w1", 1, b"[42]", '{"headers": 1}',
    )  # fmt: skip
    assert message.published_at == rig.row().published_at
    assert rig.republish() == []
    assert rig.workflows.release(fence, 30, patience=0) is None


def test_celerys_retry_replaces_the_message_and_forgets_failed_steps(rig: Rig) -> None:
    """The completed steps stay."""
    fence = rig.run()
    rig.save(fence, "charge", 5, seq=1)
    rig.save_try(fence, "ship")
    rig.sql.execute(
        "INSERT INTO celery_durable.checkpoint (workflow, key, seq, attempt, tries, ok, value, started_at, at)"
        " VALUES ('w1', 'bad', 3, 1, 1, false, '{}', clock_timestamp(), clock_timestamp())"
    )
    assert again(rig, fence, 100)
    assert set(rig.outcomes()) == {"charge"}
    assert rig.sql.value("SELECT count(*) FROM celery_durable.checkpoint") == 1
    assert rig.sql.one("SELECT envelope, body FROM celery_durable.input") == ('{"new": 1}', b"[1]")
    assert (rig.row().waiting_for, rig.row().publish_at) == ("retry", None)


def test_expires_is_about_the_first_start_only(rig: Rig) -> None:
    """A workflow that has run once goes on, whatever Celery discards."""
    fence = rig.run()
    rig.workflows.release(fence, 60, patience=0)
    rig.start("w2")
    assert rig.workflows.expired(["w1", "w2"], verdict=VERDICT, patience=0) == ["w2"]
    assert (rig.state("w1"), rig.state("w2")) == ("ENQUEUED", "CANCELLED")
    assert rig.row("w2").dispatched is False, "whoever found it expired delivers that"


# Lists


def test_only_the_latest_message_claims(rig: Rig) -> None:
    """After Celery's retry of a workflow a doubled older message, with the older arguments, is refused."""
    rig.start("w1")
    rig.update("w1", "retries = 1")
    assert rig.claim("w1", rig.node()) is None
    claim = rig.workflows.claim("w1", "order", uuid.uuid4(), rig.node(), retries=1, patience=0)
    assert claim is not None


def test_a_silent_node_claims_nothing(rig: Rig) -> None:
    """It would lose the run after a lease, and a crash would be counted."""
    rig.start("w1")
    node = rig.node()
    rig.silence(node)
    assert rig.claim("w1", node) is None
    rig.beat(node)
    assert rig.claim("w1", node) is not None
