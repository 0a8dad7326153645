"""Starts and messages in the caller's own database transaction: ``durable.outbox``."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from .engine.context import current_attempt, current_step
from .exceptions import ConfigurationError, NotAllowedInStep, WorkflowNotFound
from .installation import Installation
from .store import Birth, Guest, Letter
from .store.rows import Published


class Box:
    """An open outbox."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._installation: Installation | None = None
        self._guest: Guest | None = None

    def publish(self, birth: Birth) -> tuple[Published, str | None]:
        """Write a new workflow, which starts when the caller has committed; return the task that has its id, too."""
        return self._store.workflows.publish_in(self._at, birth)

    def put(self, letter: Letter) -> bool:
        """Write a message, which is sent when the caller has committed; False if its workflow can't be had."""
        return self._store.messages.put_in(self._at, letter)

    def cancel(self, ids: Collection[str], *, children: bool) -> None:
        """Have workflows cancelled when the caller has committed; raise WorkflowNotFound."""
        known = self._store.workflows.names_in(self._at, ids)
        unknown = [each for each in ids if each not in known]
        if unknown:
            raise WorkflowNotFound(f"There is no workflow {', '.join(map(repr, unknown[:10]))}; nothing was done.")
        self._store.workflows.ask_to_cancel_in(self._at, ids, children=children)

    def of(self, installation: Installation) -> Box:
        """Use the box for this app; all of it must be for one."""
        if self._installation not in (None, installation):
            raise ConfigurationError("One outbox is for the workflows of one app: open another one for the other app.")
        if self._guest is None:
            self._guest = Guest(self._connection, installation.config.schema)
        self._installation = installation
        return self

    @property
    def _store(self) -> Any:
        assert self._installation is not None
        return self._installation.store

    @property
    def _at(self) -> Guest:
        assert self._guest is not None
        return self._guest


_box: ContextVar[Box | None] = ContextVar("celery_durable_outbox", default=None)


@contextmanager
def outbox(connection: Any) -> Iterator[None]:
    """Let starts, sends and cancellations in the block belong to the caller's transaction on a psycopg connection.

    They happen if it commits, at once, and leave nothing if it rolls back; this neither begins nor commits it. Only
    rows are inserted: no lock on any workflow is held until the commit. The connection must lead to the database of
    the workflows. ``delay()`` returns a handle as ever, but its ``get()`` raises NotAllowedInStep in the block: the
    workflow can't start before the commit.

    Raises TypeError for anything else than a ``psycopg.Connection``, ConfigurationError for one in autocommit without
    a transaction, and for another database; WorkflowConflict if another open transaction starts the same id;
    NotAllowedInStep in workflows and steps (an atomic step has a transaction of its own).
    """
    if current_step() is not None:
        raise NotAllowedInStep("A step can't use an outbox: start and send in the workflow, between steps.")
    if current_attempt() is not None:
        raise NotAllowedInStep("A workflow needs no outbox: what it starts and sends is kept with its own checkpoints.")
    token = _box.set(Box(connection))
    try:
        yield
    finally:
        _box.reset(token)


def current(installation: Installation) -> Box | None:
    """Return the outbox that the calling code is in."""
    box = _box.get()
    return None if box is None else box.of(installation)


def forbid_in_outbox(what: str) -> None:
    """Raise NotAllowedInStep in an outbox."""
    if _box.get() is not None:
        raise NotAllowedInStep(f"An outbox can't {what}: nothing in it has happened before its transaction commits.")
