"""Django: what is started in transaction.atomic() is part of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing, suppress
from typing import Any

import pytest
from celery import Celery
from celery.contrib.django.task import DjangoTask
from django.db import connection, connections, transaction
from django.test import AsyncClient, Client, override_settings
from django.test.utils import CaptureQueriesContext

import celery_durable as durable
from celery_durable.exceptions import ConfigurationError, NotAllowedInStep, SerializationError, WorkflowConflict
from tests.fixtures.fix_django import configure_django, enter
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.inprocess import Inprocess

configure_django()

from tests.fixtures.apps.bank import views  # noqa: E402 - models need Django's settings
from tests.fixtures.apps.bank.models import Account  # noqa: E402


@pytest.fixture
def shop(site: str, broker_url: str) -> Iterator[Inprocess]:
    with closing(Inprocess(site, broker_url, database="default")) as shop:
        yield shop


@pytest.fixture
def sql(site: str) -> Iterator[Sql]:
    with closing(Sql(site)) as sql:
        yield sql


@pytest.fixture
def welcome(shop: Inprocess, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A workflow that nobody runs."""
    task = shop.workflow(greet, name="welcome")
    monkeypatch.setattr(views, "started", task)
    return task


def nothing() -> None: ...


def find() -> Any:
    return durable.as_step(lambda: Account.objects.get(), name="find")()


def greet(pk: Any) -> Any:
    return pk


def started(sql: Sql) -> list[str]:
    """The ids of all workflows."""
    return [row.id for row in sql.all("SELECT id FROM celery_durable.workflow ORDER BY id")]


def test_a_commit_starts_it(welcome: Any, sql: Sql, shop: Inprocess) -> None:
    """Before the commit nobody sees it; after it, it runs."""
    with transaction.atomic():
        account = Account.objects.create(owner="ann")
        welcome.apply_async([account.pk], task_id="w1")
        assert started(sql) == []
    assert started(sql) == ["w1"]
    assert shop.run("w1") == account.pk


def test_a_commit_is_told(welcome: Any, sql: Sql) -> None:
    """Nodes that listen hear of it at once."""
    sql.connection.execute("LISTEN celery_durable")
    with transaction.atomic():
        welcome.delay(1)
    assert [note.channel for note in sql.connection.notifies(timeout=5, stop_after=1)] == ["celery_durable"]


def test_a_rollback_leaves_nothing(welcome: Any, sql: Sql) -> None:
    """No account, and no workflow for it."""
    with suppress(RuntimeError), transaction.atomic():
        welcome.delay(Account.objects.create(owner="ann").pk)
        raise RuntimeError
    assert (started(sql), Account.objects.count()) == ([], 0)


def test_outside_a_transaction_it_starts_at_once(welcome: Any, sql: Sql) -> None:
    """As ever."""
    welcome.apply_async([1], task_id="w1")
    assert started(sql) == ["w1"]


def test_a_savepoint_that_is_rolled_back(welcome: Any, sql: Sql) -> None:
    """It takes what was started in it along, and nothing else; what comes later is told, too."""
    sql.connection.execute("LISTEN celery_durable")
    with transaction.atomic():
        with suppress(RuntimeError), transaction.atomic():
            welcome.apply_async([1], task_id="inner")
            raise RuntimeError
        welcome.apply_async([1], task_id="outer")
    assert started(sql) == ["outer"]
    assert list(sql.connection.notifies(timeout=5, stop_after=1))


def test_nested_blocks(welcome: Any, sql: Sql) -> None:
    """The outermost commit counts."""
    with transaction.atomic():
        with transaction.atomic():
            welcome.apply_async([1], task_id="inner")
        assert started(sql) == []
    assert started(sql) == ["inner"]


def test_an_error_of_ours_leaves_the_transaction_alone(welcome: Any, shop: Inprocess, sql: Sql) -> None:
    """An id that is taken is an error, and the caller may go on."""
    other = shop.workflow(nothing, name="other")
    other.apply_async(task_id="w1")
    with transaction.atomic():
        Account.objects.create(owner="ann")
        with pytest.raises(WorkflowConflict):
            welcome.apply_async([1], task_id="w1")
        Account.objects.create(owner="bob")
    assert Account.objects.count() == 2


def test_messages_belong_to_it(welcome: Any, sql: Sql) -> None:
    """Sent by the commit, or not at all."""
    welcome.apply_async([1], task_id="w1")
    count = "SELECT count(*) FROM celery_durable.message"
    with suppress(RuntimeError), transaction.atomic():
        durable.send("w1", "hello", app=welcome.app)
        raise RuntimeError
    assert sql.value(count) == 0
    with transaction.atomic():
        durable.send("w1", "hello", app=welcome.app)
        assert sql.value(count) == 0
    assert sql.value(count) == 1


def test_cancellations_and_bulk_starts_belong_to_it(welcome: Any, sql: Sql) -> None:
    """Both by the commit."""
    welcome.apply_async([1], task_id="w1")
    with transaction.atomic():
        assert durable.cancel_workflow("w1", app=welcome.app)
        durable.enqueue_many(welcome.s(n).set(task_id=f"many-{n}") for n in range(3))
        assert started(sql) == ["w1"]
        assert sql.value("SELECT count(*) FROM celery_durable.cancellation") == 0
    assert started(sql) == ["many-0", "many-1", "many-2", "w1"]
    assert sql.value("SELECT count(*) FROM celery_durable.cancellation") == 1


def test_a_handle_cannot_wait_for_what_is_not_committed(welcome: Any, shop: Inprocess) -> None:
    """It would wait for ever; a workflow that was there before can be waited for."""
    welcome.apply_async([7], task_id="before")
    shop.run("before")
    with transaction.atomic():
        handle = welcome.delay(1)
        with pytest.raises(NotAllowedInStep, match="commit"):
            handle.get(timeout=1)
        assert durable.WorkflowHandle("before", app=shop.app).get(timeout=1) == 7


def test_it_is_no_query_of_the_app(welcome: Any) -> None:
    """Tests that count queries count the same as before."""
    with transaction.atomic(), CaptureQueriesContext(connection) as queries:
        welcome.delay(1)
    assert len(queries) == 0


def test_on_commit(shop: Inprocess, sql: Sql) -> None:
    """`delay_on_commit` of Django's task class is still there, and starts after the commit."""
    app = shop.app
    app.task_cls = DjangoTask
    task = app.task(nothing, base=durable.Workflow, name="later", shared=False)
    with transaction.atomic():
        task.delay_on_commit()
        assert started(sql) == []
    assert len(started(sql)) == 1


def test_a_broken_transaction(welcome: Any, sql: Sql) -> None:
    """What can't be committed can't start anything: Django's own error says so."""
    with transaction.atomic():
        transaction.set_rollback(True)
        with pytest.raises(transaction.TransactionManagementError):
            welcome.delay(1)
    assert started(sql) == []


def test_autocommit_off(welcome: Any, sql: Sql) -> None:
    """Then each statement belongs to a transaction, and so does a start."""
    transaction.set_autocommit(False)
    try:
        welcome.apply_async([1], task_id="kept")
        assert started(sql) == []
        transaction.commit()
        welcome.apply_async([1], task_id="lost")
        transaction.rollback()
    finally:
        transaction.set_autocommit(True)
    assert started(sql) == ["kept"]


def test_autocommit_off_from_the_start(welcome: Any, sql: Sql, site: str) -> None:
    """Also before the first query of a connection that is configured so."""
    enter("default", site, AUTOCOMMIT=False)
    try:
        welcome.apply_async([1], task_id="lost")
        transaction.rollback()
        welcome.apply_async([1], task_id="kept")
        transaction.commit()
    finally:
        enter("default", site, AUTOCOMMIT=True)
    assert started(sql) == ["kept"]


def test_another_database_does_not_matter(welcome: Any, sql: Sql, site: str) -> None:
    """A transaction there says nothing of what is started here: `delay_on_commit(…)` waits for it."""
    enter("other", site)
    with transaction.atomic(using="other"):
        welcome.apply_async([1], task_id="w1")
        assert started(sql) == ["w1"]


def test_a_router_does_not_matter(welcome: Any, sql: Sql) -> None:
    """The setting names the database, and no router can send the workflows elsewhere."""

    class Router:
        def db_for_read(self, model: Any, **hints: Any) -> str:
            return "lite"

        db_for_write = db_for_read

    with override_settings(DATABASE_ROUTERS=[Router()]), transaction.atomic(using="default"):
        welcome.apply_async([1], task_id="w1")
        assert started(sql) == []
    assert started(sql) == ["w1"]


@pytest.mark.parametrize("atomic_requests", [False, True])
def test_a_view(welcome: Any, sql: Sql, site: str, atomic_requests: bool) -> None:
    """Account and workflow, both or neither; also where every request is a transaction."""
    enter("default", site, ATOMIC_REQUESTS=atomic_requests)
    try:
        assert Client().get("/open/ann").content.decode() in started(sql)
        with pytest.raises(RuntimeError):
            Client().get("/open/nobody")
    finally:
        enter("default", site, ATOMIC_REQUESTS=False)
    assert (len(started(sql)), Account.objects.count()) == (1, 1)


def test_an_async_view(welcome: Any, sql: Sql) -> None:
    """It awaits the start."""

    async def request() -> str:
        response = await AsyncClient().get("/aopen/ann")
        return response.content.decode()

    assert asyncio.run(request()) in started(sql)


def test_an_explicit_outbox(shop: Inprocess, site: str, sql: Sql) -> None:
    """On any connection of Django's that leads to our database."""
    enter("other", site)
    task = shop.workflow(nothing, name="explicit")
    with transaction.atomic(using="other"), durable.outbox(connections["other"]):
        task.apply_async(task_id="w1")
        assert started(sql) == []
    assert started(sql) == ["w1"]
    with durable.outbox(connection), pytest.raises(ConfigurationError, match="transaction"):
        task.delay()
    with transaction.atomic(using="lite"), durable.outbox(connections["lite"]), pytest.raises(Exception):  # noqa: B017, PT011
        task.delay()


def test_a_model_is_no_argument(welcome: Any, shop: Inprocess) -> None:
    """The error says to pass the key."""
    account = Account.objects.create(owner="ann")
    with pytest.raises(SerializationError, match=r"pass its key"):
        welcome.delay(account)
    task = shop.workflow(find, name="finds")
    task.apply_async(task_id="w1")
    assert "key" in str(shop.run("w1"))


def test_what_the_alias_must_be(shop: Inprocess, broker_url: str) -> None:
    """An alias, of Postgres; and not a second database beside it."""
    for alias, told in (("lite", "Postgres"), ("nowhere", "no alias")):
        with pytest.raises(ConfigurationError, match=told):
            Inprocess("", broker_url, database=alias)
    with pytest.raises(ConfigurationError, match="one of them"):
        durable.install(Celery(set_as_current=False), database="default", database_url="postgresql://x/y")
