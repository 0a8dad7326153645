"""A database that is away, or has no place left: callers are told at once, and all goes on when it is back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, closing

import psycopg
import pytest

from celery_durable.exceptions import DatabaseUnavailable
from celery_durable.store.migrate import migrate
from celery_durable.testing.servers import EmbeddedPostgres
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_postgres import Sql, _new_database
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.ledger import Ledger
from tests.fixtures.mixed import assert_mixed, start_mixed
from tests.fixtures.proxy import PostgresProxy
from tests.fixtures.site import Site, opened, shop_env
from tests.fixtures.workers import Workers

PUBLISHES = 10_000
#: What a call may need in seconds; the first one waits for the database.
EACH = 0.02


class SmallPostgres(EmbeddedPostgres):
    """A server with few places, without any that are kept for administrators."""

    places = 24

    def _command(self) -> list[str]:
        return [*super()._command(), f"--max_connections={self.places}", "--superuser_reserved_connections=0"]


@pytest.fixture(scope="module")
def server() -> Iterator[SmallPostgres]:
    """A server of this module's own, which may be stopped."""
    with SmallPostgres() as server:
        yield server


@pytest.fixture
def database_url(server: SmallPostgres) -> Iterator[str]:
    """URL of a migrated database on it."""
    with _new_database(server.url, "template0") as url:
        migrate(url)
        yield url


@pytest.fixture
def worker_env(database_url: str, broker: Broker, ledger: Ledger) -> dict[str, str]:
    """What the shop reads from its environment."""
    return shop_env(database_url, broker.url, broker.queue, ledger, suspend_after=0.1)


def publish(site: Site, count: int) -> list[float]:
    """Start so many workflows in vain; the seconds that each call needed."""
    needed = []
    for number in range(count):
        began = time.monotonic()
        with pytest.raises(DatabaseUnavailable, match="Postgres can't be reached at"):
            site.shop.quick.apply_async((number,), task_id=str(number))
        needed.append(time.monotonic() - began)
    return needed


def waiting_messages(site: Site) -> int:
    """How many messages are in the queue."""
    with site.shop.app.connection_for_read() as connection:
        queue = connection.default_channel.queue_declare(site.shop.app.conf.task_default_queue, passive=False)
        return int(queue.message_count)


@pytest.mark.slow
def test_ten_thousand_publishes(site: Site, server: SmallPostgres) -> None:
    """Each is told within milliseconds, none is half done, and the first one after the return of the database works."""
    server.stop()
    first, *others = publish(site, PUBLISHES)
    print(f"first {first:.2f} s, others {sum(others):.1f} s, longest {max(others):.3f} s")
    assert first < 6
    assert sum(others) < EACH * PUBLISHES
    assert waiting_messages(site) == 0
    server.start()
    handle = site.shop.quick.delay("after")
    with closing(Sql(site.workers.env["DATABASE_URL"])) as sql:
        assert sql.all("SELECT id FROM celery_durable.workflow") == [(handle.id,)]
        site.workers.start()
        wait_until(lambda: sql.value("SELECT state FROM celery_durable.workflow") == "SUCCESS")


def test_publishes_to_a_host_that_is_silent(workers: Workers, ledger: Ledger, database_url: str) -> None:
    """What only a timeout can tell isn't tried again for a second; then one call finds that the host is back."""
    with PostgresProxy(database_url) as proxy:
        workers.env["DATABASE_URL"] = proxy.url
        with opened(workers, ledger, database_url) as site:
            proxy.blackhole()
            first, second, *others = publish(site, 100)
            assert first < 10
            assert second < 10
            assert sum(others) < EACH * 100 + 3
            proxy.accept()
            wait_until(lambda: _works(site), 3, "calls work within a second")


def _works(site: Site) -> bool:
    try:
        return bool(site.shop.quick.delay())
    except DatabaseUnavailable:
        return False


def test_no_place_is_left(site: Site, server: SmallPostgres) -> None:
    """Callers get the server's own words; workers wait for a place, and go on as soon as there is one."""
    site.gates.close("a-0", "b-3")
    (worker,) = site.start(1, concurrency=3)
    handles = start_mixed(site, "ab")
    site.reaches("work", "a", 0)
    site.reaches("work", "b", 3)
    with ExitStack() as others:
        site.sql.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                         " WHERE pid <> pg_backend_pid() AND datname = current_database()")  # fmt: skip
        _take_all_places(server.url, others)
        with pytest.raises(DatabaseUnavailable, match="too many clients"):
            site.shop.quick.delay()
        site.gates.open("a-0", "b-3")
        wait_until(lambda: "checkpoints.save failed" in worker.log, message="a step waits to be recorded")
        wait_until(lambda: site.sql.value("SELECT max(seen) < clock_timestamp() - lease FROM celery_durable.node"
                                          " GROUP BY lease"))  # fmt: skip
    for name, handle in handles.items():
        assert_mixed(site, name, handle)
        assert site.status(handle.id).crashes == 0
    assert worker.running


def _take_all_places(url: str, places: ExitStack) -> None:
    """Open connections until the server refuses one a few times over: those of others end late."""
    refused = 0
    while refused < 20:
        try:
            places.enter_context(psycopg.connect(url))
        except psycopg.OperationalError:
            refused += 1
