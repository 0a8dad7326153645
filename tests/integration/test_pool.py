"""Connections: made late, per process, never over a fork, made anew when they break."""

from __future__ import annotations

import gc
import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery import Celery

import celery_durable as durable
from celery_durable.exceptions import ConfigurationError, DatabaseUnavailable, SerializationError
from celery_durable.installation import installed_on
from celery_durable.store import Store
from celery_durable.store.connecting import where
from celery_durable.store.migrate import migrate
from celery_durable.store.queries import Query
from celery_durable.testing.servers import EmbeddedPostgres
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.proxy import PostgresProxy

OURS = "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'celery_durable'"


def shared(url: str, **settings: Any) -> Store:
    defaults = {"auto_migrate": True, "lease": 6.0, "pgbouncer": False}
    return Store.shared(lambda: url, "celery_durable", **{**defaults, **settings})


def of_one_thread(url: str, **settings: Any) -> Store:
    defaults = {"auto_migrate": True, "lease": 6.0, "pgbouncer": False}
    return Store.of_one_thread(lambda: url, "celery_durable", **{**defaults, **settings})


def ask(store: Store, patience: float = 0) -> object:
    return store.workflows.by_id("w1", patience=patience)


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    store = shared(database_url)
    yield store
    store.close()


@pytest.fixture
def postgres() -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres() as server:
        migrate(server.url)
        yield server


def pids(sql: Sql) -> set[int]:
    return {row.pid for row in sql.all(OURS)}


def test_installing_connects_to_nothing(proxy: PostgresProxy) -> None:
    """Nor does building the store: the first statement does."""
    app = Celery("shop", set_as_current=False, broker="redis://127.0.0.1:1/0")
    durable.install(app, database_url=proxy.url)
    app.finalize()
    store = installed_on(app).store
    assert proxy.round_trips() == 0
    assert ask(store) is None
    assert proxy.round_trips() > 0
    store.close()


def test_one_thread_uses_one_connection(store: Store, sql: Sql) -> None:
    """Over and over; closing leaves none."""
    for _ in range(10):
        ask(store)
    assert len(pids(sql)) == 1
    store.close()
    wait_until(lambda: not pids(sql), message="its session has ended")
    assert ask(store) is None, "a closed store opens again"


def test_threads_use_as_many_connections_as_they_need_at_once(database_url: str, sql: Sql) -> None:
    """At most 32; nobody gets another one's."""
    store = shared(database_url)
    with ThreadPoolExecutor(50) as threads:
        list(threads.map(lambda _: ask(store), range(200)))
    assert 1 <= len(pids(sql)) <= 32
    store.close()


def test_a_forked_child_has_its_own_backend(store: Store, sql: Sql) -> None:
    """The parent's connection goes on, in the child it is neither used nor closed."""
    ask(store)
    (parent,) = pids(sql)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        ask(store)
        gc.collect()
        os.write(writer, ",".join(map(str, pids_through(store))).encode())
        store.close()
        os._exit(0)
    os.waitpid(child, 0)
    seen = {int(pid) for pid in os.read(reader, 1000).decode().split(",")}
    os.close(reader)
    os.close(writer)
    assert parent in seen
    assert len(seen) == 2
    ask(store)
    assert pids(sql) == {parent}


def pids_through(store: Store) -> set[int]:
    """The sessions as a child sees them, through its own connection: its fixtures are the parent's."""
    with store._database._connections.lease() as connection:
        return {row[0] for row in connection.execute(OURS).fetchall()}


def test_a_thread_of_its_own_is_not_shared_over_a_fork_either(database_url: str, sql: Sql) -> None:
    """Closing in the child leaves the parent's connection alone."""
    store = of_one_thread(database_url)
    ask(store)
    child = os.fork()
    if child == 0:
        store.close()
        os._exit(0)
    os.waitpid(child, 0)
    (parent,) = pids(sql)
    ask(store)
    assert pids(sql) == {parent}
    store.close()


@pytest.mark.parametrize("make", [shared, of_one_thread])
def test_after_a_crash_of_the_database_the_next_statement_works(postgres: EmbeddedPostgres, make: Any) -> None:
    """The idle connections are dead; a little patience hides it."""
    store = make(postgres.url)
    ask(store)
    postgres.restart("immediate")
    assert ask(store, patience=10) is None
    assert ask(store) is None
    store.close()


def test_patience_outlasts_a_database_that_is_away(
    postgres: EmbeddedPostgres, caplog: pytest.LogCaptureFixture
) -> None:
    """A step's outcome waits for as long as it takes, and says so."""
    store = shared(postgres.url)
    postgres.stop()
    with ThreadPoolExecutor(1) as threads, caplog.at_level(logging.WARNING):
        asking = threads.submit(ask, store, patience=float("inf"))
        wait_until(lambda: "trying again" in caplog.text, message="a try has failed")
        assert not asking.done()
        postgres.start()
        assert asking.result(30) is None
    store.close()


@pytest.mark.parametrize("when", ["before", "after", "during"])
@pytest.mark.parametrize("make", [shared, of_one_thread])
def test_a_connection_lost_in_a_statement_is_replaced(proxy: PostgresProxy, make: Any, when: Any) -> None:
    """The statement is made again on a new one."""
    store = make(proxy.url)
    ask(store)
    cut = proxy.cut(matching="workflow", when=when)
    assert ask(store, patience=10) is None
    cut.wait_reached(0)
    store.close()


def test_patience_ends_with_an_error_that_names_host_and_setting(proxy: PostgresProxy) -> None:
    """And no password."""
    proxy.refuse()
    url = proxy.url.replace("postgres@", "postgres:hush@")
    assert "hush" in url
    store = shared(url)
    began = time.monotonic()
    with pytest.raises(DatabaseUnavailable, match=r"127.0.0.1:\d+/\w+ \(setting durable_database_url\)") as caught:
        ask(store, patience=0.3)
    assert 0.1 < time.monotonic() - began < 10
    assert "hush" not in str(caught.value) + str(caught.value.__cause__)
    proxy.accept()
    assert ask(store) is None
    store.close()


def test_a_host_that_swallows_connections_is_given_up(proxy: PostgresProxy) -> None:
    """Within the node's third of a lease (libpq's least is two seconds)."""
    store = of_one_thread(proxy.url, lease=6.0)
    proxy.blackhole()
    began = time.monotonic()
    with pytest.raises(DatabaseUnavailable):
        ask(store)
    assert time.monotonic() - began < 5
    proxy.accept()
    store.close()


@pytest.mark.parametrize("level", ["serializable", "repeatable read"])
def test_statements_run_in_read_committed_whatever_the_default_is(database_url: str, sql: Sql, level: str) -> None:
    """The rules of the protocol are made for it."""
    database = sql.value("SELECT current_database()")
    sql.execute(f"ALTER DATABASE {database} SET default_transaction_isolation = '{level}'")
    for store in (shared(database_url), of_one_thread(database_url)):
        with store._database._connections.lease() as connection:
            assert connection.execute("SHOW transaction_isolation").fetchone() == ("read committed",)
            assert connection.autocommit
        store.close()


def test_no_limit_of_others_holds_for_our_statements(database_url: str, sql: Sql) -> None:
    """Neither a role's nor a database's, but a lock is waited for some seconds only; what is lent keeps them."""
    set_for_all(sql, statement_timeout="7s", lock_timeout="0")
    store = shared(database_url)
    with store._database._connections.lease() as ours, store._database._lent.lease() as lent:
        assert [shown(ours, name) for name in ("statement_timeout", "lock_timeout")] == ["0", "3s"]
        assert [shown(lent, name) for name in ("statement_timeout", "lock_timeout")] == ["7s", "0"]
    store.close()


def test_our_statements_keep_to_their_indexes(database_url: str, sql: Sql) -> None:
    """A plan of a small table is kept when that has grown; what is lent is planned as the app has it."""
    store = shared(database_url)
    with store._database._connections.lease() as ours, store._database._lent.lease() as lent:
        assert [shown(ours, name) for name in ("enable_seqscan", "jit")] == ["off", "off"]
        assert [shown(lent, name) for name in ("enable_seqscan", "jit")] == ["on", sql.value("SHOW jit")]
    store.close()


def test_a_session_that_began_read_only_is_not_used_again(database_url: str, sql: Sql) -> None:
    """It would be so still when the database has become writable."""
    set_for_all(sql, default_transaction_read_only="on")
    store = shared(database_url, auto_migrate=False)
    with pytest.raises(DatabaseUnavailable, match="read-only"):
        store.workflows.unsent(["w1"], patience=0)
    set_for_all(sql, default_transaction_read_only="off")
    store.workflows.unsent(["w1"], patience=0)
    store.close()


def test_nobody_waits_again_for_a_database_that_is_away(proxy: PostgresProxy) -> None:
    """After one has waited in vain, others try once, whatever their patience, until a statement has succeeded."""
    store = shared(proxy.url)
    proxy.refuse()
    with pytest.raises(DatabaseUnavailable):
        ask(store, patience=0.3)
    began = time.monotonic()
    for _ in range(100):
        with pytest.raises(DatabaseUnavailable, match="refused"):
            ask(store, patience=60)
    assert time.monotonic() - began < 10
    proxy.accept()
    assert ask(store, patience=60) is None
    proxy.refuse()
    proxy.disconnect()
    with ThreadPoolExecutor(1) as threads:
        asking = threads.submit(ask, store, patience=60)
        wait_until(lambda: asking.running())
        proxy.accept()
        assert asking.result(30) is None, "patience is there again"
    store.close()


def set_for_all(sql: Sql, **settings: str) -> None:
    """Let settings hold for every session that is made from now on."""
    database = sql.value("SELECT current_database()")
    for name, value in settings.items():
        sql.execute(f"ALTER DATABASE {database} SET {name} = '{value}'")


def shown(connection: Any, name: str) -> str:
    """A setting, as a session has it."""
    return str(connection.execute(f"SHOW {name}").fetchone()[0])


def test_a_lost_connection_takes_the_other_idle_ones_with_it(store: Store, sql: Sql) -> None:
    """After a restart of the database each of them would fail once."""
    barrier = threading.Barrier(5)

    def hold() -> None:
        with store._database._connections.lease():
            barrier.wait(20)

    with ThreadPoolExecutor(5) as threads:
        for each in [threads.submit(hold) for _ in range(5)]:
            each.result()
    assert len(pids(sql)) == 5
    sql.execute(f"SELECT pg_terminate_backend(pid) FROM ({OURS}) AS ours")
    assert ask(store, patience=1) is None
    assert ask(store) is None


def test_an_error_of_a_statement_does_not_cost_the_connection(store: Store, sql: Sql) -> None:
    """Only what breaks a connection does."""
    ask(store)
    before = pids(sql)
    with pytest.raises(UnicodeEncodeError):
        store.workflows.by_id("\ud800", patience=0)
    ask(store)
    assert pids(sql) == before


MALFORMED = [
    "mysql://user:hush@host/database",
    "postgresql+psycopg://user:hush@host/database",
    "user:hush@host",
    "postgresql://user:hush@host:port/database",
    "postgresql://user:hush@host/database?sslmod=1",
    "postgresql://user:hush@[::1/database",
    "postgresql://user:h@hush@host/database",
    "postgresql://user:h/hush@host/database",
]


@pytest.mark.parametrize("url", MALFORMED)
def test_a_malformed_url_is_found_at_once_and_not_repeated(url: str) -> None:
    """The error shows how one should read, and nothing of this one, which may hold a password."""
    with pytest.raises(ConfigurationError, match=r"durable_database_url isn't a Postgres connection URL") as caught:
        durable.install(Celery("shop", set_as_current=False), database_url=url)
    assert "hush" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None


@pytest.mark.parametrize("url", ["", None])
def test_a_missing_url_is_told_with_the_line_to_write(url: str | None) -> None:
    """In install(), or where the setting is first needed."""
    with pytest.raises(ConfigurationError, match=r"There is no durable_database_url: pass durable\.install"):
        durable.install(Celery("shop", set_as_current=False), database_url=url)
    app = Celery("shop", set_as_current=False)
    durable.install(app)
    with pytest.raises(ConfigurationError, match="There is no durable_database_url"):
        installed_on(app).store  # noqa: B018 - builds it


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("postgresql://user:hush@host:5433/database", "host:5433/database"),
        ("postgres://user:hush%40%2F@host/database", "host/database"),
        ("host=host port=5433 user=user password=hush dbname=database", "host:5433/database"),
        ("postgresql:///database?host=/run/postgresql&password=hush", "/run/postgresql/database"),
        ("postgresql://user:hush@one:1,two:2/database", "one,two:1,2/database"),
        ("postgresql:///database", "the local socket/database"),
    ],
)
def test_a_place_is_named_without_user_and_password(url: str, place: str) -> None:
    """All of libpq's spellings are understood."""
    assert where(url) == place


def test_a_date_that_python_cannot_hold_is_told(store: Store, sql: Sql) -> None:
    """Postgres goes on after the year 9999; whoever reads such a row gets an error of ours."""
    query = Query("far", "SELECT 'infinity'::timestamptz")
    with pytest.raises(SerializationError, match="A row can't be read"):
        store._database.run(query, {}, patience=0)


@pytest.mark.parametrize("together", [False, True])
def test_a_session_that_has_lost_its_statements_prepares_them_again(store: Store, together: bool) -> None:
    """As a pooler, or psycopg's own housekeeping, may discard them; the connection stays."""
    act = store.awaits.notify if together else store.workflows.by_id
    argument: Any = (["w1"], 60.0) if together else ("w1",)
    act(*argument, patience=0)
    with store._database._connections.lease() as connection:
        connection.execute("DEALLOCATE ALL")
        before = connection.info.backend_pid
    act(*argument, patience=0)
    act(*argument, patience=0)
    with store._database._connections.lease() as connection:
        assert connection.info.backend_pid == before


def test_a_session_that_has_lost_some_statements_takes_no_other_for_lost(store: Store) -> None:
    """The second one is prepared in the very round trip in which the first is found to be lost."""
    first, then = Query("first", "SELECT 1"), Query("then", "SELECT 2")
    database = store._database
    database.run(first, {}, patience=0)
    with database._connections.lease() as connection:
        connection.execute("DEALLOCATE ALL")
    for _ in range(2):
        assert database.run_then((first, {}), (then, {}), patience=0) == ([(1,)], [(2,)])


def test_a_session_keeps_so_many_statements_at_most(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes memory of Postgres; then it begins anew."""
    monkeypatch.setattr("celery_durable.store.executing.MOST_PREPARED", 5)
    ours = "SELECT count(*) FROM pg_prepared_statements WHERE name LIKE 'number%'"
    database = store._database
    with database._connections.lease() as connection:
        executor = connection.executor
        queries = [Query(f"number{number}", f"SELECT {number}") for number in range(12)]
        for number, query in enumerate([*queries, *queries]):
            assert executor.run(query, {}).rows == [(number % 12,)]
            ((kept,),) = connection.execute(ours).fetchall()
            assert kept <= 5
        both = executor.run_all([(queries[0], {}), (queries[5], {})], apart=True)
        assert [answer.rows for answer in both] == [[(0,)], [(5,)]]
