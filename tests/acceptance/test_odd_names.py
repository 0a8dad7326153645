"""A schema, a database and a role may have any name that Postgres takes, and the role needs few rights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import quote, urlsplit

import psycopg
import pytest
from psycopg import sql as pgsql

import celery_durable as durable
from celery_durable.store.migrate import migrate
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.ledger import Ledger
from tests.fixtures.site import opened, shop_env
from tests.fixtures.workers import Workers

SCHEMA = "Ä\"; DROP SCHEMA public CASCADE; --\n.{x}$1\\' "
NAME, ROLE, PASSWORD = 'da"ta b/a:s%s e?', "r\"o'l@e:/ü%", "p@:/?#[]!$&'()*+,;=% \\\"ü"


#: What SECURITY.md says that a role needs for daily work.
LEAST = (
    "REVOKE ALL ON SCHEMA public FROM PUBLIC", "REVOKE ALL ON DATABASE {name} FROM PUBLIC",
    "GRANT CONNECT ON DATABASE {name} TO {role}", "GRANT USAGE ON SCHEMA {schema} TO {role}",
    "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {role}",
)  # fmt: skip


@pytest.fixture(params=["owner", "least rights"])
def url(postgres_server: str, request: pytest.FixtureRequest) -> Iterator[str]:
    """URL of a database of that name, for a role of that name: its owner, or one that may do nothing but work."""
    with psycopg.connect(postgres_server, autocommit=True) as administrator:

        def do(statement: str, connection: psycopg.Connection[Any] = administrator) -> None:
            named = {"name": NAME, "role": ROLE, "schema": SCHEMA}
            names = {key: pgsql.Identifier(value) for key, value in named.items()}
            connection.execute(pgsql.SQL(statement).format(**names, password=pgsql.Literal(PASSWORD)))

        server = urlsplit(postgres_server)
        do("CREATE ROLE {role} LOGIN PASSWORD {password}")
        do("CREATE DATABASE {name}")
        if request.param == "owner":
            do("ALTER DATABASE {name} OWNER TO {role}")
        else:
            there = server._replace(path=f"/{quote(NAME, safe='')}").geturl()
            migrate(there, SCHEMA)
            with psycopg.connect(there, autocommit=True) as connection:
                for statement in LEAST:
                    do(statement, connection)
        place = server.netloc.rpartition("@")[2]
        yield server._replace(
            netloc=f"{quote(ROLE, safe='')}:{quote(PASSWORD, safe='')}@{place}", path=f"/{quote(NAME, safe='')}"
        ).geturl()
        do("DROP DATABASE {name} WITH (FORCE)")
        do("DROP ROLE {role}")


@pytest.fixture
def worker_env(url: str, broker: Broker, ledger: Ledger) -> dict[str, str]:
    """The shop there. Only NOTIFY makes a start in an outbox be seen in time."""
    return shop_env(url, broker.url, broker.queue, ledger, schema=SCHEMA, recovery_interval=60, suspend_after=0)


def test_the_whole_life_under_odd_names(url: str, workers: Workers, ledger: Ledger) -> None:
    """Made, started, stepped, woken, told by NOTIFY, swept and pruned; nothing else in the database is touched."""
    with opened(workers, ledger, url) as site, closing(Sql(url)) as sql:
        shop, table = site.shop, f"{_quoted(SCHEMA)}.workflow"
        early = shop.quick.delay(1)
        workers.start()
        assert site.finished(early.id).result == 1
        assert site.finished(shop.order.delay("a").id).result == [0, 10, 20]
        assert site.finished(shop.sleeper.delay(0.5).id).state == "SUCCESS"
        assert site.finished(shop.fan_out.delay(3).id).result == 3
        with psycopg.connect(url) as connection:
            with durable.outbox(connection):
                told = shop.quick.delay(2)
            connection.commit()
        assert site.finished(told.id, 20).result == 2
        wait_until(lambda: _all_dispatched(sql, table), message="the node confirms")
        assert {each.state for each in durable.list_workflows(app=shop.app)} == {"SUCCESS"}
        sql.execute(f"UPDATE {table} SET finished_at = finished_at - interval '1 year'")
        shop.app.tasks["celery_durable.recover"]()
        assert durable.list_workflows(app=shop.app) == []
        assert sql.value("SELECT count(*) FROM pg_namespace WHERE nspname IN (%s, 'public')", SCHEMA) == 2


def _all_dispatched(sql: Sql, table: str) -> bool:
    return bool(sql.value(f"SELECT bool_and(dispatched AND node IS NULL) FROM {table}"))


def _quoted(name: str) -> str:
    return pgsql.Identifier(name).as_string(None).replace("%", "%%")
