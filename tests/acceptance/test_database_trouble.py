"""A database whose administrator has other things in mind: workers live, everything ends, no step runs twice."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import psycopg
import pytest

from celery_durable.exceptions import DatabaseUnavailable
from celery_durable.store.migrate import _LOCK, migrate
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.ledger import Ledger
from tests.fixtures.mixed import assert_mixed, start_mixed
from tests.fixtures.site import FAST, Site, shop_env

#: Longer than a lease, and the sweep after it.
LONG = FAST["lease"] + FAST["recovery_interval"] + 1
TIMEOUTS = {"statement_timeout": "250ms", "lock_timeout": "100ms", "idle_in_transaction_session_timeout": "400ms"}


@pytest.fixture
def worker_env(database_url: str, broker: Broker, ledger: Ledger) -> dict[str, str]:
    """What the shop reads from its environment."""
    return shop_env(database_url, broker.url, broker.queue, ledger, suspend_after=0.1)


def set_for_all(sql: Sql, **settings: str) -> None:
    """Let settings hold for every session that is made from now on, as ALTER ROLE would."""
    database = sql.value("SELECT current_database()")
    for name, value in settings.items():
        sql.execute(f"ALTER DATABASE {database} SET {name} = '{value}'")


def pass_time(sql: Sql, seconds: float) -> None:
    """Return when so much time has passed for the database."""
    began = sql.value("SELECT clock_timestamp()")
    wait_until(lambda: sql.value("SELECT clock_timestamp() - %s > make_interval(secs => %s)", began, seconds), math.inf)


# Settings of a role or database


@pytest.mark.parametrize(
    "settings", [TIMEOUTS, {"default_transaction_isolation": "serializable"}], ids=["timeouts", "isolation"]
)
def test_settings_that_are_meant_for_others(site: Site, empty_database_url: str, settings: dict[str, str]) -> None:
    """Workflows, atomic steps, sweeps and migrations aren't bound by what holds for the database's other sessions."""
    set_for_all(site.sql, **settings)
    site.start(2)
    handles = start_mixed(site, "abc", seconds=0.2)
    for name, handle in handles.items():
        assert_mixed(site, name, handle)
    with closing(Sql(empty_database_url)) as sql, ThreadPoolExecutor(1) as threads:
        set_for_all(sql, **settings)
        with psycopg.connect(empty_database_url, autocommit=True) as another:
            another.execute("SELECT pg_advisory_lock(%s)", [_LOCK])
            migration = threads.submit(migrate, empty_database_url)
            pass_time(sql, 0.5)
        assert migration.result(30)


def test_an_atomic_step_that_is_idle_for_too_long(site: Site) -> None:
    """It fails after one run, with an error that says what to set; nothing of it is committed."""
    set_for_all(site.sql, **TIMEOUTS)
    site.start(1)
    (handle,) = start_mixed(site, "a", seconds=1).values()
    status = site.finished(handle.id)
    assert status.state == "FAILURE"
    assert "SET LOCAL idle_in_transaction_session_timeout" in str(status.error)
    assert site.ledger.count("book", "a") == 1
    assert site.sql.value("SELECT count(*) FROM booking") == 0
    assert_mixed(site, "b", site.shop.mixed.apply_async(("b",), task_id="b"))


def test_read_only_for_a_while(site: Site) -> None:
    """Steps that have run wait to be recorded, callers are told, and all goes on when writing is allowed again."""
    site.gates.close("a-0", "b-3")
    (worker,) = site.start(1, concurrency=3)
    handles = start_mixed(site, "ab")
    site.reaches("work", "a", 0)
    site.reaches("work", "b", 3)
    set_for_all(site.sql, default_transaction_read_only="on")
    site.sql.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                     " WHERE pid <> pg_backend_pid() AND datname = current_database()")  # fmt: skip
    site.gates.open("a-0", "b-3")
    with pytest.raises(DatabaseUnavailable, match="read-only"):
        site.shop.quick.delay()
    wait_until(lambda: "save failed (cannot execute INSERT in a read-only" in worker.log)
    pass_time(site.sql, FAST["lease"])
    set_for_all(site.sql, default_transaction_read_only="off")
    for name, handle in handles.items():
        assert_mixed(site, name, handle)
        assert site.status(handle.id).crashes == 0
    assert site.finished(site.shop.quick.delay("after").id).result == "after"


# Locks


@contextmanager
def locked(site: Site, *tables: str) -> Iterator[None]:
    """An administrator's transaction that lets nobody have these tables, as VACUUM FULL does."""
    with psycopg.connect(site.workers.env["DATABASE_URL"]) as administrator:
        for table in tables:
            administrator.execute(f"LOCK TABLE celery_durable.{table} IN ACCESS EXCLUSIVE MODE")
        yield


@pytest.mark.parametrize("tables", [["workflow", "checkpoint"], ["node"]], ids="-".join)
def test_tables_that_are_locked_for_longer_than_a_lease(site: Site, tables: list[str]) -> None:
    """Nobody is taken for dead, heartbeats come again, no step runs twice, and no caller waits for ever."""
    site.gates.close("a-0", "b-3")
    workers = site.start(2)
    handles = start_mixed(site, "abc")
    site.reaches("work", "a", 0)
    site.reaches("work", "b", 3)
    with locked(site, *tables):
        site.gates.open("a-0", "b-3")
        if "workflow" in tables:
            with pytest.raises(DatabaseUnavailable, match="lock timeout"):
                site.shop.quick.apply_async(task_id="refused")
        pass_time(site.sql, LONG - FAST["lease"] * ("workflow" in tables))
    for name, handle in handles.items():
        assert_mixed(site, name, handle)
        assert site.status(handle.id).crashes == 0
    assert all(worker.running for worker in workers)
    wait_until(lambda: site.sql.value(
        "SELECT count(*) FROM celery_durable.node WHERE unbroken < clock_timestamp() - lease / 2"
        " AND seen > clock_timestamp() - lease / 2") == 2)  # fmt: skip
    assert not site.sql.all("SELECT 1 FROM celery_durable.workflow WHERE id = 'refused'")
