"""What a step returns: by its own serializer, by its type hint, compressed; alike on the first run and on a replay."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from pydantic import BaseModel

import celery_durable as durable
from celery_durable.exceptions import ConfigurationError, PayloadTooLarge, SerializationError
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.inprocess import Inprocess

pytestmark = pytest.mark.oldest


@dataclass
class Receipt:
    """A plain dataclass."""

    number: int
    at: datetime
    cents: Decimal


class Parcel(BaseModel):
    """A pydantic model that holds dataclasses."""

    id: UUID
    receipts: list[Receipt]


class Unreadable:
    """Something that can be stored, and not read back."""

    def __reduce__(self) -> Any:
        return Unreadable.broken, ()

    @staticmethod
    def broken() -> None:
        raise RuntimeError("it can't be made again")


RECEIPT = Receipt(7, datetime(2026, 1, 2, tzinfo=timezone.utc), Decimal("12.50"))


@pytest.fixture
def make(database_url: str, broker_url: str) -> Iterator[Callable[..., Inprocess]]:
    """Make an app with settings of Celery's."""
    made = []

    def make(**conf: Any) -> Inprocess:
        shop = Inprocess(database_url, broker_url, max_payload=100_000)
        shop.app.conf.update(conf)
        made.append(shop)
        return shop

    yield make
    for shop in made:
        shop.close()


def seen_twice(shop: Inprocess, step: Any, *args: Any) -> list[Any]:
    """Call a step in a workflow that runs twice; return what both attempts saw, value or error."""
    seen: list[Any] = []

    @shop.workflow(name="order", autoretry_for=(ZeroDivisionError,), default_retry_delay=0)
    def order() -> None:
        try:
            seen.append(step(*args))
        except Exception as error:
            seen.append(error)
        if len(seen) == 1:
            raise SystemExit(15 - 256)  # as Celery's pool ends a process

    handle = order.apply_async(task_id="w1")
    with pytest.raises(SystemExit):
        shop.run(handle.id)
    assert shop.installation.store.workflows.hand_over(shop.node, ["w1"], patience=0) == ["w1"]
    shop.run(handle.id)
    return seen


def content_type(sql: Sql) -> Any:
    return sql.value("SELECT content_type FROM celery_durable.checkpoint WHERE key = 'make'")


@pytest.mark.parametrize("value", [RECEIPT.at, RECEIPT.cents, UUID(int=7), b"\x00\xff", {"a": [1, None]}], ids=repr)
def test_json_keeps_kombus_types(make: Any, value: Any) -> None:
    """Dates, decimals, ids and bytes come back as what they were."""
    assert seen_twice(make(), durable.as_step(lambda: value, name="make")) == [value, value]


def test_a_dataclass_comes_back_by_its_hint(make: Any) -> None:
    """The workflow gets an instance, with its fields' types."""

    def make_receipt() -> Receipt:
        return RECEIPT

    first, second = seen_twice(make(), durable.as_step(make_receipt, name="make"))
    assert first == second == RECEIPT
    assert type(first) is type(second) is Receipt


def test_a_model_comes_back_by_its_hint(make: Any) -> None:
    """With all that it holds."""
    parcel = Parcel(id=UUID(int=1), receipts=[RECEIPT])

    def make_parcels() -> list[Parcel]:
        return [parcel]

    assert seen_twice(make(), durable.as_step(make_parcels, name="make")) == [[parcel], [parcel]]


def test_without_a_hint_a_dataclass_is_told_to_have_one(make: Any) -> None:
    """JSON knows no classes."""
    first, second = seen_twice(make(), durable.as_step(lambda: RECEIPT, name="make"))
    assert type(first) is type(second) is SerializationError


@pytest.mark.parametrize(
    ("serializer", "written_as"), [("pickle", "application/x-python-serialize"), ("yaml", "application/x-yaml")]
)
def test_a_steps_own_serializer(make: Any, sql: Sql, serializer: str, written_as: str) -> None:
    """Pickle and YAML keep what JSON can't, where the app accepts them."""
    shop = make(accept_content=["json", serializer])
    step = durable.as_step(lambda: {1, 2}, name="make", serializer=serializer)
    assert seen_twice(shop, step) == [{1, 2}, {1, 2}]
    assert content_type(sql) == written_as


@pytest.mark.parametrize("serializer", ["pickle", "yaml"])
def test_a_serializer_that_the_app_does_not_accept(make: Any, serializer: str) -> None:
    """Nothing that it writes could be read, so the step isn't run."""
    runs: list[int] = []
    step = durable.as_step(lambda: runs.append(1), name="make", serializer=serializer)
    first, second = seen_twice(make(), step)
    assert type(first) is type(second) is ConfigurationError
    assert serializer in str(first)
    assert runs == []


def test_a_large_result_is_compressed(make: Any, sql: Sql) -> None:
    """As Celery's task_compression says; small ones stay as they are."""
    shop = make(task_compression="gzip")
    text = "durable " * 50_000
    assert seen_twice(shop, durable.as_step(lambda: text, name="make")) == [text, text]
    assert "compression" in content_type(sql)
    assert sql.value("SELECT length(value) FROM celery_durable.checkpoint WHERE key = 'make'") < 10_000


def test_a_result_that_is_too_large(make: Any) -> None:
    """It is the step's outcome: the body doesn't run again."""
    runs: list[int] = []
    step = durable.as_step(lambda: runs.append(1) or "x" * 200_000, name="make", max_retries=3)
    first, second = seen_twice(make(), step)
    assert type(first) is type(second) is PayloadTooLarge
    assert runs == [1]


def test_a_result_that_cannot_be_read_back(make: Any) -> None:
    """An object whose decoding fails is the step's outcome, too, and known before it is recorded."""
    runs: list[int] = []
    shop = make(accept_content=["json", "pickle"])
    step = durable.as_step(lambda: runs.append(1) or Unreadable(), name="make", serializer="pickle", max_retries=3)
    first, second = seen_twice(shop, step)
    assert type(first) is type(second) is SerializationError
    assert "it can't be made again" in str(first)
    assert runs == [1]


async def coroutine() -> None:
    """Nobody awaits it."""


@pytest.mark.parametrize(
    "result",
    [
        lambda: (number for number in range(3)),
        lambda: Path(__file__).open(),  # noqa: SIM115 - that it is open is the point
        threading.Lock,
        coroutine,
        lambda: object(),
    ],
    ids=["generator", "file", "lock", "coroutine", "object"],
)
def test_a_result_that_is_no_data(make: Any, result: Any) -> None:
    """It is the step's outcome as an error, and the body doesn't run again."""
    runs: list[int] = []
    step = durable.as_step(lambda: runs.append(1) or result(), name="make", max_retries=3)
    first, second = seen_twice(make(), step)
    assert type(first) is type(second) is SerializationError
    assert runs == [1]


# What is sent to another worker.


def make_receipt() -> Receipt:
    return RECEIPT


async def amake_receipt() -> Receipt:
    return RECEIPT


SENT: dict[str, Callable[[Inprocess], Callable[[], durable.WorkflowHandle[Any]]]] = {
    "step": lambda shop: shop.step(make_receipt, name="make").delay,
    "async step": lambda shop: shop.step(amake_receipt, name="make").delay,
    "task": lambda shop: durable.as_step(shop.app.task(make_receipt, name="make", shared=False)).delay,
    "workflow": lambda shop: shop.workflow(make_receipt, name="make").delay,
    "async workflow": lambda shop: shop.workflow(amake_receipt, name="make").delay,
}


@pytest.mark.parametrize("gathered", [False, True], ids=["alone", "gathered"])
@pytest.mark.parametrize("kind", SENT.values(), ids=SENT)
def test_a_dataclass_comes_back_from_another_worker(make: Any, kind: Any, gathered: bool) -> None:
    """To the workflow that awaits it, on a replay as well, and to whoever asks for the result or the status."""
    shop = make()
    send, seen = kind(shop), []

    @shop.workflow(name="order")
    def order() -> None:
        handle = send()
        seen.append(durable.gather(handle)[0] if gathered else handle.get())
        durable.recv()

    order.apply_async(task_id="w1")
    shop.run("w1")
    (child,) = durable.list_workflows(parent_id="w1", app=shop.app)
    told = shop.run(child.id)
    assert told["number"] == RECEIPT.number
    shop.run("w1")
    durable.send("w1", None, app=shop.app)
    shop.run("w1")
    handle = durable.WorkflowHandle(child.id, app=shop.app)
    seen += [handle.get(), handle.result, durable.get_workflow_status(child.id, app=shop.app).result]
    assert seen == [RECEIPT] * 5
    assert {type(each) for each in seen} == {Receipt}


def test_an_app_without_the_task_reads_plain_data(make: Any) -> None:
    """As whoever lists workflows may be."""
    shop, other = make(), make()
    shop.workflow(make_receipt, name="make").apply_async(task_id="w1")
    shop.run("w1")
    assert durable.get_workflow_status("w1", app=other.app).result["number"] == RECEIPT.number
