"""What is counted and what the database tells, in process and on a real Postgres."""

from __future__ import annotations

import errno
import logging
import os
import re
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery
from celery.concurrency.prefork import TaskPool
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest

import celery_durable as durable
from celery_durable.contrib import prometheus
from celery_durable.contrib.prometheus import MOST_STEPS, OTHER
from celery_durable.exceptions import ConfigurationError, NotInstalled
from celery_durable.installation import installed_on
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.pages import read, rows
from tests.fixtures.rig import Rig
from tests.fixtures.scrapes import Scrape
from tests.fixtures.workers import ROOT

pytestmark = pytest.mark.oldest

TRIES = "celery_durable_step_duration_seconds_count"
STARTED = "celery_durable_attempts_started_total"
ENDED = "celery_durable_attempts_ended_total"

DUE = """
    WITH due AS (UPDATE celery_durable.checkpoint SET wake_at = clock_timestamp())
    UPDATE celery_durable.workflow SET wake_at = clock_timestamp() WHERE state = 'SUSPENDED'
"""
#: A pool process that takes over the files of others, with a step that none of them has told of.
SUCCESSOR = """
from celery_durable.contrib.prometheus import Measuring
from tests.unit.test_step_events import report
import sys
for name in sys.argv[1:]:
    Measuring().step_ended(report(name=name))
"""


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """One database for all of these tests, which is cheaper."""
    return emptied_database_url


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    shop = Inprocess(database_url, broker_url, suspend_after=2)
    prometheus.install(shop.app)
    yield shop
    shop.close()


@pytest.fixture
def name() -> str:
    """A task's name that no other test has counted under."""
    return f"shop.order_{uuid.uuid4().hex}"


@pytest.fixture
def ask(shop: Inprocess) -> Callable[[], Scrape]:
    """What the database tells now."""

    def ask() -> Scrape:
        return Scrape(generate_latest(_registry_of(prometheus.collector(shop.app))).decode())

    return ask


def counted() -> Scrape:
    """What this process has counted."""
    return Scrape(generate_latest(REGISTRY).decode())


# What is counted


def test_a_workflow_is_counted(shop: Inprocess, sql: Sql, name: str) -> None:
    """Its attempts and how they ended; each try of its steps, by outcome, under the step's name alone."""
    tries: list[int] = []

    @shop.step(name="shop.charge", autoretry_for=(OSError,), max_retries=3, retry_backoff=0.001)
    def charge(number: int) -> int:
        tries.append(number)
        if number and len(tries) == 2:
            raise OSError("away")
        return number

    @shop.workflow(name=name)
    def order() -> list[int]:
        durable.sleep(60)
        return [charge(0), charge(1), *durable.gather(charge.s(0), charge.s(0))]

    workflow_id = order.delay().id
    shop.run(workflow_id)
    assert counted().value(ENDED, workflow=name, ending="suspended") == 1
    sql.execute(DUE)
    shop.installation.store.workflows.wake(limit=10, patience=0)
    shop.run(workflow_id)
    page = counted()
    assert page.value(STARTED, workflow=name) == 2
    assert page.value(ENDED, workflow=name, ending="SUCCESS") == 1
    labels = {"workflow": name, "step": "shop.charge"}
    assert page.value(TRIES, **labels, outcome="success") == 4
    assert page.value(TRIES, **labels, outcome="retry") == 1
    assert page.value(TRIES, workflow=name) == 5


def test_every_ending(shop: Inprocess, sql: Sql, name: str) -> None:
    """A failure, a cancellation, a hand-over, an attempt whose workflow another one has."""
    meanwhile: list[Any] = []

    @shop.workflow(name=name)
    def order() -> None:
        meanwhile.pop()()
        durable.as_step(lambda: None, name="work")()

    def run(action: Any) -> None:
        meanwhile.append(action)
        shop.run(order.delay().id)

    def fail() -> None:
        raise ValueError("no")

    run(fail)
    run(lambda: durable.cancel_workflow(durable.current.workflow_id, app=shop.app))
    run(lambda: sql.execute("UPDATE celery_durable.workflow SET token = gen_random_uuid() WHERE state = 'RUNNING'"))
    run(shop.drain)
    page = counted()
    for ending in ("FAILURE", "CANCELLED", "fenced", "handed over"):
        assert page.value(ENDED, workflow=name, ending=ending) == 1, ending
    assert page.value(ENDED, workflow=name) == page.value(STARTED, workflow=name) == 4


def test_the_way_of_a_message_is_measured(shop: Inprocess, sql: Sql, name: str) -> None:
    """By the database's clock, from the message that was claimed; one that says nothing, or nonsense, isn't."""

    @shop.workflow(name=name)
    def order() -> None:
        pass

    for published in (None, "soon", sql.value("SELECT (clock_timestamp() - interval '20 s')::text")):
        shop.run(order.delay().id, durable={"published": published})
    page = counted()
    assert page.value("celery_durable_queued_seconds_count", workflow=name) == 1
    assert 20 <= page.value("celery_durable_queued_seconds_sum", workflow=name) < 30
    assert page.value(STARTED, workflow=name) == 3


def test_the_recovery_is_counted(shop: Inprocess, name: str) -> None:
    """By duty, in the process that sweeps."""

    @shop.workflow(name=name)
    def order() -> None:
        pass

    before = counted().value("celery_durable_recovered_total", duty="republish")
    for _ in range(3):
        order.apply_async(countdown=0)
    shop.installation.store.workflows.unsent([each.id for each in durable.list_workflows(app=shop.app)], patience=0)
    shop.installation.recovery(lambda messages: (), patience=0).republish()
    assert counted().value("celery_durable_recovered_total", duty="republish") == before + 3


def test_names_that_are_made_from_data(shop: Inprocess, name: str, caplog: pytest.LogCaptureFixture) -> None:
    """The number of series is bounded for each workflow; what is beyond that is counted together, and told once."""

    @shop.workflow(name=name)
    def order() -> None:
        for number in range(MOST_STEPS + 20):
            durable.as_step(lambda: None, name=f"fetch_{number}")()

    for _ in range(2):
        shop.run(order.delay().id)
    samples = [each for each in counted().samples(TRIES) if each.labels["workflow"] == name]
    assert len(samples) == MOST_STEPS + 1
    assert counted().value(TRIES, workflow=name, step=OTHER) == 40
    assert len([record for record in caplog.records if "doesn't depend on data" in record.getMessage()]) == 1


def test_names_that_earlier_processes_have_told(tmp_path: Path) -> None:
    """A pool replaces its processes all the time: those that come later know what the files hold already."""
    env = {**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for names in ([f"fetch_{number}" for number in range(MOST_STEPS)], ["fetch_7", "one_more", "another"]):
        done = subprocess.run(
            [sys.executable, "-c", SUCCESSOR, *names], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
    page = Scrape(generate_latest(_registry_of(prometheus.Files(str(tmp_path)))).decode())
    assert page.value(TRIES, step=OTHER) == 2
    assert page.value(TRIES, step="fetch_7") == 2
    assert len(list(page.samples(TRIES))) == MOST_STEPS + 1


RESTART = """
import os
from types import SimpleNamespace
from celery import Celery, signals
from celery.concurrency.prefork import TaskPool
import celery_durable as durable
from celery_durable.contrib import prometheus
app = Celery("shop", set_as_current=False)
durable.install(app, database_url="postgresql://localhost/shop")
exporter = prometheus.Exporter(app, 9540, "127.0.0.1")
exporter.prepare(SimpleNamespace(pool_cls=TaskPool))
assert os.environ["PROMETHEUS_MULTIPROC_DIR"].startswith(os.environ["TMPDIR"])
exporter._close()
assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ
"""


def test_a_worker_that_stops_leaves_no_environment(tmp_path: Path) -> None:
    """By SIGHUP Celery runs the program anew in it: the directory is gone by then, but would be taken for given."""
    env = {name: value for name, value in os.environ.items() if name != "PROMETHEUS_MULTIPROC_DIR"}
    env |= {"TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", RESTART], env=env, check=True, timeout=60)
    assert not list(tmp_path.iterdir())


def test_metrics_that_break_break_no_workflow(
    shop: Inprocess, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that is full, say: it is logged."""

    @shop.workflow(name=name)
    def order() -> int:
        return int(durable.as_step(lambda: 1, name="work")())

    def broken() -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(prometheus, "metrics", broken)
    workflow_id = order.delay().id
    shop.run(workflow_id)
    assert durable.get_workflow_status(workflow_id, app=shop.app).result == 1
    assert "No space left on device" in caplog.text


def test_a_disk_that_is_full(
    shop: Inprocess, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A write to a file in memory would kill the process: nothing is measured then, and nothing is left behind."""

    def no_room(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_room)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    exporter = prometheus.Exporter(shop.app, 9540, "127.0.0.1")
    shop.installation.observers.add(exporter.measuring)
    exporter.prepare(SimpleNamespace(pool_cls=TaskPool))
    assert "measures nothing" in caplog.text
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ
    assert not list(tmp_path.iterdir())
    assert exporter.measuring not in shop.installation.observers._observers


def test_names_follow_the_conventions(shop: Inprocess, name: str, ask: Callable[[], Scrape]) -> None:
    """Base units, `_total` for counters and for nothing else, no label of Prometheus' own, help in sentences."""

    @shop.workflow(name=name)
    def order() -> int:
        return int(durable.as_step(lambda: 1, name="work")())

    shop.run(order.delay().id, durable={"published": "2026-01-01T00:00:00+00:00"})
    shop.installation.observers.tell("recovered", "wake", ["w1"])
    families = [*counted().families.values(), *ask().families.values()]
    ours = [family for family in families if family.name.startswith("celery_durable_")]
    assert {family.type for family in ours} == {"counter", "gauge", "histogram"}
    for family in ours:
        assert re.fullmatch("[a-z_]+", family.name)
        assert family.documentation.endswith(".")
        assert family.type == "counter" or not family.name.endswith("_total")
        assert (family.type == "histogram") <= family.name.endswith("_seconds")
        assert not re.search("milli|minute|hour|percent", family.name)
        labels = {label for sample in family.samples for label in sample.labels}
        assert labels <= {"workflow", "step", "outcome", "ending", "duty", "state", "le"}
        if family.type == "counter":
            assert {sample.name for sample in family.samples} <= {f"{family.name}_total", f"{family.name}_created"}


def test_the_page_lists_every_metric() -> None:
    """And questions and alerts name no other."""
    told = {f"celery_durable_{name}" for name in prometheus._GAUGES}
    for metric in vars(prometheus.metrics()).values():
        (family,) = metric.describe()
        told.add(f"{family.name}_total" if family.type == "counter" else family.name)
    listed = {row[0].strip("`") for row in rows("docs/metrics.md") if row[0].startswith("`celery_durable_")}
    assert listed == told
    named = set(re.findall(r"celery_durable_[a-z_]+", read("docs/metrics.md")))
    assert {re.sub("_(bucket|count|sum)$", "", name) for name in named} == told


# What the database tells


def test_how_the_database_stands(shop: Inprocess, ask: Callable[[], Scrape], sql: Sql, rig: Rig) -> None:
    """Live workflows by state and task, what nobody has looked after, nodes, lags."""
    rig.start("a")
    rig.start("b", name="refund")
    rig.age("a", "published_at", 40)
    rig.age("a", "publish_at", 40)
    rig.run("c")
    rig.suspend(rig.run("d"), 3600)
    rig.age("d", "wake_at", 3630)
    rig.finish(rig.run("e"), "DEAD", dispatched=False)
    gone = rig.run("f")
    rig.finish(rig.run("g"))
    rig.drain(rig.node())
    rig.silence(gone.node, 60)
    shop.installation.recovery(lambda messages: (), patience=0).prune()
    shop.installation.store.nodes.swept("command", None, {}, patience=0)
    page = ask()
    workflows = {
        (each.labels["state"], each.labels["workflow"]): each.value for each in page.samples("celery_durable_workflows")
    }
    assert workflows == {
        ("ENQUEUED", "order"): 1, ("ENQUEUED", "refund"): 1, ("RUNNING", "order"): 2, ("SUSPENDED", "order"): 1
    }  # fmt: skip
    assert page.value("celery_durable_up") == 1
    assert page.value("celery_durable_dead_workflows") == 1
    assert page.value("celery_durable_undelivered_outcomes") == 1
    assert page.value("celery_durable_orphans") == 1
    assert page.value("celery_durable_nodes", state="draining") == 1
    assert page.value("celery_durable_nodes", state="silent") == 1
    assert (
        page.value("celery_durable_nodes", state="alive") == sql.value("SELECT count(*) FROM celery_durable.node") - 2
    )
    assert 40 <= page.value("celery_durable_claim_lag_seconds") < 60
    assert 30 <= page.value("celery_durable_timer_lag_seconds") < 60
    assert 0 <= page.value("celery_durable_sweep_age_seconds") < 20


def test_a_state_is_counted_up_to_a_bound(ask: Callable[[], Scrape], rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A million of sleeping workflows makes no scrape slow."""
    monkeypatch.setattr(prometheus, "MOST_COUNTED", 2)
    for number in range(3):
        rig.start(f"w{number}")
    assert ask().value("celery_durable_workflows") == 2


def test_an_answer_is_told_again(shop: Inprocess, rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """For some seconds, or ten times as long as it has taken."""
    clock = [1000.0]
    monkeypatch.setattr(prometheus.time, "monotonic", lambda: clock[0])
    asked: list[float] = []
    check_health = prometheus.check_health

    def slow_check(app: Celery) -> Any:
        asked.append(clock[0])
        clock[0] += 3 if len(asked) == 2 else 0
        return check_health(app)

    monkeypatch.setattr(prometheus, "check_health", slow_check)
    collector = prometheus.collector(shop.app)
    for moment in (1000.0, 1009.0, 1011.0, 1015.0, 1043.0, 1045.0):
        clock[0] = moment
        collector.collect()
    assert asked == [1000.0, 1011.0, 1045.0]


def test_a_database_that_is_away(
    shop: Inprocess, ask: Callable[[], Scrape], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A scrape is answered all the same; an outage is logged once, and its end."""
    monkeypatch.setattr(prometheus, "KEPT", 0.0)
    monkeypatch.setattr(prometheus, "KEPT_TIMES", 0.0)
    registry = _registry_of(prometheus.collector(shop.app))

    def told() -> Scrape:
        return Scrape(generate_latest(registry).decode())

    assert told().value("celery_durable_up") == 1
    real = shop.installation.store
    nowhere = Celery("nowhere", broker="memory://", set_as_current=False)
    durable.install(nowhere, database_url="postgresql://localhost:1/none")
    shop.installation.__dict__["store"] = installed_on(nowhere).store
    with caplog.at_level(logging.INFO):
        pages = [told(), told()]
        shop.installation.__dict__["store"] = real
        assert told().value("celery_durable_up") == 1
    for page in pages:
        assert [each.value for family in page.families.values() for each in family.samples] == [0.0]
        assert page.families.keys() == {"celery_durable_up"}
    assert caplog.text.count("can't be had") == 1
    assert "there again" in caplog.text


def test_a_schema_that_is_missing(broker_url: str, sql: Sql, database_url: str) -> None:
    """Nothing was migrated yet: the gauges say that there is nothing to be had."""
    shop = Inprocess(database_url, broker_url)
    registry = _registry_of(prometheus.collector(shop.app))
    sql.execute("ALTER SCHEMA celery_durable RENAME TO elsewhere")
    try:
        page = Scrape(generate_latest(registry).decode())
    finally:
        sql.execute("ALTER SCHEMA elsewhere RENAME TO celery_durable")
        shop.close()
    assert page.value("celery_durable_up") == 0


def test_a_registry_asks_no_database() -> None:
    """It is told the names only; two of one app would be told twice."""
    app = Celery("shop", broker="memory://", set_as_current=False)
    durable.install(app, database_url="postgresql://localhost:1/none")
    registry = _registry_of(prometheus.collector(app))
    with pytest.raises(ValueError, match="Duplicated"):
        registry.register(prometheus.collector(app))


# install()


@pytest.mark.parametrize("port", [0, -1, 65536, "9540", 9540.0, True])
def test_what_is_no_port(shop: Inprocess, port: Any) -> None:
    """It is told where it is written."""
    with pytest.raises(ConfigurationError, match="1 to 65535"):
        prometheus.install(shop.app, port)


def test_install_twice(shop: Inprocess, name: str) -> None:
    """The same again does nothing, and counts nothing twice."""
    prometheus.install(shop.app)
    with pytest.raises(ConfigurationError, match="another port"):
        prometheus.install(shop.app, 9540)

    @shop.workflow(name=name)
    def order() -> None:
        pass

    shop.run(order.delay().id)
    assert counted().value(STARTED, workflow=name) == 1


def test_an_app_without_us() -> None:
    """`durable.install()` comes first."""
    app = Celery("plain", broker="memory://", set_as_current=False)
    with pytest.raises(NotInstalled):
        prometheus.install(app, 9540)
    with pytest.raises(NotInstalled):
        prometheus.collector(app)


def _registry_of(collector: Any) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(collector)
    return registry
