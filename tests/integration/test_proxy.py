"""The proxy counts round trips and loses connections exactly where it was told to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait

import psycopg
import pytest

from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.proxy import PostgresProxy

pytestmark = [pytest.mark.matrix, pytest.mark.oldest]

INSERT = "INSERT INTO effect VALUES (%s)"


@pytest.fixture
def direct(empty_database_url: str) -> Iterator[Sql]:
    helper = Sql(empty_database_url)
    helper.execute("CREATE TABLE effect (value int)")
    yield helper
    helper.close()


@pytest.fixture
def proxy(direct: Sql, empty_database_url: str) -> Iterator[PostgresProxy]:
    with PostgresProxy(empty_database_url) as proxy:
        yield proxy


@pytest.fixture
def client(proxy: PostgresProxy) -> Iterator[psycopg.Connection]:
    with psycopg.connect(proxy.url, autocommit=True) as connection:
        proxy.reset()
        yield connection


def effects(direct: Sql) -> list[int]:
    return [row[0] for row in direct.all("SELECT value FROM effect ORDER BY 1")]


def test_simple_and_extended_queries_are_one_round_trip_each(client: psycopg.Connection, proxy: PostgresProxy) -> None:
    client.execute("SELECT 1")
    client.execute("SELECT %s", [2])
    assert proxy.round_trips() == 2
    assert proxy.statements() == ["SELECT 1", "SELECT $1"]


def test_a_pipeline_is_one_round_trip(client: psycopg.Connection, proxy: PostgresProxy, direct: Sql) -> None:
    with client.pipeline():
        for value in range(3):
            client.execute(INSERT, [value])
    assert proxy.round_trips() == 1
    assert len(proxy.statements()) == 3
    assert effects(direct) == [0, 1, 2]


def test_prepared_statements_are_recorded_and_matched_by_their_sql(
    client: psycopg.Connection, proxy: PostgresProxy, direct: Sql
) -> None:
    client.execute(INSERT, [1], prepare=True)
    proxy.reset()
    client.execute(INSERT, [2], prepare=True)
    assert proxy.round_trips() == 1
    assert proxy.parsed() == []
    assert proxy.statements() == ["INSERT INTO effect VALUES ($1)"]
    proxy.cut(matching="insert into EFFECT")
    with pytest.raises(psycopg.OperationalError):
        client.execute(INSERT, [3], prepare=True)
    assert effects(direct) == [1, 2]


def test_large_values_pass_both_ways(client: psycopg.Connection) -> None:
    value = "x" * 5_000_000
    row = client.execute("SELECT %s", [value]).fetchone()
    assert row == (value,)


def test_copy_passes(client: psycopg.Connection, direct: Sql) -> None:
    with client.cursor().copy("COPY effect FROM STDIN") as copy:
        for value in range(1000):
            copy.write_row([value])
    with client.cursor().copy("COPY effect TO STDOUT") as copy:
        assert len(list(copy.rows())) == 1000
    assert len(effects(direct)) == 1000


@pytest.mark.parametrize(("when", "committed"), [("before", [1]), ("after", [1, 2]), ("during", [1, 2])], ids=str)
def test_the_nth_statement_is_cut(
    client: psycopg.Connection, proxy: PostgresProxy, direct: Sql, when: str, committed: list[int]
) -> None:
    cut = proxy.cut(matching="INSERT INTO", when=when, nth=2)
    client.execute(INSERT, [1])
    client.execute("SELECT 1")
    with pytest.raises(psycopg.OperationalError):
        client.execute(INSERT, [2])
    cut.wait_reached(0)
    assert client.closed
    assert effects(direct) == committed
    with psycopg.connect(proxy.url, autocommit=True) as fresh:
        fresh.execute(INSERT, [9])
    assert effects(direct) == [*committed, 9]


def test_a_lost_commit_of_a_transaction(client: psycopg.Connection, proxy: PostgresProxy, direct: Sql) -> None:
    proxy.cut(matching="COMMIT", when="after")
    with pytest.raises(psycopg.OperationalError), client.transaction():
        client.execute(INSERT, [1])
    assert effects(direct) == [1]


def insert_in_pipeline(client: psycopg.Connection, values: list[int], each: Callable[..., object]) -> None:
    """Insert in one pipeline, calling `each(pipeline, cursor)` after every statement."""
    with client.pipeline() as pipeline, client.cursor() as cursor:
        for value in values:
            cursor.execute(f"{INSERT} RETURNING value", [value])
            each(pipeline, cursor)


def test_a_cut_in_a_pipeline_loses_all_of_it(client: psycopg.Connection, proxy: PostgresProxy, direct: Sql) -> None:
    proxy.cut(matching="INSERT INTO", when="before", nth=2)
    with pytest.raises(psycopg.OperationalError):
        insert_in_pipeline(client, [1, 2], each=lambda *_: None)
    assert effects(direct) == []


def test_synced_parts_of_a_pipeline_are_cut_apart(
    client: psycopg.Connection, proxy: PostgresProxy, direct: Sql
) -> None:
    proxy.cut(matching="INSERT INTO", when="after", nth=2)
    with pytest.raises(psycopg.OperationalError):
        insert_in_pipeline(client, [1, 2, 3], each=lambda pipeline, _: pipeline.sync())
    assert effects(direct) == [1, 2]


def test_a_flushed_answer_is_lost_before_its_commit(
    client: psycopg.Connection, proxy: PostgresProxy, direct: Sql
) -> None:
    proxy.cut(matching="INSERT INTO", when="after", nth=2)
    with pytest.raises(psycopg.OperationalError):
        insert_in_pipeline(client, [1, 2], each=lambda _, cursor: cursor.fetchone())
    assert effects(direct) == []


def test_an_error_is_an_answer_too(client: psycopg.Connection, proxy: PostgresProxy) -> None:
    proxy.cut(matching="1/0", when="after")
    with pytest.raises(psycopg.OperationalError):
        client.execute("SELECT 1/0")


def test_a_held_answer_is_committed_and_comes_when_released(
    client: psycopg.Connection, proxy: PostgresProxy, direct: Sql
) -> None:
    hold = proxy.hold(matching="INSERT INTO")
    with ThreadPoolExecutor() as threads:
        running = threads.submit(client.execute, INSERT, [1])
        hold.wait_reached()
        assert effects(direct) == [1]
        assert not running.done()
        hold.release()
        assert running.result(timeout=20).rowcount == 1


def test_a_held_statement_has_not_happened(client: psycopg.Connection, proxy: PostgresProxy, direct: Sql) -> None:
    hold = proxy.hold(matching="INSERT INTO", when="before")
    with ThreadPoolExecutor() as threads:
        running = threads.submit(client.execute, INSERT, [1])
        hold.wait_reached()
        assert effects(direct) == []
        hold.release()
        assert running.result(timeout=20).rowcount == 1
    assert effects(direct) == [1]


def test_a_hold_that_is_never_reached_says_so(proxy: PostgresProxy) -> None:
    with pytest.raises(AssertionError, match="no statement with 'DELETE'"):
        proxy.hold(matching="DELETE").wait_reached(timeout=0.05)


def test_refused_connections(client: psycopg.Connection, proxy: PostgresProxy) -> None:
    proxy.refuse()
    with pytest.raises(psycopg.OperationalError, match="refused"):
        psycopg.connect(proxy.url)
    assert client.execute("SELECT 1").fetchone() == (1,)
    proxy.accept()
    psycopg.connect(proxy.url).close()


def test_swallowed_connections(client: psycopg.Connection, proxy: PostgresProxy) -> None:
    proxy.blackhole()
    with pytest.raises(psycopg.errors.ConnectionTimeout):
        psycopg.connect(proxy.url, connect_timeout=2)
    assert client.execute("SELECT 1").fetchone() == (1,)
    proxy.accept()
    psycopg.connect(proxy.url).close()


def test_a_silenced_connection_goes_on_later(client: psycopg.Connection, proxy: PostgresProxy) -> None:
    proxy.blackhole(existing=True)
    with ThreadPoolExecutor() as threads:
        running = threads.submit(client.execute, "SELECT 1")
        assert wait([running], timeout=0.2).not_done
        assert proxy.round_trips() == 0
        proxy.accept()
        assert running.result(timeout=20).fetchone() == (1,)


def test_disconnect_loses_every_connection(client: psycopg.Connection, proxy: PostgresProxy) -> None:
    proxy.disconnect()
    with pytest.raises(psycopg.OperationalError):
        client.execute("SELECT 1")


def test_a_client_that_goes_leaves_no_connection_on_the_server(
    client: psycopg.Connection, proxy: PostgresProxy, direct: Sql
) -> None:
    client.close()
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    wait_until(lambda: direct.value(query) == 1, message="only the direct connection is left")


def test_the_proxy_is_one_thread_that_ends(direct: Sql, empty_database_url: str) -> None:
    before = threading.active_count()
    with PostgresProxy(empty_database_url) as proxy, psycopg.connect(proxy.url), psycopg.connect(proxy.url):
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
