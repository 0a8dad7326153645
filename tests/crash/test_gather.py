"""Workers that die while several steps of a workflow run at once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import celery_durable as durable
from tests.crash.crew import Crew, crew
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_wait import wait_until

pytestmark = [pytest.mark.crash, pytest.mark.slow]

NAMES = ("gathered", "agathered", "deadly", "adeadly")


@pytest.fixture(scope="module")
def all_hands(
    module_database_url: str, module_broker: Broker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Crew]:
    with crew(tmp_path_factory.mktemp("gather"), module_database_url, module_broker, size=1) as made:
        for name in NAMES:
            made.client.task(base=durable.Workflow, name=name)(only_started)
        made.muster(concurrency=1)
        yield made


def only_started() -> None:
    raise AssertionError("a client runs nothing")


@pytest.fixture
def hands(all_hands: Crew) -> Iterator[Crew]:
    """A worker with one pool process."""
    wait_until(lambda: len(all_hands.workers[0].children()) == 1, message="the pool process was replaced")
    yield all_hands
    all_hands.show_logs()


def runs(hands: Crew, workflow_id: str) -> list[int]:
    """How often each part has run."""
    return [hands.ledger.count("part", workflow_id, number) for number in range(3)]


@pytest.mark.parametrize("name", ["gathered", "agathered"])
def test_what_has_finished_is_kept(hands: Crew, name: str) -> None:
    """SIGKILL in the middle: completed steps never run again, the one that was running does."""
    workflow_id = hands.start(name)
    hands.at_gate(workflow_id)
    kept = "SELECT count(*) FROM celery_durable.checkpoint WHERE workflow = %s AND ok"
    wait_until(lambda: hands.sql.value(kept, workflow_id) == 2, message="the others are recorded")
    hands.runner_of(hands.workers[0]).kill()
    assert hands.result(workflow_id) == [0, 1, 2]
    assert runs(hands, workflow_id) == [1, 2, 1]


@pytest.mark.parametrize("name", ["deadly", "adeadly"])
def test_a_step_that_kills_its_worker_ends_lost(hands: Crew, name: str) -> None:
    """The others complete, although it kills the process that they run in, and none of them loses a try by that."""
    workflow_id = hands.start(name)
    assert hands.result(workflow_id) == [0, "StepLost", 2, 3, 4]
    assert 2 <= hands.ledger.count("killer", workflow_id) <= 6
    tries = "SELECT max(tries) FROM celery_durable.checkpoint WHERE workflow = %s AND ok"
    assert hands.sql.value(tries, workflow_id) == 1
