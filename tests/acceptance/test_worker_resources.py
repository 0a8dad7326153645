"""Workers that run out of files or memory, and pools that come and go: nothing is lost, nothing runs twice."""

from __future__ import annotations

import json

import psutil
import pytest

import celery_durable as durable
from tests.fixtures.brokers import Broker
from tests.fixtures.ledger import Ledger
from tests.fixtures.mixed import assert_mixed, start_mixed
from tests.fixtures.site import Site, shop_env

MIB = 2**20


@pytest.fixture
def worker_env(database_url: str, broker: Broker, ledger: Ledger) -> dict[str, str]:
    """What the shop reads from its environment."""
    return shop_env(database_url, broker.url, broker.queue, ledger, suspend_after=0.1, max_payload=100 * MIB)


def cut_off(site: Site) -> None:
    """Every session of the database ends."""
    site.sql.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                     " WHERE pid <> pg_backend_pid() AND datname = current_database()")  # fmt: skip


# Files


def test_a_step_that_uses_up_all_files(site: Site) -> None:
    """Its workflow ends, and so do those beside and after it whose own code opens no file."""
    site.gates.close("beside-0")
    (worker,) = site.start(1, concurrency=2)
    for child in worker.children():
        child.rlimit(psutil.RLIMIT_NOFILE, (child.num_fds() + 20, 4096))
    beside = site.shop.order.delay("beside")
    site.reaches("work", "beside", 0)
    leaky = site.shop.leaky.delay("leak")
    assert site.finished(leaky.id).result == 10
    assert site.work_of("leak", 2) == [1, 1]
    after = [site.shop.number.delay(value) for value in range(6)]
    assert [site.finished(handle.id).result for handle in after] == list(range(6))
    site.gates.open("beside-0")
    assert site.finished(beside.id).result == [0, 10, 20]
    assert site.work_of("beside") == [1, 1, 1]
    assert worker.running


@pytest.mark.crash
def test_a_worker_that_can_open_no_file_any_more(site: Site) -> None:
    """Cut off from the database it is taken for dead, and another one goes on; with files it joins in again."""
    site.gates.close("a-3")
    (first,) = site.start(1)
    handle = start_mixed(site, "a")["a"]
    site.reaches("work", "a", 3)
    family = [psutil.Process(first.pid), *first.children()]
    before = [process.rlimit(psutil.RLIMIT_NOFILE) for process in family]
    for process in family:
        process.rlimit(psutil.RLIMIT_NOFILE, (4, before[0][1]))
    second = site.workers.start()
    cut_off(site)
    site.reaches("work", "a", 3, times=2)
    site.gates.open("a-3")
    assert_mixed(site, "a", handle, interrupted=["work-3"])
    for process, limit in zip(family, before, strict=True):
        process.rlimit(psutil.RLIMIT_NOFILE, limit)
    second.kill()
    assert_mixed(site, "b", site.shop.mixed.apply_async(("b",), task_id="b"))
    assert first.running


# Memory


def test_a_step_that_finds_no_memory(site: Site) -> None:
    """MemoryError is the outcome of its body, and of a value that there is no room to send; the workflow goes on."""
    settings = {**json.loads(site.workers.env["DURABLE_SETTINGS"]), "serializer": "pickle"}
    site.shop.app.conf.accept_content = ["json", "pickle"]
    env = {"CELERY_SETTINGS": json.dumps({"accept_content": ["json", "pickle"]}), "C_FORCE_ROOT": "1"}
    # What glibc sets aside for each thread is as much as all of the room.
    (worker,) = site.start(1, concurrency=1, settings=settings, env={**env, "MALLOC_ARENA_MAX": "1"})
    (child,) = worker.children()
    assert site.finished(site.shop.quick.delay("before").id).result == "before"
    # Room for a value, what it is serialized to, and a copy of both, but not for the buffer that they are sent from.
    child.rlimit(psutil.RLIMIT_AS, (child.memory_info().vms + 145 * MIB,) * 2)
    handles = {"a": site.shop.greedy.delay("a"), "b": site.shop.abundant.delay("b", 33 * MIB)}
    for name, handle in handles.items():
        assert site.finished(handle.id).result == [0, "MemoryError", 10]
        assert site.work_of(name, 2) == [1, 1]
        assert len(durable.list_workflow_steps(handle.id, app=site.shop.app)) == 3, "each step is recorded"
    assert site.ledger.count("return_much", "b") == 1
    assert site.finished(site.shop.quick.delay("after").id).result == "after"
    assert [each.pid for each in worker.children()] == [child.pid]


# Pools that come and go

RECYCLING = {
    "tasks": {"worker_max_tasks_per_child": 1},
    "memory": {"worker_max_memory_per_child": 1},
    "autoscale": {},
}


@pytest.mark.parametrize("kind", list(RECYCLING))
def test_processes_that_are_replaced(site: Site, kind: str) -> None:
    """No crash is counted, no workflow is lost, none runs twice, and what follows one fires once."""
    args = ("--autoscale=4,1",) if kind == "autoscale" else ()
    # A new process for each task takes its time on a busy machine: messages that wait aren't lost.
    settings = {**json.loads(site.workers.env["DURABLE_SETTINGS"]), "republish_after": 60}
    (worker,) = site.start(1, args=args, settings=settings, env={"CELERY_SETTINGS": json.dumps(RECYCLING[kind])})
    handles = start_mixed(site, "abc")
    orders = [site.shop.order.apply_async((f"o{n}",), link=site.shop.note_last.s(f"o{n}")) for n in range(12)]
    for name, handle in handles.items():
        assert_mixed(site, name, handle, timeout=90)
    for number, handle in enumerate(orders):
        assert site.finished(handle.id, timeout=90).result == [0, 10, 20]
        assert site.work_of(f"o{number}") == [1, 1, 1]
        site.reaches("note", f"o{number}", [0, 10, 20], timeout=90)
    assert sum(entry.name == "note" for entry in site.ledger.lines()) == len(orders)
    assert site.sql.value("SELECT sum(crashes) FROM celery_durable.workflow") == 0
    assert "lost its worker" not in worker.log
    assert len({entry.pid for entry in site.ledger.lines()}) > 1
