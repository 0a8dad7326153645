"""One shop on several databases: an app for each, and the id of a workflow says which."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from typing import Any
from zlib import crc32

import pytest

import celery_durable as durable
from celery_durable.exceptions import ConfigurationError, WorkflowNotFound
from tests.fixtures.fix_postgres import _new_database
from tests.fixtures.inprocess import Inprocess

SHARDS, ORDERS = 3, 30


@pytest.fixture
def shards(postgres_server: str, template_database: str, broker_url: str) -> Iterator[list[Inprocess]]:
    """An app on each of several databases."""
    with ExitStack() as stack:
        urls = [stack.enter_context(_new_database(postgres_server, template_database)) for _ in range(SHARDS)]
        yield [stack.enter_context(closing(Inprocess(url, broker_url))) for url in urls]


def declare(shop: Inprocess) -> None:
    """What each of the apps has."""

    @shop.step(name="shop.charge")
    def charge(order_id: str) -> str:
        return f"payment of {order_id}"

    @shop.workflow(name="shop.fulfil")
    def fulfil(order_id: str) -> Any:
        return charge(order_id)


def of(shards: list[Inprocess], order_id: str) -> Inprocess:
    return shards[crc32(order_id.encode()) % len(shards)]


def test_each_workflow_lives_in_one_of_them(shards: list[Inprocess]) -> None:
    """Its start, its run, and whatever is asked of it; the others know nothing of it."""
    for shop in shards:
        declare(shop)
    ids = [f"order-{number}" for number in range(ORDERS)]
    for order_id in ids:
        of(shards, order_id).app.tasks["shop.fulfil"].apply_async((order_id,), task_id=order_id)
    for order_id in ids:
        assert of(shards, order_id).run(order_id) == f"payment of {order_id}"
    found = [{each.id for each in durable.list_workflows(state="SUCCESS", app=shop.app)} for shop in shards]
    assert all(found)
    assert sorted(each for part in found for each in part) == sorted(ids)
    other = next(shop for shop in shards if shop is not of(shards, "order-0"))
    with pytest.raises(WorkflowNotFound):
        durable.send("order-0", "parcel", app=other.app)


def test_a_workflow_starts_none_of_another_app(shards: list[Inprocess]) -> None:
    """Its child and the step that says so would be in two databases: it is told, and nothing is started."""
    here, there, *_ = shards
    declare(there)

    @here.workflow(name="order")
    def order() -> str:
        with pytest.raises(ConfigurationError, match="is another app's"):
            there.app.tasks["shop.fulfil"].delay("order-1")
        return "told"

    order.apply_async(task_id="w1")
    assert here.run("w1") == "told"
    assert durable.list_workflows(app=there.app) == []
