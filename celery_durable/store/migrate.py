"""Brings the schema up to date: plain numbered SQL files, by one process at a time.

Quick migrations are applied by whoever comes first, each in a transaction. One that waits for a table gives up within
moments and tries again later: everybody would have to queue behind it. Online ones have their own room.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from psycopg import errors

from ..exceptions import SchemaVersionError
from .connecting import apart
from .ledger import ledger_of, migrations, missing, quick
from .online import build, finish
from .queries import Queries
from .roles import allowed
from .transaction import Connection

_LOCK = 0x6365_6C65_7279  # one at a time in a database, whatever the schema's name

#: How long a statement waits for a table, with everybody behind it, and the seconds until it does so again.
_LOCK_TIMEOUT, _PAUSE = "300ms", 1.0
#: Seconds until who waits for another process's migration looks again.
_POLL = 0.05
#: Seconds, of a caller's first use in a process, and of the command.
_SHORT_PATIENCE, _PATIENCE = 3.0, 60.0


def migrate(url: str, schema: str = "celery_durable", *, patience: float = _PATIENCE) -> list[int]:
    """Apply what is missing and return the numbers of what was applied.

    Safe in any number of processes at once, and beside workers that run. ``patience``: seconds for which a quick
    migration tries to get a table that others have locked; an online one takes as long as it takes, and goes on from
    there if it was interrupted. Raises SchemaVersionError if this code is too old for the database, the role may not
    change the schema, or patience ends.
    """
    with apart(url) as connection, allowed(connection, schema):
        try:
            applied = upgrade(connection, schema, patience=patience)
        except errors.LockNotAvailable as error:
            raise SchemaVersionError(
                f"The schema {schema!r} can't be brought up to date now: {error}. Look for long transactions in "
                "pg_stat_activity, end them or wait for them, and run `celery -A yourproject durable migrate` again."
            ) from error
        return applied + finish(build(url, schema, wait=True))


def drop(url: str, schema: str) -> None:
    """Remove the schema, with all that is in it."""
    with apart(url) as connection:
        connection.execute(Queries("migrate.sql", schema)["drop"].text)


def clear(url: str, schema: str) -> None:
    """Remove all workflows, if the schema is there and up to date; for tests."""
    with apart(url) as connection:
        if not missing(ledger_of(connection, schema)):
            connection.execute(Queries("migrate.sql", schema)["clear"].text)


def missing_in(url: str, schema: str) -> list[int]:
    """Return the numbers of the migrations that a database lacks."""
    with apart(url) as connection:
        return missing(ledger_of(connection, schema))


def upgrade(connection: Connection, schema: str, *, patience: float) -> list[int]:
    """Apply the quick migrations that are missing; all of them, where there is no schema yet.

    Raises LockNotAvailable if ``patience`` ends.
    """
    applied: list[int] = []
    give_up_at = time.monotonic() + patience
    while quick(missing(ledger_of(connection, schema))):
        with _alone(connection, schema) as is_alone:
            if is_alone:
                applied += _apply_next(connection, schema, give_up_at)
                continue
        if time.monotonic() > give_up_at:
            raise errors.LockNotAvailable("another process is changing the schema")
        time.sleep(_POLL)
    return applied


def checker(schema: str, *, auto_migrate: bool) -> Callable[[Connection], None]:
    """Return what each process does before its first statement.

    Online migrations may be missing: they make faster, and no more.
    """

    def check(connection: Connection) -> None:
        if auto_migrate:
            with allowed(connection, schema):
                upgrade(connection, schema, patience=_SHORT_PATIENCE)
        elif quick(missing(ledger_of(connection, schema))):
            raise SchemaVersionError(
                f"The schema {schema!r} is missing or older than this version of celery_durable needs, and "
                "durable_auto_migrate is off: run `celery -A yourproject durable migrate`."
            )

    return check


def script(schema: str, number: int) -> str:
    """Return a migration as SQL that can be run by hand, the first one with the schema itself."""
    texts = Queries("migrate.sql", schema)
    first = f"{texts['make_schema'].text}\n{texts['make_ledger'].text}\n" if number == min(migrations()) else ""
    return first + migrations()[number].by_hand(schema)


@contextmanager
def _alone(connection: Connection, schema: str) -> Iterator[bool]:
    """Begin a transaction, and tell whether it is the only one that changes a schema in this database."""
    texts = Queries("migrate.sql", schema)
    with connection.transaction():
        connection.execute(texts["seeing"].text)
        connection.execute(texts["unbounded"].text, {"lock_timeout": _LOCK_TIMEOUT})
        yield connection.execute(texts["lock"].text, {"key": _LOCK}).fetchone() == (True,)


def _apply_next(connection: Connection, schema: str, give_up_at: float) -> list[int]:
    """Apply the first quick migration that is still missing: no table is locked for longer than one takes."""
    ledger = ledger_of(connection, schema)
    if not ledger.applied:
        return _make(connection, schema)
    numbers = quick(missing(ledger))[:1]
    for number in numbers:
        _patiently(connection, migrations()[number].at_once(schema), number, give_up_at)
    return numbers


def _make(connection: Connection, schema: str) -> list[int]:
    texts = Queries("migrate.sql", schema)
    if connection.execute(texts["has_schema"].text, {"schema": schema}).fetchone() is None:
        connection.execute(texts["make_schema"].text)
    connection.execute(texts["make_ledger"].text)
    for migration in migrations().values():
        connection.execute(migration.at_once(schema).encode())
    return list(migrations())


def _patiently(connection: Connection, text: str, number: int, give_up_at: float) -> None:
    """Execute; if a table can't be had, let everybody pass, and try again."""
    while True:
        try:
            with connection.transaction():
                connection.execute(text.encode())
        except errors.LockNotAvailable as error:
            # Slept in any case: whoever tries next does so under the same lock of ours.
            time.sleep(_PAUSE)
            if time.monotonic() > give_up_at:
                raise errors.LockNotAvailable(
                    f"migration {number} needs a table that another transaction has locked"
                ) from error
        else:
            return
