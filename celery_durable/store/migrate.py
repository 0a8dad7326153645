"""Brings the schema up to date: plain numbered SQL files, one transaction, under an advisory lock."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import psycopg

from ..exceptions import SchemaVersionError
from .connecting import bare, unavailable, where
from .queries import in_schema
from .transaction import Connection

_FILE = re.compile(r"(\d{4})_\w+\.sql")
_LOCK = 0x6365_6C65_7279  # one at a time in a database, whatever the schema's name

#: What a role is allowed by default isn't meant for a migration.
_UNBOUNDED = """
SELECT set_config('statement_timeout', '0', true), set_config('lock_timeout', '0', true),
    set_config('idle_in_transaction_session_timeout', '0', true)"""

_FIRST = """
CREATE SCHEMA IF NOT EXISTS {schema};
CREATE TABLE {schema}.migration (
    number      integer PRIMARY KEY,
    applied_at  timestamptz NOT NULL DEFAULT clock_timestamp()
);"""
_NOTE = "INSERT INTO {schema}.migration (number) VALUES (%s);"
# A database that is newer than this code has the column.
_LEDGER = "SELECT number, (to_jsonb(m) ->> 'oldest')::integer FROM {schema}.migration AS m"

_EMPTY = """
TRUNCATE {schema}.workflow, {schema}.node, {schema}.input, {schema}.output, {schema}.checkpoint, {schema}.message,
    {schema}.event, {schema}.awaiting, {schema}.on_cancel, {schema}.cancellation, {schema}.attempt, {schema}.sweep;"""


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a database says of its migrations."""

    applied: frozenset[int]
    #: Code that doesn't know the migration of this number can't work on the schema any more; 0: all can.
    oldest: int


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

    Safe in any number of processes at once. Raises SchemaVersionError if this code is too old for the database.
    """
    with _connected(url) as connection:
        return upgrade(connection, schema)


def drop(url: str, schema: str) -> None:
    """Remove the schema, with all that is in it."""
    with _connected(url) as connection:
        connection.execute(_in(schema, "DROP SCHEMA IF EXISTS {schema} CASCADE"))


def clear(url: str, schema: str) -> None:
    """Remove all workflows, if the schema is there and up to date; for tests."""
    with _connected(url) as connection:
        if not missing(ledger_of(connection, schema)):
            connection.execute(_in(schema, _EMPTY))


def missing_in(url: str, schema: str) -> list[int]:
    """Return the numbers of the migrations that a database lacks."""
    with _connected(url) as connection:
        return missing(ledger_of(connection, schema))


def upgrade(connection: Connection, schema: str) -> list[int]:
    """Apply what is missing on an open connection."""
    if not missing(ledger_of(connection, schema)):
        return []
    with connection.transaction():
        # What others have applied during the wait for the lock must be seen.
        connection.execute("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
        connection.execute(_UNBOUNDED)
        connection.execute("SELECT pg_advisory_xact_lock(%s)", [_LOCK])
        ledger = ledger_of(connection, schema)
        if not ledger.applied:
            connection.execute(_in(schema, _FIRST))
        return [_apply(connection, schema, number) for number in missing(ledger)]


def checker(schema: str, *, auto_migrate: bool) -> Callable[[Connection], None]:
    """Return what each process does before its first statement."""

    def check(connection: Connection) -> None:
        if auto_migrate:
            upgrade(connection, schema)
        elif missing(ledger_of(connection, schema)):
            raise SchemaVersionError(
                f"The schema {schema!r} is missing or older than this version of celery_durable needs, and "
                "durable_auto_migrate is off: run `celery -A yourproject durable migrate`."
            )

    return check


def missing(ledger: Ledger) -> list[int]:
    """Return the numbers to apply, in order.

    What this code doesn't know of was applied by a newer release, beside which it has to work while a deploy is under
    way. Raises SchemaVersionError if the database says that it can't.
    """
    newest = max(migrations())
    if ledger.oldest > newest:
        raise SchemaVersionError(
            f"The database schema needs a celery_durable that knows migration {ledger.oldest}, this one knows only "
            f"{newest}: upgrade the package on this machine."
        )
    return [number for number in migrations() if number not in ledger.applied]


def ledger_of(connection: Connection, schema: str) -> Ledger:
    """Return which migrations were applied; none, if there is no schema."""
    # Not to_regclass(): it may answer from what this session knew before it waited for the lock.
    there = "SELECT FROM pg_catalog.pg_tables WHERE schemaname = %s AND tablename = 'migration'"
    if connection.execute(there, [schema]).fetchone() is None:
        return Ledger(frozenset(), 0)
    rows = connection.execute(_in(schema, _LEDGER)).fetchall()
    return Ledger(frozenset(number for number, _ in rows), max((oldest or 0 for _, oldest in rows), default=0))


def script(schema: str, number: int) -> str:
    """Return a migration as SQL that can be run by hand, the first one with the schema itself."""
    first = in_schema(_FIRST, schema) if number == min(migrations()) else ""
    record = in_schema(_NOTE, schema).replace("%s", str(number))
    return f"{first}\n{in_schema(migrations()[number], schema)}\n{record}"


def _apply(connection: Connection, schema: str, number: int) -> int:
    connection.execute(_in(schema, migrations()[number].replace("CONCURRENTLY", "")))
    connection.execute(_in(schema, _NOTE), [number])
    return number


@contextmanager
def _connected(url: str) -> Iterator[Connection]:
    place = where(url)
    try:
        # What is prepared behind pgbouncer would be there for the next client, too.
        connection = psycopg.connect(url, autocommit=True, prepare_threshold=None)
    except psycopg.OperationalError as error:
        raise unavailable(place, error) from bare(error)
    with connection:
        yield connection


def _in(schema: str, text: str) -> bytes:
    return in_schema(text, schema).encode()
