"""Every test has a database of its own."""

from __future__ import annotations

import pytest

from tests.fixtures.fix_postgres import Sql
from tests.fixtures.proxy import PostgresProxy

TABLES = "SELECT count(*) FROM pg_tables WHERE schemaname = 'celery_durable'"


@pytest.mark.parametrize("_", range(2))
def test_a_database_is_migrated_and_fresh(sql: Sql, _: int) -> None:
    assert sql.value(TABLES) > 0
    assert sql.value("SELECT to_regclass('public.leftover')") is None
    sql.execute("CREATE TABLE public.leftover ()")


def test_an_empty_database_has_no_schema(empty_database_url: str) -> None:
    helper = Sql(empty_database_url)
    assert helper.value(TABLES) == 0
    helper.close()


def test_the_proxy_leads_to_the_same_database(sql: Sql, proxy: PostgresProxy) -> None:
    through = Sql(proxy.url)
    assert through.value("SELECT current_database()") == sql.value("SELECT current_database()")
    through.close()


def test_rows_are_named_and_counted(sql: Sql) -> None:
    assert [row.n for row in sql.all("SELECT n FROM generate_series(1, %s) AS n", 3)] == [1, 2, 3]
    assert sql.one("SELECT 1 AS a, '%' AS b") == (1, "%")
    with pytest.raises(AssertionError, match="2 rows instead of one"):
        sql.one("SELECT generate_series(1, 2)")
    assert sql.execute("CREATE TABLE n AS SELECT generate_series(1, 4)") == 4
