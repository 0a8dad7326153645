"""Libraries that are found beside Celery: schedules, results, errors, traces, greenlets.

`test_triggers.py` shows that django-celery-beat triggers the recovery.
"""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import celery_durable as durable
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.pages import CHECKOUT
from tests.fixtures.site import Site

NEIGHBOURS = "tests.fixtures.apps.neighbours"
START = """
import sys
from tests.fixtures.apps import neighbours
for workflow_id, name in zip(sys.argv[1::2], sys.argv[2::2]):
    args = [workflow_id, 2] if name == "flaky_order" else [workflow_id]
    getattr(neighbours, name).apply_async(args, task_id=workflow_id)
"""
READ = """
import django
django.setup()
from tests.fixtures.apps.neighbours import waits
print(waits.AsyncResult("w1").get(timeout=10))
"""
SCHEDULE = """
import django
django.setup()
from django_celery_beat.models import IntervalSchedule, PeriodicTask
every, _ = IntervalSchedule.objects.get_or_create(every=1, period="seconds")
PeriodicTask.objects.create(
    name="report", task="tests.fixtures.apps.shop.quick", args="[7]", interval=every, one_off=True)
"""
GREENLETS = """
from gevent import monkey
monkey.patch_all()
import json, os
import gevent
import celery_durable as durable
from tests.fixtures.apps import shop

seen = [0]

def beside():
    while len(done) < 50:
        seen[0] += 1
        gevent.sleep(0.001)

def one(number):
    handle = shop.echoes.delay("e", number)
    done.append(handle.get(timeout=60))

done = []
ticking = gevent.spawn(beside)
gevent.joinall([gevent.spawn(one, number) for number in range(50)], raise_error=True)
ticking.join()
print(json.dumps([sorted(done), seen[0]]))
"""


def python(env: dict[str, str], code: str, *args: str) -> str:
    """Run Python in a process of its own, from the checkout; what it prints."""
    command = [sys.executable, "-c", code, *args]
    done = subprocess.run(command, cwd=CHECKOUT, env={**os.environ, **env}, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def django(env: dict[str, str]) -> None:
    """Make the tables."""
    python(env, "from django.core.management import execute_from_command_line as run; run(['', 'migrate', '-v0'])")


def entries(site: Site, name: str) -> list[list[Any]]:
    """What a neighbour has recorded."""
    return [entry.args for entry in site.ledger.lines() if entry.name == name]


def suspended(site: Site, *ids: str) -> None:
    """Wait until these wait for a message, and send it."""
    for workflow_id in ids:
        wait_until(lambda workflow_id=workflow_id: site.status(workflow_id).state == "SUSPENDED")
        durable.send(workflow_id, None, "go", app=site.shop.app)


def test_a_schedule_of_django_celery_beat(site: Site, tmp_path: Path) -> None:
    """A workflow as a periodic task is started by beat, and is as durable as any."""
    env = {
        "DJANGO_SETTINGS_MODULE": "tests.fixtures.apps.beat_settings",
        "BEAT_DATABASE": str(tmp_path / "beat.sqlite"),
    }
    django(env)
    python(env, SCHEDULE)
    site.workers.start()
    site.workers.beat(scheduler="django_celery_beat.schedulers:DatabaseScheduler", env=env)
    (started,) = wait_until(lambda: durable.list_workflows(name="tests.fixtures.apps.shop.quick", app=site.shop.app))
    assert (site.finished(started.id).state, site.finished(started.id).result) == ("SUCCESS", 7)


def test_results_in_django_celery_results(site: Site, tmp_path: Path) -> None:
    """Its table shows each state as Celery does, and the result; Postgres has both anyway."""
    database = tmp_path / "results.sqlite"
    env = {
        "DJANGO_SETTINGS_MODULE": "tests.fixtures.apps.results_settings",
        "RESULTS_DATABASE": str(database),
        "RESULT_BACKEND": "django-db",
    }
    django(env)

    def shown(workflow_id: str) -> tuple[str, Any] | None:
        with closing(sqlite3.connect(database)) as connection:
            query = "SELECT status, result FROM django_celery_results_taskresult WHERE task_id = ?"
            row = connection.execute(query, [workflow_id]).fetchone()
        return row and (row[0], json.loads(row[1]))

    site.workers.start(app=f"{NEIGHBOURS}:app", concurrency=1, env=env)
    producer = {**site.workers.env, **env}
    python(producer, f"import django; django.setup()\n{START}", "w1", "waits", "w2", "fails", "w3", "waits")
    wait_until(lambda: all((shown(each) or " ")[0] == "RETRY" for each in ("w1", "w2", "w3")))
    durable.cancel_workflow("w3", app=site.shop.app)
    suspended(site, "w1", "w2")
    wait_until(lambda: shown("w1") == ("SUCCESS", 10))
    wait_until(lambda: (shown("w2") or " ")[0] == "FAILURE")
    assert shown("w2")[1]["exc_type"] == "Refused"  # type: ignore[index]
    wait_until(lambda: (shown("w3") or " ")[0] == "REVOKED")
    assert python(producer, READ).strip() == "10"


def test_sentry(site: Site) -> None:
    """A workflow that fails is one error; suspensions, retries, cancellations and errors that it catches are none."""
    env = {**site.workers.env, "NEIGHBOUR": "sentry"}
    site.workers.start(app=f"{NEIGHBOURS}:app", env=env)
    outcomes = {
        "waits": "SUCCESS", "fails": "FAILURE", "flaky_order": "SUCCESS", "retried": "SUCCESS",
        "fails_by_its_step": "FAILURE", "catches_and_waits": "SUCCESS",
    }  # fmt: skip
    ids = {f"the-{name}": name for name in outcomes} | {"cancelled": "waits"}
    python(env, START, *(word for pair in ids.items() for word in pair))
    wait_until(lambda: site.status("cancelled").state == "SUSPENDED")
    durable.cancel_workflow("cancelled", app=site.shop.app)
    suspended(site, "the-waits", "the-fails", "the-catches_and_waits")
    assert {name: site.finished(f"the-{name}").state for name in outcomes} == outcomes
    # Celery tells of the cancelled one by a delivery of its own.
    wait_until(lambda: site.status("cancelled").dispatched)
    wait_until(lambda: (transactions(site, "fails"), transactions(site, "waits")) == (2, 4))
    errors = sorted((kind, text[:3], workflow_id) for kind, text, workflow_id in entries(site, "error"))
    assert errors == [("Refused", "503", "the-fails"), ("Refused", "504", "the-fails_by_its_step")]
    assert site.work_of("the-waits", 2) == [1, 1]


def transactions(site: Site, name: str) -> int:
    """How many deliveries of this workflow Sentry has seen."""
    return [args[0] for args in entries(site, "transaction")].count(f"{NEIGHBOURS}.{name}")


def test_opentelemetry(site: Site) -> None:
    """One span for the start and one for each attempt, all of one trace: its context is kept with the workflow."""
    env = {**site.workers.env, "NEIGHBOUR": "opentelemetry"}
    site.workers.start(app=f"{NEIGHBOURS}:app", env=env)
    python(env, START, "w1", "waits", "w2", "fails")
    suspended(site, "w1", "w2")
    assert [site.finished(each).state for each in ("w1", "w2")] == ["SUCCESS", "FAILURE"]
    for name, last in (("waits", "UNSET"), ("fails", "ERROR")):
        wait_until(lambda name=name: len(spans(site, name)) == 3, message=lambda: str(entries(site, "span")))
        publish, *runs = spans(site, name)
        assert publish[0] == f"apply_async/{NEIGHBOURS}.{name}"
        assert [run[0] for run in runs] == [f"run/{NEIGHBOURS}.{name}"] * 2
        assert len({span[1] for span in (publish, *runs)}) == 1
        assert [span[2] for span in (publish, *runs)] == ["UNSET", "UNSET", last]


def spans(site: Site, name: str) -> list[list[Any]]:
    """Those about one task, in the order in which they ended."""
    return [args for args in entries(site, "span") if args[0].endswith(f".{name}")]


def test_a_producer_under_gevent(site: Site) -> None:
    """Greenlets of a patched process start workflows and wait for them side by side, and no other greenlet stops."""
    site.workers.start(concurrency=2)
    outcomes, ticks = json.loads(python(site.workers.env, GREENLETS))
    assert outcomes == list(range(50))
    assert ticks > 50
