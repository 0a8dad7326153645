"""Time limits and cancellation of steps, in real workers of every kind."""

from __future__ import annotations

import statistics
import time

import psutil
import pytest
from celery import Celery

import celery_durable as durable
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.ledger import Entry
from tests.fixtures.site import FAST, Site
from tests.fixtures.workers import is_alive

pytestmark = pytest.mark.oldest

LIMIT = 0.5
BORN = "SELECT count(*) FROM celery_durable.workflow WHERE id = %s"


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    return str(request.node.name)


def entries(site: Site, kind: str, name: str) -> list[Entry]:
    return [entry for entry in site.ledger.lines() if entry.name == kind and entry.args[0] == name]


def step_of(site: Site, workflow_id: str, key: str) -> durable.StepInfo:
    return next(step for step in durable.list_workflow_steps(workflow_id, app=site.shop.app) if step.key == key)


def seconds_until_death(site: Site, name: str, nth: int) -> float:
    """How long the process has lived from the nth start of the body that holds the interpreter."""
    wait_until(lambda: len(entries(site, "hold", name)) >= nth, message="the body has begun")
    entry = entries(site, "hold", name)[nth - 1]
    wait_until(lambda: not _lives(entry.pid), message="its process has died")
    return time.time() - float(entry.args[1])


def _lives(pid: int) -> bool:
    try:
        return is_alive(psutil.Process(pid))
    except psutil.NoSuchProcess:
        return False


@pytest.mark.alone
@pytest.mark.crash
def test_a_hard_limit_ends_a_process_that_holds_the_interpreter(standing_site: Site, name: str) -> None:
    """Close to the limit; each is a failed try and no crash, and another process goes on with the next one."""
    site = standing_site
    handle = site.shop.held.delay(name, 3, 3)
    lives = [seconds_until_death(site, name, nth) for nth in (1, 2, 3)]
    assert min(lives) > LIMIT - 0.1
    assert statistics.median(lives) < LIMIT + 0.5
    status = site.finished(handle.id)
    assert (status.result, status.attempt, status.crashes) == (4, 4, 0)
    info = step_of(site, handle.id, "tests.fixtures.apps.shop.hold")
    assert info.tries == 4
    assert [error.type for error in info.errors] == ["celery_durable.exceptions.StepTimeout"] * 3
    assert "Timeout (0:00:00" in site.workers.logs()
    assert "in hold" in site.workers.logs()


@pytest.mark.crash
def test_a_workflow_may_fall_back_from_a_hard_limit(standing_site: Site, name: str) -> None:
    """Without a retry it gets the timeout, in another process."""
    site = standing_site
    handle = site.shop.held.delay(name, 9, 0)
    status = site.finished(handle.id)
    assert "longer than its time_limit" in status.result
    assert (status.attempt, status.crashes) == (2, 0)
    assert len(entries(site, "hold", name)) == 1


@pytest.mark.crash
def test_the_earliest_of_several_hard_limits_ends_the_process(standing_site: Site, name: str) -> None:
    """What ran beside it runs again, and isn't timed out; what had finished is kept."""
    site = standing_site
    site.gates.close(f"{name}-0")
    handle = site.shop.held_beside_others.delay(name)
    assert seconds_until_death(site, name, 1) < 1 + 0.5 + 0.5
    site.gates.open(f"{name}-0")
    status = site.finished(handle.id)
    assert (status.result, status.crashes) == ([2, 1, 10], 0)
    assert len(entries(site, "waits", name)) == 2
    assert site.ledger.count("work", name, 1) == 1


def test_the_tasks_own_soft_limit_is_not_the_steps(standing_site: Site, name: str) -> None:
    """In the middle of a step it is raised in the workflow; the step isn't settled."""
    handle = standing_site.shop.softly_limited.delay(name)
    assert standing_site.finished(handle.id).result == "the task's"
    assert durable.list_workflow_steps(handle.id, app=standing_site.shop.app) == []


@pytest.mark.parametrize("pool", ["prefork", "solo", "gevent"])
def test_a_blocking_step_is_interrupted(site: Site, pool: str) -> None:
    """By its soft limit, and if it is cancellable by its workflow's deadline; what it cleans up runs."""
    site.workers.start(pool=pool)
    impatient, hurried = site.shop.impatient.delay("i"), site.shop.hurried.delay("h")
    assert site.finished(impatient.id, timeout=10).result == "StepTimeout"
    began = time.monotonic()
    assert site.finished(hurried.id, timeout=10).state == "CANCELLED"
    assert time.monotonic() - began < 8
    site.reaches("endured", "h")


@pytest.mark.alone
@pytest.mark.parametrize("start", ["by us", "by name"])
def test_a_workflow_ends_at_its_deadline(site: Site, start: str) -> None:
    """Within a second, running or waiting, long before a sweep; its compensation is started. Whoever has started it."""
    site.workers.start(concurrency=2, settings={**FAST, "recovery_interval": 60})
    site.finished(site.shop.number.delay(1).id)
    site.gates.close("runs-0")
    stranger = Celery("stranger", broker=site.workers.env["BROKER_URL"], set_as_current=False)
    for how in ("runs", "waits"):
        if start == "by us":
            site.shop.in_time.apply_async((how, how), task_id=how)
        else:
            queue = site.workers.env["CELERY_DURABLE_TEST_QUEUE"]
            stranger.send_task(site.shop.in_time.name, (how, how), task_id=how, queue=queue)
            wait_until(lambda how=how: site.sql.value(BORN, how), message="the foreign message gave birth")
    for how in ("runs", "waits"):
        status = site.finished(how, timeout=10)
        assert (status.state, status.attempt) == ("CANCELLED", 1)
        assert status.started_at is not None
        assert status.finished_at is not None
        assert 1.5 <= (status.finished_at - status.started_at).total_seconds() < 2.5
        (compensation,) = durable.list_workflows(parent_id=how, app=site.shop.app)
        assert site.finished(compensation.id, timeout=10).result == "undone"
    site.gates.open("runs-0")


def test_in_threads_a_step_looks_for_itself(site: Site) -> None:
    """What returns in time counts, what returns late has timed out."""
    site.workers.start(pool="threads")
    in_time, late = site.shop.polite_order.delay("a", -0.1), site.shop.polite_order.delay("b", 0.2)
    assert site.finished(in_time.id, timeout=10).result <= 0.1
    assert site.finished(late.id, timeout=10).result == "StepTimeout"
    assert site.ledger.count("polite", "b") == 1


@pytest.mark.crash
def test_a_host_that_dies_before_the_limit_has_crashed(site: Site) -> None:
    """Even when that is found after the limit."""
    workers = site.start(2, concurrency=1)
    site.gates.close("a-0")
    handle = site.shop.limited_step.delay("a", 1.5)
    site.reaches("waits", "a", 0)
    site.owner(*workers).kill()
    site.gates.open("a-0")
    status = site.finished(handle.id)
    assert (status.result, status.attempt, status.crashes) == (1, 2, 1)
    assert step_of(site, handle.id, "tests.fixtures.apps.shop.wait_in_step").errors == ()


@pytest.mark.crash
def test_a_cold_shutdown_takes_no_try_of_a_limited_step(site: Site) -> None:
    """Another worker, in which nothing can end a process, begins the same one again."""
    worker = site.workers.start(concurrency=1)
    site.gates.close("a-0")
    handle = site.shop.limited_step.delay("a", 600)
    site.reaches("waits", "a", 0)
    site.workers.start(pool="solo")
    worker.stop("cold")
    site.reaches("waits", "a", 0, times=2)
    site.gates.open("a-0")
    status = site.finished(handle.id)
    assert (status.result, status.crashes) == (1, 0)
    assert step_of(site, handle.id, "tests.fixtures.apps.shop.wait_in_step").errors == ()
