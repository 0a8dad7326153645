"""The worker fixtures start, kill, pause and stop real Celery processes, on every broker."""

from __future__ import annotations

from collections.abc import Callable

import celery
import pytest
from celery import Celery

from tests.fixtures.fix_wait import wait_until
from tests.fixtures.ledger import Ledger
from tests.fixtures.workers import Workers, is_alive

pytestmark = [pytest.mark.matrix, pytest.mark.oldest]

APP = "tests.integration.plain_app:app"

Send = Callable[..., object]


@pytest.fixture
def database_url(empty_database_url: str) -> str:
    """These tests need no schema."""
    return empty_database_url


@pytest.fixture
def send(broker_url: str, queue_name: str) -> Send:
    client = Celery("client", broker=broker_url)
    return lambda name, *args: client.send_task(name, args, queue=queue_name)


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo", "gevent", "eventlet"])
def test_every_pool_works_and_stops(workers: Workers, ledger: Ledger, send: Send, pool: str) -> None:
    worker = workers.start(APP, pool=pool)
    send("note", 1, "two words")
    wait_until(lambda: ledger.count("note", 1, "two words") == 1, message="the task has run")
    # A warm shutdown that begins before Celery has the task's result may hang in Celery's pool.
    wait_until(lambda: "succeeded" in worker.log, message="Celery knows that it has")
    worker.stop("warm")
    assert worker.wait_exit() == 0
    assert "Warm shutdown" in worker.log


def test_a_killed_child_is_replaced(workers: Workers) -> None:
    worker = workers.start(APP)
    pid = worker.kill_child()
    wait_until(lambda: pid not in [child.pid for child in worker.children()] and len(worker.children()) == 2)
    assert worker.running


def test_kill_leaves_no_process(workers: Workers) -> None:
    worker, other = workers.start(APP), workers.start(APP)
    children = worker.children()
    assert len(children) == 2
    worker.kill()
    assert not worker.running
    assert not any(map(is_alive, children))
    assert other.running


def test_a_paused_worker_does_nothing_until_resumed(workers: Workers, ledger: Ledger, send: Send) -> None:
    worker = workers.start(APP)
    worker.pause()
    send("note", 1)
    assert all(process.status() == "stopped" for process in worker.children())
    assert ledger.lines() == []
    worker.resume()
    wait_until(lambda: ledger.count("note") == 1, message="the task has run")


def test_a_cold_shutdown_cuts_a_task_short(workers: Workers, ledger: Ledger, send: Send) -> None:
    worker = workers.start(APP)
    send("linger", 60)
    wait_until(lambda: ledger.count("began"), message="the task has begun")
    worker.stop("cold")
    worker.wait_exit()
    assert "Cold shutdown" in worker.log
    assert ledger.count("ended") == 0


@pytest.mark.skipif(celery.VERSION < (5, 5), reason="soft shutdown is new in Celery 5.5")
def test_a_soft_shutdown_waits_a_while(workers: Workers, ledger: Ledger, send: Send) -> None:
    worker = workers.start(APP, soft_shutdown=3)
    send("linger", 1)
    wait_until(lambda: ledger.count("began"), message="the task has begun")
    worker.stop("soft")
    worker.wait_exit()
    assert ledger.count("ended") == 1


def test_beat_sends_what_is_due(workers: Workers, ledger: Ledger) -> None:
    workers.start(APP, pool="solo")
    beat = workers.beat(APP)
    wait_until(lambda: ledger.count("note", "tick") >= 2, message="two ticks have come")
    beat.kill()
    assert not beat.running


def test_a_worker_that_cannot_start_shows_its_log(workers: Workers) -> None:
    with pytest.raises(AssertionError, match="no_such_app"):
        workers.start("tests.no_such_app:app")


def test_settings_travel_as_json(workers: Workers) -> None:
    worker = workers.start(APP, pool="solo", settings={"lease": 3}, env={"EXTRA": "yes"})
    environment = worker.environment()
    assert environment["DURABLE_SETTINGS"] == '{"lease": 3}'
    assert environment["EXTRA"] == "yes"
