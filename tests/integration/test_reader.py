"""A read replica for lists: an app object of its own that leads there, and starts nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from celery import Celery

import celery_durable as durable
from celery_durable.exceptions import DatabaseUnavailable
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.replication import Pair

pytestmark = pytest.mark.slow


@pytest.fixture
def shop(pair: Pair, broker_url: str) -> Iterator[Inprocess]:
    """The app, on the primary, with a workflow that has ended and one that waits."""
    with closing(Inprocess(pair.url, broker_url)) as shop:

        @shop.workflow(name="order")
        def order(number: int) -> Any:
            durable.set_event("step", number)
            return durable.as_step(lambda: number, name="work")() or durable.recv()

        order.apply_async((1,), task_id="w1")
        order.apply_async((0,), task_id="w0")
        shop.run("w1")
        shop.run("w0")
        durable.send("w0", "parcel", app=shop.app)
        yield shop


@pytest.fixture
def reader(pair: Pair, shop: Inprocess) -> Iterator[Celery]:
    """An app object that leads to the replica, which has all of it."""
    pair.catch_up()
    reader = Celery("reader", set_as_current=False)
    durable.install(reader, database_url=pair.replica.url, auto_migrate=False)
    yield reader
    reader.close()


def test_lists_are_read_from_a_replica(reader: Celery) -> None:
    """Whatever looks, and changes nothing."""
    assert [each.id for each in durable.list_workflows(app=reader)] == ["w0", "w1"]
    counts = durable.count_workflows(app=reader)
    assert {state: count for state, count in counts.items() if count} == {"SUCCESS": 1, "ENQUEUED": 1}
    assert durable.list_workflow_names(app=reader) == ["order"]
    assert durable.get_workflow_status("w1", app=reader).result == 1
    assert [step.name for step in durable.list_workflow_steps("w1", app=reader)][-1] == "work"
    assert durable.list_workflow_events("w1", app=reader) == {"step": 1}
    assert [each.message for each in durable.list_workflow_messages("w0", app=reader)] == ["parcel"]
    assert len(durable.list_workflow_attempts("w0", app=reader)) == 1
    assert durable.check_health(app=reader).dead == 0


def test_nothing_is_changed_through_a_replica(reader: Celery, shop: Inprocess) -> None:
    """A write there is an error, not a silent loss."""
    start = reader.task(nothing, base=durable.Workflow, name="order", shared=False)
    for write in (
        lambda: start.delay(),
        lambda: durable.send("w0", "parcel", app=reader),
        lambda: durable.cancel_workflow("w0", app=reader),
        lambda: durable.fork_workflow("w1", "work", app=reader),
    ):
        with pytest.raises(DatabaseUnavailable, match="read-only"):
            write()
    assert [each.id for each in durable.list_workflows(app=shop.app)] == ["w0", "w1"]
    assert durable.get_workflow_status("w0", app=shop.app).state == "ENQUEUED"
    assert len(durable.list_workflow_messages("w0", app=shop.app)) == 1


def nothing() -> None:
    """Never runs."""
