"""How statements get to Postgres on a connection of ours: prepared, in one round trip, as cheaply as the pool allows.

==========  =====================================================================================
Direct      one call into libpq, in which the thread blocks: a cursor costs several times as much
ByCursor    psycopg's cursors: under gevent and eventlet, where a thread may not block, behind
            pgbouncer, where nothing may be prepared, and with a libpq that has no pipelines
==========  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cached_property
from itertools import count
from typing import Any, NamedTuple, Protocol

import psycopg
from psycopg import errors, generators
from psycopg.abc import PQGen
from psycopg.adapt import PyFormat, Transformer
from psycopg.pq import DiagnosticField, ExecStatus

from ..exceptions import SerializationError
from ..native import under_eventlet, under_gevent
from .queries import Query
from .shield import deferred_signals
from .transaction import Connection, Row, brief

Statement = tuple[Query, Mapping[str, Any]]

#: Statements that a session keeps prepared: each takes memory of Postgres, and one with many parameters that may be
#: None has many combinations of types.
MOST_PREPARED = 200

_DONE = (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK)
_BINARY = 1
_AS_IT_LIKES = PyFormat.AUTO


class Answer(NamedTuple):
    """What Postgres has answered to a statement."""

    rows: list[Row]
    #: Rows that were written, or read.
    rowcount: int


class Executor(Protocol):
    """Executes on one connection. Raises errors of psycopg, and SerializationError for a row that can't be read."""

    def run(self, query: Query, params: Mapping[str, Any]) -> Answer:
        """Execute one statement."""

    def run_all(self, statements: Sequence[Statement], *, apart: bool) -> list[Answer]:
        """Execute several in one round trip: in one transaction, or each in its own after the one before."""


class Session(psycopg.Connection[Row]):
    """A connection, and what executes on it."""

    @cached_property
    def executor(self) -> Executor:
        """The cheapest that this process and this connection allow."""
        may_block = not under_gevent() and not under_eventlet()
        may_prepare = self.prepare_threshold is not None and psycopg.Pipeline.is_supported()
        return Direct(self) if may_block and may_prepare else ByCursor(self)


class Direct:
    """Calls libpq.

    The call that executes a prepared statement returns when Postgres has answered. Meanwhile other threads run, and
    Python's signal handlers don't: they run when it has returned, so nothing is raised in the middle of a statement.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._pgconn = connection.pgconn
        self._values = Transformer(connection)
        #: Statements by what they are called in this session: one for each combination of its parameters' types.
        self._names: dict[tuple[str, tuple[int, ...]], bytes] = {}
        self._prepared: set[bytes] = set()
        #: Never used twice: of what somebody has discarded, it isn't known what else is there still.
        self._numbers = count()

    def run(self, query: Query, params: Mapping[str, Any]) -> Answer:
        """Execute one statement; its first use prepares it in the same round trip."""
        bound = self._bound(query, params)
        if bound.name in self._prepared:
            try:
                return self._answer(self._pgconn.exec_prepared(bound.name, bound.values, bound.formats, _BINARY))
            except errors.InvalidSqlStatementName:
                bound = self._renamed([bound])[0]  # nothing was executed
        return self._together([bound], apart=False)[0]

    def run_all(self, statements: Sequence[Statement], *, apart: bool) -> list[Answer]:
        """Execute several in a pipeline."""
        bound = [self._bound(*statement) for statement in statements]
        try:
            return self._together(bound, apart=apart)
        except errors.InvalidSqlStatementName:
            return self._together(self._renamed(bound), apart=apart)

    def _renamed(self, statements: Sequence[_Bound]) -> list[_Bound]:
        """Forget what this session had, which somebody has discarded."""
        self._names.clear()
        self._prepared.clear()
        return [each._replace(name=self._name_of(each.query, each.types)) for each in statements]

    def _bound(self, query: Query, params: Mapping[str, Any]) -> _Bound:
        values = [params[name] for name in query.names]
        written = self._values.dump_sequence(values, [_AS_IT_LIKES] * len(values))
        types = self._values.types or ()
        return _Bound(query, self._name_of(query, types), written, types, self._values.formats)

    def _name_of(self, query: Query, types: tuple[int, ...]) -> bytes:
        return self._names.get((query.name, types)) or self._named(query, types)

    def _named(self, query: Query, types: tuple[int, ...]) -> bytes:
        if len(self._prepared) >= MOST_PREPARED:
            with deferred_signals():
                # Not those that psycopg has prepared.
                self._connection.execute(b";".join(b'DEALLOCATE "%s"' % name for name in self._prepared))
            self._names.clear()
            self._prepared.clear()
        name = self._names[query.name, types] = f"{query.name}/{next(self._numbers)}".encode()
        return name

    def _together(self, statements: Sequence[_Bound], *, apart: bool) -> list[Answer]:
        try:
            with deferred_signals():
                results = self._in_pipeline(statements, apart=apart)
        except BaseException:
            self._connection.close()  # there may be answers to come, which the next user would take for its own
            raise
        return [self._answer(result) for result in results]

    def _in_pipeline(self, statements: Sequence[_Bound], *, apart: bool) -> list[Any]:
        """Send all of them, then return the result of each."""
        pgconn = self._pgconn
        pgconn.enter_pipeline_mode()
        new = [self._send(each, new_transaction=apart and place > 0) for place, each in enumerate(statements)]
        pgconn.pipeline_sync()
        results = iter(self._connection.wait(self._results(syncs=len(statements) if apart else 1)))
        executed = [self._executed(each, is_new, results) for each, is_new in zip(statements, new, strict=True)]
        pgconn.exit_pipeline_mode()
        return executed

    def _send(self, bound: _Bound, *, new_transaction: bool) -> bool:
        """Send one; tell whether it had to be prepared."""
        if new_transaction:
            self._pgconn.pipeline_sync()
        is_new = bound.name not in self._prepared
        if is_new:
            self._pgconn.send_prepare(bound.name, bound.query.numbered, bound.types)
        self._pgconn.send_query_prepared(bound.name, bound.values, bound.formats, _BINARY)
        return is_new

    def _results(self, syncs: int) -> PQGen[list[Any]]:
        """Collect what is answered until the end of the pipeline."""
        found: list[Any] = []
        yield from generators.send(self._pgconn)
        while syncs:
            result = yield from generators.fetch(self._pgconn)
            if result is None:
                continue
            if result.status == ExecStatus.PIPELINE_SYNC:
                syncs -= 1
            else:
                found.append(result)
        return found

    def _executed(self, bound: _Bound, is_new: bool, results: Iterator[Any]) -> Any:
        """Return the result of one statement: that of preparing it, if that has failed."""
        if not is_new:
            return next(results)
        prepared, executed = next(results), next(results)
        if prepared.status not in _DONE:
            return prepared
        self._prepared.add(bound.name)  # it stays, however its execution has ended
        return executed

    def _answer(self, result: Any) -> Answer:
        status = result.status
        if status == ExecStatus.COMMAND_OK:
            return Answer([], result.command_tuples or 0)
        if status not in _DONE:
            raise self._error_of(result)
        self._values.set_pgresult(result)
        try:
            rows = self._values.load_rows(0, result.ntuples, tuple)
        except psycopg.DataError as error:
            raise _unreadable(error) from error
        finally:
            self._values.set_pgresult(None)
        return Answer(rows, result.command_tuples or 0)

    def _error_of(self, result: Any) -> psycopg.Error:
        encoding = self._connection.info.encoding
        if result.error_field(DiagnosticField.SQLSTATE) is None:
            self._connection.close()  # not Postgres says it but libpq: the connection has broken
            return psycopg.OperationalError(result.get_error_message(encoding))
        return errors.error_from_result(result, encoding=encoding)


class _Bound(NamedTuple):
    """A statement with its parameters, as libpq takes it."""

    query: Query
    name: bytes
    values: Sequence[Any]
    types: tuple[int, ...]
    formats: Sequence[int] | None


class ByCursor:
    """Leaves all of it to psycopg."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._prepared: set[tuple[Any, ...]] = set()

    def run(self, query: Query, params: Mapping[str, Any]) -> Answer:
        """Execute one statement; its first use prepares it in the same round trip."""
        shape = (query.text, *map(type, params.values()))
        with deferred_signals():
            if shape in self._prepared or not psycopg.Pipeline.is_supported():
                return _answer_of(self._connection.execute(query.text, params, prepare=True))
            with self._connection.pipeline():
                cursor = self._connection.execute(query.text, params, prepare=True)
        self._prepared.add(shape)
        return _answer_of(cursor)

    def run_all(self, statements: Sequence[Statement], *, apart: bool) -> list[Answer]:
        """Execute several, in a pipeline where there are any."""
        with deferred_signals(), self._pipeline(apart=apart) as execute:
            cursors = [execute(query.text, params) for query, params in statements]
        return list(map(_answer_of, cursors))

    @contextmanager
    def _pipeline(self, *, apart: bool) -> Iterator[Callable[..., psycopg.Cursor[Row]]]:
        """Send statements without waiting for answers: as one transaction, or each as its own after the one before."""
        connection = self._connection
        if not psycopg.Pipeline.is_supported():
            with nullcontext() if apart else connection.transaction():
                yield connection.execute
            return
        with connection.pipeline() as pipeline:
            # The public sync() waits for the answers so far; a psycopg without the other one costs a round trip more.
            end_transaction = getattr(pipeline, "_enqueue_sync", pipeline.sync)
            count = 0

            def execute(text: str, params: Mapping[str, Any]) -> psycopg.Cursor[Row]:
                nonlocal count
                if apart and count:
                    end_transaction()
                count += 1
                return connection.execute(text, params, prepare=True)

            yield execute


def planned_anew(connection: Connection, query: Query, params: Mapping[str, Any]) -> list[Row]:
    """Execute with a plan that is made for these very parameters, and return all rows."""
    with deferred_signals():
        return _answer_of(connection.execute(query.text, params, prepare=False)).rows


def _answer_of(cursor: psycopg.Cursor[Row]) -> Answer:
    try:
        return Answer(cursor.fetchall() if cursor.description else [], cursor.rowcount)
    except psycopg.DataError as error:
        raise _unreadable(error) from error


def _unreadable(error: psycopg.Error) -> SerializationError:
    """Return what says that Python can't hold a value, as a date after the year 9999."""
    return SerializationError(f"A row can't be read: it has a value that Python hasn't ({brief(error)}).")
