"""SIGKILL at every hook of the engine: what was completed stays, the rest is done, and nothing is left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from celery_durable.engine.observer import HOOKS
from tests.crash.crew import RESULT, RUNS, Crew, crew
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.workers import ROOT

pytestmark = [pytest.mark.crash, pytest.mark.slow]

OF_PRODUCERS = ("publishing", "published", "sent", "publish_ended")
OF_SHUTDOWNS = ("handing_over", "handed_over")
OF_FENCES = ("fenced",)
#: Between two statements nothing changes at them: a kill there is one at the hooks around.
OF_BODIES = ("body_starting", "body_ended", "step_interrupted", "branch_ended", "body_awaited")
#: Tested in test_waits.
OF_CALLS = ("call_starting", "call_registered", "call_recorded")
OF_RUNS = tuple(hook for hook in HOOKS if hook not in OF_PRODUCERS + OF_SHUTDOWNS + OF_FENCES + OF_BODIES + OF_CALLS)

#: (hook, nth): which body had ended, but not been recorded, at that instant. It alone runs once more.
IN_FLIGHT = {
    ("step_returned", 1): "plain",
    ("step_returned", 2): "flaky",
    ("step_returned", 4): "last",
    ("try_failed", 1): "flaky",
    ("try_failed", 2): "patient",
}
#: A hook that is passed more than once is tried at other times, too.
LATER = [
    ("claiming", 2),
    ("claimed", 2),
    ("attempt_ended", 2),
    ("step_starting", 2),
    ("step_starting", 3),
    ("step_returned", 2),
    ("step_returned", 4),
    ("step_recorded", 3),
    ("step_recorded", 4),
    ("try_failed", 2),
    ("try_recorded", 2),
]
CASES = [
    *((hook, 1, whom) for hook in OF_RUNS for whom in ("process", "worker")),
    *((hook, nth, "process") for hook, nth in LATER),
]


@pytest.fixture(scope="module")
def all_hands(
    module_database_url: str, module_broker: Broker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Crew]:
    with crew(tmp_path_factory.mktemp("hooks"), module_database_url, module_broker) as made:
        yield made


@pytest.fixture
def hands(all_hands: Crew) -> Iterator[Crew]:
    """Two workers that are well; whatever a test did to them, the next one has two again."""
    all_hands.muster()
    yield all_hands
    all_hands.show_logs()


def expected_runs(hook: str, nth: int) -> dict[str, int]:
    repeated = IN_FLIGHT.get((hook, nth))
    return {name: runs + (name == repeated) for name, runs in RUNS.items()}


def nothing_is_left(hands: Crew) -> bool:
    """No row waits for anybody."""
    return not hands.sql.all(
        "SELECT FROM celery_durable.workflow WHERE state IN ('RUNNING', 'ENQUEUED', 'SUSPENDED') OR NOT dispatched"
    )


def test_every_hook_is_covered() -> None:
    """A hook that the engine gets later fails here until a crash at it is tested."""
    tested = {*OF_PRODUCERS, *OF_SHUTDOWNS, *OF_FENCES, *OF_BODIES, *OF_CALLS, *(hook for hook, _, _ in CASES)}
    assert tested == set(HOOKS)


@pytest.mark.parametrize(("hook", "nth", "whom"), CASES)
def test_a_run_survives_a_kill(hands: Crew, hook: str, nth: int, whom: str) -> None:
    """Killed at a hook of its run, a workflow goes on, and only a body that wasn't recorded yet runs again."""
    workflow_id = hands.start("everything", hands.plan(hook, nth, whom))
    hands.await_kill(workflow_id)
    assert hands.result(workflow_id) == RESULT
    assert hands.runs(workflow_id) == expected_runs(hook, nth)
    assert nothing_is_left(hands)


@pytest.mark.parametrize("whom", ["process", "worker"])
@pytest.mark.parametrize("hook", OF_SHUTDOWNS)
def test_a_hand_over_survives_a_kill(hands: Crew, hook: str, whom: str) -> None:
    """Killed while it is handed over in a warm shutdown, a workflow goes on elsewhere; the running step counts."""
    workflow_id = hands.start("gated", hands.plan(hook, 1, whom))
    hands.at_gate(workflow_id)
    worker = hands.worker_of(workflow_id)
    worker.stop("warm")
    wait_until(
        lambda: hands.sql.value("SELECT draining FROM celery_durable.node WHERE pid = %s", worker.pid),
        message="the node drains",
    )
    hands.open_gate(workflow_id)
    hands.await_kill(workflow_id)
    assert hands.result(workflow_id) == ["plain", 1, "last"]
    assert [hands.ledger.count(name, workflow_id) for name in ("plain", "gate", "last")] == [1, 1, 1]
    worker.wait_exit()
    assert nothing_is_left(hands)


@pytest.mark.parametrize("whom", ["process", "worker"])
def test_a_fenced_run_survives_a_kill(hands: Crew, whom: str) -> None:
    """Killed when it finds that its workflow was given to another attempt, it leaves no trace: that one's counts."""
    workflow_id = hands.start("gated", hands.plan("fenced", 1, whom))
    hands.at_gate(workflow_id)
    hands.sql.execute(
        "UPDATE celery_durable.workflow SET state = 'ENQUEUED', node = NULL, token = NULL, "
        "publish_at = clock_timestamp(), published_at = NULL WHERE id = %s",
        workflow_id,
    )
    hands.open_gate(workflow_id)
    hands.await_kill(workflow_id)
    assert hands.result(workflow_id)[0::2] == ["plain", "last"]
    assert hands.result(workflow_id)[1] > 1, "the first attempt had lost the workflow before its step was recorded"
    # A whole worker may have had the new attempt, too, in another process.
    assert hands.ledger.count("plain", workflow_id) == 1
    assert hands.ledger.count("gate", workflow_id) <= (2 if whom == "process" else 3)
    assert hands.ledger.count("last", workflow_id) <= (1 if whom == "process" else 2)
    assert nothing_is_left(hands)


@pytest.mark.parametrize("hook", OF_PRODUCERS)
def test_a_start_survives_a_kill_of_its_producer(hands: Crew, hook: str) -> None:
    """Once the row is committed the workflow runs, whatever became of its producer; before that nothing exists."""
    workflow_id = hands.plan(hook)
    assert start_elsewhere(hands, workflow_id) == -9
    born = hook != "publishing"
    rows = hands.sql.all("SELECT FROM celery_durable.workflow WHERE id = %s", workflow_id)
    assert len(rows) == born
    if not born:
        assert start_elsewhere(hands, workflow_id) == 0
    assert hands.result(workflow_id) == RESULT
    assert hands.runs(workflow_id) == RUNS
    assert nothing_is_left(hands)


def start_elsewhere(hands: Crew, workflow_id: str) -> int:
    """Start the workflow in a process of its own, and return how that ended."""
    code = f"from tests.fixtures.apps.crashing import everything; everything.apply_async(task_id={workflow_id!r})"
    env = {**os.environ, **hands.env, "PYTHONPATH": str(Path(ROOT))}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, check=False, timeout=60).returncode
