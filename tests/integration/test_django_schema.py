"""The schema, made by Django's `migrate`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from importlib.resources import files

import pytest

from celery_durable.store.migrate import migrations
from tests.fixtures.fix_bakery import Bakery
from tests.fixtures.fix_postgres import Sql, _new_database

QUOTED = 'my "durable" schema'


@pytest.fixture
def here(empty_database_url: str) -> Iterator[Sql]:
    """The database of the workflows."""
    with closing(Sql(empty_database_url)) as sql:
        yield sql


@pytest.fixture
def elsewhere(postgres_server: str, bakery: Bakery) -> Iterator[Sql]:
    """The database of another alias."""
    with _new_database(postgres_server, "template0") as url:
        bakery.env["OTHER_DATABASE_URL"] = url
        with closing(Sql(url)) as sql:
            yield sql


def tables(sql: Sql, schema: str = "celery_durable") -> set[str]:
    """All tables of a schema."""
    return {row.tablename for row in sql.all("SELECT tablename FROM pg_tables WHERE schemaname = %s", schema)}


def schemas(sql: Sql) -> int:
    """How many schemas of ours there are."""
    return sql.value("SELECT count(*) FROM pg_namespace WHERE nspname = 'celery_durable'")


def test_migrate(bakery: Bakery, here: Sql) -> None:
    """All of it where the workflows live; a second time nothing; `zero` drops it."""
    bakery.manage("migrate")
    assert {"workflow", "checkpoint", "message", "migration"} <= tables(here)
    assert here.value("SELECT max(number) FROM celery_durable.migration") == max(migrations())
    assert "No migrations to apply" in bakery.manage("migrate")
    bakery.manage("migrate", "celery_durable", "zero")
    assert schemas(here) == 0
    bakery.manage("migrate", "celery_durable")
    assert "workflow" in tables(here)


def test_a_schema_that_is_there_already(bakery: Bakery, here: Sql) -> None:
    """A worker may have made it, before the project had Django's migrations of it."""
    bakery.python("from bakery import celery_app; from orders.tasks import fulfil; fulfil.delay(1)")
    bakery.manage("migrate")
    assert here.value("SELECT count(*) FROM celery_durable.workflow") == 1


def test_another_database(bakery: Bakery, elsewhere: Sql) -> None:
    """Only the table of markers, which atomic steps need there; `zero` drops it."""
    bakery.manage("migrate", "--database=other")
    assert tables(elsewhere) == {"marker"}
    bakery.manage("migrate", "--database=other", "celery_durable", "zero")
    assert schemas(elsewhere) == 0


def test_no_postgres(bakery: Bakery) -> None:
    """Nothing is made or dropped in an SQLite, and that is no error."""
    bakery.manage("migrate", "--database=lite")
    bakery.python(
        "from django.core.management import call_command\n"
        "call_command('migrate', database='lite', verbosity=0)\n"
        "from django.db import connections\n"
        "tables = connections['lite'].introspection.table_names()\n"
        "assert 'orders_order' in tables and not [name for name in tables if 'celery' in name], tables\n"
        "call_command('migrate', 'celery_durable', 'zero', database='lite', verbosity=0)\n"
    )


@pytest.mark.parametrize("schema", ["celery_durable", QUOTED])
def test_nothing_is_left_to_migrate(bakery: Bakery, schema: str) -> None:
    """`makemigrations --check` in the user's project finds models and migrations in agreement."""
    told = bakery.manage("makemigrations", "--check", "--dry-run", CELERY_DURABLE_SCHEMA=schema)
    assert "No changes detected" in told


def test_a_schema_with_quotes_in_its_name(bakery: Bakery, here: Sql) -> None:
    """It is made, read by the model, and dropped."""
    bakery.manage("migrate", CELERY_DURABLE_SCHEMA=QUOTED)
    assert "workflow" in tables(here, QUOTED)
    told = bakery.python(
        "from bakery import celery_app\n"
        "from celery_durable.contrib.django.models import Workflow\n"
        "from orders.tasks import fulfil\n"
        "handle = fulfil.delay(1)\n"
        "assert Workflow.objects.get().id == handle.id\n"
        "print(Workflow.objects.filter(state='ENQUEUED').count())",
        CELERY_DURABLE_SCHEMA=QUOTED,
    )
    assert told.strip() == "1"
    bakery.manage("migrate", "celery_durable", "zero", CELERY_DURABLE_SCHEMA=QUOTED)
    assert tables(here, QUOTED) == set()


def test_a_router_keeps_it_away(bakery: Bakery, here: Sql, elsewhere: Sql) -> None:
    """`allow_migrate` may say that a database gets nothing of ours."""
    settings = {"DATABASE_ROUTERS": ["orders.routers.OnlyDefault"]}
    bakery.manage("migrate", "--database=other", **settings)
    bakery.manage("migrate", **settings)
    assert schemas(elsewhere) == 0
    assert "workflow" in tables(here)


def test_each_migration_has_one_of_djangos() -> None:
    """Else `manage.py migrate` would have nothing to apply in a database that has our earlier ones."""
    names = (entry.name for entry in files("celery_durable.contrib.django").joinpath("migrations").iterdir())
    numbers = {int(match[1]) for name in names if (match := re.fullmatch(r"(\d{4})_\w+\.py", name))}
    assert numbers == set(migrations())
