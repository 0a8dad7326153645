"""The protocol's invariants where transactions meet: real statements on several connections, one held open."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from celery import Celery

import celery_durable as durable
from celery_durable.engine.context import Attempt, boot_time
from celery_durable.engine.step import StepSpec, call_step
from celery_durable.envelope import Envelope
from celery_durable.exceptions import Cancelled, ControlFlow, HandedOver, OwnershipLost
from celery_durable.installation import installed_on
from celery_durable.store.rows import Fence
from celery_durable.testing.servers import EmbeddedPostgres
from tests.crash.crew import PATIENCE, RESULT, RUNS, SETTINGS, Crew, crew, new_id
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.integration.parties import NAME, Party, Race

#: What ends an attempt under its own token, and what ends it from outside.
ENDS = ["finish", "suspend", "release", "again", "hand_over"]
ends = pytest.mark.parametrize("end", ENDS)


@pytest.fixture
def race(database_url: str, sql: Sql) -> Iterator[Race]:
    """An enqueued workflow and three sides, each with a living node."""
    race = Race(database_url, sql)
    yield race
    race.close()


def test_a_repeated_checkpoint_waits_for_the_first_and_adopts_it(race: Race) -> None:
    """A checkpoint that is sent again while the first is uncommitted waits, isn't written, and sees the first."""
    fence = race.claimed()
    with race.a.transaction():
        assert race.a.save(fence, b"1")
        repeated = race.blocked(race.b, lambda: race.b.save(fence, b"2"))
    assert repeated.result() is False
    assert race.b.save_slow(fence, b"2").settled.payload.data == b"1"
    assert race.outcomes() == {"one": b"1"}


def test_a_repeated_checkpoint_is_written_if_the_first_was_lost(race: Race) -> None:
    """A checkpoint that waits for one which is rolled back is recorded in its place."""
    fence = race.claimed()
    with race.a.transaction(commit=False):
        assert race.a.save(fence, b"1")
        repeated = race.blocked(race.b, lambda: race.b.save(fence, b"2"))
    assert repeated.result() is True
    assert race.outcomes() == {"one": b"2"}


def test_a_late_try_or_outcome_does_not_change_an_outcome(race: Race) -> None:
    """A try and another outcome that wait for an outcome to be committed leave it as it is."""
    fence = race.claimed()
    race.a.save_try(fence, 1)
    with race.a.transaction():
        race.a.save_slow(fence, b"1")
        late_try = race.blocked(race.b, lambda: race.b.save_try(fence, 2))
        late_outcome = race.blocked(race.c, lambda: race.c.save_slow(fence, b"2"))
    assert late_try.result().state == late_outcome.result().state == "RUNNING"
    assert race.outcomes() == {"one": b"1"}


def test_a_claim_with_an_old_snapshot_is_refused(race: Race) -> None:
    """A claim whose snapshot is older than another whole attempt can't load it, so it doesn't get the workflow."""
    with race.a.transaction():
        claim = race.a.claim(race.id)
        assert claim is not None
        too_early = race.blocked(race.b, lambda: race.b.claim(race.id))
        assert race.a.save(claim.fence)
        assert race.a.release(claim.fence)
    assert too_early.result() is None
    later = race.b.claim(race.id)
    assert later is not None
    assert later.fence.attempt == 2
    assert later.history["one"].payload.data == b"1"


@ends
def test_an_attempt_ends_after_its_last_checkpoint(race: Race, end: str) -> None:
    """What ends an attempt waits for its checkpoint that is on its way, so that whoever comes next finds it."""
    fence = race.claimed()
    with race.a.transaction():
        assert race.a.save(fence)
        ended = race.blocked(race.b, lambda: getattr(race.b, end)(fence))
    assert ended.result()
    assert race.outcomes() == {"one": b"1"}
    assert race.row().state != "RUNNING"


def test_a_rescue_passes_over_a_checkpoint_on_its_way(race: Race) -> None:
    """An orphan with an uncommitted checkpoint is left to the next sweep; the next attempt loads the checkpoint."""
    fence = race.claimed()
    with race.a.transaction():
        assert race.a.save(fence)
        assert race.b.rescue(fence) == []
    assert race.b.rescue(fence) == [(race.id, "ENQUEUED")]
    claim = race.c.claim(race.id)
    assert claim is not None
    assert claim.history["one"].payload.data == b"1"
    assert claim.crashes == 1


def test_of_two_claims_one_wins(race: Race) -> None:
    """A claim that waits for another one gets nothing once that one is committed."""
    with race.a.transaction():
        winner = race.a.claim(race.id)
        loser = race.blocked(race.b, lambda: race.b.claim(race.id))
    assert winner is not None
    assert loser.result() is None
    assert race.row().token == winner.fence.token


def test_a_claim_that_is_lost_leaves_the_workflow_to_the_next(race: Race) -> None:
    """A claim that waits for one which is rolled back gets the workflow, as its first attempt."""
    with race.a.transaction(commit=False):
        race.a.claim(race.id)
        next_one = race.blocked(race.b, lambda: race.b.claim(race.id))
    claim = next_one.result()
    assert claim is not None
    assert claim.fence.attempt == 1
    assert race.row().token == claim.fence.token


def test_a_repeated_claim_gets_the_same_attempt(race: Race) -> None:
    """A claim that is sent again while the first is uncommitted gets the attempt of the first."""
    token = uuid.uuid4()
    with race.a.transaction():
        first = race.a.claim(race.id, token)
        repeated = race.blocked(race.b, lambda: race.b.claim(race.id, token))
    assert first is not None
    claim = repeated.result()
    assert claim is not None, "the workflow would be RUNNING, and nobody would run it"
    assert (claim.fence.attempt, claim.fence.token) == (first.fence.attempt, token)
    assert race.row().attempt == 1


def test_an_old_token_writes_nothing(race: Race) -> None:
    """After a rescue and a new claim, no statement of the old attempt touches anything."""
    fence = race.claimed()
    race.b.rescue(fence)
    assert race.b.claim(race.id) is not None
    before = race.row()
    assert race.a.save(fence) is False
    assert race.a.save_slow(fence) is None
    assert race.a.save_try(fence, 1) is None
    assert not any(getattr(race.a, end)(fence) for end in ENDS)
    assert race.a.rescue(fence) == []
    assert race.row() == before
    assert race.outcomes() == {}


@pytest.mark.parametrize("end", [*ENDS, "rescue"])
def test_no_checkpoint_after_the_end_of_its_attempt(race: Race, end: str) -> None:
    """A checkpoint that waits for the end of its attempt isn't written once that is committed."""
    fence = race.claimed()
    with race.b.transaction():
        assert getattr(race.b, end)(fence)
        late = race.blocked(race.a, lambda: race.a.save(fence))
    assert late.result() is False
    assert race.a.save_slow(fence) is None
    assert race.outcomes() == {}


@pytest.mark.parametrize("end", [*ENDS, "rescue"])
def test_a_checkpoint_outlives_an_end_that_was_lost(race: Race, end: str) -> None:
    """A checkpoint that waits for an end which is rolled back is written."""
    fence = race.claimed()
    with race.b.transaction(commit=False):
        assert getattr(race.b, end)(fence)
        late = race.blocked(race.a, lambda: race.a.save(fence))
    assert late.result() is True
    assert race.outcomes() == {"one": b"1"}


def test_cancel_and_a_checkpoint_do_not_wait_for_each_other(race: Race) -> None:
    """A cancel commits under an open checkpoint, and a checkpoint under an open cancel."""
    fence = race.claimed()
    with race.a.transaction():
        assert race.a.save(fence, key="one")
        with race.b.transaction():
            race.cancel(race.b)
            assert race.c.save(fence, key="two"), "it doesn't see the cancel, which isn't committed"
    assert race.row().state == "CANCELLED"
    assert set(race.outcomes()) == {"one", "two"}


def test_after_cancel_only_the_running_step_is_recorded(race: Race) -> None:
    """Under CANCELLED the old token still records what was running, and learns of the cancel; no other one does."""
    fence = race.claimed()
    race.cancel(race.b)
    stranger = Fence(fence.id, fence.attempt, uuid.uuid4(), fence.node)
    assert race.b.save_slow(stranger) is None
    assert race.outcomes() == {}
    assert race.a.save(fence) is False
    assert race.a.save_slow(fence).state == "CANCELLED"
    assert race.outcomes() == {"one": b"1"}


def test_a_deadline_passes_over_a_checkpoint_on_its_way(race: Race) -> None:
    """A workflow past its deadline is cancelled by the sweep after the one that met an open checkpoint."""
    fence = race.claimed()
    with race.a.transaction():
        assert race.a.save(fence)
        race.b.connection.execute("UPDATE celery_durable.workflow SET deadline = clock_timestamp()")
        assert race.b.expire() == []
    assert race.b.expire() == [race.id]
    assert race.a.save(fence, key="two") is False
    assert race.a.save_slow(fence, key="two").state == "CANCELLED"


@pytest.fixture
def attempt(race: Race) -> Attempt:
    """A running attempt of the engine, claimed by side `a`."""
    app = Celery("engine", set_as_current=False)
    durable.install(app, database_url=race.url)
    claim = race.a.claim(race.id)
    assert claim is not None
    return Attempt.of(installed_on(app).engine, NAME, claim, boot_time())


def lose(race: Race, fence: Fence) -> None:
    race.b.rescue(fence)
    claim = race.b.claim(race.id)
    assert claim is not None
    race.b.save(claim.fence, b'"theirs"')


def drain(race: Race, fence: Fence) -> None:
    race.b.drain(fence.node)


@pytest.mark.parametrize(
    ("change", "unwinding"),
    [(lose, OwnershipLost), (lambda race, fence: race.cancel(race.b), Cancelled), (drain, HandedOver)],
    ids=["lost", "cancelled", "draining"],
)
def test_no_body_after_an_old_look(
    race: Race, attempt: Attempt, change: Callable[[Race, Fence], None], unwinding: type[ControlFlow]
) -> None:
    """An attempt that hasn't heard of its workflow for long looks before a body, and doesn't start it in vain."""
    change(race, attempt.fence)
    attempt.last_look -= attempt.engine.lease
    bodies: list[str] = []
    with pytest.raises(unwinding):
        call_step(attempt, StepSpec("one"), lambda: bodies.append("ran"), (), {})
    assert bodies == []


def test_a_body_after_a_young_look_is_void_if_the_workflow_was_lost(race: Race, attempt: Attempt) -> None:
    """A body that began within a young look's time may run in vain; the outcome stays the new owner's."""
    lose(race, attempt.fence)
    with pytest.raises(OwnershipLost):
        call_step(attempt, StepSpec("one"), lambda: "mine", (), {})
    assert race.outcomes() == {"one": b'"theirs"'}


def test_a_running_workflow_is_not_claimed(race: Race) -> None:
    """Doubled messages get nothing while an attempt runs."""
    race.claimed()
    assert race.b.claim(race.id) is None
    assert race.c.claim(race.id) is None


def test_a_resumed_workflow_waits_for_its_runner(race: Race) -> None:
    """A workflow that was enqueued again while its runner had it is claimable only once that has released it."""
    race.claimed()
    race.sql.execute("UPDATE celery_durable.workflow SET state = 'ENQUEUED', publish_at = clock_timestamp()")
    assert race.b.claim(race.id) is None
    race.sql.execute("UPDATE celery_durable.workflow SET node = NULL, token = NULL")
    assert race.b.claim(race.id) is not None


def test_a_claim_after_a_dead_runner_has_its_last_checkpoint(race: Race) -> None:
    """Of a resumed workflow whose runner is taken for dead, the checkpoint that is on its way is waited for."""
    fence = race.claimed()
    race.sql.execute("UPDATE celery_durable.workflow SET state = 'ENQUEUED', publish_at = clock_timestamp()")
    race.sql.execute("UPDATE celery_durable.node SET seen = seen - interval '1 hour' WHERE id = %s", race.a.node)
    with race.a.transaction():
        assert race.a.save_slow(fence).state == "ENQUEUED"
        too_early = race.blocked(race.b, lambda: race.b.claim(race.id))
    assert too_early.result() is None
    claim = race.b.claim(race.id)
    assert claim is not None
    assert claim.history["one"].payload.data == b"1"
    assert race.a.save_slow(fence, b"2", "two") is None


def test_racing_attempts_run_each_body_once(race: Race) -> None:
    """Workers that all want one workflow, and hand it over after each step, run no body twice and none at once."""
    keys = [f"step{number}" for number in range(25)]
    bodies: list[str] = []
    inside = threading.Lock()

    def work(party: Party) -> None:
        while len(bodies) < len(keys):
            claim = party.claim(race.id)
            if claim is None:
                continue
            key = next((key for key in keys if key not in claim.history), None)
            if key is not None:
                assert inside.acquire(blocking=False), "two bodies at once"
                bodies.append(key)
                inside.release()
                assert party.save(claim.fence, key=key)
            assert party.release(claim.fence)

    with ThreadPoolExecutor() as threads:
        for done in [threads.submit(work, race.party()) for _ in range(4)]:
            done.result(timeout=60)
    assert bodies == keys


@pytest.fixture
def hands(database_url: str, broker: Broker, tmp_path: Path) -> Iterator[Crew]:
    """One solo worker."""
    with crew(tmp_path, database_url, broker, size=1) as made:
        made.muster("solo")
        yield made
        made.show_logs()


@pytest.mark.matrix
def test_births(hands: Crew, database_url: str) -> None:
    """Our own message without a row starts nothing; a foreign one does, once, even beside an open birth."""
    no_such = new_id()
    send_ours(hands, no_such)
    wait_until(lambda: f"workflow {no_such} came, but there is no such row" in hands.workers[0].log, PATIENCE)
    assert hands.sql.all("SELECT FROM celery_durable.workflow") == []

    foreign = new_id()
    birth = Party(database_url)
    with birth.transaction(commit=False):
        assert birth.publish(foreign, "everything")
        send_foreign(hands, foreign)
        wait_until(lambda: insert_waits(hands), PATIENCE, "the worker waits for the open birth")
    birth.connection.close()
    wait_until(lambda: hands.sql.all("SELECT FROM celery_durable.workflow"), message="the foreign message gave birth")
    assert hands.result(foreign) == RESULT
    assert hands.runs(foreign) == RUNS
    assert [row.id for row in hands.sql.all("SELECT id FROM celery_durable.workflow")] == [foreign]


def send_ours(hands: Crew, workflow_id: str) -> None:
    """Send a message as our producer does, without its row."""
    headers = {"id": workflow_id, "task": "everything", "lang": "py", "root_id": workflow_id}
    queue = hands.env["CELERY_DURABLE_TEST_QUEUE"]
    envelope = Envelope(b"[[], {}, {}]", "application/json", "utf-8", headers, {}, "", queue, queue)
    with hands.client.producer_or_acquire() as producer:
        envelope.send(hands.client, producer, None)


def send_foreign(hands: Crew, workflow_id: str) -> None:
    """Send a message as an app without celery_durable does."""
    app = Celery("foreign", broker=hands.env["BROKER_URL"], set_as_current=False)
    app.send_task("everything", task_id=workflow_id, queue=hands.env["CELERY_DURABLE_TEST_QUEUE"])


def insert_waits(hands: Crew) -> bool:
    query = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query ILIKE '%A workflow is born%'"
    return bool(hands.sql.all(query))


def test_silence_of_all_is_nobodys_death(race: Race) -> None:
    """After a common silence no node is a witness, so nobody is rescued; a lease later one is, of the dead only."""
    race.claimed()
    race.sql.execute("UPDATE celery_durable.workflow SET claimed_at = claimed_at - interval '1 hour'")
    race.sql.execute("UPDATE celery_durable.node SET unbroken = seen - interval '1 hour', seen = seen - 2 * lease")
    race.b.beat()
    assert race.b.sweep() == [], "a node that was silent itself is no witness"
    race.sql.execute("UPDATE celery_durable.node SET unbroken = seen - 2 * lease WHERE id = %s", race.b.node)
    assert race.b.sweep() == [(race.id, "ENQUEUED")]


@pytest.mark.slow
@pytest.mark.crash
def test_a_database_that_was_away_rescues_nobody(broker: Broker, tmp_path: Path) -> None:
    """Two living workers go on with what they run after their database was away for longer than the lease."""
    with EmbeddedPostgres() as server, crew(tmp_path, server.url, broker) as hands:
        hands.muster(concurrency=1)
        ids = [hands.start("gated"), hands.start("gated")]
        for workflow_id in ids:
            hands.at_gate(workflow_id)
        wait_until(lambda: hands.witnesses() == 2, message="both nodes could tell that the other one is silent")
        server.stop()
        left = time.monotonic()
        wait_until(lambda: time.monotonic() - left > 1.5 * SETTINGS["lease"], message="a lease has passed")
        server.start()
        hands.sql.close()
        hands.sql = Sql(server.url)
        wait_until(lambda: hands.witnesses() == 2, PATIENCE, "both nodes were heard for a lease without a gap")
        for workflow_id in ids:
            hands.open_gate(workflow_id)
            assert hands.result(workflow_id) == ["plain", 1, "last"]
            assert [hands.ledger.count(name, workflow_id) for name in ("plain", "gate", "last")] == [1, 1, 1]
            assert hands.row(workflow_id).crashes == 0
        hands.show_logs()
