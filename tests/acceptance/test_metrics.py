"""Live workers, scraped as Prometheus does it: every pool, processes that die, ports that are taken."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.fix_wait import wait_until
from tests.fixtures.scrapes import Scrape, scrape
from tests.fixtures.site import FAST, SHOP, Site
from tests.fixtures.workers import Worker

pytestmark = pytest.mark.slow

POOLS: dict[str, dict[str, str]] = {
    "prefork": {},
    "threads": {},
    "solo": {},
    "gevent": {},
    "eventlet": {"PSYCOPG_WAIT_FUNC": "wait_select"},
}
ORDER = {"workflow": f"{SHOP}.order"}
WORK = {"workflow": f"{SHOP}.order", "step": f"{SHOP}.work"}
TRIES = "celery_durable_step_duration_seconds_count"
STARTED = "celery_durable_attempts_started_total"
ENDED = "celery_durable_attempts_ended_total"


class Metered:
    """A worker's page of metrics."""

    def __init__(self, site: Site, directory: Path) -> None:
        self.site = site
        self.directory = directory
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]

    def start(self, pool: str = "prefork", **options: Any) -> Worker:
        """Start a worker that serves its metrics."""
        env = {**POOLS[pool], "METRICS_PORT": str(self.port), "TMPDIR": str(self.directory), **options.pop("env", {})}
        app = "tests.fixtures.apps.metered:app"
        return self.site.workers.start(app=app, pool=pool, env=env, **options)

    def page(self) -> Scrape | None:
        """The page as it is now; None while nobody listens."""
        return scrape(f"http://127.0.0.1:{self.port}/metrics")

    def shows(self, what: Callable[[Scrape], bool]) -> Scrape:
        """Wait until the page shows this."""
        wait_until(lambda: (page := self.page()) is not None and what(page), 20, lambda: f"{self.told()} shows it")
        page = self.page()
        assert page is not None
        return page

    def told(self) -> list[Any]:
        """All of ours that is above zero and no bucket, for a look at it."""
        page = self.page()
        samples = [] if page is None else [each for family in page.families.values() for each in family.samples]
        ours = [each for each in samples if each.name.startswith("celery_durable") and "_bucket" not in each.name]
        return [(each.name, each.labels, each.value) for each in ours if each.value]

    def files(self) -> list[str]:
        """What the processes of the workers keep."""
        return sorted(path.name for path in self.directory.glob("celery_durable_metrics_*/*"))


@pytest.fixture
def metered(site: Site, tmp_path: Path) -> Metered:
    directory = tmp_path / "metrics"
    directory.mkdir()
    return Metered(site, directory)


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_is_measured(metered: Metered, pool: str) -> None:
    """Steps by outcome, attempts by ending, lags, and what the database knows: one page for all processes."""
    site = metered.site
    worker = metered.start(pool)
    orders = [site.shop.order.delay(f"o{number}") for number in range(6)]
    assert all(site.finished(each.id).state == "SUCCESS" for each in orders)
    assert site.finished(site.shop.flaky_order.delay("f", 2).id).result == 3
    assert site.finished(site.shop.refused.delay("r").id).state == "FAILURE"
    site.gates.close("open-1")
    site.shop.order.apply_async(["open"], task_id="open")
    site.reaches("work", "open", 1)
    page = metered.shows(lambda page: page.value(TRIES, **ORDER) == 19 and page.value(STARTED) == 9)
    assert page.value(TRIES, **WORK, outcome="success") == 19
    flaky = {"workflow": f"{SHOP}.flaky_order", "step": f"{SHOP}.flaky"}
    assert page.value(TRIES, **flaky, outcome="retry") == 2
    assert page.value(TRIES, **flaky, outcome="success") == 1
    assert page.value(ENDED, **ORDER, ending="SUCCESS") == 6
    assert page.value(ENDED, workflow=f"{SHOP}.refused", ending="FAILURE") == 1
    assert page.value("celery_durable_queued_seconds_count", **ORDER) == 7
    assert 0 <= page.value("celery_durable_queued_seconds_sum") < 60
    page = metered.shows(lambda page: page.value("celery_durable_workflows", state="RUNNING", **ORDER) == 1)
    assert page.value("celery_durable_up") == 1
    assert page.value("celery_durable_nodes", state="alive") == 1
    assert page.value("celery_durable_orphans") == 0
    assert 0 <= page.value("celery_durable_sweep_age_seconds") < 10
    assert not [family for family in page.families.values() if not family.documentation]
    site.gates.open("open-1")
    site.finished("open")
    worker.stop()
    assert worker.wait_exit() == 0
    assert metered.page() is None
    assert not list(metered.directory.iterdir()), "nothing is left on the disk"
    assert "The observer" not in worker.log
    assert "metrics can't" not in worker.log


def test_a_killed_process_has_been_counted(metered: Metered) -> None:
    """What it had counted stays; the rescue and the second attempt are there, and the new process takes its files."""
    site = metered.site
    worker = metered.start(concurrency=1)
    site.gates.close("a-1")
    handle = site.shop.order.delay("a")
    site.reaches("work", "a", 1)
    metered.shows(lambda page: page.value(TRIES, **WORK) == 1)
    before = metered.files()
    worker.kill_child()
    site.gates.open("a-1")
    assert site.finished(handle.id).result == [0, 10, 20]
    page = metered.shows(lambda page: page.value(ENDED, **ORDER) == 1)
    assert page.value(STARTED, **ORDER) == 2
    assert page.value(TRIES, **WORK) == 3
    assert page.value("celery_durable_recovered_total", duty="rescue") == 1
    assert {name for name in metered.files() if "slot" in name} == {name for name in before if "slot" in name}


def test_processes_that_are_replaced(metered: Metered) -> None:
    """However many there were, no sample is lost, and the files don't get more."""
    site = metered.site
    metered.start(concurrency=2, args=["--max-tasks-per-child=1"])
    handles = [site.shop.order.delay(f"m{number}") for number in range(10)]
    assert all(site.finished(each.id).state == "SUCCESS" for each in handles)
    page = metered.shows(lambda page: page.value(ENDED) == 10)
    assert page.value(TRIES, **WORK) == 30
    slots = {name.partition("slot")[2] for name in metered.files() if "slot" in name}
    assert slots <= {"0.db", "1.db", "2.db"}


def test_a_killed_worker_and_its_successor(metered: Metered) -> None:
    """The port is free at once, and the database's gauges say what the dead one has left."""
    site = metered.site
    site.gates.close("k-1")
    worker = metered.start(settings={**FAST, "lease": 4})
    handle = site.shop.order.delay("k")
    site.reaches("work", "k", 1)
    metered.shows(lambda page: page.value("celery_durable_nodes", state="alive") == 1)
    worker.kill()
    site.gates.open("k-1")
    metered.start()
    metered.shows(lambda page: page.value("celery_durable_nodes", state="silent") == 1)
    assert site.finished(handle.id).attempt == 2
    page = metered.shows(lambda page: page.value(ENDED, **ORDER, ending="SUCCESS") == 1)
    assert page.value("celery_durable_recovered_total", duty="rescue") == 1
    assert page.value(STARTED) == 1


def test_an_attempt_that_is_fenced(metered: Metered) -> None:
    """An attempt that finds its workflow in other hands is counted as such."""
    site = metered.site
    metered.start()
    site.gates.close("z-1")
    handle = site.shop.order.delay("z")
    site.reaches("work", "z", 1)
    site.sql.execute(
        "UPDATE celery_durable.workflow SET state = 'ENQUEUED', node = NULL, token = NULL, "
        "publish_at = clock_timestamp(), published_at = NULL WHERE id = %s", handle.id,
    )  # fmt: skip
    site.reaches("work", "z", 1, times=2)
    site.gates.open("z-1")
    assert site.finished(handle.id).result == [0, 10, 20]
    page = metered.shows(lambda page: page.value(ENDED, **ORDER) == 2)
    assert page.value(ENDED, **ORDER, ending="fenced") == 1
    assert page.value(STARTED, **ORDER) == 2


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_port_that_is_taken(metered: Metered, pool: str) -> None:
    """The worker says so, once, and works; it has the port as soon as that is free."""
    site = metered.site
    with socket.socket() as other:
        other.bind(("127.0.0.1", metered.port))
        other.listen()
        worker = metered.start(pool)
        assert site.finished(site.shop.order.delay("t").id).state == "SUCCESS"
        wait_until(lambda: "can't be served" in worker.log, message="it is told")
    page = metered.shows(lambda page: page.value(ENDED) == 1)
    assert page.value(TRIES, **WORK) == 3
    assert worker.log.count("can't be served") == 1
    assert "port of its own" in worker.log


def test_a_directory_of_the_users_own(metered: Metered, tmp_path: Path) -> None:
    """The environment variable that prometheus_client has for it is heeded, and the directory is left alone."""
    site, directory = metered.site, tmp_path / "own"
    worker = metered.start(env={"PROMETHEUS_MULTIPROC_DIR": str(directory)})
    assert site.finished(site.shop.order.delay("d").id).state == "SUCCESS"
    metered.shows(lambda page: page.value(ENDED) == 1)
    pids = {str(child.pid) for child in worker.children()}
    assert pids & {path.stem.rpartition("_")[2] for path in directory.iterdir()}
    worker.stop()
    worker.wait_exit()
    assert list(directory.iterdir())


def test_a_pool_whose_metrics_nobody_sees(metered: Metered) -> None:
    """Without a port, and without a directory, a prefork worker says what is missing."""
    app = "tests.fixtures.apps.metered:app"
    worker = metered.site.workers.start(app=app)
    assert metered.site.finished(metered.site.shop.order.delay("n").id).state == "SUCCESS"
    assert worker.log.count("Nobody sees the metrics") == 1
    assert "PROMETHEUS_MULTIPROC_DIR" in worker.log
