"""Brings the schema up to date: plain numbered SQL files, one transaction, under an advisory lock."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from importlib.resources import files
from typing import Any

import psycopg
from psycopg import sql

from ..exceptions import SchemaVersionError
from .pool import Connection
from .queries import in_schema

_FILE = re.compile(r"(\d{4})_\w+\.sql")
_LOCK = 0x6365_6C65_7279  # one at a time in a database, whatever the schema's name

_LEDGER = """
CREATE TABLE {schema}.migration (
    number      integer PRIMARY KEY,
    applied_at  timestamptz NOT NULL DEFAULT clock_timestamp()
)"""


@cache
def migrations() -> dict[int, str]:
    """Return the SQL of each migration by its number, in order."""
    found = {}
    for entry in files(__package__).joinpath("migrations").iterdir():
        match = _FILE.fullmatch(entry.name)
        if match:
            found[int(match[1])] = entry.read_text(encoding="utf-8")
    return dict(sorted(found.items()))


def migrate(url: str, schema: str = "celery_durable") -> list[int]:
    """Apply what is missing and return the numbers of what was applied.

    Safe in any number of processes at once. Raises SchemaVersionError if the database is newer than this code.
    """
    with psycopg.connect(url, autocommit=True) as connection:
        return upgrade(connection, schema)


def missing_in(url: str, schema: str) -> list[int]:
    """Return the numbers of the migrations that a database lacks."""
    with psycopg.connect(url, autocommit=True) as connection:
        return missing(version_of(connection, schema))


def upgrade(connection: Connection, schema: str) -> list[int]:
    """Apply what is missing on an open connection."""
    if not missing(version_of(connection, schema)):
        return []
    with connection.transaction():
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [_LOCK])
        current = version_of(connection, schema)
        if current == 0:
            connection.execute(sql.SQL("CREATE SCHEMA IF NOT EXISTS {}").format(sql.Identifier(schema)))
            connection.execute(_in(schema, _LEDGER))
        return [_apply(connection, schema, number) for number in missing(current)]


def checker(schema: str, *, auto_migrate: bool) -> Callable[[Connection], None]:
    """Return what each process does before its first statement."""

    def check(connection: Connection) -> None:
        if auto_migrate:
            upgrade(connection, schema)
        elif missing(version_of(connection, schema)):
            raise SchemaVersionError(
                f"The schema {schema!r} is missing or older than this version of celery_durable needs, and "
                "durable_auto_migrate is off: run `celery -A yourproject durable migrate`."
            )

    return check


def missing(current: int) -> list[int]:
    """Return the numbers to apply; raise SchemaVersionError if the database is ahead."""
    newest = max(migrations())
    if current > newest:
        raise SchemaVersionError(
            f"The database schema has version {current}, this celery_durable knows only {newest}: "
            "upgrade the package on this machine."
        )
    return [number for number in migrations() if number > current]


def version_of(connection: Connection, schema: str) -> int:
    """Return the number of the last migration that was applied, 0 for none."""
    (table,) = _one(connection, "SELECT to_regclass(%s)", [in_schema("{schema}.migration", schema)])
    if table is None:
        return 0
    (number,) = _one(connection, in_schema("SELECT coalesce(max(number), 0) FROM {schema}.migration", schema), [])
    return int(number)


def script(schema: str, number: int) -> str:
    """Return a migration as SQL that can be run by hand."""
    return f"{in_schema(migrations()[number], schema)}\n{_record(schema).replace('%s', str(number))}"


def _apply(connection: Connection, schema: str, number: int) -> int:
    connection.execute(_in(schema, migrations()[number]))
    connection.execute(_record(schema).encode(), [number])
    return number


def _one(connection: Connection, text: str, params: list[Any]) -> tuple[Any, ...]:
    row = connection.execute(text.encode(), params).fetchone()
    assert row is not None, "these queries always return a row"
    return row


def _record(schema: str) -> str:
    return in_schema("INSERT INTO {schema}.migration (number) VALUES (%s);", schema)


def _in(schema: str, text: str) -> bytes:
    return in_schema(text, schema).encode()
