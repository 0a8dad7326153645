"""What a role may do: an application needs rows, and no right to change the schema."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from psycopg import errors

from ..exceptions import ConfigurationError, SchemaVersionError
from .connecting import apart
from .ledger import ledger_of, missing
from .queries import Queries
from .transaction import Connection


def grants(schema: str, role: str) -> str:
    """Return the SQL by which a role may do all that workers and callers do, also after later migrations."""
    return Queries("roles.sql", schema, role=role)["grant"].text


def grant(url: str, schema: str, role: str) -> None:
    """Let a role do all that workers and callers do; ``url`` leads to Postgres as the owner of the schema.

    What later migrations make belongs to it, too, if the same owner applies them. Raises ConfigurationError if the
    schema or the role isn't there, or the user of ``url`` may not do it.
    """
    with apart(url) as connection, connection.transaction():
        try:
            connection.execute(grants(schema, role).encode())
        except (errors.InvalidSchemaName, errors.UndefinedTable) as error:
            raise ConfigurationError(
                f"There is no schema {schema!r} with our tables: run `celery -A yourproject durable migrate` first."
            ) from error
        except errors.UndefinedObject as error:
            raise ConfigurationError(f"There is no role {role!r}: CREATE ROLE makes one.") from error
        except errors.InsufficientPrivilege as error:
            raise ConfigurationError(
                f'The role "{connection.info.user}" may not grant rights on the schema {schema!r}: only its owner may.'
            ) from error


@contextmanager
def allowed(connection: Connection, schema: str) -> Iterator[None]:
    """Raise SchemaVersionError, which says who may do it, if the role of this connection may not change the schema."""
    try:
        yield
    except errors.InsufficientPrivilege as error:
        raise SchemaVersionError(_who(connection, schema)) from error


def _who(connection: Connection, schema: str) -> str:
    user = connection.info.user
    owner = connection.execute(Queries("migrate.sql", schema)["owner"].text, {"schema": schema}).fetchone()
    if owner is None:
        return (
            f'There is no schema {schema!r}, and the role "{user}" may not make it: let a role that may create in this '
            f"database run `celery -A yourproject durable migrate --grant {user}`."
        )
    numbers = ", ".join(map(str, missing(ledger_of(connection, schema))))
    return (
        f'The schema {schema!r} lacks migrations ({numbers}), and the role "{user}" may not apply them: let its owner, '
        f'"{owner[0]}", run `celery -A yourproject durable migrate`.'
    )
