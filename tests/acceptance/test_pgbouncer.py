"""Behind a real pgbouncer in transaction mode, and what is said where the settings don't fit it."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from celery import Celery

import celery_durable as durable
from celery_durable.exceptions import ConfigurationError
from celery_durable.store.migrate import migrate
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.ledger import Ledger
from tests.fixtures.mixed import assert_mixed, start_mixed
from tests.fixtures.pgbouncer import Pgbouncer
from tests.fixtures.site import Site, opened, shop_env
from tests.fixtures.workers import Workers


@pytest.fixture
def worker_env(pgbouncer: Pgbouncer, broker: Broker, ledger: Ledger) -> dict[str, str]:
    """What the shop reads from its environment."""
    return shop_env(pgbouncer.url, broker.url, broker.queue, ledger, pgbouncer=True, suspend_after=0.1)


@pytest.fixture
def site(workers: Workers, ledger: Ledger, database_url: str) -> Iterator[Site]:
    """The shop, which reaches its database by way of pgbouncer only; the test looks past it."""
    with opened(workers, ledger, database_url) as site:
        yield site


@pytest.mark.crash
def test_everything_works_through_kills_of_both(site: Site, pgbouncer: Pgbouncer) -> None:
    """All kinds of calls, an outbox and a cancel; a killed worker and a killed pgbouncer repeat no completed step."""
    site.gates.close("b-3", "d-1")
    workers = site.start(2)
    handles = start_mixed(site, "abc")
    cancelled = site.shop.order.delay("d")
    site.reaches("work", "d", 1)
    durable.cancel_workflow(cancelled.id, app=site.shop.app)
    with psycopg.connect(pgbouncer.url) as connection, durable.outbox(connection):
        put = site.shop.quick.delay("put")
    for name in "ac":
        assert_mixed(site, name, handles.pop(name))
    assert site.finished(put.id).result == "put"
    more = start_mixed(site, "ef")
    site.reaches("work", "b", 3)
    site.owner(*workers).kill()
    pgbouncer.kill()
    site.gates.open("b-3", "d-1")
    pgbouncer.start()
    assert_mixed(site, "b", handles["b"], interrupted=["work-3"])
    for name, handle in more.items():
        assert site.finished(handle.id).state == "SUCCESS"
        assert site.sql.value("SELECT count(*) FROM booking WHERE name = %s", name) == 1
    assert site.finished(cancelled.id).state == "CANCELLED"


#: Settings that somebody has made for the session, of those that we have an opinion of.
SETTINGS = (
    "pg_settings WHERE source = 'session'"
    " AND name IN ('default_transaction_isolation', 'lock_timeout', 'statement_timeout', 'enable_seqscan', 'jit')"
)


def test_nothing_is_left_in_the_shared_sessions(site: Site, pgbouncer: Pgbouncer) -> None:
    """A worker, a caller and a migration prepare nothing, listen to nothing and set nothing."""
    site.start(1)
    handles = start_mixed(site, "ab")
    migrate(pgbouncer.url, "another")
    for name, handle in handles.items():
        assert_mixed(site, name, handle)
    with psycopg.connect(pgbouncer.url, prepare_threshold=None) as connection:
        for left in ("pg_prepared_statements", "pg_listening_channels()", SETTINGS):
            assert connection.execute(f"SELECT count(*) FROM {left}").fetchone() == (0,)


def quick() -> None:
    raise AssertionError("nobody runs this")


POOLER = "connection pooler such as pgbouncer: set durable_pgbouncer = True"


def test_a_caller_is_told_of_the_setting(site: Site, pgbouncer: Pgbouncer, sql: Sql) -> None:
    """Without durable_pgbouncer the first call raises an error that names it; nothing was started."""
    app = Celery("without", broker=site.shop.app.conf.broker_url, set_as_current=False)
    durable.install(app, database_url=pgbouncer.url)
    with pytest.raises(ConfigurationError, match=POOLER):
        app.task(base=durable.Workflow, shared=False)(quick).delay()
    assert sql.value("SELECT count(*) FROM celery_durable.workflow") == 0


def test_a_worker_that_lacks_the_setting_does_not_start(site: Site) -> None:
    """Its last words name the setting."""
    worker = site.workers.start(settings={}, wait=False)
    assert worker.wait_exit() != 0
    assert POOLER in " ".join(worker.log.split())


def test_another_isolation_is_refused(site: Site, pgbouncer: Pgbouncer, sql: Sql) -> None:
    """As it can't be set for one session, a caller gets an error that says what to do."""
    database = sql.value("SELECT current_database()")
    sql.execute(f"ALTER DATABASE {database} SET default_transaction_isolation = 'serializable'")
    pgbouncer.kill()
    pgbouncer.start()
    with pytest.raises(ConfigurationError, match="SET default_transaction_isolation = 'read committed'"):
        site.shop.quick.delay()
