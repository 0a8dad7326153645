"""A step's tries outlive the worker: what is left of them, and when the next one is due."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

import celery_durable as durable
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.ledger import Ledger
from tests.fixtures.site import Site, opened, shop_env
from tests.fixtures.workers import Workers

pytestmark = pytest.mark.crash

#: A wait of two seconds is spent in the worker, one of five isn't.
SUSPEND_AFTER, SHORT, LONG = 3, 2.0, 5.0


@pytest.fixture(scope="module")
def site(module_database_url: str, module_broker: Broker, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A shop with one worker, shared by all tests here: each uses names of its own."""
    directory = tmp_path_factory.mktemp("budget")
    ledger = Ledger(directory / "ledger")
    env = shop_env(module_database_url, module_broker.url, module_broker.queue, ledger, suspend_after=SUSPEND_AFTER)
    workers = Workers(env, directory)
    with opened(workers, ledger, module_database_url) as site:
        workers.start(concurrency=2)
        yield site
        workers.kill_all()
        print(workers.logs())


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    return str(request.node.name)


def began(site: Site, name: str) -> list[float]:
    """When each run of the step began."""
    return [line.args[1] for line in site.ledger.lines() if line.name == "began" and line.args[0] == name]


def step_of(site: Site, handle: Any) -> durable.StepInfo:
    return durable.list_workflow_steps(handle.id, app=site.shop.app)[0]


def has_failed_once(site: Site, handle: Any) -> bool:
    """Whether the first try is recorded."""
    return [info.tries for info in durable.list_workflow_steps(handle.id, app=site.shop.app)] == [1]


def test_a_death_in_a_short_wait(site: Site, name: str) -> None:
    """The process dies while it waits for the next try: that comes when it was due, neither sooner nor later."""
    handle = site.shop.backing_off.delay(name, 1, SHORT)
    wait_until(lambda: has_failed_once(site, handle), message="the first try is recorded")
    (first,) = began(site, name)
    wait_until(lambda: time.time() - first > SHORT / 2, message="half of the wait is over")
    assert site.status(handle.id).state == "RUNNING"
    os.kill(site.ledger.lines()[-1].pid, signal.SIGKILL)
    status = site.finished(handle.id)
    assert (status.result, status.attempt, status.crashes) == (2, 2, 1)
    assert SHORT < began(site, name)[1] - first < 1.45 * SHORT
    assert step_of(site, handle).tries == 2


def test_a_death_while_suspended(site: Site, name: str) -> None:
    """The whole worker dies while the workflow waits without one: another worker makes the next try when it is due."""
    handle = site.shop.backing_off.delay(name, 1, LONG)
    wait_until(lambda: site.status(handle.id).state == "SUSPENDED", message="the wait gives the worker back")
    (first,) = began(site, name)
    os.killpg(os.getpgid(site.ledger.lines()[-1].pid), signal.SIGKILL)
    site.workers.start(concurrency=2)
    status = site.finished(handle.id)
    assert (status.result, status.crashes) == (2, 0)
    assert LONG < began(site, name)[1] - first < 1.45 * LONG
    assert step_of(site, handle).tries == 2


@pytest.mark.oldest
def test_a_death_in_a_try(site: Site, name: str) -> None:
    """Of four tries one has failed when the process dies in the next: that one takes none, so three are left."""
    handle = site.shop.backing_off.delay(name, 9, 0.05, 2)
    status = site.finished(handle.id)
    assert isinstance(status.error, site.shop.Refused)
    assert (status.error.reason, status.crashes) == ("run 5", 1)
    info = step_of(site, handle)
    assert (info.state, info.tries) == ("FAILURE", 4)
    assert len(began(site, name)) == 5
    assert all(error.message == "503" and error.at and "in backs_off" in error.traceback for error in info.errors)
    assert len(info.errors) == 4


@pytest.mark.oldest
def test_a_step_that_kills_its_worker(site: Site, name: str) -> None:
    """Each death after the first takes a try, because that one may have had another reason; then the step is lost.

    The workflow catches that, and goes on.
    """
    handle = site.shop.survives_a_killer.delay(name)
    status = site.finished(handle.id)
    assert status.result is not None
    said, other = status.result
    assert "worker process died" in said
    assert other == 0
    assert site.ledger.count("die", name) == 1 + 3
    assert status.crashes == 4
    assert (step_of(site, handle).state, step_of(site, handle).tries) == ("FAILURE", 3)
