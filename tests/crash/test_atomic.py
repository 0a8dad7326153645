"""Processes that die or stand still around the commit of an atomic step: its effect is there exactly once."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest

import celery_durable as durable
from tests.crash.crew import PATIENCE, Crew, _only_started, crew
from tests.crash.statements import text_of
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.proxy import PostgresProxy
from tests.fixtures.workers import is_alive

pytestmark = [pytest.mark.crash, pytest.mark.slow]

#: By what the proxy recognizes each statement.
STATEMENTS = {
    "begin": "BEGIN ISOLATION",
    "effect": "INTO booking",
    "save": text_of("checkpoints.save_slow"),
    "commit": "COMMIT",
    "discard": "DISCARD ALL",
}
When = Literal["before", "after"]


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
    sql = Sql(module_database_url)
    sql.execute("CREATE TABLE booking (workflow text NOT NULL)")
    sql.close()
    directory = tmp_path_factory.mktemp("atomic")
    with crew(directory, module_database_url, module_broker, shared_proxy.url) as made:
        made.client.task(base=durable.Workflow, name="booked")(_only_started)
        made.muster(concurrency=1)
        yield made


@pytest.fixture
def hands(all_hands: Crew, shared_proxy: PostgresProxy) -> Iterator[Crew]:
    """Two workers with one pool process each, which reach the database through the proxy."""
    wait_until(lambda: all(len(worker.children()) == 1 for worker in all_hands.workers), message="all are replaced")
    wait_until(lambda: all_hands.witnesses() == 2, message="both nodes were heard for a lease without a gap")
    shared_proxy.reset()
    yield all_hands
    all_hands.show_logs()


def check_booked_once(hands: Crew, workflow_id: str) -> None:
    assert hands.result(workflow_id) == ["booked", "last"]
    assert hands.sql.value("SELECT count(*) FROM booking WHERE workflow = %s", workflow_id) == 1
    assert hands.ledger.count("last", workflow_id) == 1


@pytest.mark.parametrize(
    ("statement", "when", "runs"),
    [
        ("begin", "after", 1),
        ("effect", "after", 2),
        ("save", "before", 2),
        ("save", "after", 2),
        ("commit", "before", 1),  # it arrives after the death of who has sent it
        ("commit", "after", 1),
        ("discard", "before", 1),
    ],
)
def test_killed_around_the_commit(
    hands: Crew, shared_proxy: PostgresProxy, statement: str, when: When, runs: int
) -> None:
    """SIGKILL at any instant: what was committed isn't repeated, what wasn't is."""
    held = shared_proxy.hold(STATEMENTS[statement], when)
    workflow_id = hands.start("booked")
    held.wait_reached()
    process = hands.runner_of(hands.worker_of(workflow_id))
    process.kill()
    wait_until(lambda: not is_alive(process), message="the process is gone")
    held.release()
    check_booked_once(hands, workflow_id)
    assert hands.ledger.count("book", workflow_id) == runs


def test_stopped_before_the_commit(hands: Crew, shared_proxy: PostgresProxy) -> None:
    """A worker that stands still with its checkpoint written loses it after a lease; another one goes on."""
    held = shared_proxy.hold("COMMIT", "before")
    workflow_id = hands.start("booked")
    held.wait_reached()
    worker = hands.worker_of(workflow_id)
    worker.pause()
    wait_until(lambda: hands.row(workflow_id).state == "SUCCESS", PATIENCE, "another worker has finished it")
    held.release()
    worker.resume()
    wait_until(
        lambda: f"the workflow {workflow_id} over" in worker.log, PATIENCE, "the first attempt has ended as void"
    )
    check_booked_once(hands, workflow_id)
    assert hands.row(workflow_id).attempt == 2
