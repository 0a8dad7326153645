"""A project's own tests with pytest-django: what they start never reaches the developer's database."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.fixtures.fix_bakery import Bakery
from tests.fixtures.fix_postgres import Sql

CONFTEST = """
import celery_durable as durable

# The app has been used, and has connections, before there is a test database.
assert durable.list_workflows() == []
"""
SUITE = """
import pytest
from bakery import celery_app
from django.db import connection

import celery_durable as durable
from celery_durable.contrib.django.models import Workflow
from orders.models import Loaf, Order
from orders.tasks import fulfil


def place(client):
    return client.get("/orders/3").content.decode()


@pytest.mark.parametrize("again", [1, 2])
def test_it_is_rolled_back_with_the_test(db, client, again):
    workflow_id = place(client)
    assert [each.id for each in Workflow.objects.all()] == [workflow_id]
    with pytest.raises(durable.exceptions.WorkflowNotFound):
        durable.get_workflow_status(workflow_id)


@pytest.mark.parametrize("again", [1, 2])
def test_it_is_committed_to_the_test_database(transactional_db, client, again):
    assert connection.settings_dict["NAME"].startswith("test_")
    workflow_id = place(client)
    assert durable.get_workflow_status(workflow_id).state == "ENQUEUED"
    assert [each.id for each in durable.list_workflows()] == [workflow_id]
    assert Workflow.objects.count() == Order.objects.count() == 1


def test_nothing_is_left_of_those_that_committed(db):
    assert Workflow.objects.count() == 0


def test_on_commit(db, django_capture_on_commit_callbacks):
    with django_capture_on_commit_callbacks(execute=True):
        fulfil.delay_on_commit(1)
        assert Workflow.objects.count() == 0
    assert Workflow.objects.count() == 1


@pytest.fixture
def eager():
    celery_app.conf.task_always_eager = True
    yield
    celery_app.conf.task_always_eager = False


def test_eager(db, eager, monkeypatch, tmp_path):
    monkeypatch.setenv("LEDGER", str(tmp_path / "ledger"))
    order = Order.objects.create(loaves=3)
    assert fulfil.delay(order.pk).get() == Loaf.objects.count() == 3
    assert Workflow.objects.count() == 0
"""


@pytest.fixture
def sql(empty_database_url: str) -> Iterator[Sql]:
    """The developer's database."""
    with closing(Sql(empty_database_url)) as sql:
        yield sql


def run(bakery: Bakery, directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the suite by a pytest of its own."""
    (directory / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\n")
    (directory / "conftest.py").write_text(CONFTEST)
    (directory / "test_orders.py").write_text(SUITE)
    done = bakery.run(["-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly", *options, "."], cwd=directory)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("options", [(), ("-n2",)], ids=["one process", "xdist"])
def test_a_suite(bakery: Bakery, sql: Sql, tmp_path: Path, options: tuple[str, ...]) -> None:
    """`db`, `transactional_db`, callbacks on commit and eager tasks; in one process, and in several at once."""
    bakery.manage("migrate")
    suite = tmp_path / "suite"
    suite.mkdir()
    passed = re.search(r"(\d+) passed", run(bakery, suite, *options).stdout)
    assert passed is not None
    assert passed[1] == "7"
    assert sql.value("SELECT count(*) FROM celery_durable.workflow") == 0
    assert sql.value("SELECT count(*) FROM orders_order") == 0
