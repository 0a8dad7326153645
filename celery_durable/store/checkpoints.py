"""The outcomes of steps: written under the fence, never changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from psycopg import errors

from ..exceptions import StepError
from ..serialization import Payload
from .host import Hosted, Place, hosted, sqlstate_of
from .pool import Database
from .queries import Queries
from .rows import Checkpoint, Fence, Standing, StepRecord, StepRow
from .transaction import OVERDUE, Transaction

#: Bytes: more than a value can have.
ANY_SIZE = 2**40
_OF_A_RECORD = (
    "key", "seq", "tries", "ok", "value", "content_type", "args", "fingerprint", "errors", "took",
)  # fmt: skip


class Checkpoints:
    """Table ``checkpoint``."""

    def __init__(self, database: Database, schema: str) -> None:
        self._database = database
        self._sql = Queries("checkpoints.sql", schema)

    def save(self, fence: Fence, record: StepRecord, *, patience: float) -> bool:
        """Record an outcome in one round trip, if all is well with the run.

        False: it isn't, or an outcome is there already; nothing was written, ask ``save_slow``.
        """
        try:
            return self._database.count(self._sql["save"], _params(fence, record), patience=patience) == 1
        except errors.UniqueViolation:
            return False

    def save_slow(self, fence: Fence, record: StepRecord, *, patience: float) -> Standing | None:
        """Record an outcome if the token still matches, and tell how the run stands; None: it isn't ours."""
        return _standing(self._database.run(self._sql["save_slow"], _params(fence, record), patience=patience), record)

    def save_many(self, fence: Fence, records: Sequence[StepRecord], *, patience: float) -> bool:
        """Record the outcomes of several steps in one round trip, if all is well with the run.

        False: it isn't, or one of them is there already or can't be stored; nothing was written.
        """
        one_by_one = [_params(fence, record) for record in records]
        lists = {f"{name}s": [params[name] for params in one_by_one] for name in _OF_A_RECORD}
        params = {"id": fence.id, "attempt": fence.attempt, "token": fence.token, **lists}
        try:
            return self._database.count(self._sql["save_many"], params, patience=patience) == len(records)
        except (errors.IntegrityError, errors.DataError):
            return False

    def save_try(
        self,
        fence: Fence,
        record: StepRecord,
        delay: float | None,
        *,
        spent: bool = False,
        kill_in: float | None = None,
        patience: float,
    ) -> Standing | None:
        """Record a try that failed, with the seconds until the next, or one that starts (no delay).

        ``spent``: the tries count the one that starts. ``kill_in``: the seconds after which a hard time limit will
        have ended its process.
        """
        params = _params(fence, record) | {"delay": delay, "spent": spent, "kill_in": kill_in}
        return _standing(self._database.run(self._sql["save_try"], params, patience=patience), record)

    @contextmanager
    def transaction(
        self, idle_timeout: float, *, patience: float, place: Place | None = None
    ) -> Iterator[StepTransaction]:
        """Begin a transaction that a step's own statements and its checkpoint share, and commit it at the end.

        ``place``: a way of the app's own into our database. Raises Conflict if another transaction is in the way,
        DatabaseUnavailable if it isn't known whether it was committed, StepError if the step has left it in a state
        in which it can't be, and errors of Postgres.
        """
        begin = self._database.transaction if place is None else partial(hosted, place)
        with begin(patience=patience) as transaction:
            yield StepTransaction(transaction, self._sql, idle_timeout)

    def of_workflow(self, workflow_id: str, *, most: int | None = None, patience: float) -> list[StepRow]:
        """Return all steps of a workflow in the order of their first call, without values larger than ``most``."""
        params = {"id": workflow_id, "most": ANY_SIZE if most is None else most}
        rows = self._database.run(self._sql["of_workflow"], params, patience=patience)
        return [StepRow.of(row) for row in rows]


class StepTransaction:
    """The transaction of an atomic step."""

    def __init__(self, transaction: Transaction | Hosted, sql: Queries, idle_timeout: float) -> None:
        self._transaction = transaction
        self._sql = sql
        self._idle_timeout = idle_timeout

    @property
    def connection(self) -> Any:
        """The connection for the step's own statements."""
        return self._transaction.connection

    @property
    def session(self) -> Any:
        """The session of an object-relational mapper on that connection."""
        return self._transaction.session

    def save(self, fence: Fence, record: StepRecord) -> Standing | None:
        """Write the outcome under the fence, as ``save_slow``; from here the transaction may hang no longer.

        A worker that hung between this and the commit would hold the workflow's row.
        """
        self._bind()
        return _standing(self._transaction.run(self._sql["save_slow"], _params(fence, record)), record)

    def _bind(self) -> None:
        try:
            self._transaction.run(self._sql["bound"], {"timeout": f"{self._idle_timeout * 1000:.0f}"})
        except Exception as error:
            if sqlstate_of(error) not in OVERDUE:
                raise
            raise StepError(
                "Postgres has ended the step's transaction, which was idle for longer than the settings of its role or "
                "database allow: begin the step with `SET LOCAL idle_in_transaction_session_timeout = '10min'` (or "
                "`transaction_timeout`, where that is set), or raise that setting."
            ) from error

    def abandon(self, error: BaseException | None = None) -> None:
        """Roll back when the block ends; raise the body's error if it is the database's own."""
        self._transaction.abandon(error)


def _params(fence: Fence, record: StepRecord) -> dict[str, Any]:
    payload = record.payload
    return {
        "id": fence.id,
        "attempt": fence.attempt,
        "token": fence.token,
        "key": record.key,
        "seq": record.seq,
        "tries": record.tries,
        "args": record.args,
        "fingerprint": record.fingerprint,
        "errors": record.errors,
        "ok": record.ok,
        "value": None if payload is None else payload.data,
        "content_type": None if payload is None else payload.content_type,
        "took": record.took,
    }


def _standing(rows: list[tuple[Any, ...]], record: StepRecord) -> Standing | None:
    if not rows:
        return None
    state, draining, late, ok, value, content_type = rows[0]
    settled = None
    if ok is not None:
        settled = Checkpoint(record.key, record.seq, record.tries, ok, Payload(value, content_type), record.args)
    return Standing(state, draining, late, settled)
