"""Measures what operations cost: statements and round trips on the wire, bytes of the log, bytes that stay."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median, mode

import celery_durable
from celery_durable.engine.context import Attempt
from celery_durable.store.migrate import migrate
from celery_durable.testing.servers import EmbeddedPostgres
from tests.costs.operations import Act, Bench, Operation, operations
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.proxy import PostgresProxy

#: How often each operation is measured; the median counts.
TIMES, TIMES_OF_MANY = 11, 3
#: How many of a thing are put into the database to see how large one is.
MUCH = 300

_SQL = Path(celery_durable.__file__).parent / "store"
_SAME_SHAPE = "CREATE TABLE plain (LIKE celery_durable.checkpoint INCLUDING ALL)"
_NAMED = re.compile(r"^-- name: (\w+)\n-- (.+)$", re.MULTILINE)
#: The log then holds what the operations write, however long ago the last checkpoint was; and it needn't be safe.
_QUIET = tuple(f"ALTER SYSTEM SET {name} = off" for name in ("full_page_writes", "autovacuum", "fsync"))


@dataclass(frozen=True)
class Cost:
    """What an operation costs, for one workflow; statements and round trips for all that are done at once."""

    statements: tuple[str, ...]
    round_trips: int
    wal: float


@contextmanager
def quiet_server() -> Iterator[str]:
    """A server of our own, on which nothing but the operations writes; its URL."""
    with EmbeddedPostgres() as server:
        with closing(Sql(server.url)) as sql:
            for statement in (*_QUIET, "SELECT pg_reload_conf()"):
                sql.execute(statement)
        yield server.url


def costs(url: str) -> dict[str, Cost]:
    """Measure all operations on an empty database of a quiet server."""
    migrate(url)
    with PostgresProxy(url) as proxy, closing(Sql(url)) as sql, closing(Bench(proxy.url, sql)) as bench:
        return {operation.name: _cost(operation, bench, proxy, sql) for operation in operations()}


def sizes(url: str) -> dict[str, float]:
    """Measure what stays in the database of each thing, indexes included, on an empty one of a quiet server."""
    migrate(url)
    with closing(Sql(url)) as sql, closing(Bench(url, sql)) as bench:
        return {what: _growth(partial(bench.times, MUCH, put), sql) / MUCH for what, put in bench.things(MUCH).items()}


def beside_an_insert(url: str) -> tuple[float, float, float]:
    """Return what a step writes into the log, what a plain INSERT of the same row does, and how much more a step does.

    Measured on an empty database of a quiet server. The INSERT is prepared, in a transaction of its own, into a table
    of the same shape; each is a median, the last one that of the differences.
    """
    migrate(url)
    with closing(Sql(url)) as sql, closing(Bench(url, sql)) as bench:
        sql.execute(_SAME_SHAPE)
        attempt = bench.running()
        pairs = [_pair(bench, attempt, sql) for _ in range(2 * TIMES)]
    steps, inserts = zip(*pairs, strict=True)
    return median(steps), median(inserts), median(step - insert for step, insert in pairs)


def _pair(bench: Bench, attempt: Attempt, sql: Sql) -> tuple[int, int]:
    """Bytes of a step, and of the INSERT of its row."""
    bench.beat()
    step = _bytes_of(lambda: bench.step(attempt), sql)
    row = sql.one("SELECT * FROM celery_durable.checkpoint ORDER BY seq DESC LIMIT 1")
    statement = f"INSERT INTO plain VALUES ({', '.join(['%s'] * len(row))})"
    return step, _bytes_of(lambda: sql.connection.execute(statement.encode(), row, prepare=True), sql)


def _bytes_of(act: Act, sql: Sql) -> int:
    before = _written(sql)
    act()
    return _written(sql) - before


def _growth(put: Act, sql: Sql) -> float:
    before = _size(sql)
    put()
    return _size(sql) - before


def _size(sql: Sql) -> int:
    sql.execute("VACUUM")
    size: int = sql.value(
        "SELECT sum(pg_total_relation_size(c.oid)) FROM pg_class c "
        "WHERE relnamespace = 'celery_durable'::regnamespace AND relkind = 'r'"
    )
    return int(size)


def _cost(operation: Operation, bench: Bench, proxy: PostgresProxy, sql: Sql) -> Cost:
    times = TIMES if operation.many == 1 else TIMES_OF_MANY
    each = [_measured(bench.ready(operation), proxy, sql) for _ in range(times)]
    # A machine that has stopped for a second makes an attempt look whether its workflow is still its own.
    usual = mode((cost.statements, cost.round_trips) for cost in each)
    return Cost(*usual, median(cost.wal for cost in each) / operation.many)


def _measured(act: Act, proxy: PostgresProxy, sql: Sql) -> Cost:
    before = _written(sql)
    proxy.reset()
    act()
    return Cost(tuple(map(name_of, proxy.statements())), proxy.round_trips(), float(_written(sql) - before))


def _written(sql: Sql) -> int:
    """Bytes of the write-ahead log so far."""
    written: int = sql.value("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
    return int(written)


def name_of(statement: str) -> str:
    """Return what a statement on the wire is called in our files; its first word, if it isn't from there."""
    names = dict((description, name) for name, description in _names())
    match = re.match(r"-- (.+)", statement)
    return names[match[1]] if match else statement.split()[0]


def _names() -> Sequence[tuple[str, str]]:
    return [found for path in sorted(_SQL.glob("*.sql")) for found in _NAMED.findall(path.read_text())]
