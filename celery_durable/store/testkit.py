"""What the test kit asks of Postgres: databases of its own, a clock that can be set, and looks at what is to be run."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psycopg
from psycopg import conninfo, sql

from ..exceptions import ConfigurationError, DatabaseUnavailable
from ..serialization import Payload
from .migrate import migrate
from .queries import Queries
from .rows import StoredMessage
from .transaction import brief

if TYPE_CHECKING:
    from . import Store

#: A name that a database of the kit begins with.
PREFIX = "durable_test_"
#: ``public`` comes first, so that what others create lands where it always does. A role's own path would come before
#: that of a database.
_SEARCH_PATH = "ALTER ROLE CURRENT_USER IN DATABASE {} SET search_path = public, durable_clock, pg_catalog"
#: What tests write needn't survive a power cut.
_HURRY = "ALTER DATABASE {} SET synchronous_commit = off"


class TestKit:
    """Looks and changes that only tests make."""

    __test__ = False  # to pytest this isn't a test

    def __init__(self, store: Store) -> None:
        self._database = store._database
        self._sql = Queries("testkit.sql", store._schema)

    @property
    def has_clock(self) -> bool:
        """Whether time can be set in this database."""
        return bool(self._run("has_clock")[0][0])

    def now(self) -> datetime:
        """Return the database's time."""
        moment: datetime = self._run("now")[0][0]
        return moment

    def advance(self, seconds: float) -> None:
        """Set the clock forward."""
        self._run("advance", seconds=seconds)

    def clear(self) -> None:
        """Remove all workflows and nodes, and let the clock show the real time."""
        self._database.run_all([(self._sql["empty"], {}), (self._sql["reset"], {})], patience=0)

    def runnable(self, not_now: Collection[str]) -> StoredMessage | None:
        """Return the message that a worker would get next; None: all wait, or have ended."""
        rows = self._run("runnable", not_now=list(not_now))
        return StoredMessage(*rows[0]) if rows else None

    def next_timer(self, *, with_deadlines: bool) -> float | None:
        """Return the seconds until time alone changes something; a deadline counts alone only if asked for."""
        seconds: float | None = self._run("next_timer", with_deadlines=with_deadlines)[0][0]
        return seconds

    def answer(self, workflow_id: str, key: str, payload: Payload, *, ok: bool) -> None:
        """Give a step its outcome beforehand."""
        self._run("answer", id=workflow_id, key=key, ok=ok, value=payload.data, content_type=payload.content_type)

    def settled(self, ids: Collection[str]) -> dict[tuple[str, str], tuple[bool, bytes, int]]:
        """Return for each settled step of these workflows whether it has succeeded, its value, and its tries."""
        return {(row[0], row[1]): (row[2], bytes(row[3]), row[4]) for row in self._run("settled", ids=list(ids))}

    def _run(self, name: str, **params: Any) -> list[tuple[Any, ...]]:
        return self._database.run(self._sql[name], params, patience=3.0)


@contextmanager
def new_database(server: str) -> Iterator[str]:
    """Make a database for tests on a server, with our tables and a clock that can be set; it is dropped at the end.

    The end of this process counts, too, even by SIGKILL. Yields the URL. Raises ConfigurationError for what can't be
    one, or if databases can't be created there; DatabaseUnavailable. Neither shows the password.
    """
    try:
        facts = conninfo.conninfo_to_dict(server)
    except psycopg.Error:
        raise ConfigurationError(
            "DATABASE_URL isn't a Postgres connection URL; it should read like postgresql://user@host:5432/database. "
            "Unset it to test on an embedded server."
        ) from None
    name = f"{PREFIX}{uuid.uuid4().hex[:12]}"
    with _dropped_at_the_end(server, name):
        _administer(server, "CREATE DATABASE {}", name)
        _administer(server, _SEARCH_PATH, name)
        _administer(server, _HURRY, name)
        url = _url_of({**facts, "dbname": name}, server)
        with psycopg.connect(url, autocommit=True) as connection:
            connection.execute(Queries("testkit.sql", "")["make_clock"].text.encode())
        migrate(url)
        yield url


@contextmanager
def _dropped_at_the_end(server: str, name: str) -> Iterator[None]:
    """Drop a database after the block, by a process that outlives this one."""
    dropper = subprocess.Popen(  # noqa: S603 - a file of ours
        [sys.executable, "-I", "-S", str(Path(__file__).with_name("dropper.py"))],
        stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert dropper.stdin is not None
    dropper.stdin.write(json.dumps({"server": server, "name": name, "path": sys.path}) + "\n")
    dropper.stdin.flush()
    try:
        yield
    finally:
        # A line, since children of this process that were forked may keep the pipe open.
        _, complaint = dropper.communicate("end\n")
    if dropper.returncode:
        raise DatabaseUnavailable(f"The database {name} of the tests is left over, drop it: {complaint.strip()}.")


def _url_of(facts: dict[str, Any], server: str) -> str:
    """Return the URL of another database on the same server, in the form in which that was given."""
    if "://" not in server:
        return conninfo.make_conninfo(**facts)
    scheme, _, rest = server.partition("://")
    place, _, options = rest.partition("?")
    address = place.partition("/")[0]
    return f"{scheme}://{address}/{facts['dbname']}" + (f"?{options}" if options else "")


def _administer(server: str, statement: str, name: str) -> None:
    try:
        with psycopg.connect(server, autocommit=True) as connection:
            connection.execute(sql.SQL(statement).format(sql.Identifier(name)))
    except psycopg.errors.InsufficientPrivilege as error:
        raise ConfigurationError(
            f"The user of DATABASE_URL can't create a database for tests ({brief(error)}): grant it CREATEDB, or unset "
            "DATABASE_URL to test on an embedded server."
        ) from None
    except psycopg.OperationalError as error:
        raise DatabaseUnavailable(
            f"The server of DATABASE_URL can't be reached ({brief(error)}): start it, or unset DATABASE_URL to test on "
            "an embedded one."
        ) from None
