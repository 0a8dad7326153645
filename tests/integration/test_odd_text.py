"""Ids, names, topics and keys often come from a page's visitor: none of them is ever a part of an SQL statement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery

import celery_durable as durable
from celery_durable.exceptions import DurableError
from celery_durable.installation import installed_on
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.tables import TABLES

ODD: list[Any] = [
    "'; DROP TABLE celery_durable.workflow; --", '"; DROP SCHEMA celery_durable CASCADE; --', "%s %(id)s %", "{schema}",
    "{}", "\\'", "$1", "é\u202e", "\x00", "\ud800", "x" * 10_000, "", "' OR ''='", None, 5, 10**30, float("nan"), b"x",
    [], {"a": 1},
]  # fmt: skip

Call = Callable[[Celery, str, Any], Any]
CALLS: dict[str, Call] = {
    "get_workflow_status": lambda app, _, odd: durable.get_workflow_status(odd, app=app),
    "list_workflow_steps": lambda app, _, odd: durable.list_workflow_steps(odd, app=app),
    "list_workflows state": lambda app, _, odd: durable.list_workflows(state=odd, app=app),
    "list_workflows states": lambda app, _, odd: durable.list_workflows(state=[odd], app=app),
    "list_workflows name": lambda app, _, odd: durable.list_workflows(name=odd, app=app),
    "list_workflows queue": lambda app, _, odd: durable.list_workflows(queue=odd, app=app),
    "list_workflows parent": lambda app, _, odd: durable.list_workflows(parent_id=odd, app=app),
    "list_workflows root": lambda app, _, odd: durable.list_workflows(root_id=odd, app=app),
    "list_workflows forked": lambda app, _, odd: durable.list_workflows(forked_from=odd, app=app),
    "list_workflows limit": lambda app, _, odd: durable.list_workflows(limit=odd, app=app),
    "cancel_workflow": lambda app, _, odd: durable.cancel_workflow(odd, app=app),
    "cancel_workflows": lambda app, _, odd: durable.cancel_workflows([odd], app=app),
    "resume_workflow": lambda app, _, odd: durable.resume_workflow(odd, app=app),
    "resume_workflows": lambda app, _, odd: durable.resume_workflows([odd], app=app),
    "fork_workflow": lambda app, _, odd: durable.fork_workflow(odd, app=app),
    "fork_workflow step": lambda app, known, odd: durable.fork_workflow(known, from_step=odd, app=app),
    "fork_workflow new": lambda app, known, odd: durable.fork_workflow(known, new_id=odd, app=app),
    "send": lambda app, _, odd: durable.send(odd, 1, app=app),
    "send topic": lambda app, known, odd: durable.send(known, 1, topic=odd, app=app),
    "send key": lambda app, known, odd: durable.send(known, 1, idempotency_key=odd, app=app),
    "get_event": lambda app, _, odd: durable.get_event(odd, "key", timeout=0, app=app),
    "get_event key": lambda app, known, odd: durable.get_event(known, odd, timeout=0, app=app),
    "task_id": lambda app, _, odd: app.tasks["odd"].apply_async(task_id=odd),
    "deduplication_id": lambda app, _, odd: app.tasks["odd"].apply_async(deduplication_id=odd),
    "shadow": lambda app, _, odd: app.tasks["odd"].apply_async(shadow=odd),
    "routing_key": lambda app, _, odd: app.tasks["odd"].apply_async(routing_key=odd),
    "headers": lambda app, _, odd: app.tasks["odd"].apply_async(headers={"odd": odd}),
    "countdown": lambda app, _, odd: app.tasks["odd"].apply_async(countdown=odd),
    "workflow_timeout": lambda app, _, odd: app.tasks["odd"].apply_async(workflow_timeout=odd),
    "handle": lambda app, _, odd: durable.WorkflowHandle(odd, app=app).state,
    "enqueue_many": lambda app, _, odd: durable.enqueue_many([app.tasks["odd"].s().set(task_id=odd)], app=app),
}  # fmt: skip


@pytest.fixture
def app(database_url: str) -> Iterator[Celery]:
    """An app with a workflow, and a broker in this process."""
    with Celery("odd", broker="memory://", set_as_current=False) as app:
        durable.install(app, database_url=database_url)

        @app.task(name="odd", base=durable.Workflow, shared=False)
        def odd(value: Any = None) -> Any: ...

        yield app
        installed_on(app).store.close()


def test_odd_text_anywhere(app: Celery, sql: Sql) -> None:
    """Whatever is passed for an id, a name, a topic, a key or a filter is a value, or refused with an error of ours."""
    known = app.tasks["odd"].delay().id
    for name, call in CALLS.items():
        for odd in ODD:
            try:
                call(app, known, odd)
            except Exception as error:
                ours = isinstance(error, DurableError | TypeError | ValueError) and not isinstance(error, UnicodeError)
                if not ours:
                    pytest.fail(f"{name} of {odd!r:.40} raised {error!r}")
    for table in TABLES:
        assert sql.value(f"SELECT count(*) FROM celery_durable.{table}") >= 0
    assert durable.get_workflow_status(known, app=app).state == "ENQUEUED"


def test_an_odd_id_is_kept_as_it_is(app: Celery) -> None:
    """Quotes, percent signs and braces are characters like others: found again by the same id, and by no other."""
    ids = [odd for odd in ODD if isinstance(odd, str) and 0 < len(odd) < 256 and odd.isprintable()]
    for each in ids:
        app.tasks["odd"].apply_async(task_id=each)
        durable.send(each, each, topic=each, idempotency_key=each, app=app)
    assert {each.id for each in durable.list_workflows(app=app)} == set(ids)
    assert [durable.get_workflow_status(each, app=app).id for each in ids] == ids
