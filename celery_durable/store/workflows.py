"""The life of a workflow: one statement for each arrow of the state machine."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from psycopg import errors

from ..exceptions import WorkflowConflict
from ..serialization import Payload
from .checkpoints import ANY_SIZE
from .executing import Statement
from .outgoing import Outgoing, Taken
from .pool import Database
from .queries import Queries
from .rows import (
    Checkpoint,
    ChildStart,
    Claim,
    Fence,
    Look,
    Published,
    Standing,
    StepRecord,
    StoredMessage,
    StoredOutcome,
    Wakers,
    WorkflowRow,
)


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
    deduplication_id: str | None = None
    #: What is born when this one is cancelled or given up.
    on_cancel: Birth | None = None


@dataclass(frozen=True, slots=True)
class Fork:
    """What is written when a workflow begins with the first steps of another one."""

    source: str
    #: The steps before this one, by their place.
    cut: int
    message: StoredMessage
    #: What is started when it is cancelled or given up.
    on_cancel: StoredMessage | None


class Workflows:
    """Tables ``workflow``, ``input`` and ``output``."""

    def __init__(self, database: Database, schema: str) -> None:
        self._database = database
        self._sql = Queries("workflows.sql", schema)

    def publish(self, birth: Birth, *, patience: float) -> Published:
        """Write a new workflow, unless its id is taken, or its deduplication id is."""
        (row,) = self._beside_twins("publish", _of_birth(birth), patience)
        return Published(*row)

    def publish_in(self, out: Outgoing, birth: Birth) -> tuple[Published, str | None]:
        """Write a new workflow in a transaction of the caller's own; return the task that has its id, too.

        Raises WorkflowConflict if that transaction can't see the unfinished workflow with its deduplication id.
        """
        statement = self._sql["publish"], _of_birth(birth)
        try:
            (row,) = out.run(*statement)
        except Taken:
            # Another transaction has just been committed; in READ COMMITTED it can be seen now.
            (row,) = out.run_or_conflict(*statement)
        return Published(*row), self.names_in(out, [birth.id]).get(birth.id)

    def names_in(self, out: Outgoing, ids: Collection[str]) -> dict[str, str]:
        """Return the tasks that have taken these ids, as a transaction of the caller's own sees it."""
        return dict(out.run(self._sql["names_of"], {"ids": list(ids)}))

    def publish_many(self, births: Sequence[Birth], *, patience: float) -> dict[str, datetime | None]:
        """Write many new workflows in one statement; return when those that are born were published."""
        lists = {f"{name}s": [getattr(birth, name) for birth in births] for name in _OF_MANY}
        rows = self._run("publish_many", patience, republish_after=births[0].republish_after, **lists)
        return dict(rows)

    def bear(self, fence: Fence, record: StepRecord, birth: Birth, *, patience: float) -> ChildStart | None:
        """Write a child with the parent's checkpoint; None: the parent isn't ours any more."""
        assert record.payload is not None
        params = {
            **_of_birth(birth), "parent": fence.id, "attempt": fence.attempt, "token": fence.token, "key": record.key,
            "seq": record.seq, "value": record.payload.data, "value_type": record.payload.content_type,
            "args": record.args, "fingerprint": record.fingerprint,
        }  # fmt: skip
        rows = self._beside_twins("bear", params, patience)
        if not rows:
            return None
        state, draining, late, taken_by, child_id, is_new, published_at = rows[0]
        return ChildStart(Standing(state, draining, late), child_id, taken_by, is_new, published_at)

    def _beside_twins(self, query: str, params: dict[str, Any], patience: float) -> list[tuple[Any, ...]]:
        """Make a start's statement; another one with the same deduplication id may be made at this moment."""
        for _ in range(_MOST_TWINS):
            try:
                return self._run(query, patience, **params)
            except errors.UniqueViolation as error:
                twin = error  # the next look finds it
        raise twin

    def unsent(self, ids: Collection[str], *, patience: float) -> None:
        """Note that these messages couldn't be sent."""
        self._run("unsent", patience, ids=list(ids))

    def leave_to_others(self, delays: Mapping[str, float], *, patience: float) -> None:
        """Note that a worker without their task took these messages: each is sent again in so many seconds."""
        self._run("leave_to_others", patience, ids=list(delays), delays=list(delays.values()))

    def names_of(self, ids: Collection[str], *, patience: float) -> dict[str, str]:
        """Return the tasks that have taken these ids, by id."""
        return dict(self._run("names_of", patience, ids=list(ids)))

    def births_of(self, ids: Collection[str]) -> dict[str, str]:
        """Return when these workflows were made, of those that are there."""
        return dict(self._run("births_of", 0, ids=list(ids)))

    def claim(
        self, workflow_id: str, name: str, token: UUID, node: UUID, *, retries: int, patience: float
    ) -> Claim | None:
        """Take an enqueued workflow, with its history in no order; None if it can't be had (``look`` says why).

        ``retries`` is what the message says: only the latest message of a workflow can claim it.
        """
        rows = self._run("claim", patience, id=workflow_id, name=name, token=token, node=node, retries=retries)
        if not rows:
            return None
        attempt, crashes, now, deadline_in = next(row[-4:] for row in rows if row[0] is None)
        history = {row[0]: _checkpoint(*row) for row in rows if row[0] is not None}
        return Claim(Fence(workflow_id, attempt, token, node), crashes, now, deadline_in, history)

    def look(self, fence: Fence, *, patience: float) -> Look | None:
        """Return how a workflow stands, seen by an attempt; None if there is no such workflow."""
        rows = self._run("look", patience, id=fence.id, attempt=fence.attempt, token=fence.token, node=fence.node)
        return Look(*rows[0]) if rows else None

    def finish(
        self,
        fence: Fence,
        state: str,
        payload: Payload,
        then: Statement,
        *,
        error: str | None,
        dispatched: bool,
        patience: float,
    ) -> tuple[bool, list[StoredMessage]]:
        """End an attempt with an outcome; False if the run isn't ours to end any more.

        ``error`` is the beginning of what it has failed with, None for a success.
        ``then`` wakes those that await it, after the commit; their messages are returned, for the caller to send.
        """
        params = {
            "id": fence.id, "attempt": fence.attempt, "token": fence.token, "state": state, "ok": error is None,
            "error": error, "value": payload.data, "content_type": payload.content_type, "dispatched": dispatched,
        }  # fmt: skip
        done, woken = self._database.run_then((self._sql["finish"], params), then, patience=patience)
        return bool(done), [StoredMessage(*row) for row in woken]

    def suspend(
        self,
        fence: Fence,
        reason: str,
        seconds: float | None,
        wakers: Wakers,
        *,
        republish_after: float,
        patience: float,
    ) -> tuple[bool, StoredMessage | None]:
        """Let an attempt wait without a worker; False if the run isn't ours any more.

        What it waits for may be there already: then the message is returned with which it goes on.
        """
        while True:
            rows = self._run(
                "suspend", patience, id=fence.id, attempt=fence.attempt, token=fence.token, reason=reason,
                seconds=seconds, topics=sorted(wakers.topics), waits=list(wakers.waits),
                spares=list(wakers.waits.values()),
                republish_after=republish_after,
            )  # fmt: skip
            if not rows:
                return False, None
            state, *message = rows[0]
            if state is not None:
                return True, None if message[0] is None else StoredMessage(*message)

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

    def resume(self, ids: Collection[str], republish_after: float, *, patience: float) -> list[StoredMessage]:
        """Let workflows go on that have ended without success, all or none; return what the caller now sends.

        Raises WorkflowConflict if another workflow has the deduplication id of one of them.
        """
        try:
            rows = self._run("resume", patience, ids=list(ids), republish_after=republish_after)
        except errors.UniqueViolation as error:
            raise WorkflowConflict(
                "A workflow can't be resumed while another one of the same task has its deduplication_id."
            ) from error
        return [StoredMessage(*row) for row in rows]

    def cancel(self, ids: Collection[str], *, verdict: Payload, patience: float) -> list[str]:
        """End these workflows as CANCELLED; return those that hadn't ended."""
        return _ids(self._run("cancel", patience, ids=list(ids), verdict=verdict.data))

    def family(self, ids: Collection[str], *, patience: float) -> list[str]:
        """Return these workflows and all that they have started, as far as they haven't ended."""
        return _ids(self._run("family", patience, ids=list(ids)))

    def ask_to_cancel_in(self, out: Outgoing, ids: Collection[str], *, children: bool) -> None:
        """Have workflows cancelled once the caller's own transaction is committed."""
        out.run(self._sql["ask_to_cancel"], {"ids": list(ids), "children": children})

    def asked_to_cancel(self, *, limit: int, patience: float) -> list[tuple[int, str, bool]]:
        """Return which requests there are, for which workflows, and whether with all that those have started."""
        return [(row[0], row[1], row[2]) for row in self._run("asked_to_cancel", patience, limit=limit)]

    def forget_cancellations(self, requests: Collection[int], *, patience: float) -> None:
        """Note that these requests are done."""
        self._run("forget_cancellations", patience, seqs=list(requests))

    def fork(self, forks: Sequence[Fork], republish_after: float, *, patience: float) -> dict[str, datetime]:
        """Write new workflows that begin with the first steps of others, all or none; return when they were published.

        Raises WorkflowConflict if an id is taken.
        """
        try:
            rows = self._run(
                "fork", patience, ids=[fork.message.workflow_id for fork in forks],
                sources=[fork.source for fork in forks], cuts=[fork.cut for fork in forks],
                envelopes=[fork.message.envelope for fork in forks], bodys=[fork.message.body for fork in forks],
                content_types=[fork.message.content_type for fork in forks],
                content_encodings=[fork.message.content_encoding for fork in forks], republish_after=republish_after,
                hooks=[fork.on_cancel and fork.on_cancel.workflow_id for fork in forks],
                hook_envelopes=[fork.on_cancel and fork.on_cancel.envelope for fork in forks],
                hook_bodys=[fork.on_cancel and fork.on_cancel.body for fork in forks],
            )  # fmt: skip
        except errors.UniqueViolation as error:
            raise WorkflowConflict("The id for a fork is taken: choose another new_id.") from error
        return dict(rows)

    def messages_of(self, ids: Collection[str], *, patience: float) -> list[StoredMessage]:
        """Return the stored messages of workflows."""
        return [StoredMessage(*row) for row in self._run("message_of", patience, ids=list(ids))]

    def hooks_of(self, ids: Collection[str], *, patience: float) -> dict[str, StoredMessage]:
        """Return the messages of what is started when these workflows are cancelled, by the workflows' ids."""
        rows = self._run("hooks_of", patience, ids=list(ids))
        return {workflow_id: StoredMessage(hook, None, 0, *message) for workflow_id, hook, *message in rows}

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
        error: str,
        limit: int,
        patience: float,
    ) -> list[tuple[str, str]]:
        """Enqueue orphans again, or end them as DEAD, with this verdict; return ids and new states."""
        rows = self._run(
            "rescue", patience, node=node, lost=list(lost), lease=lease, verdict=verdict.data, error=error, limit=limit
        )
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

    def prune(self, *, kept: Mapping[str, float | None], limit: int, patience: float) -> list[str]:
        """Delete what was finished for longer than it is kept: seconds by final state; None and others: for ever."""
        ages = _ages(kept)
        return _ids(self._run("prune", patience, **ages, limit=limit)) if ages["states"] else []

    def count_old(self, *, kept: Mapping[str, float | None], most: int, patience: float) -> int:
        """Return how many there are for ``prune``, counted up to ``most``; some of them may still be needed."""
        return int(self._run("count_old", patience, **_ages(kept), most=most)[0][0])

    def next_due(self, *, patience: float) -> float | None:
        """Return the seconds until the next timer is due, if there is one."""
        ((seconds,),) = self._run("next_due", patience)
        return None if seconds is None else float(seconds)

    def by_id(self, workflow_id: str, *, most: int | None = None, patience: float) -> WorkflowRow | None:
        """Return one workflow, without values that take more bytes than ``most``."""
        rows = self._run("by_id", patience, id=workflow_id, most=ANY_SIZE if most is None else most)
        return WorkflowRow.of(rows[0]) if rows else None

    def _run(self, query: str, patience: float, **params: Any) -> list[tuple[Any, ...]]:
        return self._database.run(self._sql[query], params, patience=patience)


_OF_MANY = (
    "id", "name", "queue", "max_crashes", "timeout", "parent_id", "root_id", "delay", "envelope", "body",
    "content_type", "content_encoding",
)  # fmt: skip


#: Workflows with one deduplication id that may come and go while another one is started.
_MOST_TWINS = 20
_OF_A_HOOK = (
    "id", "name", "queue", "max_crashes", "timeout", "envelope", "content_type", "content_encoding",
)  # fmt: skip


def _of_birth(birth: Birth) -> dict[str, Any]:
    return {name: getattr(birth, name) for name in Birth.__slots__} | {"on_cancel": _of_hook(birth.on_cancel)}


def _of_hook(birth: Birth | None) -> str | None:
    if birth is None:
        return None
    facts = {name: getattr(birth, name) for name in _OF_A_HOOK}
    return json.dumps({**facts, "body": b64encode(birth.body).decode()})


def _ages(kept: Mapping[str, float | None]) -> dict[str, Any]:
    finite = {state: age for state, age in kept.items() if age is not None}
    return {"states": list(finite), "ages": list(finite.values())}


def _ids(rows: list[tuple[Any, ...]]) -> list[str]:
    return [row[0] for row in rows]


def _checkpoint(
    key: str, seq: int, tries: int, ok: bool | None, value: bytes | None, content_type: str | None, args: str | None,
    fingerprint: bytes | None, errors: bytes | None, due_in: float | None, overran: bool, spent: bool,
    child_id: str | None, *of_claim: None,
) -> Checkpoint:  # fmt: skip
    payload = None if value is None else Payload(value, content_type)
    due_in = 0.0 if due_in is None else max(due_in, 0.0)
    return Checkpoint(key, seq, tries, ok, payload, args, fingerprint, errors, due_in, overran, spent, child_id)
