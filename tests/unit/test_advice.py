"""What `durable advise` says of tasks and settings, and when it says nothing."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import smtplib
import subprocess
import sys
import uuid
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from celery import Celery, _state, chain, chord, group
from celery.result import AsyncResult

import celery_durable as durable
from celery_durable.advice import Finding, advise
from tests.fixtures.pages import CHECKOUT

DAY = 24 * 3600
app = Celery("advice", broker="redis://localhost:6379/0", set_as_current=False)
durable.install(app, database_url="postgresql://nobody@localhost:1/nothing")


@pytest.fixture(autouse=True)
def no_shared_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Advice is on an app's tasks: those that other modules of this process share aren't there."""
    own = {each for each in _state._on_app_finalizers if each.__module__ == "celery.app.builtins"}
    monkeypatch.setattr(_state, "_on_app_finalizers", own)


def task(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    return (
        app.task(**{"name": f"shop.{function.__name__}", "shared": False}, **options)(function)
        if function
        else _with(options)
    )


def _with(options: dict[str, Any]) -> Callable[..., Any]:
    return lambda function: task(function, **options)


def ask_bank(order: Any) -> Any:
    return httpx.post("https://bank.example", json=order)


@task
def add(left: Any, right: Any = 1) -> Any:
    return left + right


@task
def note(order: Any) -> Any:
    return order


@task(base=durable.Step)
def durable_step(order: Any) -> Any:
    return order


@task
def calls_several(order: Any) -> Any:
    add(order, 1)
    return note(order)


@task
def sends_the_next(order: Any) -> None:
    note.delay(order)


@task
def sends_by_name(order: Any) -> None:
    app.send_task("shop.note", [order])


@task
def sends_a_signature(order: Any) -> None:
    note.si(order).apply_async(queue="slow")


@task
def makes_a_chain(order: Any) -> None:
    chain(note.s(order), add.s(1)).delay()


@task
def makes_a_piped_chain(order: Any) -> None:
    (note.s(order) | add.s(1)).delay()


@task
def makes_a_group(orders: Any) -> None:
    group(note.s(order) for order in orders).delay()


@task
def makes_a_chord(orders: Any) -> None:
    chord([note.s(order) for order in orders], add.s())()


@task
def has_effects(order: Any) -> None:
    httpx.post("https://bank.example", json=order)
    with smtplib.SMTP("localhost") as server:
        server.sendmail("shop", order, "paid")


@task
def has_an_effect_in_a_function(order: Any) -> None:
    import urllib.request

    ask_bank(order)
    urllib.request.urlopen("https://shop.example")


@task(bind=True)
def shows_progress(self: Any, rows: Any) -> None:
    for number, _ in enumerate(rows):
        self.update_state(state="PROGRESS", meta={"row": number})


@task
def keeps_an_offset(job: Any, connection: Any) -> None:
    for number in range(job.offset, 100):
        connection.execute("UPDATE job SET position = %s WHERE id = %s", (number, job.id))


@task
def keeps_an_attribute(job: Any) -> None:
    while job.processed < 100:
        job.processed += 1
        job.save()


@task
def keeps_a_status(order: Any, table: Any) -> None:
    order.status = "paying"
    table.update(status="paid")


@task(bind=True, max_retries=3)
def retries_all(self: Any, order: Any) -> None:
    try:
        add(order, 1)
        note(order)
    except OSError as error:
        raise self.retry(exc=error) from error


@task
def has_one_effect(order: Any) -> Any:
    client = httpx.Client()
    try:
        return client.get("https://bank.example").json()
    except httpx.HTTPError:
        return None


@task(autoretry_for=(OSError,), max_retries=5)
def is_retried(order: Any) -> Any:
    return order


@task
def sets_a_status(order: Any) -> None:
    order.status = "done"


@task
def does_little(order: Any, settings: Any) -> Any:
    """UPDATE order SET status = 'x': only words."""
    settings.get("requests")
    return dict(order).get("note")


@task
def waits_for_another(order: Any) -> Any:
    result = add.delay(order)
    return result.get()


@task
def waits_for_an_id(task_id: Any) -> Any:
    return AsyncResult(task_id, app=app).get()


@task
def waits_for_a_group(orders: Any) -> Any:
    return group(note.s(order) for order in orders)().get()


@task
def postpones(order: Any) -> None:
    note.apply_async([order], countdown=3 * DAY_IN_TEXT)
    note.apply_async([order], countdown=3 * 24 * 3600)


DAY_IN_TEXT = 24 * 3600


@task
def postpones_to_a_time(order: Any) -> None:
    note.apply_async([order], eta=datetime.now() + timedelta(days=2))


@task(bind=True)
def retries_late(self: Any) -> None:
    raise self.retry(countdown=7200)


@task
def postpones_a_little(order: Any) -> None:
    note.apply_async([order], countdown=60)


@task(autoretry_for=(OSError,), acks_late=True)
def acks_late(order: Any) -> Any:
    return order


@task(base=durable.Workflow, reject_on_worker_lost=True)
def rejects(order: Any) -> Any:
    return order


@task(autoretry_for=(OSError,), serializer="pickle")
def pickles(order: Any) -> Any:
    return order


@task(base=durable.Workflow, ignore_result=True)
def ignores(order: Any) -> Any:
    return order


@task(autoretry_for=(OSError,))
def returns_a_set(order: Any) -> Any:
    return {order, 1}


@task(autoretry_for=(OSError,))
def returns_a_made_set(order: Any) -> Any:
    return set(order)


@task(autoretry_for=(OSError,))
def generates(order: Any) -> Any:
    yield order


@task(base=durable.Workflow)
def effect_in_a_workflow(order: Any) -> Any:
    return httpx.get("https://bank.example")


@task(base=durable.Workflow)
def sends_in_a_workflow(order: Any) -> Any:
    note.delay(order)


@task(base=durable.Workflow)
def chord_in_a_workflow(orders: Any) -> Any:
    chord([durable_step.s(order) for order in orders])(add.s())


@task(base=durable.Workflow)
def good(order: Any) -> Any:
    value = durable.as_step(add)(order, 1)
    child = rejects.apply_async([value], countdown=30 * DAY)
    rejects.apply_async([value], countdown=30 * 24 * 3600)
    durable_step.delay(order)
    return child.get(), durable_step.delay(order).get(), durable_step(order)


FINDINGS = advise(app)

#: For each task: the kind, what is said of it, a part of the remedy, and the line of its body (0: its first one).
EXPECTED = [
    (calls_several, "workflow", "calls add (line", "base=durable.Step) on add, note", 0),
    (sends_the_next, "workflow", "sends note (line", "call note in place of sending", 0),
    (sends_by_name, "workflow", "sends note (line", "call note in place of sending", 0),
    (sends_a_signature, "workflow", "sends note (line", "call note in place of sending", 0),
    (makes_a_chain, "workflow", "makes a chain (line", "call their tasks in place of sending", 0),
    (makes_a_piped_chain, "workflow", "makes a chain (line", "base=durable.Workflow", 0),
    (makes_a_group, "workflow", "makes a group (line", "base=durable.Workflow", 0),
    (makes_a_chord, "workflow", "makes a chord (line", "base=durable.Workflow", 0),
    (makes_a_chord, "option", "counters expire after 86400 s", "durable.gather(", 2),
    (has_effects, "workflow", "server.sendmail (line", "durable.as_step(function)(…)", 0),
    (has_an_effect_in_a_function, "workflow", "ask_bank: httpx.post (line", "durable.as_step(function)(…)", 0),
    (shows_progress, "workflow", "keeps its progress by self.update_state", "durable.set_event('progress'", 0),
    (keeps_an_offset, "workflow", "keeps its progress by its position column", "turn of the loop a step", 0),
    (keeps_an_attribute, "workflow", "keeps its progress by job.processed += …", "turn of the loop a step", 0),
    (keeps_a_status, "workflow", "keeps its state by order.status = …", "base=durable.Workflow", 0),
    (retries_all, "workflow", "is retried as a whole", "base=durable.Workflow", 0),
    (has_one_effect, "step", "has one effect, client.get (line", "durable.as_step(has_one_effect)(…)", 0),
    (is_retried, "step", "is retried", "base=durable.Step", 0),
    (waits_for_another, "option", "result.get() holds a worker", "durable.as_step(add)(…)", 3),
    (waits_for_an_id, "option", ".get() holds a worker", "base=durable.Workflow on both", 2),
    (waits_for_a_group, "option", ".get() holds a worker", "base=durable.Workflow on both", 2),
    (
        postpones,
        "option",
        "waits for 259200 s, longer than the visibility timeout (3600 s)",
        "base=durable.Workflow",
        3,
    ),
    (postpones_to_a_time, "option", "waits for 172800 s", "base=durable.Workflow", 2),
    (retries_late, "option", "waits for 7200 s", "base=durable.Workflow", 2),
    (acks_late, "option", "acks_late=True", "remove acks_late=True", 0),
    (rejects, "option", "reject_on_worker_lost=True", "remove reject_on_worker_lost=True", 0),
    (pickles, "option", "serializer='pickle'", "serializer='json'", 0),
    (ignores, "option", "ignore_result=True", "remove ignore_result=True", 0),
    (returns_a_set, "option", "return {order, 1}", "return a list", 2),
    (returns_a_made_set, "option", "return set(order)", "return a list", 2),
    (generates, "option", "a generator", "return a list", 2),
    (effect_in_a_workflow, "option", "httpx.get in the workflow itself", "durable.as_step(function)(…)", 2),
    (sends_in_a_workflow, "option", "note, a plain task, is sent again", "durable.as_step(note).delay(…)", 2),
    (chord_in_a_workflow, "option", "counters expire", "durable.gather(", 2),
]


def findings_on(task: Any, kind: str) -> list[Finding]:
    return [each for each in FINDINGS if each.task == task.name and each.kind == kind]


def names(value: Any) -> Any:
    return value.name.removeprefix("shop.") if hasattr(value, "name") else None


@pytest.mark.parametrize(("task", "kind", "what", "remedy", "line"), EXPECTED, ids=names)
def test_a_finding_says_where_what_and_what_to_write(task: Any, kind: str, what: str, remedy: str, line: int) -> None:
    """Each sign and each option that fights is found once, at its line, with the line to write."""
    (found,) = findings_on(task, kind)
    lines, first = inspect.getsourcelines(getattr(task, "_orig_run", task.run))
    first_of_body = next(number for number, text in enumerate(lines) if text.startswith("def "))
    assert what in found.what
    assert remedy in found.remedy
    assert (found.file, found.line) == (__file__, first + (line and first_of_body + line - 1))


@pytest.mark.parametrize("task", [add, note, durable_step, does_little, sets_a_status, good], ids=names)
def test_nothing_is_said_without_a_sign(task: Any) -> None:
    """Plain tasks that do one thing, and workflows as they should be, get no advice."""
    assert [each for each in FINDINGS if each.task == task.name] == []


def test_a_short_delay_is_no_finding() -> None:
    """A countdown within the visibility timeout is left alone."""
    assert findings_on(postpones_a_little, "option") == []


SETTINGS = [
    ({"task_always_eager": True}, "task_always_eager=True", "settings of the tests only"),
    ({"task_serializer": "pickle"}, "task_serializer='pickle'", "task_serializer = 'json'"),
    ({"result_serializer": "yaml"}, "result_serializer='yaml'", "result_serializer = 'json'"),
    ({"accept_content": ["json", "pickle"]}, "accept_content with pickle", "accept_content = ['json']"),
    ({"task_ignore_result": True}, "task_ignore_result=True", "ignore_result=False"),
    ({"broker_transport_options": {"visibility_timeout": 100}, "task_time_limit": 300},
     "visibility timeout (100 s) is shorter than the time limit of shop.sum (300 s)", "'visibility_timeout': 360"),
]  # fmt: skip


def other_app(
    function: Callable[..., Any] = add.run, broker: str = "redis://localhost:6379/0", **settings: Any
) -> Celery:
    other = Celery("other", broker=broker, set_as_current=False)
    other.conf.update(settings)
    other.task(name="shop.sum", shared=False)(function)
    return other


@pytest.mark.parametrize(("settings", "what", "remedy"), SETTINGS, ids=[next(iter(each[0])) for each in SETTINGS])
def test_a_setting_that_fights(
    settings: dict[str, Any], what: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each setting that fights is found once; that has the place where the app's own modules name it."""
    # A project of its own: of this one any module may name a setting, and all that are loaded are looked at.
    name = f"project_{uuid.uuid4().hex}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("def add(left, right=1):\n    return left + right\n")
    conf = tmp_path / name / "conf.py"
    conf.write_text("".join(f"{key} = {value!r}\n" for key, value in settings.items()))
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module(f"{name}.conf")
    (found,) = advise(other_app(importlib.import_module(name).add, **settings))
    assert what in found.what
    assert remedy in found.remedy
    if "broker_transport_options" not in settings:
        assert (found.file, found.line) == (str(conf), 1)


def test_usual_settings_are_no_finding() -> None:
    """An app with Celery's defaults, and one without a visibility timeout, get no advice."""
    assert advise(other_app()) == []
    assert advise(other_app(broker="amqp://localhost", task_time_limit=100_000)) == []


def test_longer_chords() -> None:
    """The chord's finding says how long the counters live in this app."""
    other = Celery("chords", broker="redis://localhost:6379/0", set_as_current=False)
    other.conf.result_expires = timedelta(days=2)
    other.task(name="shop.note", shared=False)(note.run)
    other.task(name="shop.makes_a_chord", shared=False)(makes_a_chord.run)
    assert any("expire after 172800 s" in each.what for each in advise(other))


def advise_command(app: str, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "celery", "-A", app, "durable", "advise", *options]
    return subprocess.run(
        command, cwd=CHECKOUT, env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False
    )


def test_the_command_prints_a_line_each() -> None:
    """Each finding is one line with its place; the status is 0, whatever is found, and JSON has the same."""
    text = advise_command("tests.unit.test_advice:app")
    listed = json.loads(advise_command("tests.unit.test_advice:app", "--json").stdout)
    assert text.returncode == 0
    lines = text.stdout.splitlines()[:-1]
    assert len(lines) == len(listed) == len(FINDINGS)
    for line, found in zip(lines, listed, strict=True):
        place = f"{found['file']}:{found['line']}"
        assert line == f"{place}: {found['task'] or 'the app'}: {found['what']}. {found['remedy']}."
        assert found["file"] == "tests/unit/test_advice.py"


def test_the_example_project_needs_no_advice() -> None:
    """What is durable in the example project has no finding; of the plain version, the retried charge has."""
    found = json.loads(advise_command("example_project.app", "--json").stdout)
    assert {each["task"] for each in found} == {"example_project.plain.charge"}


def test_an_app_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    """An app whose tasks can't be imported is told in one line, with status 1."""
    (tmp_path / "broken.py").write_text(
        "from celery import Celery\napp = Celery('broken', include=['broken_tasks'], set_as_current=False)\n"
    )
    (tmp_path / "broken_tasks.py").write_text("raise RuntimeError('no\\nsecrets')\n")
    done = advise_command("broken", PYTHONPATH=os.pathsep.join([str(tmp_path), str(CHECKOUT)]))
    assert done.returncode == 1
    assert done.stderr == "Error: The app can't be imported: RuntimeError: no secrets\n"


def test_it_contacts_nobody() -> None:
    """Advice brings neither psycopg nor the store's pool, and opens no connection."""
    code = (
        "import celery, sys, psutil\n"
        "app = celery.Celery('shop', broker='redis://localhost:1/0')\n"
        "from celery_durable.advice import advise\n"
        "advise(app)\n"
        "print(psutil.Process().net_connections())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr
