"""SIGTERM in a pool process while a statement is on its way: billiard makes a SystemExit of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import psutil
import pytest

from tests.crash.crew import RESULT, RUNS, Crew, crew
from tests.crash.statements import text_of
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.proxy import PostgresProxy
from tests.fixtures.workers import is_alive

pytestmark = [pytest.mark.crash, pytest.mark.slow]

#: Every commit of a run, and the attempts that the workflow needs if its process ends right after it.
COMMITS = {
    "workflows.claim": 3,
    "checkpoints.save": 3,
    "checkpoints.save_try": 3,
    "checkpoints.save_slow": 3,
    "workflows.suspend": 2,
    "workflows.finish": 2,
}


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
    directory = tmp_path_factory.mktemp("signals")
    with crew(directory, module_database_url, module_broker, shared_proxy.url, size=1) as made:
        made.muster(concurrency=1)
        yield made


@pytest.fixture
def hands(all_hands: Crew, shared_proxy: PostgresProxy) -> Iterator[Crew]:
    """A worker with one pool process, which reaches the database through the proxy."""
    wait_until(lambda: len(all_hands.workers[0].children()) == 1, message="the pool process was replaced")
    shared_proxy.reset()
    yield all_hands
    all_hands.show_logs()


def terminate(process: psutil.Process) -> None:
    """Send SIGTERM, and return once the process has taken it."""
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: not is_pending(process.pid, signal.SIGTERM), message="the signal was taken")


def is_pending(pid: int, number: int) -> bool:
    with open(f"/proc/{pid}/status") as status:
        masks = [int(line.split()[1], 16) for line in status if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask & 1 << number - 1 for mask in masks)


def end(hands: Crew, proxy: PostgresProxy, statement: str, begin: str) -> str:
    """Hold the answer of a commit, have the process terminated meanwhile, and let the answer through."""
    held = proxy.hold(text_of(statement), "after")
    workflow_id = hands.start(begin)
    if begin == "gated":
        hands.at_gate(workflow_id)
        hands.sql.execute("UPDATE celery_durable.node SET draining = true")
        hands.open_gate(workflow_id)
    held.wait_reached()
    process = hands.runner_of(hands.workers[0])
    terminate(process)
    assert is_alive(process), "no handler runs while the answer is on its way"
    held.release()
    wait_until(lambda: not is_alive(process), message="the handler has run, and ended the process")
    return workflow_id


@pytest.mark.parametrize("statement", COMMITS)
def test_a_signal_waits_for_the_answer(hands: Crew, shared_proxy: PostgresProxy, statement: str) -> None:
    """What was committed when SIGTERM came counts: the process ends after the answer, and no body runs again."""
    workflow_id = end(hands, shared_proxy, statement, "everything")
    assert hands.result(workflow_id) == RESULT
    assert hands.runs(workflow_id) == RUNS
    assert hands.row(workflow_id).attempt == COMMITS[statement]


def test_a_signal_waits_for_a_hand_over(hands: Crew, shared_proxy: PostgresProxy) -> None:
    """A hand-over that was committed when SIGTERM came is one: its message is sent, by whomever."""
    workflow_id = end(hands, shared_proxy, "workflows.release", "gated")
    hands.sql.execute("UPDATE celery_durable.node SET draining = false")
    assert hands.result(workflow_id) == ["plain", 1, "last"]
    assert [hands.ledger.count(name, workflow_id) for name in ("plain", "gate", "last")] == [1, 1, 1]
    row = hands.row(workflow_id)
    assert (row.attempt, row.crashes) == (2, 0), "no crash is counted"
