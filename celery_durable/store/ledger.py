"""Which migrations there are, and which of them a database has."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from psycopg import errors

from ..exceptions import SchemaVersionError
from .queries import Queries, in_schema
from .transaction import Connection

_FILE = re.compile(r"(\d{4})_\w+\.sql")
_ONLINE = "-- online\n"
_OLDEST = re.compile(r"^-- oldest: (\d+)$", re.MULTILINE)
_COMMENT = re.compile(r"^--.*\n", re.MULTILINE)
_END = re.compile(r";\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Migration:
    """One file. What it begins with says what it is.

    ``-- online`` as its first line: its statements run one by one, outside of transactions, beside everything else;
    each may be run again. Without it the file is one quick transaction. ``-- oldest: 7``: code that doesn't know
    migration 7 can't work on the schema any more.
    """

    number: int
    text: str

    @property
    def is_online(self) -> bool:
        """Whether it takes its time, and needs nobody to wait."""
        return self.text.startswith(_ONLINE)

    @property
    def oldest(self) -> int | None:
        """The number that code must know; None: all code can go on."""
        found = _OLDEST.search(self.text)
        return int(found[1]) if found else None

    def statements(self, schema: str) -> list[str]:
        """Return its statements, without comments."""
        parts = _END.split(_COMMENT.sub("", self.text))
        return [in_schema(part.strip(), schema) for part in parts if part.strip()]

    def at_once(self, schema: str) -> str:
        """Return it as a part of the transaction that makes the schema, where nobody has to be spared."""
        return in_schema(self.text.replace(" CONCURRENTLY", ""), schema) + self.note(schema)

    def by_hand(self, schema: str) -> str:
        """Return it for psql: an online one must not be run in a transaction."""
        return f"{in_schema(self.text, schema)}\n{self.note(schema)}\n"

    def note(self, schema: str) -> str:
        """Return the statement that notes it as applied."""
        texts, values = Queries("migrate.sql", schema), (str(self.number), str(self.oldest))
        if self.oldest is None:
            return texts["note"].text % values[:1]
        return texts["note_oldest"].text % values


@dataclass(frozen=True, slots=True)
class Ledger:
    """What a database says of its migrations."""

    applied: frozenset[int]
    #: Code that doesn't know the migration of this number can't work on the schema any more; 0: all can.
    oldest: int


@cache
def migrations() -> dict[int, Migration]:
    """Return the migrations by their numbers, in order."""
    found = {}
    for entry in files(__package__).joinpath("migrations").iterdir():
        match = _FILE.fullmatch(entry.name)
        if match:
            found[int(match[1])] = Migration(int(match[1]), entry.read_text(encoding="utf-8"))
    return dict(sorted(found.items()))


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


def quick(numbers: Iterable[int]) -> list[int]:
    """Return those of some migrations that are needed before anything else works."""
    return [number for number in numbers if not migrations()[number].is_online]


def ledger_of(connection: Connection, schema: str) -> Ledger:
    """Return which migrations were applied; none, if there is no schema.

    Raises SchemaVersionError if the role may not know.
    """
    texts = Queries("migrate.sql", schema)
    if connection.execute(texts["is_there"].text, {"schema": schema}).fetchone() is None:
        return Ledger(frozenset(), 0)
    try:
        rows = connection.execute(texts["ledger"].text).fetchall()
    except errors.InsufficientPrivilege as error:
        user = connection.info.user
        raise SchemaVersionError(
            f'The role "{user}" may not use the schema {schema!r}: let its owner run '
            f"`celery -A yourproject durable migrate --grant {user}`."
        ) from error
    return Ledger(frozenset(number for number, _ in rows), max((oldest or 0 for _, oldest in rows), default=0))
