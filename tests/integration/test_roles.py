"""Roles: an application's needs rows only, and whoever may not change the schema is told who may."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import psycopg
import pytest
from psycopg import sql as pgsql

from celery_durable.exceptions import ConfigurationError, SchemaVersionError
from celery_durable.store import Store
from celery_durable.store.ledger import migrations
from celery_durable.store.migrate import migrate, missing_in
from celery_durable.store.online import build, finish
from celery_durable.store.roles import grant, grants
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.rig import Rig
from tests.fixtures.roles import as_role, new_role
from tests.fixtures.tables import run_script

pytestmark = pytest.mark.matrix

SCHEMA = "celery_durable"
ALL = list(migrations())


@pytest.fixture
def empty(empty_database_url: str) -> Iterator[Sql]:
    with closing(Sql(empty_database_url)) as helper:
        yield helper


@pytest.fixture
def role(postgres_server: str) -> Iterator[str]:
    """An application's role, with quotes and capitals in its name."""
    with new_role(postgres_server, 'Shop "app"') as name:
        yield name


def store(url: str, *, auto_migrate: bool = True) -> Store:
    return Store.shared(lambda: url, SCHEMA, auto_migrate=auto_migrate, lease=15, pgbouncer=False)


def test_a_granted_role_runs_workflows(database_url: str, sql: Sql, role: str) -> None:
    """It reads and writes every table, and neither changes the schema nor what was noted of it."""
    grant(database_url, SCHEMA, role)
    url = as_role(database_url, role)
    with closing(Rig(url, sql)) as rig:
        fence = rig.run()
        assert rig.save(fence)
        assert rig.finish(fence)
        assert rig.prune(0) == ["w1"]
    assert migrate(url) == []
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in (
            "CREATE TABLE celery_durable.mine ()",
            "ALTER TABLE celery_durable.workflow ADD COLUMN mine text",
            "CREATE TABLE public.mine ()",
            "DELETE FROM celery_durable.migration",
            "TRUNCATE celery_durable.workflow",
        ):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                connection.execute(statement.encode())


def test_what_later_migrations_make_is_granted(empty_database_url: str, empty: Sql, role: str) -> None:
    """The owner applies them, and the application goes on."""
    run_script(empty, 1)
    grant(empty_database_url, SCHEMA, role)
    assert migrate(empty_database_url) == ALL[1:]
    with closing(Rig(as_role(empty_database_url, role), empty)) as rig:
        fence = rig.run()
        assert rig.suspend(fence, 1)  # writes into a table of the second migration
    assert empty.value("SELECT count(*) FROM celery_durable.attempt") == 1


@pytest.mark.parametrize("auto_migrate", [True, False])
def test_a_missing_migration_is_told_with_its_owner(
    empty_database_url: str, empty: Sql, role: str, auto_migrate: bool
) -> None:
    """Who may apply it, and by which command."""
    run_script(empty, 1)
    grant(empty_database_url, SCHEMA, role)
    url = as_role(empty_database_url, role)
    opened = store(url, auto_migrate=auto_migrate)
    with pytest.raises(SchemaVersionError, match="celery -A yourproject durable migrate") as told:
        opened.workflows.by_id("w1", patience=0)
    opened.close()
    if auto_migrate:
        assert f'role "{role}" may not apply them: let its owner, "postgres", run' in str(told.value)
    with pytest.raises(SchemaVersionError, match=r"lacks migrations \(2, 3\), and the role"):
        migrate(url)


def test_a_missing_index_is_told_and_harms_nothing(empty_database_url: str, empty: Sql, role: str) -> None:
    """What is quick is there: the application works, and its worker says who can build the rest."""
    for number in (1, 2):
        run_script(empty, number)
    grant(empty_database_url, SCHEMA, role)
    url = as_role(empty_database_url, role)
    opened = store(url)
    assert opened.workflows.by_id("w1", patience=0) is None
    opened.close()
    with pytest.raises(SchemaVersionError, match=r"lacks migrations \(3\), and the role"):
        finish(build(url, SCHEMA, wait=False))
    assert missing_in(url, SCHEMA) == [3]


def test_no_schema_and_no_right_to_make_it(empty_database_url: str, role: str) -> None:
    """The sentence names the command, with the grant that comes with it."""
    with pytest.raises(SchemaVersionError, match=r"There is no schema 'celery_durable'.*durable migrate --grant"):
        migrate(as_role(empty_database_url, role))


def test_a_schema_that_was_made_for_its_owner(empty_database_url: str, empty: Sql, role: str) -> None:
    """A role that owns the schema, and may create nothing else in the database, can migrate."""
    empty.execute(f"CREATE SCHEMA celery_durable AUTHORIZATION {pgsql.Identifier(role).as_string(None)}")
    assert migrate(as_role(empty_database_url, role)) == ALL


def test_a_role_without_a_grant(database_url: str, role: str) -> None:
    """It is told which one it needs."""
    with pytest.raises(SchemaVersionError, match=r"may not use the schema 'celery_durable'.*durable migrate --grant"):
        migrate(as_role(database_url, role))


def test_what_can_not_be_granted(database_url: str, empty_database_url: str, role: str) -> None:
    """An unknown role, no schema, and somebody who isn't the owner: one sentence each."""
    with pytest.raises(ConfigurationError, match="There is no role 'nobody at all'"):
        grant(database_url, SCHEMA, "nobody at all")
    with pytest.raises(ConfigurationError, match=r"There is no schema 'celery_durable'.*durable migrate` first"):
        grant(empty_database_url, SCHEMA, role)
    with pytest.raises(ConfigurationError, match="only its owner may"):
        grant(as_role(database_url, role), SCHEMA, role)


def test_names_are_quoted() -> None:
    """A role can't be anything but a name, and PUBLIC is no role of ours."""
    text = grants('my "schema"', 'x"; DROP TABLE y; --')
    assert 'ON SCHEMA "my ""schema""" TO "x""; DROP TABLE y; --";' in text
    assert 'TO "PUBLIC";' in grants(SCHEMA, "PUBLIC")
