"""Markers of atomic steps in databases of the app's own: what was committed there, until our checkpoint says so."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..exceptions import SchemaVersionError
from ..serialization import Payload
from .host import Hosted, Place, hosted
from .queries import Queries, Query, in_schema
from .rows import Fence
from .transaction import Conflict, brief

logger = logging.getLogger("celery_durable.store")

#: Seconds. A transaction that hangs for longer than the first has lost its connection; no marker goes before the other.
LONGEST_IDLE, SHORTEST_MEMORY = 86400.0, 2 * 86400.0
#: Seconds between two looks of a process for old markers, and how many it removes then.
_PRUNE_INTERVAL, _MOST_PRUNED = 3600.0, 1000

_MAKE = """
CREATE SCHEMA IF NOT EXISTS {schema};
CREATE TABLE IF NOT EXISTS {schema}.marker (
    workflow      text NOT NULL,
    born          text NOT NULL,
    key           text NOT NULL,
    attempt       integer NOT NULL,
    token         uuid NOT NULL,
    value         bytea,
    content_type  text,
    at            timestamptz NOT NULL,
    PRIMARY KEY (workflow, born, key)
);
CREATE INDEX IF NOT EXISTS marker_at ON {schema}.marker (at);
COMMENT ON TABLE {schema}.marker IS
    'Values of steps that were committed here with their effects; born tells workflows apart that have had one id.';"""


@dataclass(frozen=True, slots=True)
class Mark:
    """One attempt's try at one step."""

    fence: Fence
    #: When the workflow was made: an id may be used again.
    born: str
    key: str

    def params(self) -> dict[str, Any]:
        """Return it as our statements take it."""
        fence = self.fence
        facts = {"workflow": fence.id, "born": self.born, "key": self.key}
        return {**facts, "attempt": fence.attempt, "token": str(fence.token)}


class Markers:
    """Table ``marker`` of one database of the app's own."""

    def __init__(self, place: Place, schema: str, *, auto_migrate: bool) -> None:
        self._place = place
        self._schema = schema
        self._auto_migrate = auto_migrate
        self._sql = Queries("markers.sql", schema)
        self._is_there = False
        #: When this process looks for old markers, on the monotonic clock.
        self.prune_at = time.monotonic() + _PRUNE_INTERVAL
        #: Older ones were looked at: their workflows may stay for ever. None: look from the first one on.
        self._looked_until: Any = None

    def reserve(self, mark: Mark, *, patience: float) -> tuple[bool, Payload | None]:
        """Tell whether it is this attempt's turn, and the value that has been committed already.

        After it no earlier attempt can commit. Raises DatabaseUnavailable, and the database's own errors.
        """
        self.make(patience=patience)
        while True:
            try:
                with hosted(self._place, patience=patience) as transaction:
                    rows = transaction.run(self._sql["reserve"], mark.params())
            except Conflict:
                continue
            for token, value, content_type in rows:
                is_mine = str(token) == str(mark.fence.token)
                return is_mine, None if value is None else Payload(value, content_type)

    @contextmanager
    def transaction(self, idle_timeout: float, *, patience: float) -> Iterator[MarkedTransaction]:
        """Begin a transaction that a step's own statements and its marker share, and commit it at the end.

        ``idle_timeout``: the seconds that it may hang once the marker is written.
        """
        self.make(patience=patience)
        with hosted(self._place, patience=patience) as transaction:
            transaction.run(self._sql["bound"], {"timeout": _milliseconds(LONGEST_IDLE)})
            yield MarkedTransaction(transaction, self._sql, idle_timeout)

    def make(self, *, patience: float) -> None:
        """Make the table where it isn't; raise SchemaVersionError if that is left to somebody else."""
        if self._is_there:
            return
        table = in_schema("{schema}.marker", self._schema)
        with hosted(self._place, patience=patience) as transaction:
            if not transaction.run(self._sql["exists"], {"table": table})[0][0]:
                if not self._auto_migrate:
                    raise SchemaVersionError(
                        f"{self._place.name} has no table {table}, which atomic steps there need, and "
                        "durable_auto_migrate is off: make it with the SQL of `celery -A yourproject durable migrate "
                        "--markers`, or in Django with `manage.py migrate --database`."
                    )
                transaction.run(Query("markers.make", script(self._schema)), {})
        self._is_there = True

    def prune(self, retention: float, living: Callable[[Sequence[str]], dict[str, str]]) -> None:
        """Remove, from time to time, the markers of workflows that aren't there any more.

        ``living`` returns when those were made of some ids that are. It is no duty: what fails is done another time.
        """
        if time.monotonic() < self.prune_at:
            return
        self.prune_at = time.monotonic() + _PRUNE_INTERVAL
        age = max(retention, SHORTEST_MEMORY)
        try:
            with hosted(self._place, patience=0) as transaction:
                page = {"age": age, "after": self._looked_until, "limit": _MOST_PRUNED}
                old = transaction.run(self._sql["old"], page)
            known = living([workflow for workflow, _, _ in old])
            gone = [(workflow, born) for workflow, born, _ in old if known.get(workflow) != born]
            if gone:
                workflows, borns = map(list, zip(*gone, strict=True))
                with hosted(self._place, patience=0) as transaction:
                    transaction.run(self._sql["forget"], {"workflows": workflows, "borns": borns, "age": age})
            self._looked_until = old[-1][2] if len(old) == _MOST_PRUNED else None
        except Exception as error:  # noqa: BLE001 - too many markers harm nobody
            logger.warning("Old markers in %s are left for later: %s", self._place.name, brief(error))


class MarkedTransaction:
    """The transaction of an atomic step in a database of the app's own."""

    def __init__(self, transaction: Hosted, sql: Queries, idle_timeout: float) -> None:
        self._transaction = transaction
        self._sql = sql
        self._idle_timeout = idle_timeout
        self.connection = transaction.connection
        self.session = transaction.session

    def keep(self, mark: Mark, payload: Payload) -> bool:
        """Write the step's value; False: it isn't this attempt's turn any more, or there is one."""
        value = {"value": payload.data, "content_type": payload.content_type}
        self._transaction.run(self._sql["hurry"], {"timeout": _milliseconds(self._idle_timeout)})
        return bool(self._transaction.run(self._sql["keep"], mark.params() | value))

    def abandon(self, error: BaseException | None = None) -> None:
        """Roll back when the block ends; raise the body's error if it is the database's own."""
        self._transaction.abandon(error)


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.0f}"


def script(schema: str) -> str:
    """Return the SQL that makes the table."""
    return in_schema(_MAKE, schema)
