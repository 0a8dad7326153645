"""Workflows that wait, in real workers: what it costs, how soon they go on, and what others see of it."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import psutil
import psycopg
import pytest

import celery_durable as durable
from celery_durable.exceptions import WorkflowCancelledError
from tests.crash.statements import text_of
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.proxy import PostgresProxy
from tests.fixtures.site import FAST, Site
from tests.fixtures.workers import Worker

DUE = "SELECT extract(epoch FROM wake_at)::float8 FROM celery_durable.checkpoint WHERE workflow = %s AND key = %s"
WAITING = "SELECT count(*) FROM celery_durable.workflow WHERE state = 'SUSPENDED' AND name LIKE %s"
#: Rows of workflows that sleep for a year, as a suspension leaves them.
ASLEEP = """
    INSERT INTO celery_durable.workflow (id, name, queue, state, max_crashes, wake_at, waiting_for, started_at)
    SELECT 'asleep' || n, 'asleep', 'celery', 'SUSPENDED', 10, clock_timestamp() + interval '1 year', 'sleep',
        clock_timestamp() FROM generate_series(1, 100000) AS n
"""


#: Real ones, twice: the first let a worker reach its size, of the others it would have to show what each one holds.
MANY = 2_000


def suspended(site: Site, name: str, count: int, timeout: float = 60) -> None:
    wait_until(lambda: site.sql.value(WAITING, f"%{name}") >= count, timeout, lambda: f"{count} of {name} wait")


@pytest.mark.alone
@pytest.mark.slow
def test_the_waiting_cost_their_rows(site: Site) -> None:
    """A hundred thousand hold nothing of a worker with two processes, nor of the broker; it is free for others."""
    worker = site.workers.start(concurrency=2, env={"SHOP_COLLECTS": "1"})
    site.sql.execute(ASLEEP)
    first = durable.enqueue_many(site.shop.receiver.s() for _ in range(MANY))
    suspended(site, "receiver", MANY, 120)
    before = memory(worker)
    others = durable.enqueue_many(site.shop.receiver.s() for _ in range(MANY))
    suspended(site, "receiver", 2 * MANY, 120)
    assert memory(worker) - before < MANY * 1_000
    wait_until(lambda: messages(site) == (0, 0), message=lambda: f"the broker has none: {messages(site)}")
    assert site.sql.value("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()") < 12
    assert all(len(process.threads()) < 12 for process in family(worker))
    for _ in range(5):
        began = time.monotonic()
        site.finished(site.shop.stamp.delay().id)
        assert time.monotonic() - began < 2
    woken = [*first[:100], *others[-100:]]
    for number, handle in enumerate(woken):
        durable.send(handle.id, number, app=site.shop.app)
    assert [site.finished(handle.id).result[0] for handle in woken] == list(range(200))


def family(worker: Worker) -> list[psutil.Process]:
    """The worker's main process and its pool."""
    return [psutil.Process(worker.pid), *worker.children()]


def memory(worker: Worker) -> int:
    """What these have for themselves, in bytes."""
    return sum(process.memory_full_info().uss for process in family(worker))


def messages(site: Site) -> tuple[int, int]:
    """How many messages wait in the broker, and how many a worker has taken and not confirmed."""
    queue = site.workers.env["CELERY_DURABLE_TEST_QUEUE"]
    with site.shop.app.connection_for_write() as connection:
        channel = connection.default_channel
        waiting = channel.queue_declare(queue, durable=True, auto_delete=False).message_count
        unconfirmed = channel.client.hlen(channel.unacked_key) if hasattr(channel, "unacked_key") else 0
    return waiting, unconfirmed


def test_between_sweeps_nothing_is_asked_for(site: Site, proxy: PostgresProxy) -> None:
    """A node that has nothing due makes no statement but its heartbeats, although a workflow sleeps."""
    settings = {**FAST, "heartbeat_interval": 0.1, "recovery_interval": 600}
    site.workers.start(concurrency=1, env={"DATABASE_URL": proxy.url}, settings=settings)
    site.shop.sleeper.delay(3600)
    suspended(site, "sleeper", 1)
    done = lambda name: sum(text_of(name) in each for each in proxy.statements())  # noqa: E731
    wait_until(lambda: done("workflows.next_due"), message="the first sweep is over")
    proxy.reset()
    wait_until(lambda: done("nodes.beat") >= 20, message="twenty heartbeats")
    assert {each for each in proxy.statements() if text_of("nodes.beat") not in each} == set()


@pytest.mark.alone
def test_waits_end_soon(site: Site) -> None:
    """A message, a time and a commit wake a workflow within a tenth of a second, at the median."""
    site.workers.start(concurrency=2)
    handles = [site.shop.receiver.delay() for _ in range(15)]
    suspended(site, "receiver", 15)
    late = []
    for handle in handles:
        sent_at = time.time()
        durable.send(handle.id, 1, app=site.shop.app)
        late.append(site.finished(handle.id).result[1] - sent_at)
    assert median(late) < 0.1
    sleepers = [site.shop.sleeper.delay(6 + number / 10) for number in range(15)]
    late = [site.finished(each.id).result - site.sql.value(DUE, each.id, "durable.sleep") for each in sleepers]
    assert min(late) >= 0
    assert median(late) < 0.1
    late = []
    for _ in range(15):
        with psycopg.connect(site.workers.env["DATABASE_URL"]) as connection:
            with durable.outbox(connection):
                handle = site.shop.stamp.delay()
            connection.commit()
            committed_at = time.time()
        late.append(site.finished(handle.id).result - committed_at)
    assert median(late) < 0.1


def test_one_process_never_waits_for_itself(site: Site) -> None:
    """Fifty levels of children in a worker with a single process; a thousand awaited at once cost one replay."""
    site.workers.start(concurrency=1)
    assert site.finished(site.shop.deep.delay(50).id, 60).result == 50
    fan = site.shop.fan_out.delay(1000)
    status = site.finished(fan.id, 120)
    assert status.result == sum(range(1000))
    assert status.attempt <= 3


def test_others_see_a_wait_as_a_retry(site: Site) -> None:
    """Celery's result says RETRY and why; a caller's get() waits through it."""
    if not site.workers.env["RESULT_BACKEND"]:
        pytest.skip("needs a result backend")
    site.workers.start()
    handle = site.shop.receiver.delay("approval")
    suspended(site, "receiver", 1)
    result = site.shop.app.AsyncResult(handle.id)
    assert (result.state, "message approval" in str(result.result)) == ("RETRY", True)
    durable.send(handle.id, "yes", topic="approval", app=site.shop.app)
    assert handle.get(timeout=20)[0] == "yes"


def test_a_step_runs_in_its_own_place(site: Site) -> None:
    """A step, or an unmodified task, that a workflow sends away runs once, on the worker of its queue."""
    queue = site.workers.env["CELERY_DURABLE_TEST_QUEUE"]
    env = {"FAR_QUEUE": f"{queue}-far"}
    site.workers.start(env={**env, "PLACE": "near"})
    site.workers.start(env={**env, "PLACE": "far"}, args=(f"--queues={queue}-far",))
    handle = site.shop.sends_away.delay()
    assert site.finished(handle.id).result == [[1, "far"], [2, "far"]]
    assert [site.ledger.count("far", value) for value in (1, 2)] == [1, 1]
    children = durable.list_workflows(parent_id=handle.id, app=site.shop.app)
    assert {each.queue for each in children} == {f"{queue}-far"}


def test_a_step_that_is_sent_away_keeps_its_rate_limit(site: Site) -> None:
    """Eight of them, five a second, need more than a second."""
    site.workers.start(concurrency=4)
    times = sorted(site.finished(site.shop.sends_many.delay().id).result)
    assert 1 < times[-1] - times[0] < 10


@pytest.mark.parametrize("terminate", [False, True])
def test_revoke_cancels(site: Site, terminate: bool) -> None:
    """Celery's own way, for what waits and for what runs; recovery resurrects nothing, a resume isn't discarded."""
    site.workers.start(concurrency=2)
    site.gates.close("o-1")
    running, waiting = site.shop.order.delay("o"), site.shop.receiver.delay()
    site.reaches("work", "o", 1)
    suspended(site, "receiver", 1)
    ids = [running.id, waiting.id]
    site.shop.app.control.revoke(ids, terminate=terminate, signal="SIGKILL")
    wait_until(lambda: [site.status(each).state for each in ids] == ["CANCELLED"] * 2, message="both are cancelled")
    sweeps = site.sql.value("SELECT max(seen) FROM celery_durable.node")
    wait_until(lambda: site.sql.value("SELECT max(seen) FROM celery_durable.node") > sweeps, message="a heartbeat")
    assert [site.status(each).state for each in ids] == ["CANCELLED"] * 2
    with pytest.raises(WorkflowCancelledError):
        waiting.get(timeout=20)
    site.gates.open("o-1")
    wait_until(lambda: site.sql.value("SELECT node IS NULL FROM celery_durable.workflow WHERE id = %s", running.id))
    for each in ids:
        durable.resume_workflow(each, app=site.shop.app)
    durable.send(waiting.id, "again", app=site.shop.app)
    results: list[Any] = [site.finished(each) for each in ids]
    assert [each.state for each in results] == ["SUCCESS"] * 2
    assert results[1].result[0] == "again"
