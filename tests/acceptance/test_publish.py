"""Starting workflows: whatever is down, whoever else starts them, and whatever hangs on their end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import celery
import psutil
import pytest
from celery import Celery, chain, chord, group

from celery_durable.exceptions import WorkflowConflict
from celery_durable.testing.servers import EmbeddedBroker
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.ledger import Ledger
from tests.fixtures.proxy import PostgresProxy
from tests.fixtures.site import Site, opened, shop_env
from tests.fixtures.workers import Workers

#: Seconds that a caller may be held up by servers that are down.
BOUND = 2.0

# Servers that are down


@pytest.fixture
def servers() -> Iterator[tuple[EmbeddedBroker, EmbeddedBroker]]:
    """A Redis for the messages and one for the results, for the test to stop."""
    with EmbeddedBroker() as messages, EmbeddedBroker() as results:
        yield messages, results


@pytest.mark.parametrize("down", ["broker", "result backend", "both in one", "broker of rpc"])
def test_a_start_needs_only_the_database(
    servers: tuple[EmbeddedBroker, EmbeddedBroker], database_url: str, ledger: Ledger, tmp_path: Path, down: str
) -> None:
    """With servers down, `delay()` returns within a bound; the workflows run when they are back."""
    messages, results = servers
    backend = {"broker": "", "result backend": results.url, "both in one": messages.url, "broker of rpc": "rpc://"}
    env = {**shop_env(database_url, messages.url, "celery", ledger), "RESULT_BACKEND": backend[down]}
    workers = Workers(env, tmp_path)
    with opened(workers, ledger, database_url) as site:
        handles = [site.shop.quick.delay(0)]
        stopped = results if down == "result backend" else messages
        stopped.stop()
        for number in (1, 2):
            began = time.monotonic()
            handles.append(site.shop.quick.delay(number))
            assert time.monotonic() - began < BOUND
        stopped.start()
        workers.start()
        assert [site.finished(handle.id).result for handle in handles] == [0, 1, 2]
        assert site.ledger.count("quick") == 3
        handles.clear()  # a handle says goodbye to its result backend, which must be there then
        workers.kill_all()


# Ids


@pytest.mark.oldest
def test_ten_threads_start_one_workflow(site: Site) -> None:
    """The same id at the same time from many threads is one workflow."""
    with ThreadPoolExecutor(10) as pool:
        starts = [pool.submit(site.shop.order.apply_async, ("a",), task_id="a") for _ in range(10)]
        assert {start.result().id for start in starts} == {"a"}
    site.workers.start()
    assert site.finished("a").result == [0, 10, 20]
    assert site.shop.order.apply_async(("a",), task_id="a").id == "a"
    assert site.finished(site.shop.order.delay("b").id)
    assert site.work_of("a") == [1, 1, 1]


def test_three_processes_start_one_workflow(site: Site) -> None:
    """The same id from several processes is one workflow."""
    code = "from tests.fixtures.apps import shop; shop.order.apply_async(('a',), task_id='a')"
    env = {**os.environ, **site.workers.env}
    producers = [subprocess.Popen([sys.executable, "-c", code], env=env) for _ in range(3)]
    assert [producer.wait() for producer in producers] == [0, 0, 0]
    assert site.sql.value("SELECT count(*) FROM celery_durable.workflow") == 1


def test_an_id_belongs_to_one_task(site: Site) -> None:
    """The id of another task's workflow is a conflict, and nothing is changed."""
    site.shop.order.apply_async(("a",), task_id="a")
    with pytest.raises(WorkflowConflict, match=r"shop\.order"):
        site.shop.other_order.apply_async(("a",), task_id="a")
    assert site.status("a").name.endswith("shop.order")


# Foreign messages


@pytest.fixture(scope="module")
def standing(standing_site: Site) -> Site:
    return standing_site


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    return str(request.node.name)


def stranger(site: Site) -> Celery:
    """A producer that has Celery and not us."""
    return Celery("stranger", broker=site.workers.env["BROKER_URL"], set_as_current=False)


@pytest.mark.oldest
def test_a_start_by_name(standing: Site, name: str) -> None:
    """A message from a producer without us gives birth to a workflow."""
    queue = standing.workers.env["CELERY_DURABLE_TEST_QUEUE"]
    stranger(standing).send_task("tests.fixtures.apps.shop.order", (name,), task_id=name, queue=queue)
    standing.reaches("work", name, 2)
    assert standing.finished(name).result == [0, 10, 20]


def test_a_foreign_duplicate(standing: Site, name: str) -> None:
    """The same foreign message again does nothing, while the workflow runs and when it is over."""
    queue = standing.workers.env["CELERY_DURABLE_TEST_QUEUE"]
    send = lambda: stranger(standing).send_task(  # noqa: E731
        "tests.fixtures.apps.shop.order", (name,), task_id=name, queue=queue
    )
    standing.gates.close(f"{name}-1")
    send()
    standing.reaches("work", name, 1)
    send()
    assert standing.finished(standing.shop.quick.delay().id)
    standing.gates.open(f"{name}-1")
    standing.finished(name)
    send()
    assert standing.finished(standing.shop.quick.delay().id)
    assert standing.work_of(name) == [1, 1, 1]
    assert standing.ledger.count("order", name) == 1


# What hangs on the end


def needs_results(site: Site) -> None:
    if not site.workers.env["RESULT_BACKEND"]:
        pytest.skip("Celery's chords need a result backend that can keep them")


def canvas_of(site: Site, kind: str, name: str) -> tuple[Any, str]:
    """A canvas with one workflow in it, and that workflow's id."""
    shop, workflow_id = site.shop, f"in-{name}"
    order = shop.order.si(name).set(task_id=workflow_id)
    note = shop.note_last.s(name)
    if kind == "link":
        return order.set(link=note), workflow_id
    if kind == "link_error":
        return shop.refused.si(name).set(task_id=workflow_id, link_error=shop.note_error.s(label=name)), workflow_id
    if kind == "chain":
        return chain(shop.quick.si(1), order, note, app=shop.app), workflow_id
    if kind == "group":
        return chain(group([order, shop.other_order.si(name)], app=shop.app), note, app=shop.app), workflow_id
    return chord([order, shop.note.si("part")], note, app=shop.app), workflow_id


KINDS = pytest.mark.parametrize("kind", ["link", "link_error", "chain", "group", "chord"])


def assert_once(site: Site, name: str) -> None:
    """The last task of a canvas has run, and doesn't run again."""
    wait_until(lambda: notes(site, name) >= 1, message="the canvas has ended")
    site.finished(f"in-{name}")
    wait_until(lambda: site.status(f"in-{name}").dispatched, message="the outcome is confirmed")
    assert site.finished(site.shop.quick.delay().id)
    assert notes(site, name) == 1


def notes(site: Site, name: str) -> int:
    return sum(entry.name == "note" and entry.args[0] == name for entry in site.ledger.lines())


@pytest.mark.oldest
@KINDS
def test_what_follows_fires_once(standing: Site, name: str, kind: str) -> None:
    """Links, chains, groups and chords with workflows in them go on once, as with plain tasks."""
    if kind in ("group", "chord"):
        needs_results(standing)
    canvas, _ = canvas_of(standing, kind, name)
    canvas.apply_async()
    assert_once(standing, name)


@pytest.mark.crash
@pytest.mark.oldest
@KINDS
def test_what_follows_fires_once_after_a_crash_before_delivery(standing: Site, name: str, kind: str) -> None:
    """If the process dies after the outcome's commit, another one delivers the stored outcome; no body runs again."""
    if kind in ("group", "chord"):
        needs_results(standing)
    canvas, workflow_id = canvas_of(standing, kind, name)
    standing.gates.close(f"delivery-of-{workflow_id}")
    canvas.apply_async()
    standing.reaches("finished", workflow_id)
    psutil.Process(standing.ledger.lines()[-1].pid).kill()
    standing.gates.open(f"delivery-of-{workflow_id}")
    assert_once(standing, name)
    assert standing.ledger.count("work", name, 0) == 1
    assert standing.ledger.count("finished", workflow_id) == 1


@pytest.mark.crash
def test_a_dead_worker_has_its_outcomes_delivered(site: Site) -> None:
    """When the whole worker dies after the outcome's commit, a link still fires once."""
    canvas, workflow_id = canvas_of(site, "link", "a")
    site.gates.close(f"delivery-of-{workflow_id}")
    workers = site.start(2)
    canvas.apply_async()
    site.reaches("finished", workflow_id)
    site.owner(*workers).kill()
    site.gates.open(f"delivery-of-{workflow_id}")
    assert_once(site, "a")


@pytest.mark.crash
@pytest.mark.skipif(celery.VERSION < (5, 7), reason="older ones don't publish what follows a task again")
def test_a_database_that_is_away_when_the_next_workflow_starts(site: Site) -> None:
    """Celery's tracer tries again to start the next workflow of a chain, row first."""
    with PostgresProxy(site.workers.env["DATABASE_URL"]) as proxy:
        site.gates.close("delivery-of-first")
        worker = site.workers.start(env={"DATABASE_URL": proxy.url})
        first, second = site.shop.quick.si(1).set(task_id="first"), site.shop.order.si("a").set(task_id="second")
        chain(first, second, app=site.shop.app).apply_async()
        site.reaches("finished", "first")
        proxy.refuse()
        proxy.disconnect()
        site.gates.open("delivery-of-first")
        wait_until(lambda: "Retrying refused callback publish" in worker.log, message="the start is tried again")
        proxy.accept()
        wait_until(lambda: site.sql.all("SELECT 1 FROM celery_durable.workflow WHERE id = 'second'"))
        assert site.finished("second").result == [0, 10, 20]
        assert site.work_of("a") == [1, 1, 1]


# Times


def test_later_starts_are_kept_by_the_database(site: Site, broker: Broker) -> None:
    """A start with countdown or eta survives a flush of the broker, and is never early."""
    site.workers.start()
    due = datetime.now(timezone.utc) + timedelta(seconds=1.5)
    handles = [site.shop.quick.apply_async(countdown=1.5), site.shop.quick.apply_async(eta=due)]
    broker.flush()
    for handle in handles:
        status = site.finished(handle.id)
        assert status.started_at is not None
        waited = (status.started_at - status.created_at).total_seconds()
        assert 1.4 < waited < 4
    assert site.status(handles[0].id).started_at - site.status(handles[0].id).created_at >= timedelta(seconds=1.5)


def test_expires(site: Site) -> None:
    """A workflow that isn't started in time is cancelled, and doesn't run."""
    handle = site.shop.quick.apply_async(expires=0.2)
    wait_until(lambda: site.sql.value("SELECT clock_timestamp() - created_at > '0.3 s' FROM celery_durable.workflow"))
    site.workers.start()
    assert site.finished(handle.id).state == "CANCELLED"
    assert site.ledger.count("quick") == 0


# The message


def test_a_message_is_sent_again_as_it_was(site: Site) -> None:
    """Headers, stamps, priority, links, body and queue of the second message are those of the first."""
    signature = site.shop.order.s("a").set(
        queue="special", priority=6, headers={"tenant": "t1"}, shadow="shade", time_limit=30, link=site.shop.note.s("b")
    )
    signature.stamp(campaign="spring")
    signature.apply_async()
    first = take(site, "special")
    second = wait_until(lambda: sweep(site) and take(site, "special"), message="the message comes again")
    assert first is not None
    assert first.headers.pop("durable")
    assert second.headers.pop("durable")
    assert first.headers["tenant"] == "t1"
    assert first.headers["stamps"] == {"campaign": "spring"}
    assert second.headers == first.headers
    assert second.body == first.body
    assert properties(second) == properties(first)
    assert properties(first)["priority"] == 6
    assert (second.content_type, second.content_encoding) == (first.content_type, first.content_encoding)
    assert second.delivery_info["routing_key"] == first.delivery_info["routing_key"] == "special"


def take(site: Site, queue: str) -> Any:
    with site.shop.app.connection_for_read() as connection:
        return connection.default_channel.basic_get(queue, no_ack=True)


def sweep(site: Site) -> bool:
    site.shop.app.tasks["celery_durable.recover"]()
    return True


def properties(message: Any) -> dict[str, Any]:
    """What a producer decides, without what the transport adds."""
    ours = ("correlation_id", "reply_to", "priority", "delivery_mode")
    return {name: message.properties.get(name) for name in ours}
