"""Whatever dies, a workflow goes on past its completed steps."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import celery
import psutil
import pytest

from celery_durable.exceptions import WorkflowDead
from celery_durable.testing.servers import EmbeddedPostgres
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.gates import Gates
from tests.fixtures.ledger import Ledger
from tests.fixtures.site import FAST, Site, opened, shop_env
from tests.fixtures.workers import Workers

pytestmark = pytest.mark.crash

#: What PROTOCOL allows for noticing a dead worker, with a second for a busy machine.
NOTICED = FAST["lease"] + FAST["recovery_interval"] + 1


def at_second_step(site: Site, name: str = "a", **options: Any) -> Any:
    """Start an order of three steps, and return its handle once it waits in the second one."""
    site.gates.close(f"{name}-1")
    handle = site.shop.order.apply_async((name,), **options)
    site.reaches("work", name, 1)
    return handle


def assert_resumed(site: Site, handle: Any, *, crashes: int, name: str = "a", second: int = 2) -> None:
    """The order has its result, its first and last step ran once, and the crashes were counted."""
    status = site.finished(handle.id)
    assert (status.state, status.result) == ("SUCCESS", [0, 10, 20])
    assert site.work_of(name) == [1, second, 1]
    assert status.crashes == crashes


@pytest.mark.oldest
def test_a_killed_worker(site: Site, gates: Gates) -> None:
    """The workflow of a worker that is SIGKILLed goes on in another one, within the bound."""
    workers = site.start(2)
    handle = at_second_step(site)
    site.owner(*workers).kill()
    killed_at = time.monotonic()
    site.reaches("work", "a", 1, times=2)
    assert time.monotonic() - killed_at < NOTICED
    gates.open("a-1")
    assert_resumed(site, handle, crashes=1)


@pytest.mark.alone
@pytest.mark.oldest
def test_a_killed_pool_process(site: Site, gates: Gates) -> None:
    """After the SIGKILL of a pool process, the next attempt has begun within half a second (median of five)."""
    site.start(1)
    handle = at_second_step(site)
    delays = []
    for run in range(2, 7):
        psutil.Process(site.ledger.lines()[-1].pid).kill()
        killed_at = time.monotonic()
        site.reaches("work", "a", 1, times=run)
        delays.append(time.monotonic() - killed_at)
    gates.open("a-1")
    assert_resumed(site, handle, crashes=5, second=6)
    assert statistics.median(delays) < 0.5


def test_a_silent_node(site: Site, gates: Gates) -> None:
    """A worker whose main process hangs is taken for dead; what its pool process still does doesn't count."""
    workers = site.start(2)
    handle = at_second_step(site)
    silent = site.owner(*workers)
    silent.send_signal(signal.SIGSTOP)
    site.reaches("work", "a", 1, times=2)
    gates.open("a-1")
    assert_resumed(site, handle, crashes=1)
    silent.send_signal(signal.SIGCONT)
    wait_until(lambda: "Another worker has taken" in silent.log, message="the late run has seen that it is void")
    assert site.work_of("a") == [1, 2, 1]


@pytest.mark.alone
@pytest.mark.oldest
@pytest.mark.parametrize(
    "how",
    [
        "warm",
        pytest.param("soft", marks=pytest.mark.skipif(celery.VERSION < (5, 5), reason="new in Celery 5.5")),
    ],
)
def test_a_shutdown_hands_over_after_the_running_step(site: Site, gates: Gates, how: Any) -> None:
    """All that run end their steps, which are kept, and begin the next ones elsewhere within two seconds; no crash."""
    owner = site.workers.start(concurrency=4, soft_shutdown=3 if how == "soft" else 0)
    handles = {name: at_second_step(site, name) for name in "abcd"}
    site.workers.start(concurrency=4)
    owner.stop(how)
    wait_until(lambda: site.sql.value("SELECT bool_or(draining) FROM celery_durable.node"))
    gates.open(*(f"{name}-1" for name in handles))
    opened_at = time.monotonic()
    for name in handles:
        site.reaches("work", name, 2)
    assert time.monotonic() - opened_at < 2
    for name, handle in handles.items():
        assert_resumed(site, handle, crashes=0, second=1, name=name)
        assert site.status(handle.id).attempt == 2
    assert owner.wait_exit() == 0


# Celery 5.4 doesn't tell a green pool's requests that they are cancelled: there they are found a lease later.
@pytest.mark.parametrize("pool", [pytest.param("prefork", marks=pytest.mark.oldest), "gevent"])
def test_a_cold_shutdown_hands_over_the_step(site: Site, gates: Gates, pool: str) -> None:
    """The running step is cut short and runs again in another worker; no crash is counted."""
    workers = site.start(2, pool=pool)
    handle = at_second_step(site)
    owner = site.owner(*workers)
    owner.stop("cold")
    site.reaches("work", "a", 1, times=2)
    gates.open("a-1")
    assert_resumed(site, handle, crashes=0)
    owner.wait_exit()


def test_lost_messages(site: Site, broker: Broker) -> None:
    """Workflows whose messages a flush of the broker has lost are run all the same."""
    handles = [site.shop.order.delay(f"lost{number}") for number in range(3)]
    broker.flush()
    site.start(1)
    for number, handle in enumerate(handles):
        assert_resumed(site, handle, crashes=0, name=f"lost{number}", second=1)


def test_a_flush_in_the_middle(site: Site, gates: Gates, broker: Broker) -> None:
    """Running workflows don't notice a flush, and those that wait in the queue are sent again."""
    worker = site.workers.start(concurrency=1)
    handle = at_second_step(site)
    waiting = [site.shop.order.delay(f"waits{number}") for number in range(6)]
    broker.flush()
    assert worker.running
    gates.open("a-1")
    assert_resumed(site, handle, crashes=0, second=1)
    for number, each in enumerate(waiting):
        assert_resumed(site, each, crashes=0, name=f"waits{number}", second=1)


PRODUCER = """
import os, signal
from celery_durable.engine.observer import Observer
from celery_durable.installation import installed_on
from tests.fixtures.apps import shop

class Killer(Observer):
    def published(self, workflow_id):
        os.kill(os.getpid(), signal.SIGKILL)

installed_on(shop.app).observers.add(Killer())
shop.order.apply_async(("a",), task_id="a")
"""


def test_a_publish_that_never_happened(site: Site) -> None:
    """A producer that dies between its row and its message has started the workflow."""
    producer = subprocess.run([sys.executable, "-c", PRODUCER], check=False, env={**os.environ, **site.workers.env})
    assert producer.returncode == -signal.SIGKILL
    site.start(1)
    assert_resumed(site, site.shop.order.AsyncResult("a"), crashes=0, second=1)


@pytest.fixture
def own_postgres(tmp_path: Path) -> Iterator[EmbeddedPostgres]:
    """A server that the test may stop."""
    with EmbeddedPostgres() as server:
        yield server


def test_a_database_that_is_away_for_longer_than_the_lease(
    own_postgres: EmbeddedPostgres, broker: Broker, ledger: Ledger, tmp_path: Path
) -> None:
    """Nobody is taken for dead: the runs go on where they were, no body runs twice."""
    workers = Workers(shop_env(own_postgres.url, broker.url, broker.queue, ledger), tmp_path)
    with opened(workers, ledger, own_postgres.url) as site:
        site.start(2)
        handles = [at_second_step(site, name) for name in ("a", "b", "c")]
        own_postgres.stop()
        stopped_at = time.monotonic()
        site.gates.open("a-1")
        wait_until(lambda: time.monotonic() - stopped_at > 1.5 * FAST["lease"])
        own_postgres.start()
        site.gates.open("b-1", "c-1")
        site.sql.close()
        site.sql = Sql(own_postgres.url)
        for name, handle in zip("abc", handles, strict=True):
            assert_resumed(site, handle, crashes=0, name=name, second=1)
            assert site.status(handle.id).attempt == 1
        workers.kill_all()


def test_a_crash_loop_ends(site: Site) -> None:
    """A step that always kills its process makes its workflow DEAD, with the reason; others go on."""
    site.start(1)
    doomed = site.shop.doomed.delay("d")
    others = [site.shop.order.delay(f"o{number}") for number in range(5)]
    status = site.finished(doomed.id)
    assert status.state == "DEAD"
    assert isinstance(status.error, WorkflowDead)
    assert "max_recovery_attempts" in str(status.error)
    assert site.ledger.count("die", "d") == 3
    assert site.ledger.count("work", "d", 0) == 1
    for each in others:
        assert site.finished(each.id).state == "SUCCESS"


def test_a_sole_worker_that_restarts(site: Site, gates: Gates) -> None:
    """With nobody else to see it, a restarted worker finds its own orphans within a lease more."""
    worker = site.workers.start()
    handle = at_second_step(site)
    worker.kill()
    site.workers.start()
    started_at = time.monotonic()
    site.reaches("work", "a", 1, times=2)
    assert time.monotonic() - started_at < NOTICED + FAST["lease"]
    gates.open("a-1")
    assert_resumed(site, handle, crashes=1)


def test_a_hard_time_limit_is_a_crash(site: Site, gates: Gates) -> None:
    """Celery's hard limit on a workflow kills the process; the workflow goes on after its completed steps."""
    site.start(1)
    gates.close("l-1")
    handle = site.shop.limited.apply_async(("l",), link_error=site.shop.note_error.s("limit"))
    site.reaches("work", "l", 1, times=2)
    gates.open("l-1")
    status = site.finished(handle.id)
    assert (status.state, status.result, status.crashes) == ("SUCCESS", 10, 1)
    assert handle.get(timeout=20) == 10
    assert site.ledger.count("work", "l", 0) == 1
    assert site.ledger.count("note", "limit") == 0, "a crash isn't a failure"


@pytest.mark.oldest
@pytest.mark.parametrize(("task", "result"), [("retried", [0, "done"]), ("retries_itself", [0, "done", 1])])
def test_a_retry_of_the_workflow(site: Site, task: str, result: list[Any]) -> None:
    """Celery's retry of the whole workflow keeps its successful steps and runs the failed ones anew."""
    site.start(1)
    handle = getattr(site.shop, task).delay("r")
    status = site.finished(handle.id)
    assert (status.state, status.result, status.crashes) == ("SUCCESS", result, 0)
    assert site.ledger.count("work", "r", 0) == 1
    assert site.ledger.count("fails_once", "r") == 2
