"""A worker that was stopped past its lease and goes on: it records nothing and starts no further body."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.crash.crew import PATIENCE, Crew, crew
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_wait import wait_until

pytestmark = [pytest.mark.crash, pytest.mark.slow]


@pytest.fixture(scope="module", params=["prefork", "solo"])
def all_hands(
    request: pytest.FixtureRequest,
    module_database_url: str,
    module_broker: Broker,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Crew]:
    with crew(tmp_path_factory.mktemp("fence"), module_database_url, module_broker) as made:
        made.muster(request.param, concurrency=1)
        yield made


@pytest.fixture
def hands(all_hands: Crew) -> Iterator[Crew]:
    """Two workers with one slot each, both able to see that the other one is silent."""
    wait_until(lambda: all_hands.witnesses() == 2, message="both nodes were heard for a lease without a gap")
    yield all_hands
    all_hands.show_logs()


def outlive(hands: Crew, workflow_id: str) -> None:
    """Stop the worker of a waiting workflow until another one has finished it, then let it go on."""
    worker = hands.worker_of(workflow_id)
    worker.pause()
    wait_until(lambda: hands.row(workflow_id).state == "SUCCESS", PATIENCE, "another worker has finished it")
    hands.result(workflow_id)
    hands.open_gate(workflow_id)
    worker.resume()
    wait_until(
        lambda: f"the workflow {workflow_id} over" in worker.log, PATIENCE, "the first attempt has ended as void"
    )


def recorded(hands: Crew, workflow_id: str) -> list[tuple[str, int, bool]]:
    """Key, attempt and success of each stored step."""
    query = "SELECT key, attempt, ok FROM celery_durable.checkpoint WHERE workflow = %s ORDER BY seq"
    return [tuple(row) for row in hands.sql.all(query, workflow_id)]


def test_stopped_in_a_body(hands: Crew) -> None:
    """A body that was stopped and ends too late is void: the new owner's value counts, and no next step starts."""
    workflow_id = hands.start("gated")
    hands.at_gate(workflow_id)
    outlive(hands, workflow_id)
    assert hands.result(workflow_id) == ["plain", 2, "last"]
    assert recorded(hands, workflow_id) == [
        ("plain", 1, True),
        ("gate", 2, True),
        ("last", 2, True),
    ]
    assert hands.ledger.count("plain", workflow_id) == 1
    assert hands.ledger.count("gate", workflow_id) == 2, "the one in flight ran again"
    assert hands.ledger.count("last", workflow_id) == 1, "the stopped worker started no further body"


def test_stopped_between_two_bodies(hands: Crew) -> None:
    """A run that was stopped between two steps looks before it starts the next body, and doesn't start it."""
    workflow_id = hands.start("between")
    hands.at_gate(workflow_id, "function")
    outlive(hands, workflow_id)
    assert hands.result(workflow_id) == ["plain", 2, "last"]
    assert recorded(hands, workflow_id) == [("plain", 1, True), ("last", 2, True)]
    assert hands.ledger.count("plain", workflow_id) == 1
    assert hands.ledger.count("last", workflow_id) == 1, "the stopped worker started no further body"
