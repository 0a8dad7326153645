"""Remote control of real workers: what they run, and that they take no more."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from celery_durable import control
from tests.fixtures.commands import Commands
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.site import Site


@pytest.fixture
def commands(site: Site) -> Commands:
    return Commands(site.workers.env)


def inspected(site: Site, worker: str) -> list[dict[str, Any]]:
    """What a worker answers."""
    # Celery waits for no more answers than there are destinations.
    replies = site.shop.app.control.inspect(timeout=10, destination=[worker])._request("durable")
    return list(replies[worker])


def runs(site: Site, worker: str, workflow_id: str) -> dict[str, Any]:
    """What a worker tells of a workflow that it runs."""
    return next((each for each in inspected(site, worker) if each["id"] == workflow_id), {})


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_inspect(site: Site, commands: Commands, pool: str) -> None:
    """It tells of each workflow that runs its name, attempt, step, and since when; nothing of those that wait."""
    began = datetime.now(timezone.utc)
    (worker,) = site.start(1, pool=pool, concurrency=4)
    name = worker.hostname
    assert inspected(site, name) == []
    site.gates.close("a-1", "g-0", "g-1")
    site.shop.order.apply_async(("a",), task_id="order/'é'")
    site.shop.gathered_order.apply_async(("g",), task_id="gathered")
    site.shop.receiver.apply_async((), task_id="waits")
    site.reaches("work", "a", 1)
    site.reaches("work", "g", 1)
    wait_until(lambda: site.status("waits").state == "SUSPENDED")
    wait_until(lambda: len(runs(site, name, "gathered")["steps"]) == 2)

    (found,) = json.loads(
        commands.run("inspect", "durable", "--json", f"--destination={name}", "--timeout=10")
    ).values()
    by_id = {each["id"]: each for each in found}
    assert by_id.keys() == {"order/'é'", "gathered"}
    order = by_id["order/'é'"]
    assert (order["name"], order["attempt"]) == ("tests.fixtures.apps.shop.order", 1)
    assert list(order["steps"]) == ["tests.fixtures.apps.shop.work#2"]
    assert all(key.startswith("tests.fixtures.apps.shop.work") for key in by_id["gathered"]["steps"])
    since, step_since = (datetime.fromisoformat(at) for at in (order["since"], *order["steps"].values()))
    assert began - timedelta(seconds=1) < since <= step_since < datetime.now(timezone.utc)
    if pool == "prefork":
        assert order["pid"] in [child.pid for child in worker.children()]

    site.gates.open("a-1", "g-0", "g-1")
    site.finished("order/'é'")
    site.finished("gathered")
    wait_until(lambda: inspected(site, name) == [])
    assert name in commands.run("inspect", "durable", f"--destination={name}", "--timeout=10")


def test_inspect_after_a_crash(site: Site) -> None:
    """What a process has left that has died isn't told; the next attempt is."""
    (worker,) = site.start(1, concurrency=1)
    site.gates.close("a-1")
    site.shop.order.apply_async(("a",), task_id="a")
    site.reaches("work", "a", 1)
    worker.kill_child()
    site.reaches("work", "a", 1, times=2)
    wait_until(lambda: runs(site, worker.hostname, "a").get("attempt") == 2)
    assert list(runs(site, worker.hostname, "a")["steps"]) == ["tests.fixtures.apps.shop.work#2"]
    site.gates.open("a-1")
    site.finished("a")


def test_drain(site: Site, commands: Commands) -> None:
    """A worker that drains hands over after the running step and takes no more; plain tasks still run there."""
    drained, other = site.start(2, concurrency=2)
    site.gates.close("a-1")
    site.shop.order.apply_async(("a",), task_id="a")
    site.reaches("work", "a", 1)
    first = site.owner(drained, other)
    second = other if first is drained else drained

    said = commands.run("control", "durable_drain", f"--destination={first.hostname}", "--timeout=10")
    assert "hands 1 over" in said
    wait_until(lambda: draining(site) == [first.hostname])
    site.gates.open("a-1")
    site.finished("a")
    assert site.work_of("a") == [1, 1, 1]
    assert site.owner(first, second) is second
    assert site.status("a").worker == second.hostname

    for number in range(5):
        site.shop.order.apply_async((f"b{number}",), task_id=f"b{number}")
    for number in range(5):
        assert site.finished(f"b{number}").worker == second.hostname

    second.stop()
    second.wait_exit()
    site.shop.note.delay("plain")
    site.reaches("note", "plain")
    assert site.owner(first) is first


def test_names_are_known(commands: Commands) -> None:
    """The command line knows both by their names, and what they do, before it asks anybody."""
    assert "durable " in commands.run("inspect", "--list")
    assert "durable_drain " in commands.run("control", "--list")


def test_app_without_it() -> None:
    """A worker that has loaded the commands for another app says that it isn't meant."""
    app = Celery("plain", set_as_current=False)
    for command in (control.durable, control.durable_drain):
        assert "isn't installed" in command(SimpleNamespace(app=app))["error"]


def draining(site: Site) -> list[str]:
    """Host names of the nodes that drain."""
    return [row.hostname for row in site.sql.all("SELECT hostname FROM celery_durable.node WHERE draining")]
