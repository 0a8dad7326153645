"""Recovery is started by beat and by an elected node: by each alone, by both, by many, through errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.fix_wait import wait_until
from tests.fixtures.proxy import PostgresProxy
from tests.fixtures.site import FAST, Site
from tests.fixtures.workers import Worker

pytestmark = pytest.mark.crash

NEVER = 3600
#: With these, a node's own sweeps are over when it has been elected.
BEAT_ALONE = {**FAST, "recovery_interval": NEVER}


def orphan(site: Site, settings: dict[str, Any]) -> tuple[Any, Worker]:
    """Kill a worker in a step; return the handle, and the worker that is left, which had been elected long before."""
    left = site.workers.start(settings=settings)
    wait_until(lambda: site.sql.value("SELECT count(*) FROM celery_durable.node") == 1)
    killed = site.workers.start(settings=settings, args=["--queues=other"])
    site.gates.close("a-1")
    handle = site.shop.order.apply_async(("a",), queue="other")
    site.reaches("work", "a", 1)
    killed.kill()
    site.gates.open("a-1")
    site.shop.app.control.add_consumer("other", destination=[left.hostname], reply=True, timeout=5)
    return handle, left


def assert_recovered(site: Site, handle: Any) -> None:
    """The orphan went on once, past its completed step."""
    status = site.finished(handle.id)
    assert (status.state, status.result, status.attempt, status.crashes) == ("SUCCESS", [0, 10, 20], 2, 1)
    assert site.work_of("a") == [1, 2, 1]


@pytest.fixture
def django_beat(tmp_path: Path) -> dict[str, str]:
    """The environment of a beat with django-celery-beat's tables in an SQLite file."""
    env = {
        "DJANGO_SETTINGS_MODULE": "tests.fixtures.apps.beat_settings",
        "BEAT_DATABASE": str(tmp_path / "beat.sqlite"),
    }
    subprocess.run([sys.executable, "-m", "django", "migrate", "-v0"], check=True, env={**os.environ, **env})
    return env


def test_beat_alone(site: Site) -> None:
    """Celery's own scheduler recovers where no node sweeps."""
    handle, left = orphan(site, BEAT_ALONE)
    site.workers.beat()
    assert_recovered(site, handle)
    assert "celery_durable.recover" in left.log


def test_the_scheduler_of_django_alone(site: Site, django_beat: dict[str, str]) -> None:
    """So does django-celery-beat's, which keeps the schedule in its tables."""
    handle, left = orphan(site, BEAT_ALONE)
    site.workers.beat(scheduler="django_celery_beat.schedulers:DatabaseScheduler", env=django_beat)
    assert_recovered(site, handle)
    assert "celery_durable.recover" in left.log


def test_a_node_alone(site: Site) -> None:
    """The elected node recovers where no beat runs."""
    handle, _ = orphan(site, FAST)
    assert_recovered(site, handle)


def test_three_beats_and_a_node(site: Site) -> None:
    """Any number of sweeps at once rescue each orphan once."""
    beats = [site.workers.beat(wait=False) for _ in range(3)]
    handle, _ = orphan(site, FAST)
    assert_recovered(site, handle)
    assert all(beat.running for beat in beats)


def test_a_database_error_in_the_middle_of_a_sweep(site: Site) -> None:
    """What a sweep had rescued when it lost the database, before it knew, is sent by a later one."""
    with PostgresProxy(site.workers.env["DATABASE_URL"]) as proxy:
        site.workers.env["DATABASE_URL"] = proxy.url
        handle, left = orphan(site, FAST)
        for sweep in range(1, 9):
            proxy.cut("WITH lost AS", when="after", nth=sweep)
        assert_recovered(site, handle)
        assert "duty 'rescue' failed" in left.log
        assert "lost its worker" not in left.log, "a sweep got the answer: none of the cuts was in its middle"
