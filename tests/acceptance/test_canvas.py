"""Celery's canvas with workflows in it, and canvases that a workflow makes."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from celery import Celery, chain, chord, group
from celery.canvas import StampingVisitor

import celery_durable as durable
from celery_durable.exceptions import ConfigurationError
from tests.fixtures.brokers import Broker, isolated
from tests.fixtures.fix_postgres import _new_database
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.ledger import Ledger
from tests.fixtures.site import Site, opened, shop_env
from tests.fixtures.workers import Workers

CANVAS = "tests.fixtures.apps.canvas"
SHORT = {"suspend_after": 0.1}


@pytest.fixture(scope="module")
def site(
    request: pytest.FixtureRequest,
    postgres_server: str,
    template_database: str,
    broker_server: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Site]:
    """A shop with one worker of two processes and a result backend, shared by the tests: each has a name of its own."""
    directory = tmp_path_factory.mktemp("canvas")
    ledger = Ledger(directory / "ledger")
    with _new_database(postgres_server, template_database) as url, isolated(broker_server) as broker:
        env = shop_env(url, broker.url, broker.queue, ledger, **SHORT)
        workers = Workers({**env, "RESULT_BACKEND": redis_of(request, broker)}, directory)
        with opened(workers, ledger, url) as site:
            workers.start(app=f"{CANVAS}:app", concurrency=2)
            yield site
            workers.kill_all()
            print(workers.logs())


def redis_of(request: pytest.FixtureRequest, broker: Broker) -> str:
    """A Redis for the results, which chords need."""
    return broker.url if broker.url.startswith("redis") else str(request.getfixturevalue("embedded_broker").url)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    return str(request.node.name)


@pytest.fixture(scope="module")
def tasks(site: Site) -> Any:
    """What a producer has of the canvas app."""
    return load_canvas(site)


def load_canvas(site: Site) -> Any:
    sys.modules.pop(CANVAS, None)
    assert sys.modules["tests.fixtures.apps.shop"] is site.shop
    return importlib.import_module(CANVAS)


def notes(site: Site, label: str) -> list[Any]:
    """What the last task of a canvas was given, once for each of its runs."""
    return [entry.args[1:] for entry in site.ledger.lines() if entry.name == "note" and entry.args[0] == label]


def assert_noted_once(site: Site, label: str, *expected: Any) -> None:
    """The last task of a canvas runs with this, and, when all is delivered, hasn't run again."""
    wait_until(lambda: notes(site, label), message="the canvas has ended")
    delivered = "SELECT bool_and(dispatched) FROM celery_durable.workflow"
    wait_until(lambda: site.sql.value(delivered), message="every outcome is confirmed")
    assert site.finished(site.shop.quick.delay().id)
    assert notes(site, label) == [list(expected)]


# Workflows in a canvas


def test_a_workflow_in_a_chain(site: Site, tasks: Any, name: str) -> None:
    """Each link gets the result of the one before, whether that is a plain task or a workflow that has waited."""
    canvas = chain(
        tasks.naps.s(name, 1),
        tasks.plain_adds.s(2),
        tasks.adds.s(3),
        site.shop.note_last.s(name),
        app=site.shop.app,
    )
    assert canvas.delay().get(timeout=20) == 6
    assert_noted_once(site, name, 6)
    assert site.work_of(name, 1) == [1]


def test_a_failure_ends_a_chain(site: Site, tasks: Any, name: str) -> None:
    """What follows a failed workflow doesn't run; its `link_error` does, once."""
    failing = tasks.naps_and_fails.si(name).set(link_error=site.shop.note_error.s(label=name))
    result = chain(failing, site.shop.note_last.s(f"{name}-after"), app=site.shop.app).delay()
    with pytest.raises(KeyError, match=re.escape(name)):
        result.parent.get(timeout=20)
    assert_noted_once(site, name)
    assert notes(site, f"{name}-after") == []


def test_a_group_of_workflows(site: Site, tasks: Any, name: str) -> None:
    """Results in order, plain tasks and workflows together."""
    members = [tasks.naps.s(f"{name}-0", 1), tasks.plain_adds.s(2), tasks.adds.s([3, 4])]
    assert group(members, app=site.shop.app).delay().get(timeout=20) == [1, 2, 7]


@pytest.mark.parametrize("body", ["workflow", "plain task"])
def test_a_chord_of_workflows_that_wait(site: Site, tasks: Any, name: str, body: str) -> None:
    """The header gives its processes back while it sleeps, and the body runs once, with all results in order."""
    adds = tasks.adds if body == "workflow" else tasks.plain_adds
    header = [tasks.naps.s(f"{name}-{number}", number) for number in range(4)]
    canvas = chord([*header, tasks.plain_adds.s(10)], adds.s(100) | site.shop.note_last.s(name), app=site.shop.app)
    result = canvas.delay()
    assert result.get(timeout=20) == 116
    assert_noted_once(site, name, 116)
    assert [site.ledger.count("naps", f"{name}-{number}") for number in range(4)] == [2, 2, 2, 2]
    assert [site.work_of(f"{name}-{number}", 1) for number in range(4)] == [[1]] * 4


def test_a_chord_whose_header_fails(site: Site, tasks: Any, name: str) -> None:
    """The body doesn't run; its `link_error` does, once, as in a chord of plain tasks."""
    body = site.shop.note_last.s(f"{name}-body").on_error(site.shop.note_error.s(label=name))
    chord([tasks.naps.s(f"{name}-0"), tasks.naps_and_fails.s(name)], body, app=site.shop.app).delay()
    assert_noted_once(site, name)
    assert notes(site, f"{name}-body") == []


def test_a_chord_whose_member_is_cancelled(site: Site, tasks: Any, name: str) -> None:
    """The chord fails, as with a revoked task: its `link_error` runs once, and the body doesn't."""
    body = site.shop.note_last.s(f"{name}-body").on_error(site.shop.note_error.s(label=name))
    waits = tasks.naps.s(name, 1, seconds=600).set(task_id=name)
    chord([tasks.plain_adds.s(1), waits], body, app=site.shop.app).delay()
    wait_until(lambda: site.status(name).state == "SUSPENDED", message="the member waits")
    durable.cancel_workflow(name, app=site.shop.app)
    assert_noted_once(site, name)
    assert notes(site, f"{name}-body") == []


def test_groups_and_chords_in_a_chain(site: Site, tasks: Any, name: str) -> None:
    """A group that something follows becomes a chord, also a second time and within another one."""
    app = site.shop.app
    inner = chord([tasks.naps.s(f"{name}-0", 1), tasks.adds.s(1, 1)], tasks.adds.s(), app=app)
    canvas = chain(
        group([tasks.naps.s(f"{name}-1", 1), inner], app=app),
        tasks.adds.s(),
        group([tasks.adds.s(1), tasks.plain_adds.s(2)], app=app),
        tasks.adds.s(),
        site.shop.note_last.s(name),
        app=app,
    )
    assert canvas.delay().get(timeout=30) == 11
    assert_noted_once(site, name, 11)


def test_links_of_a_workflow(site: Site, tasks: Any, name: str) -> None:
    """All its links fire once at its end, and none at its waits: plain tasks and workflows."""
    site.gates.close(f"{name}-0")
    linked = tasks.naps.s(name, 7)
    linked.link(site.shop.note_last.s(name))
    linked.link(tasks.adds.s(1) | site.shop.note_last.s(f"{name}-second"))
    linked.link_error(site.shop.note_error.s(label=f"{name}-error"))
    linked.delay()
    site.reaches("work", name, 0)
    assert notes(site, name) == notes(site, f"{name}-second") == []
    site.gates.open(f"{name}-0")
    assert_noted_once(site, name, 7)
    assert_noted_once(site, f"{name}-second", 8)
    assert notes(site, f"{name}-error") == []


@pytest.mark.parametrize("link", ["signature with the error", "signature with the id", "workflow"])
def test_links_of_a_failure(site: Site, tasks: Any, name: str, link: str) -> None:
    """`link_error` fires once at the failure that comes after a wait; it may be a workflow itself."""
    signatures = {
        "signature with the error": site.shop.note_error.s(label=name),
        "signature with the id": site.shop.note.si(name),
        "workflow": tasks.adds.si(1) | site.shop.note_last.s(name),
    }
    tasks.naps_and_fails.apply_async((name,), link_error=signatures[link])
    assert_noted_once(site, name, *([1] if link == "workflow" else []))


def test_a_workflow_that_is_called_with_the_error(site: Site, tasks: Any, name: str) -> None:
    """A `link_error` that takes request, error and traceback is called by Celery itself, as a function."""
    handle = tasks.naps_and_fails.apply_async((name,), link_error=tasks.mends.s(label=name))
    assert_noted_once(site, name, handle.id, "KeyError")


def test_a_handle_may_be_returned(site: Site, tasks: Any, name: str) -> None:
    """What a workflow has started may be its result, as in a plain task: it becomes plain data."""
    handle = tasks.starts_a_child.delay(name)
    assert site.finished(handle.id).result == [[name, None], None]
    assert handle.get(timeout=20) == [[name, None], None]
    assert site.finished(name).parent_id == handle.id


def test_what_a_message_says_is_kept_over_a_wait(site: Site, tasks: Any, name: str) -> None:
    """Priority, stamps and headers of the first message are there again when the workflow goes on."""
    signature = tasks.looks_at_its_message.s(name).set(priority=4, headers={"tenant": "t1"})
    signature.stamp(campaign="spring")
    handle = signature.delay()
    assert site.finished(handle.id).state == "SUCCESS"
    assert site.ledger.count("message", name, 4, {"campaign": "spring"}, ["campaign"], "t1") == 3


class Campaign(StampingVisitor):
    """The same stamp on all."""

    def on_signature(self, sig: Any, **headers: Any) -> dict[str, Any]:
        return {"campaign": "spring"}


def test_stamps_reach_every_workflow_of_a_canvas(site: Site, tasks: Any, name: str) -> None:
    """A stamp on a chord is on its header's workflows and on its body."""
    looks = tasks.looks_at_its_message
    canvas = chord([looks.si(f"{name}-0"), looks.si(f"{name}-1")], looks.si(f"{name}-body"), app=site.shop.app)
    canvas.stamp(Campaign())
    canvas.delay().get(timeout=20)
    stamps = {
        entry.args[0]: entry.args[2]
        for entry in site.ledger.lines()
        if entry.name == "message" and entry.args[0].startswith(name)
    }
    assert stamps.keys() == {f"{name}-0", f"{name}-1", f"{name}-body"}
    assert all(each["campaign"] == "spring" for each in stamps.values())


def test_callers_see_a_wait_as_a_retry(site: Site, tasks: Any, name: str) -> None:
    """A member of a canvas that waits is RETRY to Celery, with the reason; if it is cancelled, nothing follows it."""
    waiting = tasks.naps.si(name, 1, seconds=600).set(link_error=site.shop.note_error.s(label=name))
    result = chain(waiting, site.shop.note_last.s(name), app=site.shop.app).delay()
    first = result.parent
    wait_until(lambda: site.status(first.id).state == "SUSPENDED", message="the workflow waits")
    assert first.state == "RETRY"
    assert "sleep" in str(first.info)
    durable.cancel_workflow(first.id, app=site.shop.app)
    assert site.finished(first.id).state == "CANCELLED"
    wait_until(lambda: site.status(first.id).dispatched, message="Celery has dealt with the end")
    assert notes(site, name) == []


@pytest.mark.matrix
@pytest.mark.parametrize("kind", ["redis", "database"])
def test_a_chord_with_every_result_backend(
    request: pytest.FixtureRequest,
    database_url: str,
    broker: Broker,
    ledger: Ledger,
    tmp_path: Path,
    kind: str,
) -> None:
    """A header that waits and a body that is a workflow, with every broker and each kind of chord."""
    backend = redis_of(request, broker) if kind == "redis" else f"db+sqlite:///{tmp_path / 'results.sqlite'}"
    env = {**shop_env(database_url, broker.url, broker.queue, ledger, **SHORT), "RESULT_BACKEND": backend}
    workers = Workers(env, tmp_path)
    with opened(workers, ledger, database_url) as site:
        tasks = load_canvas(site)
        workers.start(app=f"{CANVAS}:app")
        header = [tasks.naps.s("a-0", 1), tasks.naps.s("a-1", 2)]
        result = chord(header, tasks.adds.s(3) | site.shop.note_last.s("a"), app=site.shop.app).delay()
        assert result.get(timeout=30) == 6
        assert_noted_once(site, "a", 6)
        del result, header
        workers.kill_all()


# What a canvas can't do with a workflow


@pytest.mark.parametrize("how", ["map", "starmap", "chunks"])
def test_what_would_call_a_workflow_plainly_is_refused(site: Site, how: str) -> None:
    """`map`, `starmap` and `chunks` would run it as a function inside of another task."""
    args = ([(1,), (2,)], 1) if how == "chunks" else ([(1,), (2,)],)
    with pytest.raises(ConfigurationError, match=r"write durable\.enqueue_many\(\["):
        getattr(site.shop.quick, how)(*args)
    with pytest.raises(ConfigurationError, match=r"write durable\.enqueue_many\(\["):
        getattr(site.shop.quick.s().type, how)(*args)


def test_a_workflow_is_not_replaced(site: Site, tasks: Any, name: str) -> None:
    """It fails with the line to write."""
    status = site.finished(tasks.replaces_itself.delay(name).id)
    assert status.state == "FAILURE"
    assert isinstance(status.error, ConfigurationError)
    assert "return other.delay(…).get()" in str(status.error)
    assert site.ledger.count("order", name) == 0


def test_a_workflow_takes_the_place_of_a_plain_task(site: Site, tasks: Any, name: str) -> None:
    """A plain task's `replace` works, also in a chain, and the chain goes on when the workflow has ended."""
    canvas = chain(tasks.becomes.s(name), site.shop.note_last.s(name), app=site.shop.app)
    assert canvas.delay().get(timeout=20) == "replaced"
    assert_noted_once(site, name, "replaced")


def test_the_first_task_protocol_is_refused(site: Site) -> None:
    """Its messages have no place for what a workflow needs."""
    app = Celery("old", broker="memory://", set_as_current=False)
    app.conf.task_protocol = 1
    durable.install(app, database_url=site.workers.env["DATABASE_URL"])

    @app.task(base=durable.Workflow, shared=False)
    def old() -> None:
        pass

    with pytest.raises(ConfigurationError, match="task_protocol"):
        old.delay()
    app.close()


def test_a_chord_that_a_wait_could_outlive(
    request: pytest.FixtureRequest, database_url: str, broker: Broker, ledger: Ledger, tmp_path: Path
) -> None:
    """Before the counters of the result backend expire during a wait, the log says so, once for each task."""
    env = shop_env(database_url, broker.url, broker.queue, ledger, **SHORT)
    env = {**env, "RESULT_BACKEND": redis_of(request, broker), "CELERY_SETTINGS": json.dumps({"result_expires": 100})}
    workers = Workers(env, tmp_path)
    with opened(workers, ledger, database_url) as site:
        tasks = load_canvas(site)
        worker = workers.start(app=f"{CANVAS}:app", concurrency=1)
        for name, seconds in (("short", 0.5), ("long", 101), ("longer", 102)):
            members = [tasks.naps.s(name, 0, seconds).set(task_id=name), tasks.plain_adds.s(1)]
            chord(members, site.shop.note.s(name), app=site.shop.app).delay()
        for name in ("long", "longer"):
            wait_until(lambda name=name: site.status(name).state == "SUSPENDED", message="the members wait")
        site.finished("short")
        (warning,) = [line for line in worker.log.splitlines() if "its body may never run" in line]
        assert "result_chord_expires" in warning
        assert "The workflow long" in warning
        workers.kill_all()


# Canvases that a workflow makes


@pytest.mark.crash
@pytest.mark.parametrize("how", ["get", "join"])
def test_a_group_in_a_workflow(site: Site, tasks: Any, name: str, how: str) -> None:
    """Its members are durable children; waiting for them holds no process, and a replay finds the same ones again."""
    for number in range(3):
        site.gates.close(f"{name}-{number}-0")
    site.gates.close(f"{name}-9")
    handle = tasks.fans_out.delay(name, how)
    wait_until(lambda: site.status(handle.id).state == "SUSPENDED", message="the parent waits")
    children = site.sql.all("SELECT id FROM celery_durable.workflow WHERE parent_id = %s", handle.id)
    for number in range(3):
        site.gates.open(f"{name}-{number}-0")
    site.reaches("work", name, 9)
    psutil.Process(site.ledger.lines()[-1].pid).kill()
    site.reaches("work", name, 9, times=2)
    site.gates.open(f"{name}-9")
    assert site.finished(handle.id).result == [0, 1, 2]
    seen = [entry.args[1:] for entry in site.ledger.lines() if entry.name == "children" and entry.args[0] == name]
    assert len(seen) >= 3
    assert all(each == seen[0] for each in seen)
    assert {child.id for child in children} == set(seen[0])
    assert [site.work_of(f"{name}-{number}", 1) for number in range(3)] == [[1]] * 3


def test_a_failure_in_a_group_of_a_workflow(site: Site, tasks: Any, name: str) -> None:
    """The first error in the order of the members is raised in the parent, which may catch it."""
    assert site.finished(tasks.fans_out_in_vain.delay(name).id).result == "Refused"


def test_a_group_of_chains_is_not_awaited(site: Site, tasks: Any, name: str) -> None:
    """Celery makes new ids for the ends of chains on each replay: the workflow fails, and says what to do."""
    status = site.finished(tasks.fans_out_chains.delay(name).id)
    assert isinstance(status.error, ConfigurationError)
    assert "start a workflow that calls them" in str(status.error)


@pytest.mark.crash
@pytest.mark.parametrize("kind", ["chain", "chord"])
def test_a_canvas_in_a_workflow_is_made_once(site: Site, tasks: Any, name: str, kind: str) -> None:
    """The workflows that begin a canvas are children: a replay of the parent doesn't start them again."""
    site.gates.close(f"{name}-9")
    handle = tasks.makes_a_canvas.delay(name, kind)
    site.reaches("work", name, 9)
    psutil.Process(next(e.pid for e in site.ledger.lines() if (e.name, e.args) == ("work", [name, 9]))).kill()
    site.reaches("work", name, 9, times=2)
    site.gates.open(f"{name}-9")
    assert site.finished(handle.id).attempt == 2
    assert_noted_once(site, name, 2 if kind == "chain" else 1)
    assert site.work_of(f"{name}-0", 1) == [1]
