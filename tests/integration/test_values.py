"""What is different each time, kept for every replay: now, uuid4, random."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

import celery_durable as durable
from celery_durable.engine.context import running
from celery_durable.exceptions import NotInWorkflow
from tests.fixtures.fix_postgres import Sql, _new_database
from tests.fixtures.inprocess import Inprocess
from tests.integration.attempts import begin, clear, crash, order, steps

VALUES = [durable.now, durable.uuid4, durable.random]
each_value = pytest.mark.parametrize("value", VALUES, ids=lambda value: value.__name__)


@pytest.fixture(scope="module")
def database_url(postgres_server: str, template_database: str) -> Iterator[str]:
    """One database for all of these tests, which is cheaper; each begins with empty tables."""
    with _new_database(postgres_server, template_database) as url:
        yield url


@pytest.fixture(autouse=True)
def empty_tables(sql: Sql) -> None:
    clear(sql)


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    shop = Inprocess(database_url, broker_url)
    yield shop
    shop.close()


@each_value
def test_the_same_on_every_replay(shop: Inprocess, value: Callable[[], Any]) -> None:
    """Each call has its own; a crash changes none of them."""
    seen: list[list[Any]] = []

    def body() -> None:
        seen.append([value(), value()])

    order(shop, body)
    attempt = begin(shop)
    with running(attempt):
        body()
    crash(shop, attempt)
    shop.run("w1")
    assert seen[0] == seen[1]
    assert seen[0][0] != seen[0][1]
    assert list(map(type, seen[0])) == list(map(type, seen[1]))


@each_value
def test_the_same_on_every_replay_of_an_async_function(shop: Inprocess, value: Callable[[], Any]) -> None:
    """It is called there without await."""
    seen: list[Any] = []

    async def body() -> None:
        seen.append(value())
        await durable.arecv()

    order(shop, body)
    shop.run("w1")
    durable.send("w1", None, app=shop.app)
    shop.run("w1")
    assert len(seen) == 2
    assert seen[0] == seen[1]


def test_now_is_the_time_of_the_database(shop: Inprocess, sql: Sql) -> None:
    """In UTC, with its time zone."""
    order(shop, lambda: durable.now().isoformat())
    before = sql.value("SELECT clock_timestamp()")
    now = datetime.fromisoformat(shop.run("w1"))
    assert now.utcoffset() == timedelta(0)
    second = timedelta(seconds=1)
    assert before - second < now < sql.value("SELECT clock_timestamp()") + second


def test_now_does_not_go_back(shop: Inprocess) -> None:
    """Not from one attempt to the next."""
    seen: list[list[datetime]] = []

    def body() -> None:
        moments = [durable.now()]
        durable.recv()
        seen.append([*moments, durable.now()])

    order(shop, body)
    shop.run("w1")
    durable.send("w1", None, app=shop.app)
    shop.run("w1")
    assert seen[0] == sorted(seen[0])


def test_uuids_are_random_ones(shop: Inprocess) -> None:
    """As those of Python's own function."""
    order(shop, lambda: str(durable.uuid4()))
    assert uuid.UUID(shop.run("w1")).version == 4


def test_random_is_a_number_from_0_to_1(shop: Inprocess) -> None:
    """As that of Python's own function; to its last bit the same when read back."""
    order(shop, lambda: [durable.random() for _ in range(20)])
    numbers = shop.run("w1")
    assert all(0 <= number < 1 for number in numbers)
    assert len(set(numbers)) == 20
    assert [step.output for step in steps(shop).values()] == numbers


@each_value
def test_outside_a_workflow(value: Callable[[], Any]) -> None:
    """It is a new one each time, and needs no app."""
    first, second = value(), value()
    assert type(first) is type(second)
    assert first != second


def test_now_outside_a_workflow() -> None:
    """This machine's time, in UTC."""
    now = durable.now()
    assert now.utcoffset() == timedelta(0)
    assert abs(now - datetime.now(timezone.utc)) < timedelta(seconds=10)


@each_value
def test_in_a_step(shop: Inprocess, value: Callable[[], Any]) -> None:
    """Part of the step: it isn't kept for itself."""
    order(shop, durable.as_step(lambda: str(value()), name="step"))
    assert isinstance(shop.run("w1"), str)
    assert list(steps(shop)) == ["step"]


@each_value
def test_in_a_direct_call(shop: Inprocess, sql: Sql, value: Callable[[], Any]) -> None:
    """Nothing is kept."""
    task = order(shop, lambda: str(value()))
    assert task() != task()
    assert sql.value("SELECT count(*) FROM celery_durable.checkpoint") == 0


@each_value
def test_not_in_a_thread_of_the_user(shop: Inprocess, value: Callable[[], Any]) -> None:
    """The order of its calls isn't the same on every replay."""
    seen: list[BaseException] = []

    def caught() -> None:
        try:
            value()
        except NotInWorkflow as error:
            seen.append(error)

    def body() -> None:
        thread = threading.Thread(target=caught)
        thread.start()
        thread.join()

    order(shop, body)
    shop.run("w1")
    assert len(seen) == 1
