"""Starts and messages in the caller's own database transaction: ``durable.outbox``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any

from .engine.context import current_attempt, current_step
from .exceptions import ConfigurationError, NotAllowedInStep, WorkflowNotFound
from .installation import Installation
from .store import Birth, Host, Letter, Outgoing, PsycopgHost
from .store.rows import Published


class Box:
    """An open outbox: a transaction of the caller's own, of which the nodes hear when it is committed."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._installation: Installation | None = None
        self.is_over = False

    def publish(self, birth: Birth) -> tuple[Published, str | None]:
        """Write a new workflow, which starts when the caller has committed; return the task that has its id, too."""
        return self._store.workflows.publish_in(self._out, birth)

    def put(self, letter: Letter) -> bool:
        """Write a message, which is sent when the caller has committed; False if its workflow can't be had."""
        return self._store.messages.put_in(self._out, letter)

    def cancel(self, ids: Collection[str], *, children: bool) -> None:
        """Have workflows cancelled when the caller has committed; raise WorkflowNotFound."""
        known = self._store.workflows.names_in(self._out, ids)
        unknown = [each for each in ids if each not in known]
        if unknown:
            raise WorkflowNotFound(f"There is no workflow {', '.join(map(repr, unknown[:10]))}; nothing was done.")
        self._store.workflows.ask_to_cancel_in(self._out, ids, children=children)

    def of(self, installation: Installation) -> Box:
        """Use the box for this app; all of it must be for one."""
        if self._installation not in (None, installation):
            raise ConfigurationError("One outbox is for the workflows of one app: open another one for the other app.")
        self._installation = installation
        return self

    @property
    def _store(self) -> Any:
        assert self._installation is not None
        return self._installation.store

    @property
    def _out(self) -> Outgoing:
        assert self._installation is not None
        return Outgoing(self._host, self._installation.config.schema)

    @property
    def run(self) -> Callable[[Callable[[], Any]], Any] | None:
        """How something that blocks is awaited on an asynchronous connection; None: this isn't one."""
        run: Callable[[Callable[[], Any]], Any] | None = getattr(self._host, "run_sync", None)
        return run


_box: ContextVar[Box | None] = ContextVar("celery_durable_outbox", default=None)


class outbox:  # noqa: N801 - reads as the context manager that it is
    """Let starts, sends and cancellations in the block belong to the caller's transaction on a connection.

    They happen if it commits, at once, and leave nothing if it rolls back; this neither begins nor commits it. Only
    rows are inserted: no lock on any workflow is held until the commit. The connection must lead to the database of
    the workflows. ``delay()`` returns a handle as ever, but its ``get()`` raises NotAllowedInStep in the block: the
    workflow can't start before the commit.

    ``connection``: a ``psycopg.Connection``, a Session or Connection of SQLAlchemy's, or one of ``django.db``'s
    connections; with ``async with``, an AsyncSession or AsyncConnection of SQLAlchemy's, where workflows are started
    by ``await wf.adelay(…)`` and messages sent by ``await durable.asend(…)``.

    Raises TypeError for anything else, ConfigurationError for a connection in autocommit without a transaction, and
    for another database; WorkflowConflict if another open transaction starts the same id; NotAllowedInStep in
    workflows and steps (an atomic step has a transaction of its own).
    """

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._opened: list[tuple[Box, Token[Box | None]]] = []

    def __enter__(self) -> None:
        box = self._box()
        if box.run is not None:
            raise TypeError("An asynchronous connection needs `async with durable.outbox(…)`.")
        self._open(box)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        box, token = self._opened.pop()
        # Tasks and threads that were made in the block have inherited the box.
        box.is_over = True
        _box.reset(token)

    async def __aenter__(self) -> None:
        box = self._box()
        if box.run is None:
            raise TypeError(f"This connection needs `with durable.outbox(…)`: {self._connection!r:.100} isn't async.")
        self._open(box)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)

    def _box(self) -> Box:
        _forbid_where_none_is_needed()
        return Box(_host(self._connection))

    def _open(self, box: Box) -> None:
        self._opened.append((box, _box.set(box)))


def current(installation: Installation) -> Box | None:
    """Return the outbox that the calling code is in: an open one, or a transaction that needs none to be opened."""
    box = _open_box()
    if box is not None:
        return box.of(installation)
    host = installation.surrounding()
    return None if host is None else Box(host).of(installation)


def forbid_in_outbox(what: str) -> None:
    """Raise NotAllowedInStep in an outbox."""
    if _open_box() is not None:
        raise NotAllowedInStep(f"An outbox can't {what}: nothing in it has happened before its transaction commits.")


def runner() -> Callable[[Callable[[], Any]], Any] | None:
    """Return how something that blocks is awaited in an outbox on an asynchronous connection; None anywhere else."""
    box = _open_box()
    return None if box is None else box.run


def _open_box() -> Box | None:
    box = _box.get()
    return None if box is None or box.is_over else box


def _forbid_where_none_is_needed() -> None:
    if current_step() is not None:
        raise NotAllowedInStep("A step can't use an outbox: start and send in the workflow, between steps.")
    if current_attempt() is not None:
        raise NotAllowedInStep("A workflow needs no outbox: what it starts and sends is kept with its own checkpoints.")


def _host(connection: Any) -> Host:
    """Return a connection as what we need of it, by the library that it belongs to."""
    finders: list[Callable[[Any], Host | None]] = []
    if "sqlalchemy" in sys.modules:
        from .contrib import sqlalchemy

        finders.append(sqlalchemy.host_of)
    if "django.db" in sys.modules:
        from .contrib.django import transactions

        finders.append(transactions.host_of)
    found = (find(connection) for find in finders)
    return next((host for host in found if host is not None), None) or PsycopgHost(connection)
