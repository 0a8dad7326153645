"""Applies online migrations: each statement in its own time, beside everything that runs, by one process at a time.

An index is built CONCURRENTLY: that waits for every transaction that has a snapshot, so whoever wants the lock polls,
and holds it in a transaction on one connection, which has none, while another connection builds. A process that dies
leaves an invalid index, which the next one drops.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import psycopg
from psycopg import errors
from psycopg.pq import ExecStatus, TransactionStatus

from .connecting import apart
from .ledger import ledger_of, migrations, missing, quick
from .queries import Queries, in_schema
from .roles import allowed
from .transaction import CONFLICTS, Connection, brief

logger = logging.getLogger("celery_durable.store")

_LOCK = 0x6365_6C65
_POLL = 0.1

#: Applies bit by bit; to be driven every second or so. Returns the numbers of what was applied.
Building = Generator[None, None, list[int]]


def build(url: str, schema: str, *, wait: bool) -> Building:
    """Apply the online migrations that a database lacks, if it lacks no quick one.

    ``wait``: if another process does it, wait until it has; else leave it to that one. Raises DatabaseUnavailable,
    SchemaVersionError if the role may not change the schema, and psycopg's errors. Whatever ends it, the next one goes
    on from there.
    """
    with ExitStack() as connections:
        worker = connections.enter_context(apart(url))
        watch: Connection | None = None
        while _is_due(worker, schema):
            watch = watch or connections.enter_context(apart(url))
            with _alone(watch, schema) as is_alone, allowed(worker, schema):
                if is_alone:
                    return (yield from _apply(worker, schema))
            if not wait:
                break
            yield
        return []


def finish(building: Building) -> list[int]:
    """Drive it to its end."""
    with closing(building):
        while True:
            try:
                next(building)
            except StopIteration as end:
                return list(end.value)
            time.sleep(_POLL)


def _is_due(connection: Connection, schema: str) -> bool:
    numbers = missing(ledger_of(connection, schema))
    return bool(numbers) and not quick(numbers)


@contextmanager
def _alone(connection: Connection, schema: str) -> Generator[bool, None, None]:
    texts = Queries("migrate.sql", schema)
    with connection.transaction():
        connection.execute(texts["seeing"].text)
        connection.execute(texts["unbounded"].text, {"lock_timeout": "0"})
        # With its parameters sent apart, the statement would keep its snapshot until the next one.
        cursor = psycopg.ClientCursor(connection)
        yield cursor.execute(texts["lock_build"].text, {"key": _LOCK, "schema": schema}).fetchone() == (True,)


def _apply(connection: Connection, schema: str) -> Building:
    """Apply what is missing, with the ledger read again: another process may just have ended."""
    connection.execute(Queries("migrate.sql", schema)["builder"].text, {"pid": connection.info.backend_pid})
    numbers = missing(ledger_of(connection, schema))
    for number in numbers:
        for statement in migrations()[number].statements(schema):
            logger.info("Migration %d of schema %r: %s", number, schema, " ".join(statement.split()))
            yield from _run(connection, schema, statement)
        connection.execute(migrations()[number].note(schema).encode())
    return numbers


def _run(connection: Connection, schema: str, statement: str) -> Generator[None, None, None]:
    """Run a statement, when nobody else works on our tables any more: two would wait for each other."""
    texts = Queries("migrate.sql", schema)
    while True:
        while connection.execute(texts["busy"].text, {"schema": schema}).fetchone() is not None:
            yield
        try:
            for (name,) in connection.execute(texts["invalid"].text, {"schema": schema}).fetchall():
                if f" INDEX CONCURRENTLY IF NOT EXISTS {name} ON " in statement:
                    yield from _execute(
                        connection, in_schema("DROP INDEX CONCURRENTLY {schema}.{index}", schema, index=name)
                    )
            yield from _execute(connection, statement)
        except CONFLICTS as error:
            logger.info("Another session works in the schema %r (%s), trying again.", schema, brief(error))
            yield
        else:
            return


def _execute(connection: Connection, statement: str) -> Generator[None, None, None]:
    """Run a statement without waiting for it; cancel it if nobody waits any more."""
    session = connection.pgconn
    session.send_query(statement.encode())
    try:
        session.flush()
        while session.is_busy():
            yield
            session.consume_input()
        result: Any = None
        while (part := session.get_result()) is not None:
            result = part
    finally:
        if connection.info.transaction_status is TransactionStatus.ACTIVE:
            connection.cancel()
            connection.close()
    if result.status == ExecStatus.FATAL_ERROR:
        error = errors.error_from_result(result, encoding=connection.info.encoding)
        raise psycopg.OperationalError(brief(error)) if connection.broken else error
