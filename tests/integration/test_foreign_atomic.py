"""Atomic steps through Django's aliases and SQLAlchemy's engines: in our database, and in another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from contextvars import Context
from typing import Any

import pytest
from django.db import connections, transaction
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker

import celery_durable as durable
from celery_durable.contrib.sqlalchemy import place_of
from celery_durable.exceptions import SchemaVersionError, StepError
from celery_durable.store.markers import script
from tests.fixtures.fix_django import configure_django, enter
from tests.fixtures.fix_postgres import Sql, _new_database
from tests.fixtures.inprocess import Inprocess
from tests.integration.attempts import order, status

configure_django()

from tests.fixtures.apps.bank.models import Account  # noqa: E402 - models need Django's settings

#: Where a step is atomic: the way into a database, and whether that is the workflows' own.
WAYS = [(way, home) for way in ("alias", "engine", "sessionmaker") for home in (True, False)]


class Bank:
    """Accounts in one database, changed in one of three ways."""

    def __init__(self, way: str, url: str, alias: str) -> None:
        self.sql = Sql(url)
        self.way = way
        engine = create_engine(url.replace("postgresql://", "postgresql+psycopg://"))
        self.engine = engine
        self.atomic = {"alias": alias, "engine": engine, "sessionmaker": sessionmaker(engine)}[way]

    def pay(self, owner: str = "ann") -> None:
        """Add one to a balance, as a body does."""
        statement = "UPDATE bank_account SET balance = balance + 1 WHERE owner = 'ann'"
        connection = durable.current.connection
        if self.way == "alias":
            with connection.cursor() as cursor:
                cursor.execute(statement)
        elif self.way == "engine":
            connection.execute(text(statement))
        else:
            durable.current.session.execute(text(statement))

    @property
    def balance(self) -> int:
        """What is committed."""
        return int(self.sql.value("SELECT balance FROM bank_account WHERE owner = 'ann'"))

    @property
    def markers(self) -> int:
        """How many steps have left a marker."""
        return int(self.sql.value("SELECT count(*) FROM celery_durable.marker WHERE value IS NOT NULL"))


@pytest.fixture(scope="module")
def other_url(postgres_server: str) -> Iterator[str]:
    with _new_database(postgres_server, "template0") as url, closing(Sql(url)) as sql:
        sql.execute("CREATE TABLE bank_account (id bigserial PRIMARY KEY, owner text UNIQUE, balance integer NOT NULL)")
        yield url


@pytest.fixture
def shop(site: str, broker_url: str) -> Iterator[Inprocess]:
    with closing(Inprocess(site, broker_url, auto_migrate=True)) as shop:
        yield shop


@pytest.fixture(params=WAYS, ids=lambda param: f"{param[0]}-{'home' if param[1] else 'elsewhere'}")
def bank(request: pytest.FixtureRequest, site: str, other_url: str) -> Iterator[Bank]:
    way, home = request.param
    with opened(way, site if home else other_url) as bank:
        yield bank


@pytest.fixture
def elsewhere(other_url: str) -> Iterator[Bank]:
    """An engine that leads to another database."""
    with opened("engine", other_url) as bank:
        yield bank


@contextmanager
def opened(way: str, url: str) -> Iterator[Bank]:
    """A bank with one account."""
    enter("other", url)
    bank = Bank(way, url, "other")
    bank.sql.execute("DELETE FROM bank_account")
    if bank.sql.value("SELECT to_regclass('celery_durable.marker') IS NOT NULL"):
        bank.sql.execute("DELETE FROM celery_durable.marker")
    bank.sql.execute("INSERT INTO bank_account (owner, balance) VALUES ('ann', 0)")
    yield bank
    bank.sql.close()
    bank.engine.dispose()
    connections.close_all()


def paying(bank: Bank, then: Callable[[], Any] = lambda: None, **options: Any) -> Any:
    """An atomic step that pays."""

    def body() -> Any:
        bank.pay()
        return then()

    return durable.as_step(body, name="pay", atomic=bank.atomic, **options)


def fails() -> None:
    raise ValueError("no")


def test_effect_and_outcome(shop: Inprocess, bank: Bank) -> None:
    """Both are there, once."""
    step = paying(bank, lambda: "paid")
    order(shop, lambda: [step(), step()])
    assert shop.run("w1") == ["paid", "paid"]
    assert bank.balance == 2
    steps = durable.list_workflow_steps("w1", app=shop.app)
    assert [(each.key, each.output) for each in steps] == [("pay", "paid"), ("pay#2", "paid")]


def test_an_error_rolls_back(shop: Inprocess, bank: Bank) -> None:
    """Each try by itself; the last error is the step's."""
    order(shop, paying(bank, fails, max_retries=2, retry_backoff=0.01))
    assert isinstance(shop.run("w1"), ValueError)
    assert bank.balance == 0
    assert durable.list_workflow_steps("w1", app=shop.app)[0].tries == 3


def test_a_swallowed_error_is_the_steps(shop: Inprocess, bank: Bank) -> None:
    """A transaction in which a statement has failed can't be committed, and says so."""

    def swallow() -> str:
        with suppress(Exception):
            if bank.way == "alias":
                with durable.current.connection.cursor() as cursor:
                    cursor.execute("SELECT 1/0")
            else:
                durable.current.connection.execute(text("SELECT 1/0"))
        return "swallowed"

    order(shop, paying(bank, swallow))
    error = shop.run("w1")
    assert isinstance(error, StepError)
    assert "swallowed" in str(error)
    assert bank.balance == 0


def test_a_rollback_after_all_was_prepared(shop: Inprocess, bank: Bank) -> None:
    """A constraint that is checked by the commit: neither effect nor value, the error is the outcome."""
    bank.sql.execute("CREATE TABLE IF NOT EXISTS once (n integer UNIQUE DEFERRABLE INITIALLY DEFERRED)")
    bank.sql.execute("DELETE FROM once")

    def twice() -> None:
        for _ in range(2):
            if bank.way == "alias":
                with durable.current.connection.cursor() as cursor:
                    cursor.execute("INSERT INTO once VALUES (1)")
            else:
                durable.current.connection.execute(text("INSERT INTO once VALUES (1)"))

    order(shop, paying(bank, twice))
    assert "once_n_key" in str(shop.run("w1"))
    assert bank.balance == 0
    assert bank.sql.value("SELECT count(*) FROM once") == 0


def test_a_connection_that_is_lost(shop: Inprocess, bank: Bank) -> None:
    """In the body: the transaction is gone with it, and the body runs again."""
    seen: list[int] = []

    def lose() -> str:
        seen.append(1)
        if len(seen) == 1:
            if bank.way == "alias":
                pid = durable.current.connection.connection.info.backend_pid
            else:
                pid = durable.current.connection.connection.dbapi_connection.info.backend_pid
            bank.sql.execute("SELECT pg_terminate_backend(%s)", pid)
            bank.pay()
        return "paid"

    order(shop, paying(bank, lose))
    assert shop.run("w1") == "paid"
    assert (bank.balance, len(seen)) == (1, 2)


def test_a_conflict_runs_the_body_again(shop: Inprocess, bank: Bank) -> None:
    """A serialization failure of the body's own statements is no try."""
    seen: list[int] = []

    def conflict() -> str:
        seen.append(1)
        if len(seen) == 1:
            statement = "DO $$ BEGIN RAISE EXCEPTION 'conflict' USING ERRCODE = '40001'; END $$"
            if bank.way == "alias":
                with durable.current.connection.cursor() as cursor:
                    cursor.execute(statement)
            else:
                durable.current.connection.execute(text(statement))
        return "paid"

    order(shop, paying(bank, conflict))
    assert shop.run("w1") == "paid"
    assert (bank.balance, len(seen)) == (1, 2)
    assert durable.list_workflow_steps("w1", app=shop.app)[0].tries == 1


def test_only_other_databases_need_markers(shop: Inprocess, bank: Bank, site: str) -> None:
    """Ours has the checkpoint in the same transaction, through whichever alias or engine."""
    order(shop, paying(bank))
    shop.run("w1")
    if bank.sql.connection.info.dbname == Sql(site).connection.info.dbname:
        assert bank.sql.value("SELECT to_regclass('celery_durable.marker')") is None
    else:
        assert bank.markers == 1


def test_ended_by_the_body(shop: Inprocess, bank: Bank) -> None:
    """Who commits by hand gets an error, and nothing more is committed."""
    if bank.way == "alias":
        order(shop, paying(bank, lambda: transaction.set_rollback(True, using="other")))
        told = "set_rollback"
    elif bank.way == "engine":
        order(shop, paying(bank, lambda: durable.current.connection.rollback()))
        told = "itself"
    else:
        order(shop, paying(bank, lambda: durable.current.session.rollback()))
        told = "itself"
    assert told in str(shop.run("w1"))
    assert bank.balance == 0


def test_a_commit_by_hand(shop: Inprocess, bank: Bank) -> None:
    """Django forbids it in a transaction; a session's, on a connection whose transaction is ours, only flushes."""
    if bank.way == "alias":
        order(shop, paying(bank, lambda: transaction.commit(using="other")))
        assert isinstance(shop.run("w1"), transaction.TransactionManagementError)
        assert bank.balance == 0
    else:
        order(shop, paying(bank, lambda: durable.current.session.commit()))
        assert shop.run("w1") is None
        assert bank.balance == 1


def test_a_transaction_around_it_is_an_error(shop: Inprocess, site: str) -> None:
    """Nobody would know when the step is committed."""
    step = durable.as_step(lambda: Account.objects.create(owner="ann") and None, name="open", atomic="default")

    def body() -> None:
        with transaction.atomic():
            step()

    order(shop, body)
    assert "outside of transaction.atomic()" in str(shop.run("w1"))
    assert Account.objects.count() == 0


def test_djangos_models_are_part_of_it(shop: Inprocess, site: str) -> None:
    """The ORM's writes and the checkpoint commit together."""
    step = durable.as_step(lambda: Account.objects.create(owner="ann").pk, name="open", atomic="default")
    order(shop, step)
    assert shop.run("w1") == Account.objects.get().pk


@pytest.mark.parametrize("home", [True, False])
def test_an_alias_without_autocommit(shop: Inprocess, site: str, other_url: str, home: bool) -> None:
    """Where Django leaves each commit to the app, this one is ours."""
    url = site if home else other_url
    with opened("alias", url) as bank:
        enter("other", url, AUTOCOMMIT=False)
        try:
            order(shop, paying(bank))
            assert shop.run("w1") is None
            assert bank.balance == 1
        finally:
            enter("other", url, AUTOCOMMIT=True)


@pytest.mark.parametrize("commits", [True, False])
def test_a_zombie_elsewhere(shop: Inprocess, elsewhere: Bank, commits: bool) -> None:
    """An attempt that was overtaken in its body can't commit, whatever has become of its successor's."""
    runs: list[int] = []

    def overtaken() -> int:
        number = durable.current.attempt
        if number == 1:
            shop.installation.store.workflows.hand_over(shop.node, ["w1"], patience=0)
            Context().run(shop.run, "w1")
        elif not commits:
            raise ValueError("no")
        elsewhere.pay()
        runs.append(number)
        return number

    order(shop, durable.as_step(overtaken, name="pay", atomic=elsewhere.atomic))
    shop.run("w1")
    assert runs == ([2, 1] if commits else [1])
    assert elsewhere.balance == int(commits)
    assert status(shop).result == (2 if commits else None)


def test_an_id_that_is_used_again(shop: Inprocess, elsewhere: Bank, site: str) -> None:
    """A marker of a workflow that is gone doesn't answer for the next one of its id."""
    task = order(shop, paying(elsewhere))
    shop.run("w1")
    with closing(Sql(site)) as sql:
        for table in ("workflow", "checkpoint", "input", "output"):
            sql.execute(f"DELETE FROM celery_durable.{table}")
    task.apply_async(task_id="w1")
    shop.run("w1")
    assert elsewhere.balance == 2


def test_old_markers_go(shop: Inprocess, elsewhere: Bank) -> None:
    """Those of workflows that are gone, and not before a transaction that hangs has lost its connection."""
    order(shop, paying(elsewhere))
    shop.run("w1")
    place = place_of(elsewhere.atomic)
    assert place is not None
    store = shop.installation.store
    markers = store.markers_at(place)
    markers.prune_at = 0.0
    elsewhere.sql.execute("UPDATE celery_durable.marker SET at = at - interval '3 days'")
    elsewhere.sql.execute(
        "INSERT INTO celery_durable.marker SELECT 'gone' || n, 'then', 'pay', 1, gen_random_uuid(), '1', NULL, "
        "clock_timestamp() - n * interval '1 day' FROM generate_series(1, 3) AS n"
    )
    markers.prune(60, store.workflows.births_of)
    left = elsewhere.sql.all("SELECT workflow FROM celery_durable.marker ORDER BY workflow")
    assert [row.workflow for row in left] == ["gone1", "w1"]


def test_without_rights_it_says_what_to_do(site: str, broker_url: str, elsewhere: Bank) -> None:
    """With durable_auto_migrate off the table of markers is made by somebody else."""
    elsewhere.sql.execute("DROP SCHEMA IF EXISTS celery_durable CASCADE")
    with closing(Inprocess(site, broker_url)) as shop:
        order(shop, paying(elsewhere))
        error = shop.run("w1")
        assert isinstance(error, SchemaVersionError)
        assert "migrate --markers" in str(error)
        elsewhere.sql.connection.execute(script("celery_durable").encode())
        durable.resume_workflow("w1", app=shop.app)
        assert shop.run("w1") is None
    assert elsewhere.balance == 1
