"""The life of a workflow: one statement for each arrow of the state machine."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from ..serialization import Payload
from .pool import Database
from .queries import Queries
from .rows import Checkpoint, Claim, Fence, Look, StoredMessage, StoredOutcome, WorkflowRow


@dataclass(frozen=True, slots=True)
class Birth:
    """What is written when a workflow is started."""

    id: str
    name: str
    queue: str
    envelope: str
    body: bytes
    content_type: str
    content_encoding: str
    max_crashes: int
    republish_after: float
    #: Seconds until it may start; None: now, its message is being sent by the caller.
    delay: float | None = None
    timeout: float | None = None
    retries: int = 0
    parent_id: str | None = None
    root_id: str | None = None


class Workflows:
    """Tables ``workflow``, ``input`` and ``output``."""

    def __init__(self, database: Database, schema: str) -> None:
        self._database = database
        self._sql = Queries("workflows.sql", schema)

    def publish(self, birth: Birth, *, patience: float) -> tuple[bool, datetime | None]:
        """Write a new workflow; (False, None) if the id is taken. The time is that of the publication."""
        params = {name: getattr(birth, name) for name in Birth.__slots__}
        rows = self._run("publish", patience, **params)
        return (True, rows[0][0]) if rows else (False, None)

    def unsent(self, ids: Collection[str], *, patience: float) -> None:
        """Note that these messages couldn't be sent."""
        self._run("unsent", patience, ids=list(ids))

    def name_of(self, workflow_id: str, *, patience: float) -> str | None:
        """Return the task that has taken an id, if any."""
        rows = self._run("name_of", patience, id=workflow_id)
        return rows[0][0] if rows else None

    def claim(
        self, workflow_id: str, name: str, token: UUID, node: UUID, *, retries: int, patience: float
    ) -> Claim | None:
        """Take an enqueued workflow, with its history; None if it can't be had (``look`` says why).

        ``retries`` is what the message says: only the latest message of a workflow can claim it.
        """
        rows = self._run("claim", patience, id=workflow_id, name=name, token=token, node=node, retries=retries)
        if not rows:
            return None
        attempt, crashes, signal, now = rows[0][:4]
        history = {row[4]: _checkpoint(row[4:]) for row in rows if row[4] is not None}
        return Claim(Fence(workflow_id, attempt, token, node), crashes, signal, now, history)

    def look(self, fence: Fence, *, patience: float) -> Look | None:
        """Return how a workflow stands, seen by an attempt; None if there is no such workflow."""
        rows = self._run("look", patience, id=fence.id, attempt=fence.attempt, token=fence.token, node=fence.node)
        return Look(*rows[0]) if rows else None

    def finish(
        self, fence: Fence, state: str, payload: Payload, *, ok: bool, dispatched: bool, patience: float
    ) -> bool:
        """End an attempt with an outcome; False if the run isn't ours to end any more."""
        return bool(
            self._run(
                "finish", patience, id=fence.id, attempt=fence.attempt, token=fence.token, state=state, ok=ok,
                value=payload.data, content_type=payload.content_type, dispatched=dispatched,
            )
        )  # fmt: skip

    def suspend(self, fence: Fence, reason: str, seconds: float | None, signal: int, *, patience: float) -> bool:
        """Let an attempt wait without a worker; False if the run isn't ours any more."""
        return bool(
            self._run(
                "suspend", patience, id=fence.id, attempt=fence.attempt, token=fence.token, signal=signal,
                seconds=seconds, reason=reason,
            )
        )  # fmt: skip

    def release(self, fence: Fence, republish_after: float, *, patience: float) -> StoredMessage | None:
        """Hand an attempt over; return the message that the caller now sends."""
        rows = self._run(
            "release",
            patience,
            id=fence.id,
            attempt=fence.attempt,
            token=fence.token,
            republish_after=republish_after,
        )
        return StoredMessage(*rows[0]) if rows else None

    def again(self, fence: Fence, message: StoredMessage, retries: int, seconds: float, *, patience: float) -> bool:
        """End an attempt by Celery's nth retry: run once more with this message, in so many seconds."""
        return bool(
            self._run(
                "again", patience, id=fence.id, attempt=fence.attempt, token=fence.token, retries=retries,
                seconds=seconds, envelope=message.envelope, body=message.body, content_type=message.content_type,
                content_encoding=message.content_encoding,
            )
        )  # fmt: skip

    def resume(self, workflow_id: str, republish_after: float, *, patience: float) -> StoredMessage | None:
        """Let a workflow go on that has ended without success; return the message that the caller now sends."""
        rows = self._run("resume", patience, id=workflow_id, republish_after=republish_after)
        return StoredMessage(*rows[0]) if rows else None

    def expired(self, ids: Collection[str], *, verdict: Payload, patience: float) -> list[str]:
        """End workflows that weren't started in time, as Celery's ``expires`` has it."""
        return _ids(self._run("expired", patience, ids=list(ids), verdict=verdict.data))

    def rescue(
        self,
        node: UUID | None,
        lost: Collection[str],
        *,
        lease: float,
        verdict: Payload,
        limit: int,
        patience: float,
    ) -> list[tuple[str, str]]:
        """Enqueue orphans again, or end them as DEAD; return their ids and new states."""
        rows = self._run("rescue", patience, node=node, lost=list(lost), lease=lease, verdict=verdict.data, limit=limit)
        return [(row[0], row[1]) for row in rows]

    def hand_over(self, node: UUID, ids: Collection[str], *, patience: float) -> list[str]:
        """Enqueue again what a node that is being killed still runs."""
        return _ids(self._run("hand_over", patience, node=node, ids=list(ids)))

    def wake(self, *, limit: int, patience: float) -> list[str]:
        """Enqueue suspended workflows whose time has come."""
        return _ids(self._run("wake", patience, limit=limit))

    def expire(self, *, verdict: Payload, limit: int, patience: float) -> list[str]:
        """Cancel workflows past their deadline."""
        return _ids(self._run("expire", patience, verdict=verdict.data, limit=limit))

    def republish(self, *, republish_after: float, limit: int, patience: float) -> list[StoredMessage]:
        """Take the messages that are to be sent now."""
        rows = self._run("republish", patience, republish_after=republish_after, limit=limit)
        return [StoredMessage(*row) for row in rows]

    def redispatch(self, *, republish_after: float, lease: float, limit: int, patience: float) -> list[StoredMessage]:
        """Take the messages of outcomes that no living process delivers."""
        rows = self._run("redispatch", patience, republish_after=republish_after, lease=lease, limit=limit)
        return [StoredMessage(*row) for row in rows]

    def adopt(self, workflow_id: str, name: str, node: UUID, *, patience: float) -> StoredOutcome | None:
        """Take over the delivery of an outcome; None if another process has it."""
        rows = self._run("adopt", patience, id=workflow_id, name=name, node=node)
        return StoredOutcome(rows[0][0], rows[0][1], Payload(rows[0][2], rows[0][3])) if rows else None

    def confirm(self, node: UUID, ids: Collection[str], *, patience: float) -> None:
        """Note that Celery has delivered these outcomes."""
        self._run("confirm", patience, node=node, ids=list(ids))

    def prune(self, *, retention: float, limit: int, patience: float) -> list[str]:
        """Delete what finished long ago."""
        return _ids(self._run("prune", patience, retention=retention, limit=limit))

    def next_due(self, *, patience: float) -> float | None:
        """Return the seconds until the next timer is due, if there is one."""
        ((seconds,),) = self._run("next_due", patience)
        return None if seconds is None else float(seconds)

    def by_id(self, workflow_id: str, *, patience: float) -> WorkflowRow | None:
        """Return one workflow."""
        rows = self._run("by_id", patience, id=workflow_id)
        return WorkflowRow.of(rows[0]) if rows else None

    def matching(
        self,
        *,
        states: Collection[str] | None,
        name: str | None,
        queue: str | None,
        parent_id: str | None,
        limit: int,
        patience: float,
    ) -> list[WorkflowRow]:
        """Return the newest workflows that fit all filters."""
        rows = self._run(
            "matching", patience, states=None if states is None else list(states), name=name, queue=queue,
            parent_id=parent_id, limit=limit,
        )  # fmt: skip
        return [WorkflowRow.of(row) for row in rows]

    def _run(self, query: str, patience: float, **params: Any) -> list[tuple[Any, ...]]:
        return self._database.run(self._sql[query], params, patience=patience)


def _ids(rows: list[tuple[Any, ...]]) -> list[str]:
    return [row[0] for row in rows]


def _checkpoint(columns: tuple[Any, ...]) -> Checkpoint:
    key, seq, tries, ok, value, content_type, args, fingerprint, errors, due_in, overran, spent = columns
    payload = None if value is None else Payload(value, content_type)
    return Checkpoint(key, seq, tries, ok, payload, args, fingerprint, errors, due_in or 0.0, overran, spent)
