"""Django's transactions: those that are open when a workflow is started, and those of atomic steps."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from ...exceptions import ConfigurationError, StepError
from ...store.host import plain
from .databases import connection_of

Row = tuple[Any, ...]


class DjangoHost:
    """A connection of Django's, of whichever driver; Django doesn't count what we execute as queries of the app."""

    #: Django's models use the connection by its alias.
    session = None

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def check(self) -> None:
        """Raise ConfigurationError if each statement would be committed by itself, as Django if nothing can be."""
        if not _is_open(self.connection):
            raise ConfigurationError(
                f"The database {self.connection.alias!r} commits each statement by itself: open a transaction first, "
                "`with transaction.atomic():`."
            )
        self.connection.validate_no_broken_transaction()

    def execute(self, text: str, params: Mapping[str, Any]) -> list[Row]:
        """Execute past Django's own cursors: no query of the app, no number in a test that counts those."""
        self.connection.ensure_connection()
        with self.connection.wrap_database_errors, self.connection.connection.cursor() as cursor:
            cursor.execute(text, params or None)
            return plain(cursor.fetchall()) if cursor.description else []


class DjangoTransaction(DjangoHost):
    """The transaction of an atomic step, begun by us."""

    def check(self) -> None:
        """Raise StepError if the step has left its transaction in no state to be committed."""
        connection = self.connection
        if connection.closed_in_transaction:
            raise StepError(f"The step has closed its connection to the database {connection.alias!r}.")
        if connection.needs_rollback:
            raise StepError(
                f"The step's transaction on the database {connection.alias!r} can only be rolled back: an error in it "
                "was swallowed (wrap what may fail in `with transaction.atomic():`), or set_rollback() was called."
            )

    def is_lost(self) -> bool:
        """Tell whether the connection broke."""
        driver = self.connection.connection
        return self.connection.errors_occurred and bool(driver is None or driver.closed or _is_broken(driver))


class Alias:
    """A database of Django's DATABASES, for steps with ``atomic="default"``."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        self.name = f"Django's database {alias!r}"

    @contextmanager
    def transaction(self) -> Iterator[DjangoTransaction]:
        """Begin; commit at the end, roll back on an error."""
        from django.db import transaction

        connection = connection_of(self.alias)
        if connection.in_atomic_block:
            raise ConfigurationError(
                f"A step with atomic={self.alias!r} was called in a transaction on that database, so that nobody knows "
                "when it is committed: call it outside of transaction.atomic()."
            )
        connection.close_if_unusable_or_obsolete()
        connection.ensure_connection()
        with transaction.atomic(using=self.alias):
            yield DjangoTransaction(connection)
        if not connection.get_autocommit():
            connection.commit()


def open_on(alias: str) -> DjangoHost | None:
    """Return the transaction that the calling thread has open on an alias."""
    connection = connection_of(alias)
    return DjangoHost(connection) if _is_open(connection) else None


def host_of(connection: Any) -> DjangoHost | None:
    """Return one of ``django.db.connections`` as what we need of it; None for anything else."""
    from django.db import DEFAULT_DB_ALIAS, connections
    from django.db import connection as default
    from django.db.backends.base.base import BaseDatabaseWrapper

    if connection is default:
        connection = connections[DEFAULT_DB_ALIAS]
    return DjangoHost(connection) if isinstance(connection, BaseDatabaseWrapper) else None


def _is_open(connection: Any) -> bool:
    """Tell whether a statement would belong to a transaction; with AUTOCOMMIT off, each one does."""
    if connection.in_atomic_block:
        return True
    return not (connection.settings_dict["AUTOCOMMIT"] if connection.connection is None else connection.autocommit)


def _is_broken(driver: Any) -> bool:
    return bool(getattr(driver, "broken", False))
