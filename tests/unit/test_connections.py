"""Django's connections, one for each thread: closed with a branch, and after an interruption."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.conf import settings
from django.db.utils import ConnectionHandler

import celery_durable as durable
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.inprocess import Inprocess
from tests.integration.attempts import order, status


@pytest.fixture
def django(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ConnectionHandler]:
    """Django's connections, to a database that is a file."""
    if not settings.configured:
        settings.configure()
    connections = ConnectionHandler({
        "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": str(tmp_path / "database")}
    })  # fmt: skip
    monkeypatch.setattr("django.db.connections", connections)
    yield connections
    connections.close_all()


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    shop = Inprocess(database_url, broker_url)
    yield shop
    shop.close()


def connected(connections: ConnectionHandler) -> Any:
    """Open this thread's connection, and return it."""
    connections["default"].ensure_connection()
    return connections["default"]


def test_a_branch_closes_its_connection(shop: Inprocess, django: Any) -> None:
    """Celery does that only for the thread of the task, whose own connection stays."""
    used: list[Any] = []
    mine, at_once = connected(django), threading.Barrier(3)

    def connect() -> None:
        at_once.wait(20)  # so that each has a thread of its own
        used.append(connected(django))

    step = durable.as_step(connect, name="connect")
    order(shop, lambda: durable.gather(step.s(), step.s(), step.s()))
    assert shop.run("w1") == [None, None, None]
    assert len({id(each) for each in (mine, *used)}) == 4
    assert [each.connection for each in used] == [None, None, None]
    assert mine.connection is not None


def test_a_body_off_the_loop_closes_its_connection(shop: Inprocess, django: Any) -> None:
    """Its thread is used again, long after the connection may have been lost."""
    used: list[Any] = []
    step = durable.as_step(lambda: used.append(connected(django)), name="connect")

    async def body() -> None:
        await asyncio.gather(step.acall(), step.acall())

    order(shop, body)
    assert shop.run("w1") is None
    assert [each.connection for each in used] == [None, None]


def test_an_interrupted_step_leaves_no_connection(shop: Inprocess, django: Any) -> None:
    """It may have been in the middle of a query; others don't close it."""
    mine = connected(django)

    def slow() -> None:
        connected(django)
        time.sleep(20)

    def body() -> None:
        durable.as_step(lambda: connected(django) and None, name="connect")()
        assert mine.connection is not None
        with pytest.raises(TimeoutError):
            durable.as_step(slow, name="slow", soft_time_limit=0.1)()

    order(shop, body)
    shop.run("w1")
    assert status(shop).state == "SUCCESS"
    assert mine.connection is None


@pytest.mark.parametrize("is_interrupted", [False, True], ids=["finished", "interrupted"])
def test_an_async_step_leaves_no_old_connection(shop: Inprocess, django: Any, is_interrupted: bool) -> None:
    """Its queries are made in a thread of asgiref's, which goes on; no request of Django's ends there."""
    used: list[Any] = []

    async def connect() -> None:
        await sync_to_async(lambda: used.append(connected(django)))()
        if is_interrupted:
            await asyncio.sleep(20)

    order(shop, durable.as_step(connect, name="connect", soft_time_limit=0.2))
    shop.run("w1")
    assert isinstance(status(shop).error, durable.exceptions.StepTimeout) is is_interrupted
    (connection,) = used
    wait_until(lambda: connection.connection is None, message="the connection is closed")


UNCONFIGURED = """
import django.db
from celery_durable.connections import DjangoConnections
DjangoConnections().branch_ended("w1", "work")
"""


@pytest.mark.parametrize("script", [UNCONFIGURED, UNCONFIGURED.replace("import django.db", "")])
def test_without_django_there_is_nothing_to_close(script: str) -> None:
    """Not imported, or imported by some library and not set up."""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
