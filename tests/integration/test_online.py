"""Online migrations: built beside what runs, by one process, and gone on with after its death."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from threading import Event

import psycopg
import pytest
from celery import Celery

import celery_durable as durable
from celery_durable.exceptions import DatabaseUnavailable
from celery_durable.installation import installed_on
from celery_durable.node import Node
from celery_durable.store import Store
from celery_durable.store.ledger import migrations
from celery_durable.store.migrate import migrate, missing_in
from celery_durable.store.online import build, finish
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.tables import describe, run_script

pytestmark = pytest.mark.matrix

SCHEMA = "celery_durable"
ONLINE = [number for number, migration in migrations().items() if migration.is_online]
STATEMENTS = [
    (number, place)
    for number in ONLINE
    for place in range(len(migrations()[number].statements(SCHEMA)))
]  # fmt: skip
MIGRATE = "import sys; from celery_durable.store.migrate import migrate; migrate(sys.argv[1])"
BUILDS = """
SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND state = 'active' AND query LIKE %s
"""
FILL = """
INSERT INTO celery_durable.workflow (id, name, queue, state, max_crashes, publish_at)
SELECT 'w' || n, 'order', 'celery', 'ENQUEUED', 3, clock_timestamp() FROM generate_series(1, 50000) AS n
"""
STEP = """
INSERT INTO celery_durable.checkpoint (workflow, key, seq, attempt, tries, ok, value, started_at, at)
VALUES (%s, %s, 1, 1, 1, true, '1', clock_timestamp(), clock_timestamp())
"""
INVALID = "SELECT count(*) FROM pg_index WHERE NOT indisvalid"


@pytest.fixture
def plain(empty_database_url: str) -> Iterator[Sql]:
    """A database that has the quick migrations only."""
    with closing(Sql(empty_database_url)) as sql:
        for number in migrations():
            if number not in ONLINE:
                run_script(sql, number)
        yield sql


@pytest.fixture
def empty_first(empty_database_url: str) -> Iterator[Sql]:
    """A database as the first release has left it."""
    with closing(Sql(empty_database_url)) as sql:
        run_script(sql, 1)
        yield sql


@contextmanager
def snapshot_of(url: str) -> Iterator[None]:
    """A transaction that every CREATE INDEX CONCURRENTLY has to wait for."""
    with psycopg.connect(url) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        connection.execute("SELECT FROM celery_durable.node")
        yield


def builds(sql: Sql, what: str = "%INDEX CONCURRENTLY%") -> bool:
    """Whether a session builds an index now."""
    return bool(sql.value(BUILDS.replace("%s", f"'{what}' AND pid <> pg_backend_pid()")))


@pytest.mark.parametrize(("number", "place"), STATEMENTS)
def test_a_death_at_any_statement(empty_database_url: str, plain: Sql, sql: Sql, number: int, place: int) -> None:
    """What was built stays, the invalid index is built anew, and the end is a schema like any other."""
    statements = [each for one in ONLINE for each in migrations()[one].statements(SCHEMA)]
    target = migrations()[number].statements(SCHEMA)[place]
    for statement in statements[: statements.index(target)]:
        plain.execute(statement)
    with snapshot_of(empty_database_url):
        process = subprocess.Popen([sys.executable, "-c", MIGRATE, empty_database_url])
        wait_until(lambda: builds(plain) and plain.value(INVALID) == 1, message="an index is built")
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_until(lambda: not builds(plain), message="the session of the dead process has ended, too")
    assert plain.value(INVALID) == 1
    assert missing_in(empty_database_url, SCHEMA) == ONLINE
    assert migrate(empty_database_url) == ONLINE
    assert plain.value(INVALID) == 0
    assert describe(plain) == describe(sql)


def test_two_processes_at_once(empty_database_url: str, plain: Sql) -> None:
    """One builds, the other waits without being waited for; both find all of it there."""
    with ThreadPoolExecutor(2) as threads:
        with snapshot_of(empty_database_url):
            migrating = [threads.submit(migrate, empty_database_url) for _ in range(2)]
            wait_until(lambda: builds(plain), message="an index is built")
        assert sorted(each.result(60) for each in migrating) == [[], ONLINE]
    assert plain.value(INVALID) == 0


def test_while_another_process_builds(empty_database_url: str, plain: Sql) -> None:
    """Callers work, a worker that starts goes on without it, and the process that builds isn't held up."""
    with ThreadPoolExecutor(1) as threads:
        with snapshot_of(empty_database_url):
            migrating = threads.submit(migrate, empty_database_url)
            wait_until(lambda: builds(plain), message="an index is built")
            assert finish(build(empty_database_url, SCHEMA, wait=False)) == []
            opened = Store.shared(lambda: empty_database_url, SCHEMA, auto_migrate=True, lease=15, pgbouncer=False)
            assert opened.workflows.by_id("w1", patience=0) is None
            opened.close()
        assert migrating.result(60) == ONLINE


def test_a_dead_process_whose_session_still_builds(empty_database_url: str, plain: Sql, sql: Sql) -> None:
    """Who comes next may meet it: neither waits for the other for ever."""
    statement = migrations()[ONLINE[0]].statements(SCHEMA)[0]
    with ThreadPoolExecutor(2) as threads, psycopg.connect(empty_database_url, autocommit=True) as orphan:
        with snapshot_of(empty_database_url):
            orphaned = threads.submit(orphan.execute, statement)
            wait_until(lambda: builds(plain), message="an index is built")
            building = threads.submit(lambda: finish(build(empty_database_url, SCHEMA, wait=False)))
            watching = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
            wait_until(lambda: plain.value(watching) == 1, message="another process has begun")
        assert building.result(60) == ONLINE
        orphaned.result(60)
    assert describe(plain) == describe(sql)


def test_who_gives_up_cancels(empty_database_url: str, plain: Sql) -> None:
    """A worker that stops leaves no session behind."""
    with snapshot_of(empty_database_url):
        building = build(empty_database_url, SCHEMA, wait=False)
        next(building)
        wait_until(lambda: builds(plain), message="an index is built")
        building.close()
        wait_until(lambda: not builds(plain), message="it isn't built any more")
    sessions = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'celery_durable' AND datname = %s"
    wait_until(lambda: plain.value(sessions, plain.value("SELECT current_database()")) == 0)
    assert missing_in(empty_database_url, SCHEMA) == ONLINE


def test_a_connection_that_breaks(empty_database_url: str, plain: Sql) -> None:
    """It is told as what it is, and the next one goes on."""
    building = build(empty_database_url, SCHEMA, wait=False)
    with snapshot_of(empty_database_url):
        next(building)
        wait_until(lambda: builds(plain), message="an index is built")
        plain.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'celery_durable'"
        )
        with pytest.raises(DatabaseUnavailable):
            finish(building)
    assert migrate(empty_database_url) == ONLINE


def test_before_the_quick_ones_nothing_is_built(empty_database_url: str, plain: Sql) -> None:
    """An index may be one of a column that isn't there yet."""
    plain.execute("DELETE FROM celery_durable.migration WHERE number = 2")
    assert finish(build(empty_database_url, SCHEMA, wait=False)) == []


def test_a_worker_that_started_while_a_quick_one_had_to_wait(
    empty_database_url: str, empty_first: Sql, broker_url: str
) -> None:
    """A long transaction has a table: when it has ended the worker applies both kinds, in their order."""
    app = Celery("shop", broker=broker_url, set_as_current=False)
    durable.install(app, database_url=empty_database_url, heartbeat_interval=0.5, lease=2)
    node = Node(installed_on(app), "worker@test")
    with psycopg.connect(empty_database_url) as long:
        long.execute("SELECT FROM celery_durable.workflow")
        node.start()
    try:
        wait_until(lambda: missing_in(empty_database_url, SCHEMA) == [], 30, "nothing is missing")
    finally:
        node.stop()


def test_nobody_waits_for_a_second(empty_database_url: str, empty_first: Sql) -> None:
    """Both kinds are applied to fifty thousand workflows beside what claims and completes steps."""
    empty_first.execute(FILL)
    ended = Event()

    def work(number: int) -> int:
        count = 0
        with psycopg.connect(empty_database_url, autocommit=True) as connection:
            connection.execute("SET lock_timeout = '1s'")
            while not ended.is_set():
                count += 1
                workflow_id = f"w{count % 50_000}"
                connection.execute(
                    "UPDATE celery_durable.workflow SET signal = signal + 1 WHERE id = %s", [workflow_id]
                )
                connection.execute(STEP, [workflow_id, f"step-{number}-{count}"])
        return count

    with ThreadPoolExecutor(2) as threads:
        working = [threads.submit(work, number) for number in range(2)]
        try:
            assert migrate(empty_database_url) == list(migrations())[1:]
        finally:
            ended.set()
        assert all(each.result(20) for each in working)
    assert empty_first.value(INVALID) == 0
