"""Connections that are lost around a commit, "committed, but the answer was lost" included."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest

from tests.crash.crew import RESULT, RUNS, Crew, crew
from tests.crash.statements import text_of
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.proxy import PostgresProxy

pytestmark = [pytest.mark.crash, pytest.mark.slow]

When = Literal["before", "during", "after"]

#: Every statement on the way of `everything`, from its start to its confirmed outcome.
ON_THE_WAY = [
    "workflows.publish",
    "workflows.claim",
    "checkpoints.save",
    "checkpoints.save_try",
    "checkpoints.save_slow",
    "workflows.suspend",
    "workflows.wake",
    "workflows.republish",
    "workflows.finish",
    "workflows.confirm",
]
whenever = pytest.mark.parametrize("when", ["before", "during", "after"])


@pytest.fixture(scope="module")
def shared_proxy(module_database_url: str) -> Iterator[PostgresProxy]:
    with PostgresProxy(module_database_url) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def all_hands(
    module_database_url: str,
    module_broker: Broker,
    shared_proxy: PostgresProxy,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Crew]:
    directory = tmp_path_factory.mktemp("cuts")
    with crew(directory, module_database_url, module_broker, shared_proxy.url, size=1) as made:
        made.muster(concurrency=1)
        yield made


@pytest.fixture
def hands(all_hands: Crew, shared_proxy: PostgresProxy) -> Iterator[Crew]:
    """A client and a worker that reach the database through the proxy only."""
    shared_proxy.reset()
    yield all_hands
    all_hands.show_logs()


def drain(hands: Crew, draining: bool) -> None:
    hands.sql.execute("UPDATE celery_durable.node SET draining = %s", draining)


@whenever
@pytest.mark.parametrize("statement", ON_THE_WAY)
def test_a_cut_repeats_nothing_and_loses_nothing(
    hands: Crew, shared_proxy: PostgresProxy, statement: str, when: When
) -> None:
    """A connection lost around a statement costs time only: each body runs as often as without it."""
    cut = shared_proxy.cut(text_of(statement), when)
    workflow_id = hands.start("everything")
    assert hands.result(workflow_id) == RESULT
    cut.wait_reached()
    assert hands.runs(workflow_id) == RUNS
    row = hands.row(workflow_id)
    assert (row.attempt, row.crashes) == (2, 0), "one attempt before the suspension, one after it, and no crash"
    if statement != "workflows.suspend":  # its commit takes the token away, so a lost answer looks like a lost run
        assert f"the workflow {workflow_id} over" not in hands.workers[0].log, "no attempt takes itself for void"


@whenever
def test_a_cut_hand_over(hands: Crew, shared_proxy: PostgresProxy, when: When) -> None:
    """A hand-over whose connection is lost hands over once, and its completed step isn't repeated."""
    workflow_id = hands.start("gated")
    hands.at_gate(workflow_id)
    cut = shared_proxy.cut(text_of("workflows.release"), when)
    drain(hands, True)
    hands.open_gate(workflow_id)
    wait_until(lambda: hands.row(workflow_id).state == "ENQUEUED", message="the workflow is handed over")
    drain(hands, False)
    assert hands.result(workflow_id) == ["plain", 1, "last"]
    cut.wait_reached()
    assert [hands.ledger.count(name, workflow_id) for name in ("plain", "gate", "last")] == [1, 1, 1]
    row = hands.row(workflow_id)
    assert (row.attempt, row.crashes) == (2, 0)


@whenever
def test_a_cut_heartbeat(hands: Crew, shared_proxy: PostgresProxy, when: When) -> None:
    """A heartbeat whose connection is lost is made again in time: what runs goes on, in the same attempt."""
    workflow_id = hands.start("gated")
    hands.at_gate(workflow_id)
    cut = shared_proxy.cut(text_of("nodes.beat"), when)
    cut.wait_reached()
    last = hands.sql.value("SELECT max(seen) FROM celery_durable.node")
    wait_until(
        lambda: hands.sql.value("SELECT max(seen) FROM celery_durable.node") > last, message="the next heartbeat"
    )
    hands.open_gate(workflow_id)
    assert hands.result(workflow_id) == ["plain", 1, "last"]
    assert [hands.ledger.count(name, workflow_id) for name in ("plain", "gate", "last")] == [1, 1, 1]
