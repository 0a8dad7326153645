"""Migrations: applied once, by any number of processes, in any schema."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest

from celery_durable.exceptions import ConfigurationError, DatabaseUnavailable, SchemaVersionError
from celery_durable.store import Store
from celery_durable.store.ledger import quick
from celery_durable.store.migrate import _LOCK as LOCK
from celery_durable.store.migrate import clear, migrate, migrations, missing_in
from tests.fixtures import releases
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.rig import Rig
from tests.fixtures.tables import TABLES, describe, run_script

pytestmark = pytest.mark.matrix

ALL = sorted(migrations())
#: Those that are missing where the first release has made the schema.
NEWER, QUICK = ALL[1:], quick(ALL[1:])
MIGRATE = """
import sys
from celery_durable.store.migrate import migrate
print("ready", flush=True)
sys.stdin.readline()
print(migrate(sys.argv[1]))
"""
#: How many sessions have looked for the lock, and wait until they look again.
REFUSED = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'celery_durable' AND state = 'idle' AND query = 'COMMIT'
"""


@pytest.fixture
def empty(empty_database_url: str) -> Iterator[Sql]:
    helper = Sql(empty_database_url)
    yield helper
    helper.close()


def newer(sql: Sql, oldest: int | None) -> None:
    """Note a migration of a later release, with columns of its own."""
    sql.execute("ALTER TABLE celery_durable.migration ADD COLUMN IF NOT EXISTS oldest integer")
    sql.execute("INSERT INTO celery_durable.migration (number, oldest) VALUES (9999, %s)", oldest)
    sql.execute("ALTER TABLE celery_durable.workflow ADD COLUMN later text, ADD COLUMN later_still text DEFAULT ''")


def store(url: str, *, auto_migrate: bool, schema: str = "celery_durable") -> Store:
    return Store.shared(lambda: url, schema, auto_migrate=auto_migrate, lease=15, pgbouncer=False)


def test_an_empty_database_gets_everything_once(empty_database_url: str, empty: Sql) -> None:
    """The second call finds nothing to do, and each migration is noted."""
    assert missing_in(empty_database_url, "celery_durable") == ALL
    assert migrate(empty_database_url) == ALL
    assert migrate(empty_database_url) == []
    assert missing_in(empty_database_url, "celery_durable") == []
    assert [row.number for row in empty.all("SELECT number FROM celery_durable.migration ORDER BY 1")] == ALL


def test_twenty_processes_at_once_migrate_once(empty_database_url: str) -> None:
    """One does it, the others wait for it and go on."""
    command = [sys.executable, "-c", MIGRATE, empty_database_url]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(20)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    answers, errors = zip(*(process.communicate(timeout=60) for process in processes), strict=True)
    assert set(errors) == {""}
    assert sorted(map(str.strip, answers)) == sorted([str(ALL)] + ["[]"] * 19)


@pytest.mark.parametrize("level", ["read committed", "repeatable read", "serializable"])
def test_who_has_waited_for_the_lock_sees_what_was_done(empty_database_url: str, empty: Sql, level: str) -> None:
    """Neither an old snapshot nor the session's own cache shows it an empty database."""
    database = empty.value("SELECT current_database()")
    empty.execute(f"ALTER DATABASE {database} SET default_transaction_isolation = '{level}'")
    with ThreadPoolExecutor(2) as threads:
        empty.execute("SELECT pg_advisory_lock(%s)", LOCK)
        migrating = [threads.submit(migrate, empty_database_url) for _ in range(2)]
        wait_until(lambda: empty.value(REFUSED) == 2, message="both wait for the lock")
        empty.execute("SELECT pg_advisory_unlock(%s)", LOCK)
        assert sorted(each.result(20) for each in migrating) == [[], ALL]


def test_the_first_statement_of_a_store_migrates(empty_database_url: str) -> None:
    """Where durable_auto_migrate is on."""
    opened = store(empty_database_url, auto_migrate=True)
    assert opened.workflows.by_id("w1", patience=0) is None
    opened.close()
    assert missing_in(empty_database_url, "celery_durable") == []


def test_without_auto_migrate_the_error_names_the_command(empty_database_url: str, empty: Sql) -> None:
    """Nothing is changed, and the next statement says the same."""
    opened = store(empty_database_url, auto_migrate=False)
    for _ in range(2):
        with pytest.raises(SchemaVersionError, match="celery -A yourproject durable migrate"):
            opened.workflows.by_id("w1", patience=0)
    assert empty.value("SELECT to_regnamespace('celery_durable')") is None
    migrate(empty_database_url)
    assert opened.workflows.by_id("w1", patience=0) is None
    opened.close()


@pytest.mark.parametrize("auto_migrate", [False, True])
@pytest.mark.parametrize("oldest", [None, ALL[-1]])
def test_a_newer_database_is_worked_on(
    database_url: str, sql: Sql, rig: Rig, auto_migrate: bool, oldest: int | None
) -> None:
    """While a release is rolled out, old workers start beside new ones: unless told otherwise they fit."""
    newer(sql, oldest)
    fence = rig.run()
    opened = store(database_url, auto_migrate=auto_migrate)
    row = opened.workflows.by_id(fence.id, patience=0)
    assert row is not None
    assert row.state == "RUNNING"
    opened.close()
    assert migrate(database_url) == []
    assert missing_in(database_url, "celery_durable") == []


@pytest.mark.parametrize("auto_migrate", [False, True])
def test_a_database_that_is_too_new_is_refused(database_url: str, sql: Sql, auto_migrate: bool) -> None:
    """A worker must not write into a schema that says it can't."""
    newer(sql, 9998)
    opened = store(database_url, auto_migrate=auto_migrate)
    with pytest.raises(SchemaVersionError, match=rf"knows migration 9998, this one knows only {ALL[-1]}: upgrade"):
        opened.workflows.by_id("w1", patience=0)
    opened.close()
    with pytest.raises(SchemaVersionError, match="9998"):
        migrate(database_url)


@pytest.mark.parametrize("schema", ["Orders", 'we"ird', "a.b", "{x}", "select", "a CONCURRENTLY", "ü" * 31])
def test_any_schema_name_works_for_every_statement(empty_database_url: str, empty: Sql, schema: str) -> None:
    """Quotes, capitals, dots and braces are parts of a name."""
    assert migrate(empty_database_url, schema) == ALL
    assert missing_in(empty_database_url, schema) == []
    rig = Rig(empty_database_url, empty, schema)
    fence = rig.run()
    assert rig.save(fence)
    assert rig.finish(fence)
    assert rig.store.nodes.forget(patience=0) == 0
    rig.close()
    schemas = "SELECT count(*) FROM pg_namespace WHERE nspname IN (%s, 'celery_durable')"
    assert empty.value(schemas, schema) == 1


def test_two_schemas_in_one_database_are_apart(empty_database_url: str, empty: Sql) -> None:
    """Two apps may share a database."""
    for schema in ("one", "two"):
        migrate(empty_database_url, schema)
    rig = Rig(empty_database_url, empty, "one")
    rig.start()
    rig.close()
    assert empty.value("SELECT count(*) FROM one.workflow") == 1
    assert empty.value("SELECT count(*) FROM two.workflow") == 0


@pytest.mark.parametrize("schema", ["celery_durable", 'my "Schema"'])
def test_the_printed_script_does_what_migrate_does(empty_database_url: str, empty: Sql, schema: str) -> None:
    """An administrator who runs it by hand gets the same tables, and the ledger knows it."""
    migrate(empty_database_url, schema)
    by_code = describe(empty, schema)
    empty.execute(f"DROP SCHEMA {psycopg.sql.Identifier(schema).as_string(None)} CASCADE")
    for number in ALL:
        run_script(empty, number, schema)
    assert describe(empty, schema) == by_code
    assert len(by_code) > 50
    assert migrate(empty_database_url, schema) == []


def test_a_failed_migration_leaves_nothing(empty_database_url: str, empty: Sql) -> None:
    """All of it is one transaction."""
    empty.execute("CREATE SCHEMA celery_durable CREATE TABLE output ()")
    with pytest.raises(psycopg.errors.DuplicateTable):
        migrate(empty_database_url)
    tables = empty.all("SELECT tablename FROM pg_tables WHERE schemaname = 'celery_durable'")
    assert [row.tablename for row in tables] == ["output"]


@pytest.mark.parametrize("action", [migrate, lambda url: missing_in(url, "celery_durable")], ids=["migrate", "missing"])
def test_a_wrong_url_is_told_without_its_password(action: object) -> None:
    """A malformed one and one that leads nowhere."""
    assert callable(action)
    with pytest.raises(ConfigurationError) as malformed:
        action("mysql://user:hush@host/database")
    with pytest.raises(DatabaseUnavailable, match=r"127.0.0.1:1/database.*durable_database_url") as nowhere:
        action("postgresql://user:hush@127.0.0.1:1/database")
    assert "hush" not in str(malformed.value) + str(nowhere.value)


def test_clear(database_url: str, sql: Sql, rig: Rig) -> None:
    """Every table but the one of migrations; where there is no schema, there is nothing to do."""
    names = sql.all("SELECT tablename FROM pg_tables WHERE schemaname = 'celery_durable' AND tablename <> 'migration'")
    assert {name for (name,) in names} == set(TABLES)
    rig.node()
    clear(database_url, "celery_durable")
    assert sql.value("SELECT count(*) FROM celery_durable.node") == 0
    clear(database_url, "nowhere")


@pytest.fixture
def first_release(empty_database_url: str, empty: Sql) -> Sql:
    """A database as the first release has left it."""
    run_script(empty, 1)
    return empty


@pytest.mark.parametrize("dump", releases.DUMPS, ids=lambda dump: dump.stem)
def test_a_released_schema_becomes_what_a_fresh_one_is(
    empty_database_url: str, empty: Sql, sql: Sql, dump: Path
) -> None:
    """Column by column, index by index, and nothing is left of what was."""
    releases.load(dump, empty)
    released = int(dump.stem)
    assert migrate(empty_database_url) == [number for number in ALL if number > released]
    assert describe(empty) == describe(sql)


def test_first_use_applies_what_is_quick(empty_database_url: str, first_release: Sql) -> None:
    """A caller of delay() builds no index; without them everything works."""
    opened = store(empty_database_url, auto_migrate=True)
    assert opened.workflows.by_id("w1", patience=0) is None
    assert missing_in(empty_database_url, "celery_durable") == [number for number in NEWER if number not in QUICK]
    opened.close()
    opened = store(empty_database_url, auto_migrate=False)
    assert opened.workflows.by_id("w1", patience=0) is None
    opened.close()


def test_nobody_queues_behind_a_migration_that_waits(empty_database_url: str, first_release: Sql) -> None:
    """A long transaction has read a table: what is quick tries again and again, and lets others pass meanwhile."""
    with psycopg.connect(empty_database_url) as long, psycopg.connect(empty_database_url, autocommit=True) as other:
        long.execute("SELECT FROM celery_durable.workflow")
        other.execute("SET lock_timeout = '1s'")
        with ThreadPoolExecutor(1) as threads:
            migrating = threads.submit(migrate, empty_database_url)
            waiting = "SELECT count(*) FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND NOT granted"
            for _ in range(2):
                wait_until(lambda: first_release.value(waiting) == 1, message="the migration waits for the table")
                other.execute("INSERT INTO celery_durable.node SELECT FROM celery_durable.workflow LIMIT 0")
                assert first_release.value(waiting) == 0
            long.rollback()
            assert migrating.result(20) == NEWER


def test_a_migration_that_can_not_be_had_says_why(empty_database_url: str, first_release: Sql) -> None:
    """When patience ends nothing is changed, and the sentence says where to look; a caller is told to try later."""
    with psycopg.connect(empty_database_url) as long:
        long.execute("SELECT FROM celery_durable.workflow")
        with pytest.raises(SchemaVersionError, match=r"migration 2 needs a table .* pg_stat_activity"):
            migrate(empty_database_url, patience=0)
        opened = store(empty_database_url, auto_migrate=True)
        with pytest.raises(DatabaseUnavailable, match="migration 2 needs a table"):
            opened.workflows.by_id("w1", patience=0)
        opened.close()
    assert missing_in(empty_database_url, "celery_durable") == NEWER
    assert migrate(empty_database_url) == NEWER
