"""The logs of live workers: each line says which workflow, attempt and step it belongs to."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fixtures.fix_wait import wait_until
from tests.fixtures.site import FAST, SHOP, Site
from tests.fixtures.workers import Worker

pytestmark = pytest.mark.slow

APP = "tests.fixtures.apps.telling"
FIELDS = "%(workflow_id)s|%(workflow_name)s|%(attempt)s|%(step)s|%(message)s"
FORMATS = {"worker_log_format": f"W|{FIELDS}", "worker_task_log_format": f"T|%(task_name)s|{FIELDS}"}
POOLS: dict[str, dict[str, str]] = {"prefork": {}, "threads": {}, "gevent": {}}


@pytest.fixture
def telling(site: Site) -> Iterator[Any]:
    """The tasks that tell, as a producer of this site has them."""
    sys.modules[SHOP] = site.shop
    yield importlib.import_module(APP)
    del sys.modules[APP]


def start(site: Site, pool: str = "prefork", **options: Any) -> Worker:
    env = {**POOLS[pool], "CELERY_SETTINGS": json.dumps(FORMATS)}
    settings = {**FAST, "suspend_after": 0.1}
    return site.workers.start(app=f"{APP}:app", pool=pool, env=env, settings=settings, **options)


def lines(worker: Worker, message: str) -> list[tuple[str, ...]]:
    """What lines with such a message say of workflow, task, attempt and step; the message itself at the end."""
    found = re.findall(r"^W\|([^|\n]*)\|([^|\n]*)\|([^|\n]*)\|([^|\n]*)\|(.*)$", worker.log, re.MULTILINE)
    return [line for line in found if re.search(message, line[-1])]


@pytest.mark.parametrize("pool", POOLS)
def test_functions_steps_and_branches(site: Site, telling: Any, pool: str) -> None:
    """In every pool; threads of a gather, asyncio tasks and greenlets each have their own step."""
    worker = start(site, pool, concurrency=4)
    for name in ("t1", "t2"):
        telling.tells.apply_async([name], task_id=name)
    telling.atells.apply_async(task_id="a1")
    for name in ("t1", "t2", "a1"):
        assert site.finished(name).state == "SUCCESS"
    told = {line[0]: line[1:4] for line in lines(worker, "^begin$")}
    for name in ("t1", "t2"):
        task = f"{APP}.tells"
        assert told[name][0] == task
        parts = {line[-1]: line[:4] for line in lines(worker, r"^part \d") if line[0] == name}
        keys = [f"{APP}.part", *(f"{APP}.part#{number}" for number in range(2, 6))]
        assert parts == {f"part {number}": (name, task, "1", key) for number, key in enumerate(keys, 1)}
        assert (name, task, "2", "-", "end") in lines(worker, "^end$")
        assert f"T|{task}|{name}|{task}|1|-|task-begin" in worker.log
        assert f"|{name}|{task}|1|{APP}.part#3|task-part 3" in worker.log
        ((*failed, _),) = [line for line in lines(worker, "failed in try 1") if line[0] == name]
        assert failed == [name, task, "1", "fails_once"]
        ((*suspended, _),) = [line for line in lines(worker, "waits without a worker") if line[0] == name]
        assert suspended == [name, task, "1", "-"]
    task = f"{APP}.atells"
    assert set(lines(worker, r"^(part|branch) \d|^end$")) >= {
        ("a1", task, "1", f"{APP}.apart[branch]", "part 1"),
        ("a1", task, "1", f"{APP}.part[branch]", "part 2"),
        ("a1", task, "1", f"{APP}.apart[branch:2]", "part 3"),
        ("a1", task, "1", f"{APP}.part[branch:2]", "part 4"),
        ("a1", task, "1", "-", "branch 1"),
        ("a1", task, "1", "-", "branch 3"),
        ("a1", task, "1", "-", "end"),
    }
    assert ("-", "-", "-", "-") in {line[:4] for line in lines(worker, "ready")}
    assert "Logging error" not in worker.log


def test_a_crash(site: Site, telling: Any) -> None:
    """The main process names the workflow that has lost its process; the next attempt has its own number."""
    worker = start(site, concurrency=1)
    site.gates.close("c-1")
    telling.crashes.apply_async(["c"], task_id="c1")
    site.reaches("work", "c", 1)
    worker.kill_child()
    wait_until(lambda: lines(worker, "lost its worker"), message="the loss is told")
    site.gates.open("c-1")
    assert site.finished("c1").attempt == 2
    task = f"{APP}.crashes"
    assert "Logging error" not in worker.log, "the pool's own line that a process is dead has the fields, too"
    assert [line[:4] for line in lines(worker, "lost its worker")] == [("c1", "-", "-", "-")]
    assert [line[:4] for line in lines(worker, "^after work$")] == [("c1", task, "1", "-"), ("c1", task, "2", "-")]
    assert ("c1", task, "2", "-") in [line[:4] for line in lines(worker, "runs, attempt 2")]
