"""Every pool of Celery runs workflows and recovers them."""

from __future__ import annotations

from typing import Any

import pytest

import celery_durable as durable
from celery_durable.installation import installed_on
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.site import FAST, Site

pytestmark = pytest.mark.crash

CONNECTIONS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND application_name = 'celery_durable'
"""
POOLS = {
    "prefork": {},
    "threads": {},
    "solo": {},
    "gevent": {},
    "eventlet": {"PSYCOPG_WAIT_FUNC": "wait_select"},
}


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_runs_and_recovers(site: Site, pool: str) -> None:
    """Workflows run side by side; after a SIGKILL of the worker, another one of the same pool goes on."""
    options: dict[str, Any] = {"pool": pool, "env": POOLS[pool]}
    workers = site.start(2, **options)
    side_by_side = [site.shop.order.delay(f"o{number}") for number in range(4)]
    assert [site.finished(handle.id).result for handle in side_by_side] == [[0, 10, 20]] * 4
    site.gates.close("a-1")
    handle = site.shop.order.delay("a")
    site.reaches("work", "a", 1)
    site.owner(*workers).kill()
    site.gates.open("a-1")
    status = site.finished(handle.id)
    assert (status.result, status.attempt, status.crashes) == ([0, 10, 20], 2, 1)
    assert site.work_of("a") == [1, 2, 1]


@pytest.mark.parametrize("pool", sorted(POOLS.keys() - {"prefork"}))
def test_a_pool_waits(site: Site, pool: str) -> None:
    """A sleep, messages and children give the place back, and each ends long before a sweep could help it."""
    settings = {**FAST, "suspend_after": 0.2, "recovery_interval": 60}
    site.workers.start(pool=pool, env=POOLS[pool], concurrency=2, settings=settings)
    assert site.finished(site.shop.number.delay(1).id).result == 1
    sleeper, fan = site.shop.sleeper.delay(1), site.shop.fan_out.delay(4)
    receivers = [site.shop.receiver.delay() for _ in range(4)]
    for each in receivers:
        wait_until(lambda each=each: site.status(each.id).state == "SUSPENDED", message="it waits for a message")
    for number, each in enumerate(receivers):
        durable.send(each.id, number, app=site.shop.app)
    assert [site.finished(each.id).result[0] for each in receivers] == [0, 1, 2, 3]
    assert site.finished(fan.id).result == 6
    assert [site.finished(each.id).attempt for each in (sleeper, *receivers)] == [2] * 5


def test_eventlet_without_its_wait_function(site: Site) -> None:
    """An eventlet worker in which a statement would block everything doesn't start, and says what to do."""
    worker = site.workers.start(pool="eventlet", wait=False)
    assert worker.wait_exit() != 0
    assert "PSYCOPG_WAIT_FUNC=wait_select" in worker.log
    assert "ready." not in worker.log


def test_a_busy_greenlet_does_not_stop_the_heartbeat(site: Site) -> None:
    """A gevent task that never yields, for longer than a lease, isn't taken for dead."""
    site.start(2, pool="gevent")
    handle = site.shop.burning.delay("b", 3.5)
    status = site.finished(handle.id)
    assert (status.result, status.attempt, status.crashes) == ("burnt", 1, 0)
    assert site.ledger.count("burn", "b") == 1


def test_connections_are_lazy_and_never_shared(site: Site) -> None:
    """An idle worker has its node's connections alone; a pool process makes its own for its first workflow."""
    site.workers.start(concurrency=2)
    wait_until(lambda: connections(site) == 3, message="only the node is connected: its duties, heartbeat and ears")
    site.gates.close("a-0", "b-0")
    handles = [site.shop.order.delay("a"), site.shop.order.delay("b")]
    site.reaches("work", "a", 0)
    site.reaches("work", "b", 0)
    wait_until(lambda: connections(site) == 5, message="each process has one connection")
    site.gates.open("a-0", "b-0")
    assert [site.finished(handle.id).result for handle in handles] == [[0, 10, 20]] * 2
    assert len({entry.pid for entry in site.ledger.lines()}) == 2


def connections(site: Site) -> int:
    """How many connections the shop's workers have; this producer's are closed first."""
    installed_on(site.shop.app).store.close()
    return int(site.sql.value(CONNECTIONS))
