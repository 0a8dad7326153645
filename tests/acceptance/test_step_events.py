"""Steps of live workers in a live Flower: what it shows of them, and what it is never told."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any
from urllib.request import Request, urlopen

import psutil
import pytest

from celery_durable.testing.servers import EmbeddedBroker
from tests.fixtures.brokers import isolated
from tests.fixtures.fix_postgres import _new_database
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.flowers import OPEN_API, Flower
from tests.fixtures.ledger import Ledger
from tests.fixtures.site import SHOP, Site, opened, shop_env
from tests.fixtures.workers import Workers

pytestmark = pytest.mark.slow

#: A worker without -E has this queue to itself.
QUIET = "quiet"
WORK = f"{SHOP}.work"


@pytest.fixture(scope="module")
def site(postgres_server: str, template_database: str, broker_server: str, tmp_path_factory: Any) -> Iterator[Site]:
    """A shop with a worker that sends events, and one that doesn't and replaces its processes all the time."""
    directory = tmp_path_factory.mktemp("events")
    ledger = Ledger(directory / "ledger")
    with _new_database(postgres_server, template_database) as url, isolated(broker_server) as broker:
        workers = Workers(shop_env(url, broker.url, broker.queue, ledger), directory)
        with opened(workers, ledger, url) as site:
            workers.start(hostname="loud@test", args=["-E"], wait=False)
            workers.start(hostname="quiet@test", args=["-Q", QUIET, "--max-tasks-per-child=1"]).wait_ready()
            yield site
            workers.kill_all()
            print(workers.logs())


@pytest.fixture(scope="module")
def flower(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flower]:
    log = tmp_path_factory.mktemp("flower") / "flower.log"
    flower = Flower({**site.workers.env, **OPEN_API}, log, ["--enable_events=False"])
    flower.wait_ready()
    wait_until(lambda: flower.hears("loud@test"), message="Flower hears the worker")
    yield flower
    flower.kill()
    print(flower.log)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    return str(request.node.name)


def test_each_executed_step_is_a_task(site: Site, flower: Flower, name: str) -> None:
    """With name, arguments, result, state, times, worker, parent and root; the workflow's page lists it."""
    handle = site.shop.order.delay(name, count=3)
    site.finished(handle.id)
    steps = shown(flower, handle.id, 3)
    assert [step["args"] for step in steps] == [f"('{name}', {number})" for number in range(3)]
    assert [step["result"] for step in steps] == ["0", "10", "20"]
    for step in steps:
        assert (step["name"], step["kwargs"], step["state"], step["retries"]) == (WORK, "{}", "SUCCESS", 0)
        assert (step["worker"], step["parent_id"], step["root_id"]) == ("loud@test", handle.id, handle.id)
        assert 0 <= step["runtime"] < 5
        assert step["started"] == pytest.approx(time.time(), abs=60)
        assert step["succeeded"] >= step["started"]
    page = flower.page(f"/task/{handle.id}")
    assert all(f"/task/{step['uuid']}" in page for step in steps)


def test_failures_and_retries_are_shown(site: Site, flower: Flower, name: str) -> None:
    """A failed step with its error and traceback; one that was tried again, under one id, with its last state."""
    failing = site.shop.catches.delay(name)
    flaky = site.shop.flaky_order.delay(name, 2)
    site.finished(failing.id)
    site.finished(flaky.id)
    refused, work = shown(flower, failing.id, 2)
    assert (refused["state"], work["state"]) == ("FAILURE", "SUCCESS")
    assert "Refused" in refused["exception"]
    assert "in refuse\n" in refused["traceback"]
    (tried,) = shown(flower, flaky.id, 1)
    assert (tried["state"], tried["retries"], tried["result"]) == ("SUCCESS", 2, "3")
    assert tried["retried"] is not None
    assert tried["exception"] == "Refused(503)"


@pytest.mark.crash
def test_a_wait_is_a_retry_with_its_reason(site: Site, flower: Flower) -> None:
    """And Flower's button, which is Celery's revoke, cancels the workflow."""
    handle = site.shop.receiver.delay("approval")
    wait_until(lambda: site.status(handle.id).state == "SUSPENDED", message="it waits")
    wait_until(lambda: flower.knows(handle.id) == "RETRY", message="Flower shows that")
    assert "message approval" in flower.task(handle.id)["exception"]
    with urlopen(Request(f"{flower.url}/api/task/revoke/{handle.id}", method="POST"), timeout=20) as answer:
        assert answer.status == 200
    wait_until(lambda: site.status(handle.id).state == "CANCELLED", message="it is cancelled")


def test_a_replay_is_not_told_again(site: Site, flower: Flower, name: str) -> None:
    """After a crash the steps that were done keep their times; the one that was running comes once."""
    site.gates.close(f"{name}-2")
    handle = site.shop.order.delay(name, count=3)
    before = shown(flower, handle.id, 2)
    site.reaches("work", name, 2)
    psutil.Process(site.ledger.lines()[-1].pid).kill()
    site.reaches("work", name, 2, times=2)
    site.gates.open(f"{name}-2")
    assert site.finished(handle.id).attempt == 2
    after = shown(flower, handle.id, 3)
    assert after[:2] == before
    assert after[2]["state"] == "SUCCESS"


def test_events_are_switched_at_run_time(site: Site, flower: Flower) -> None:
    """Off without -E, on after enable_events, off after disable_events; each workflow by what held at its start.

    The processes of this worker end after each workflow, and send what they have before.
    """
    silent = [run_quietly(site)]
    switch(site, "enable_events")
    shown(flower, run_quietly(site), 2)
    switch(site, "disable_events")
    silent.append(run_quietly(site))
    switch(site, "enable_events")
    shown(flower, run_quietly(site), 2)
    assert [steps_of(flower, workflow_id) for workflow_id in silent] == [[], []]


def steps_of(flower: Flower, workflow_id: str) -> list[dict[str, Any]]:
    """The tasks whose parent this is, by their start."""
    tasks = json.loads(flower.page("/api/tasks")).values()
    steps = [flower.task(task["uuid"]) for task in tasks if task["parent_id"] == workflow_id]
    return sorted(steps, key=lambda step: float(step["started"]))


def shown(flower: Flower, workflow_id: str, count: int) -> list[dict[str, Any]]:
    """Wait until so many steps of a workflow are shown, and return them."""
    wait_until(lambda: len(steps_of(flower, workflow_id)) >= count, message=f"{count} steps are shown")
    steps = steps_of(flower, workflow_id)
    assert len(steps) == count
    return steps


def run_quietly(site: Site) -> str:
    """Run an order of two steps on the worker without -E; return its id."""
    handle = site.shop.order.apply_async(("quiet", 2), queue=QUIET)
    site.finished(handle.id)
    return str(handle.id)


def switch(site: Site, command: str) -> None:
    """Let the worker without -E send events, or not."""
    control = site.shop.app.control
    assert getattr(control, command)(destination=["quiet@test"], reply=True, timeout=20, limit=1)


def test_steps_go_on_without_a_broker(workers: Workers, ledger: Ledger, database_url: str) -> None:
    """While it says nothing, and when it is gone: no step waits for it, and the workflow ends."""
    with EmbeddedBroker() as broker:
        workers.env |= {**shop_env(database_url, broker.url, "celery", ledger), "RESULT_BACKEND": ""}
        with opened(workers, ledger, database_url) as site:
            workers.start(args=["-E"], concurrency=1)
            site.gates.close("a-0", "a-50")
            handle = site.shop.order.delay("a", count=100)
            site.reaches("work", "a", 0)
            os.kill(broker.pid or 0, signal.SIGSTOP)
            assert seconds_until(site, opened_gate="a-0", number=50) < 3
            os.kill(broker.pid or 0, signal.SIGCONT)
            broker.stop()
            assert seconds_until(site, opened_gate="a-50", number=99) < 3
            assert site.finished(handle.id).state == "SUCCESS"
            assert site.work_of("a", 100) == [1] * 100


def seconds_until(site: Site, *, opened_gate: str, number: int) -> float:
    """Let an order go on; return how long it took to come to this step."""
    began = time.monotonic()
    site.gates.open(opened_gate)
    site.reaches("work", "a", number)
    return time.monotonic() - began
