"""A Django project with real workers: commits start workflows, and what steps do by the ORM is done once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import psutil
import pytest

from celery_durable.states import FINAL
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_bakery import Bakery
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.gates import Gates
from tests.fixtures.ledger import Ledger
from tests.fixtures.site import FAST
from tests.fixtures.workers import Workers, is_alive

pytestmark = pytest.mark.crash


def settings(durable: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {**{f"CELERY_DURABLE_{name.upper()}": value for name, value in durable.items()}, **more}


class Street:
    """The bakery, its workers and what they have done."""

    def __init__(self, bakery: Bakery, workers: Workers, ledger: Ledger, sql: Sql) -> None:
        self.bakery, self.workers, self.ledger, self.sql = bakery, workers, ledger, sql
        self.gates = Gates(ledger.path)

    def open(self, **more: Any) -> Any:
        """Start a worker with one pool process."""
        said = settings(FAST, **more)
        env = {**self.bakery.env, "BAKERY_SETTINGS": json.dumps(said)}
        return self.workers.start("bakery", concurrency=1, env=env)

    def do(self, code: str, **more: Any) -> str:
        """Run code of the project's own, as a process of its web server would."""
        return self.bakery.python(code, **settings(FAST, **more)).strip()

    def order(self, loaves: int) -> str:
        """Let a customer order."""
        return self.do(f"from django.test import Client; print(Client().get('/orders/{loaves}').content.decode())")

    def ended(self, workflow_id: str) -> Any:
        """Wait for the end of a workflow; its row."""
        query = "SELECT * FROM celery_durable.workflow WHERE id = %s"
        wait_until(lambda: self.sql.one(query, workflow_id).state in FINAL, 30, "the workflow has ended")
        return self.sql.one(query, workflow_id)

    def reaches(self, name: str) -> int:
        """Wait until a body has recorded this; the process that it runs in."""
        wait_until(lambda: self.ledger.count(name), message=f"{name} is recorded")
        return next(entry.pid for entry in self.ledger.lines() if entry.name == name)


@pytest.fixture
def street(
    bakery: Bakery, workers: Workers, ledger: Ledger, broker: Broker, empty_database_url: str
) -> Iterator[Street]:
    bakery.env.update(BROKER_URL=broker.url, CELERY_DURABLE_TEST_QUEUE=broker.queue, LEDGER=str(ledger.path))
    bakery.manage("migrate")
    with closing(Sql(empty_database_url)) as sql:
        yield Street(bakery, workers, ledger, sql)


def test_a_commit_starts_it_at_once(street: Street) -> None:
    """The worker hears of the commit: it waits for no sweep, and nothing was sent by the view."""
    street.open(CELERY_DURABLE_RECOVERY_INTERVAL=3600, CELERY_DURABLE_REPUBLISH_AFTER=3600)
    row = street.ended(street.order(3))
    assert (row.state, row.attempt) == ("SUCCESS", 1)
    assert street.sql.value("SELECT count(*) FROM orders_loaf") == 3


@pytest.mark.parametrize(("gate", "baked"), [("baked", 2), ("fulfilled", 1)])
def test_an_atomic_step_survives_a_kill(street: Street, gate: str, baked: int) -> None:
    """Of its process in the body, and after its commit: by the ORM the loaves are there once."""
    street.open()
    street.gates.close(f"{gate}-1")
    workflow_id = street.order(3)
    process = psutil.Process(street.reaches(gate))
    process.kill()
    wait_until(lambda: not is_alive(process), message="the process is gone")
    street.gates.open(f"{gate}-1")
    row = street.ended(workflow_id)
    assert (row.state, row.attempt) == ("SUCCESS", 2)
    assert street.sql.value("SELECT count(*) FROM orders_loaf") == 3
    assert street.ledger.count("baked", 1) == baked


def test_connections(street: Street) -> None:
    """After each task they are closed as Celery closes them, for workflows as for plain tasks."""
    street.open()
    for _ in range(2):
        row = street.ended(street.do("from orders.tasks import *; print(session_of_workflow.delay().id)"))
        assert row.state == "SUCCESS"
    sessions = street.sql.all("SELECT value FROM celery_durable.output")
    numbers = {int(row.value) for row in sessions}
    assert len(numbers) == 2
    alive = "SELECT count(*) FROM pg_stat_activity WHERE pid = ANY(%s)"
    wait_until(lambda: street.sql.value(alive, list(numbers)) == 0, message="both sessions are closed")


def test_connections_that_are_kept(street: Street) -> None:
    """Where Celery is told to reuse them, the next workflow has the same one."""
    street.open(CELERY_DB_REUSE_MAX=10)
    for _ in range(2):
        street.ended(street.do("from orders.tasks import *; print(session_of_workflow.delay().id)"))
    assert street.sql.value("SELECT count(DISTINCT value) FROM celery_durable.output") == 1
