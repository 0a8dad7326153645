"""The duties of the recovery: what each finds, what it leaves alone, and what it survives."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Any

import psycopg
import pytest

from celery_durable import states
from celery_durable.engine.context import Engine
from celery_durable.engine.observer import Observer, Observers
from celery_durable.recovery import BATCH, Recovery
from celery_durable.store.rows import StoredMessage
from tests.fixtures.rig import CODEC, LEASE, VERDICT, Rig

pytestmark = pytest.mark.matrix


class Found(Observer):
    def __init__(self) -> None:
        self.ids: dict[str, list[str]] = {}

    def recovered(self, duty: str, workflow_ids: list[str]) -> None:
        self.ids.setdefault(duty, []).extend(workflow_ids)


class Broker:
    """Takes messages, or a number of them."""

    def __init__(self, takes: int = 10_000) -> None:
        self.takes = takes
        self.sent: list[str] = []

    def __call__(self, messages: list[StoredMessage]) -> Collection[str]:
        ids = [message.workflow_id for message in messages]
        taken, refused = ids[: self.takes], ids[self.takes :]
        self.sent += taken
        self.takes -= len(taken)
        return refused


def recovery(rig: Rig, send: Callable[[list[StoredMessage]], Collection[str]] | None = None) -> Recovery:
    engine = Engine(
        store=rig.store, codec=CODEC, observers=Observers(), lease=LEASE, suspend_after=5, republish_after=60,
        retention=60, nondeterminism="error",
    )  # fmt: skip
    return Recovery(engine, rig.store, send or Broker(), kept=dict.fromkeys(states.FINAL, 60), patience=0)


def texts(moment: datetime, seconds: float = 0) -> str:
    return (moment + timedelta(seconds=seconds)).isoformat(timespec="microseconds")


# Rescue


def test_a_run_of_a_silent_node_is_rescued_if_a_witness_can_tell(rig: Rig) -> None:
    """The crash is counted, and the message is sent at once."""
    fence = rig.run()
    rig.silence(fence.node)
    rig.witness()
    assert rig.rescue() == [("w1", states.ENQUEUED)]
    row = rig.row()
    assert (row.crashes, row.node, row.token) == (1, None, None)
    assert rig.republish() == ["w1"]


def test_without_a_witness_nobody_is_rescued(rig: Rig) -> None:
    """After the database was away for longer than a lease every node looks silent."""
    fence = rig.run()
    rig.silence(fence.node)
    newcomer = rig.node()
    assert rig.rescue() == []
    rig.silence(rig.witness())
    assert rig.rescue() == [], "a witness that is silent itself can't tell"
    rig.sql.execute("UPDATE celery_durable.node SET unbroken = unbroken - interval '9 s' WHERE id = %s", newcomer)
    assert rig.rescue() == [], "a lease isn't over yet"


def test_a_node_that_was_seen_within_its_lease_keeps_its_runs(rig: Rig) -> None:
    """A late heartbeat isn't a death."""
    fence = rig.run()
    rig.silence(fence.node, LEASE - 2)
    rig.witness()
    assert rig.rescue() == []


def test_a_young_checkpoint_speaks_for_a_silent_node(rig: Rig) -> None:
    """A worker whose node thread hangs still works."""
    fence = rig.run()
    rig.silence(fence.node)
    rig.witness()
    rig.save(fence)
    assert rig.rescue() == []
    rig.silence(fence.node, LEASE + 1)
    assert rig.rescue() == [("w1", states.ENQUEUED)]


def test_a_fresh_claim_of_a_silent_node_is_not_rescued_yet(rig: Rig) -> None:
    """A pool process may have claimed while its node's heartbeats are held up."""
    node = rig.node()
    rig.run(node=node)
    rig.silence(node)
    rig.update("w1", "claimed_at = clock_timestamp()")
    rig.witness()
    assert rig.rescue() == []


def test_a_run_of_a_node_without_a_row_is_rescued_after_a_lease(rig: Rig) -> None:
    """Somebody has deleted it."""
    fence = rig.run()
    rig.silence(fence.node, LEASE + 1)
    rig.sql.execute("DELETE FROM celery_durable.node")
    rig.witness()
    assert rig.rescue() == [("w1", states.ENQUEUED)]


def test_what_a_living_node_does_not_list_is_rescued(rig: Rig) -> None:
    """Without any witness: the node itself says so."""
    node = uuid.uuid4()
    seen = rig.beat(node).seen
    lost, kept = rig.run("lost", node), rig.run("kept", node)
    rig.beat(node, ["kept"], as_of=seen)
    assert rig.rescue() == [], "both were claimed after the list's time"
    rig.beat(node, ["kept"], as_of=rig.beat(node, ["kept"], as_of=seen).seen)
    assert rig.rescue() == [("lost", states.ENQUEUED)]
    assert (lost.attempt, rig.state("kept"), kept.attempt) == (1, states.RUNNING, 1)


def test_lost_processes_are_named_by_their_own_node_only(rig: Rig) -> None:
    """A name alone takes no other node's run away."""
    fence = rig.run()
    assert rig.rescue(rig.node(), ["w1"]) == []
    assert rig.rescue(None, ["w1"]) == []
    assert rig.rescue(fence.node, ["w2"]) == []
    assert rig.rescue(fence.node, ["w1"]) == [("w1", states.ENQUEUED)]


def crash(rig: Rig) -> str:
    fence = rig.run()
    ((_, state),) = rig.rescue(fence.node, ["w1"])
    return state


def test_too_many_crashes_end_in_dead_with_the_reason(rig: Rig) -> None:
    """max_crashes of them are survived, the next one isn't."""
    rig.start(max_crashes=2)
    assert [crash(rig) for _ in range(3)] == [states.ENQUEUED, states.ENQUEUED, states.DEAD]
    row = rig.workflows.by_id("w1", patience=0)
    assert row is not None
    assert (row.crashes, row.ok, row.payload, row.dispatched) == (3, False, VERDICT, False)


@pytest.mark.parametrize("end", ["release", "suspend", "hand over", "again", "crash"])
def test_crashes_are_counted_since_the_last_new_checkpoint(rig: Rig, end: str) -> None:
    """However the attempt that made it ends."""
    rig.start(max_crashes=3)
    crash(rig)
    crash(rig)
    fence = rig.run()
    assert rig.row().crashes == 2
    rig.save(fence)
    ends: dict[str, Callable[[], Any]] = {
        "release": lambda: rig.workflows.release(fence, 60, patience=0),
        "suspend": lambda: (rig.suspend(fence, 0), rig.workflows.wake(limit=1, patience=0)),
        "hand over": lambda: rig.workflows.hand_over(fence.node, ["w1"], patience=0),
        "again": lambda: (
            rig.workflows.again(fence, StoredMessage("w1", None, 1, "{}", b"", "", ""), 0, 0, patience=0),
            rig.workflows.wake(limit=1, patience=0),
        ),
        "crash": lambda: rig.rescue(fence.node, ["w1"]),
    }
    ends[end]()
    assert rig.row().crashes == (end == "crash")
    crash(rig)
    assert rig.row().crashes == 1 + (end == "crash")


@pytest.mark.parametrize("end", ["release", "suspend", "hand over"])
def test_an_end_that_is_no_crash_counts_nothing(rig: Rig, end: str) -> None:
    """And without a new checkpoint it forgives nothing either."""
    rig.start()
    crash(rig)
    fence = rig.run()
    rig.save_try(fence)
    ends: dict[str, Callable[[], Any]] = {
        "release": lambda: rig.workflows.release(fence, 60, patience=0),
        "suspend": lambda: rig.suspend(fence, 0),
        "hand over": lambda: rig.workflows.hand_over(fence.node, ["w1"], patience=0),
    }
    ends[end]()
    assert rig.row().crashes == 1


def test_a_hand_over_is_for_the_named_runs_of_that_node(rig: Rig) -> None:
    """Other runs of it go on, and so do others' runs."""
    node = rig.node()
    rig.run("w1", node)
    rig.run("w2", node)
    rig.run("w3")
    assert rig.workflows.hand_over(node, ["w1", "w3"], patience=0) == ["w1"]
    assert [rig.state(each) for each in ("w1", "w2", "w3")] == ["ENQUEUED", "RUNNING", "RUNNING"]
    assert rig.republish() == ["w1"]


# Republish


def test_a_message_on_its_way_is_left_alone(rig: Rig) -> None:
    """Until its time has come."""
    rig.start()
    assert rig.republish() == []


def test_what_was_overtaken_is_sent_again(rig: Rig) -> None:
    """A later message of its queue was taken, so its own is lost; of another queue that says nothing."""
    rig.start("w1")
    rig.start("w2", queue="slow")
    rig.start("w3")
    for each in ("w1", "w2", "w3"):
        rig.age(each, "publish_at", 100)
    rig.update("w3", "published_at = clock_timestamp() + interval '1 h'")
    rig.node(accepted={"celery": texts(rig.row("w1").published_at, 1), "other": texts(rig.row().published_at, 9999)})
    # One probe of each queue that stands, beside those that were overtaken.
    assert set(rig.republish()) == {"w1", "w2"}


def test_a_standing_queue_gets_exactly_one_probe(rig: Rig) -> None:
    """However many wait in it, and however often the duty runs."""
    for number in range(5):
        rig.start(f"w{number}")
        rig.age(f"w{number}", "publish_at", 1000 - number)
    rig.start("s1", queue="slow")
    rig.age("s1", "publish_at", 100)
    assert sorted(rig.republish()) == ["s1", "w0"]
    assert rig.republish() == []
    rig.age("w0", "publish_at", 60)
    rig.update("w1", "publish_at = clock_timestamp() - interval '1 h'")
    assert len(rig.republish()) == 1


def test_many_sweeps_at_once_send_each_message_once(rig: Rig) -> None:
    """Rows that another one has locked are skipped."""
    for number in range(50):
        rig.start(f"w{number}")
    rig.workflows.unsent([f"w{number}" for number in range(50)], patience=0)
    with ThreadPoolExecutor(5) as threads:
        sent = [each for ids in threads.map(lambda _: rig.republish(limit=100), range(5)) for each in ids]
    assert sorted(sent) == sorted(f"w{number}" for number in range(50))


def test_the_distance_doubles_up_to_an_hour(rig: Rig) -> None:
    """A workflow that nobody takes isn't sent for ever at the same rate."""
    rig.start()
    distances = []
    for _ in range(9):
        rig.update("w1", "publish_at = clock_timestamp() - interval '1 s'")
        assert rig.republish(republish_after=60) == ["w1"]
        distances.append(rig.sql.value(
            "SELECT round(extract(epoch FROM publish_at - published_at))::int FROM celery_durable.workflow"
        ))  # fmt: skip
    assert distances == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]


def test_a_claim_starts_the_distance_anew(rig: Rig) -> None:
    """It was for a message that is gone."""
    rig.start()
    rig.update("w1", "publish_at = clock_timestamp(), publishes = 7")
    rig.workflows.release(rig.run(), 60, patience=0)
    assert rig.row().publishes == 0


def test_a_distance_that_is_longer_than_an_hour_by_choice_is_kept(rig: Rig) -> None:
    """The cap doesn't shorten what the user has set."""
    rig.start()
    rig.update("w1", "publish_at = clock_timestamp()")
    assert rig.republish(republish_after=7200) == ["w1"]
    distance = "SELECT round(extract(epoch FROM publish_at - published_at))::int FROM celery_durable.workflow"
    assert rig.sql.value(distance) == 7200


def test_a_broker_that_takes_nothing_leaves_all_unsent(rig: Rig) -> None:
    """The next sweep tries again, and nothing counts as published."""
    rig.start()
    rig.workflows.unsent(["w1"], patience=0)
    assert recovery(rig, Broker(takes=0)).republish() == 0
    assert rig.row().published_at is None
    broker = Broker()
    assert recovery(rig, broker).republish() == 1
    assert broker.sent == ["w1"]


# Redispatch, adopt, confirm


def test_an_outcome_of_a_gone_owner_is_delivered_by_exactly_one(rig: Rig) -> None:
    """Its message is sent once more; who takes it gets the stored outcome."""
    fence = rig.run()
    rig.finish(fence, value="paid", dispatched=False)
    assert rig.redispatch() == []
    rig.silence(fence.node)
    assert rig.redispatch() == [], "nobody can tell that its owner is gone"
    rig.witness()
    assert rig.redispatch() == ["w1"]
    assert rig.redispatch() == []
    nodes = [rig.node() for _ in range(5)]
    with ThreadPoolExecutor(5) as threads:
        adopted = list(threads.map(lambda node: rig.workflows.adopt("w1", "order", node, patience=0), nodes))
    (outcome,) = [each for each in adopted if each is not None]
    assert (outcome.state, outcome.ok, CODEC.decode(outcome.payload, "it")) == ("SUCCESS", True, "paid")
    (owner,) = [node for node, each in zip(nodes, adopted, strict=True) if each is not None]
    rig.workflows.confirm(owner, ["w1"], patience=0)
    assert (rig.row().dispatched, rig.row().node) == (True, None)


def test_a_redispatch_that_nobody_took_is_sent_again(rig: Rig) -> None:
    """After the usual time."""
    rig.finish(rig.run(), dispatched=False)
    rig.update("w1", "node = NULL, published_at = clock_timestamp()")
    assert rig.redispatch(republish_after=60) == []
    rig.age("w1", "published_at", 61)
    assert rig.redispatch(republish_after=60) == ["w1"]


def test_an_outcome_that_its_living_node_does_not_list_is_delivered_again(rig: Rig) -> None:
    """Its pool process died between the commit and Celery's part."""
    node = uuid.uuid4()
    rig.beat(node)
    rig.finish(rig.run(node=node), dispatched=False)
    seen = rig.beat(node, ["w1"]).seen
    rig.beat(node, ["w1"], as_of=seen)
    assert rig.redispatch() == []
    rig.beat(node, [], as_of=seen)
    assert rig.redispatch() == ["w1"]


def test_an_outcome_is_confirmed_by_its_owner_only(rig: Rig) -> None:
    """And adopted only under its own task's name, once nobody owns it."""
    fence = rig.run()
    rig.finish(fence, dispatched=False)
    rig.workflows.confirm(rig.node(), ["w1"], patience=0)
    assert rig.row().dispatched is False
    assert rig.workflows.adopt("w1", "order", rig.node(), patience=0) is None
    rig.update("w1", "node = NULL")
    assert rig.workflows.adopt("w1", "refund", rig.node(), patience=0) is None
    rig.update("w1", "node = %s", fence.node)
    rig.workflows.confirm(fence.node, ["w1", "w2"], patience=0)
    assert rig.row().dispatched is True


def test_a_dead_workflow_is_delivered_too(rig: Rig) -> None:
    """Its error callbacks wait for it."""
    rig.start(max_crashes=0)
    assert crash(rig) == states.DEAD
    assert rig.redispatch() == ["w1"]
    outcome = rig.workflows.adopt("w1", "order", rig.node(), patience=0)
    assert outcome is not None
    assert (outcome.state, outcome.ok) == ("DEAD", False)


# Expire, wake, prune


def test_prune_goes_by_the_final_state(rig: Rig) -> None:
    """Each state has its age; what has none is kept for ever, and isn't counted either."""
    for state in ("SUCCESS", "FAILURE", "CANCELLED"):
        for each, age in (("older", 1000), ("old", 100)):
            rig.finish(rig.run(f"{state}-{each}"), "SUCCESS" if state == "SUCCESS" else "FAILURE")
            rig.age(f"{state}-{each}", "finished_at", age)
            rig.update(f"{state}-{each}", "state = %s", state)
    kept = {"SUCCESS": 60.0, "FAILURE": None, "CANCELLED": 500.0}
    assert rig.workflows.count_old(kept=kept, most=10, patience=0) == 3
    assert rig.workflows.count_old(kept=kept, most=2, patience=0) == 2
    assert rig.workflows.prune(kept=kept, limit=1, patience=0) == ["SUCCESS-older"]
    assert rig.workflows.prune(kept=kept, limit=9, patience=0) == ["SUCCESS-old", "CANCELLED-older"]
    assert rig.workflows.prune(kept={"SUCCESS": None}, limit=9, patience=0) == []
    left = rig.sql.all("SELECT id FROM celery_durable.workflow ORDER BY id")
    assert [row.id for row in left] == ["CANCELLED-old", "FAILURE-old", "FAILURE-older"]


def test_prune_waits_for_its_index(rig: Rig) -> None:
    """While a release is rolled out it isn't there for some time, and each batch would read the whole table."""
    rig.finish(rig.run("old"))
    rig.age("old", "finished_at", 100)
    rig.sql.execute("DELETE FROM celery_durable.migration WHERE number = 3")
    assert rig.prune(retention=60) == []
    rig.sql.execute("INSERT INTO celery_durable.migration (number) VALUES (3)")
    assert rig.prune(retention=60) == ["old"]


def test_prune_takes_what_is_old_delivered_and_released(rig: Rig) -> None:
    """With everything that belongs to it, and nothing else."""
    for each, dispatched in (("old", True), ("young", True), ("undelivered", False), ("held", True)):
        fence = rig.run(each)
        rig.save(fence)
        rig.finish(fence, dispatched=dispatched)
    rig.run("running")
    for each in ("old", "undelivered", "held"):
        rig.age(each, "finished_at", 100)
    rig.update("held", "node = %s", uuid.uuid4())
    assert rig.prune(retention=60) == ["old"]
    columns = {"workflow": "id", "input": "workflow", "output": "workflow", "checkpoint": "workflow"}
    for table, column in columns.items():
        assert rig.sql.value(f"SELECT count(*) FROM celery_durable.{table} WHERE {column} = 'old'") == 0
        assert rig.sql.value(f"SELECT count(*) FROM celery_durable.{table} WHERE {column} = 'young'") == 1


def test_prune_spares_the_children_of_the_living(rig: Rig) -> None:
    """Their parent may still ask for the result."""
    parent = rig.run("parent")
    rig.finish(rig.run("child", parent_id="parent"))
    rig.finish(rig.run("orphan", parent_id="gone"))
    for each in ("child", "orphan"):
        rig.age(each, "finished_at", 100)
    assert rig.prune() == ["orphan"]
    rig.finish(parent)
    assert rig.prune() == ["child"]


def test_a_pruned_id_may_be_used_again(rig: Rig) -> None:
    """Nothing of the first workflow is left to be found."""
    fence = rig.run()
    rig.save(fence)
    rig.finish(fence)
    rig.age("w1", "finished_at", 100)
    rig.prune()
    claim = rig.claim(rig.start(), rig.node())
    assert claim is not None
    assert (claim.fence.attempt, claim.history) == (1, {})


@pytest.mark.parametrize("state", ["ENQUEUED", "RUNNING", "SUSPENDED"])
def test_a_deadline_cancels_wherever_the_workflow_is(rig: Rig, state: str) -> None:
    """The verdict is its outcome, and has to be delivered."""
    fence = rig.run(timeout=100)
    if state == "SUSPENDED":
        rig.suspend(fence, 1000)
    if state == "ENQUEUED":
        rig.workflows.release(fence, 60, patience=0)
    assert rig.workflows.expire(verdict=VERDICT, limit=10, patience=0) == []
    due = rig.workflows.next_due(patience=0)
    assert due is not None
    assert 90 < due <= 100
    rig.age("w1", "deadline", 101)
    assert rig.workflows.expire(verdict=VERDICT, limit=10, patience=0) == ["w1"]
    row = rig.workflows.by_id("w1", patience=0)
    assert row is not None
    assert (row.state, row.dispatched, row.payload, row.wake_at) == ("CANCELLED", False, VERDICT, None)


def test_the_next_due_is_the_earliest_of_all(rig: Rig) -> None:
    """Timers, deadlines and delayed starts; None if nothing waits for a time."""
    assert rig.workflows.next_due(patience=0) is None
    rig.start("delayed", delay=300)
    rig.suspend(rig.run("asleep"), 200)
    rig.run("limited", timeout=100)
    rig.start("on its way")

    def due() -> int:
        seconds = rig.workflows.next_due(patience=0)
        assert seconds is not None
        return round(seconds, -1) // 1

    assert due() == 100
    rig.update("limited", "deadline = NULL")
    assert due() == 200
    rig.update("asleep", "wake_at = NULL")
    assert due() == 300


# The sweep


def test_a_sweep_does_all_duties_and_tells_what_it_found(rig: Rig) -> None:
    """In an order in which one duty's work is sent by the next."""
    crashed, asleep, late = rig.run("crashed"), rig.run("asleep"), rig.run("late", timeout=1)
    rig.suspend(asleep, 0)
    rig.age("late", "deadline")
    done = rig.run("done")
    rig.finish(done)
    rig.age("done", "finished_at")
    rig.silence(crashed.node)
    rig.witness()
    broker, found = Broker(), Found()
    duties = recovery(rig, broker)
    duties.engine.observers.add(found)
    counts = duties.sweep()
    assert counts == {
        "rescue": 1, "expire": 1, "cancel": 0, "tell": 0, "notify": 0, "wake": 1, "redispatch": 0, "republish": 2,
        "prune": 1,
    }  # fmt: skip
    assert sorted(broker.sent) == ["asleep", "crashed"]
    assert found.ids["rescue"] == ["crashed"]
    assert found.ids["prune"] == ["done"]
    assert late.attempt == 1


def test_a_backlog_is_worked_off_in_batches(rig: Rig) -> None:
    """One sweep takes all of it."""
    count = 2 * BATCH + 1
    rig.sql.execute(
        "INSERT INTO celery_durable.workflow (id, name, queue, state, max_crashes, wake_at)"
        " SELECT 'w' || n, 'order', 'celery', 'SUSPENDED', 3, clock_timestamp() FROM generate_series(1, %s) n", count
    )  # fmt: skip
    rig.sql.execute(
        "INSERT INTO celery_durable.input SELECT id, '{}', '', 'application/json', 'utf-8' FROM celery_durable.workflow"
    )
    broker = Broker()
    counts = recovery(rig, broker).sweep()
    assert (counts["wake"], counts["republish"], len(set(broker.sent))) == (count, count, count)


def test_a_duty_that_fails_does_not_stop_the_others(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """It is logged, and done by the next sweep."""
    rig.suspend(rig.run(), 0)

    def broken(messages: list[StoredMessage]) -> Collection[str]:
        raise RuntimeError("broken pipe")

    with caplog.at_level(logging.ERROR):
        counts = recovery(rig, broken).sweep()
    assert "republish" not in counts
    assert (counts["wake"], counts["prune"]) == (1, 0)
    assert "broken pipe" in caplog.text


def test_rows_that_others_have_locked_are_left_to_the_next_sweep(rig: Rig) -> None:
    """No duty waits for a lock."""
    fence = rig.run("running")
    rig.silence(fence.node)
    rig.witness()
    rig.suspend(rig.run("asleep"), 0)
    rig.finish(rig.run("done"))
    rig.age("done", "finished_at")
    with psycopg.connect(rig.sql.connection.info.dsn) as holder:
        holder.execute("SELECT FROM celery_durable.workflow FOR UPDATE")
        assert not any(recovery(rig).sweep().values())
        holder.rollback()
    assert sum(recovery(rig).sweep().values()) == 5


def test_the_reason_of_a_death_names_the_limit(rig: Rig) -> None:
    """It is what get() raises."""
    rig.start(max_crashes=0)
    fence = rig.run()
    recovery(rig).rescue(fence.node, ["w1"])
    row = rig.workflows.by_id("w1", patience=0)
    assert row is not None
    assert row.payload is not None
    assert "max_recovery_attempts" in str(CODEC.decode_error(row.payload))
