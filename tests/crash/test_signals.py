"""SIGTERM in a pool process while a statement is on its way: billiard makes a SystemExit of it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
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

#: psycopg would cancel the statement in the first, and has nothing left to cancel in the second.
phases = pytest.mark.parametrize("phase", ["running", "answered"])


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
    """Send SIGTERM, and return once the process has got it and sleeps on where it waits."""
    process.send_signal(signal.SIGTERM)
    wait_until(lambda: not is_pending(process, signal.SIGTERM), message="the process has got the signal")
    wait_until(lambda: process.status() == psutil.STATUS_SLEEPING, message="it waits for the answer, or has ended")
    assert is_alive(process), "SIGTERM has ended the process while the answer was on its way"


def is_pending(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether a signal hasn't come to a process yet: its own handlers run at once, Python's as soon as they may."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    masks = [int(line.split()[1], 16) for line in status.splitlines() if line.startswith(("SigPnd", "ShdPnd"))]
    return any(mask >> (number - 1) & 1 for mask in masks)


def waits_for_a_lock(hands: Crew, statement: str) -> bool:
    query = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND starts_with(query, %s)"
    return bool(hands.sql.all(query, text_of(statement)))


def end(hands: Crew, proxy: PostgresProxy, statement: str, phase: str, begin: str) -> str:
    """Have the process terminated in a phase of a statement, let that go on, and see the process go."""
    held = proxy.hold(text_of(statement), "before" if phase == "running" else "after")
    workflow_id = hands.start(begin)
    if begin == "gated":
        hands.at_gate(workflow_id)
        hands.sql.execute("UPDATE celery_durable.node SET draining = true")
        hands.open_gate(workflow_id)
    held.wait_reached()
    process = hands.runner_of(hands.workers[0])
    if phase == "running":
        with psycopg.connect(hands.database_url) as connection:
            connection.execute("SELECT FROM celery_durable.workflow WHERE id = %s FOR UPDATE", [workflow_id])
            held.release()
            wait_until(lambda: waits_for_a_lock(hands, statement), message="the statement waits for the lock")
            terminate(process)
    else:
        terminate(process)
        held.release()
    wait_until(lambda: not is_alive(process), message="the handler has run, and ended the process")
    return workflow_id


@phases
@pytest.mark.parametrize("statement", COMMITS)
def test_a_signal_waits_for_the_answer(hands: Crew, shared_proxy: PostgresProxy, statement: str, phase: str) -> None:
    """SIGTERM neither cancels a statement nor loses its answer: the process ends after it, and no body runs again."""
    workflow_id = end(hands, shared_proxy, statement, phase, "everything")
    assert hands.result(workflow_id) == RESULT
    assert hands.runs(workflow_id) == RUNS
    assert hands.row(workflow_id).attempt == COMMITS[statement]


@phases
def test_a_signal_waits_for_a_hand_over(hands: Crew, shared_proxy: PostgresProxy, phase: str) -> None:
    """A hand-over that was on its way when SIGTERM came is one: its message is sent, by whomever."""
    workflow_id = end(hands, shared_proxy, "workflows.release", phase, "gated")
    hands.sql.execute("UPDATE celery_durable.node SET draining = false")
    assert hands.result(workflow_id) == ["plain", 1, "last"]
    assert [hands.ledger.count(name, workflow_id) for name in ("plain", "gate", "last")] == [1, 1, 1]
    row = hands.row(workflow_id)
    assert (row.attempt, row.crashes) == (2, 0), "no crash is counted"
