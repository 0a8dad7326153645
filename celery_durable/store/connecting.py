"""One connection to Postgres: where it leads, what it is set to, and what is told when it can't be had."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import psycopg
from psycopg import conninfo

from ..exceptions import ConfigurationError, DatabaseUnavailable, DurableError
from .executing import Session
from .queries import Queries
from .transaction import Connection, brief

SETTING = "durable_database_url"
_PORTS = re.compile(r"[\d,]*")
_IN_NO_ADDRESS = re.compile(r"@|password\s*=", re.IGNORECASE)
#: Seconds; a caller of delay() may wait for two of them.
_LONGEST_CONNECT = _LONGEST_LOCK = 3
#: Seconds in which a dead server is noticed where no lease is known.
_LONG_LEASE = 15.0
#: Classes of errors: a connection that can't be had, that was ended.
_AWAY = ("08", "57")
#: Uses of a statement after which psycopg prepares it.
PREPARED_AFTER = 5

#: The rules of the protocol are made for it.
_ISOLATION = "read committed"

#: Says where the database is now: of a Django alias that isn't known before its tests have made their own.
Url = Callable[[], str]


class Unfit(psycopg.OperationalError):
    """A connection that was made, and can't be used as the settings have it: nothing is lost, but somebody must act."""


def connector(url: Url, session: Literal["ours", "lent"], *, lease: float, pgbouncer: bool) -> Callable[[], Connection]:
    """Return what makes an autocommit connection, and sets it up by a query of ``connecting.sql``.

    It notices within ``lease`` seconds that its server is dead. Raises psycopg.OperationalError, Unfit among them.
    """

    def connect() -> Connection:
        place = url()
        connection = _connected(place, **_connect_kwargs(place, lease=lease, pgbouncer=pgbouncer))
        try:
            if pgbouncer:
                _check_isolation(connection)
            else:
                _make_ours(connection, session, where(place), lease)
        except BaseException:
            connection.close()
            raise
        return connection

    return connect


@contextmanager
def apart(url: str) -> Iterator[Connection]:
    """Lend an autocommit connection that is nobody else's, for what is done to the schema itself.

    Raises DatabaseUnavailable if it can't be had or breaks.
    """
    place = where(url)
    try:
        # What is prepared behind pgbouncer would be there for the next client, too.
        connection = _connected(url, **_connect_kwargs(url, lease=_LONG_LEASE, pgbouncer=True))
        with connection:
            yield connection
    except psycopg.OperationalError as error:
        if error.sqlstate is None or error.sqlstate[:2] in _AWAY:
            raise unavailable(place, error) from bare(error)
        raise


def where(url: str) -> str:
    """Return host, port and database of a connection URL, without user and password.

    Raises ConfigurationError if the URL can't be one.
    """
    if not url:
        raise ConfigurationError(
            f"There is no {SETTING}: pass durable.install(app, database_url='postgresql://user@host/database')."
        )
    place = _place(url)
    if place is None:
        # Neither the URL nor the parser's complaint is shown: both may hold the password.
        raise ConfigurationError(
            f"{SETTING} isn't a Postgres connection URL; it should read like "
            "postgresql://user@host:5432/database (without a driver such as +psycopg in the scheme, "
            "and with %40 for an @ and %2F for a / in the password)."
        )
    return place


def _place(url: str) -> str | None:
    try:
        facts = conninfo.conninfo_to_dict(url)
    except (psycopg.Error, UnicodeError):
        return None
    address = _address(facts)
    # A password with an unquoted @ or / is taken for a part of the host, port or database.
    is_one = _PORTS.fullmatch(str(facts.get("port") or "")) and not _IN_NO_ADDRESS.search(address)
    return address if is_one else None


def _address(facts: Mapping[str, Any]) -> str:
    host = facts.get("host") or facts.get("hostaddr") or "the local socket"
    port = f":{facts['port']}" if facts.get("port") else ""
    return f"{host}{port}/{facts.get('dbname') or ''}"


def unavailable(place: str, error: Exception) -> DurableError:
    """Return the error that says where no Postgres answers, and why; what has to be set, if that is the reason."""
    if isinstance(error, Unfit):
        return ConfigurationError(str(error))
    return DatabaseUnavailable(f"Postgres can't be reached at {place} (setting {SETTING}): {brief(error)}")


def bare(error: Exception) -> Exception:
    """Return an error without the frames in which it was raised: their variables hold the password."""
    error.__context__ = None
    return error.with_traceback(None)


def _connect_kwargs(url: str, *, lease: float, pgbouncer: bool) -> dict[str, Any]:
    ours: dict[str, Any] = {
        "connect_timeout": max(2, min(_LONGEST_CONNECT, int(lease))),
        "keepalives_idle": max(1, int(lease)),
        "keepalives_interval": max(1, int(lease / 3)),
        "keepalives_count": 3,
        "tcp_user_timeout": int(lease * 1000),
        "application_name": "celery_durable",
    }
    theirs = conninfo.conninfo_to_dict(url)
    kwargs = {name: value for name, value in ours.items() if name not in theirs}
    return {**kwargs, "autocommit": True, "prepare_threshold": None if pgbouncer else PREPARED_AFTER}


def _connected(place: str, **kwargs: Any) -> Connection:
    """Connect; a process that has no room for one more file most likely has it later."""
    try:
        return Session.connect(place, **kwargs)
    except OSError as error:
        raise psycopg.OperationalError(brief(error)) from error


def _make_ours(connection: Connection, session: Literal["ours", "lent"], place: str, lease: float) -> None:
    """Set what our statements need; raise Unfit if a pooler gives each of them another session."""
    lock_timeout = f"{min(_LONGEST_LOCK, lease) * 1000:.0f}"
    mine = connection.info.backend_pid
    values = {"pid": mine, "isolation": _ISOLATION, "lock_timeout": lock_timeout}
    text = Queries("connecting.sql", "")[session].text
    row = connection.execute(text.encode(), values, prepare=False).fetchone()
    if row is None or row[0] != mine:
        raise Unfit(
            f"Between here and Postgres at {place} is a connection pooler such as pgbouncer: set "
            "durable_pgbouncer = True, or let durable_database_url lead to Postgres itself."
        )


def _check_isolation(connection: Connection) -> None:
    """Raise Unfit if statements run otherwise than the protocol needs it; a pooled session isn't ours to set."""
    row = connection.execute("SHOW default_transaction_isolation").fetchone()
    if row != (_ISOLATION,):
        raise Unfit(
            f"The default_transaction_isolation is {row and row[0]!r}, which can't be set for one session behind "
            f"pgbouncer: ALTER ROLE \"{connection.info.user}\" SET default_transaction_isolation = 'read committed'."
        )
