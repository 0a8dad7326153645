"""What a workflow has done so far: its steps, attempts and messages."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from celery import Celery

from . import states
from .client import CALLER_PATIENCE, Omitted, readable, row_of, value_of
from .errors import TryError
from .installation import Installation, find
from .store.rows import AttemptRow, MessageRow, StepRow, WorkflowRow

#: What a key has besides the step's name: its branch, and its number.
_PLACE = re.compile(r"(\[[^\[\]]*\])?(#\d+)?$")


@dataclass(frozen=True, slots=True)
class StepInfo:
    """One step of a workflow: ``state`` is SUCCESS, FAILURE, or RETRY while it isn't settled."""

    key: str
    name: str
    seq: int
    state: str
    output: Any
    error: Exception | None
    tries: int
    started_at: datetime
    finished_at: datetime | None
    child_id: str | None
    #: The errors of its tries, the oldest first; of more than twenty only the first and the last ones.
    errors: tuple[TryError, ...] = ()
    #: In which attempt of the workflow it was recorded.
    attempt: int = 0
    #: When its next try, or the end of its wait, is due.
    wake_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class AttemptInfo:
    """One attempt of a workflow. An attempt that a worker of an older version has ended may be missing."""

    attempt: int
    #: The host name of the worker that ran it.
    worker: str | None
    node: str | None
    started_at: datetime | None
    ended_at: datetime | None
    #: None while it runs; ``suspended``, ``handed over``, ``retried``, ``crashed``, ``timed out``, or a final state.
    ending: str | None


@dataclass(frozen=True, slots=True)
class MessageInfo:
    """One message that was sent to a workflow."""

    seq: int
    #: Empty: none.
    topic: str
    #: The SerializationError that says why, if it can't be read.
    message: Any
    idempotency_key: str
    sent_at: datetime
    #: The key of the ``recv`` that has it.
    taken_by: str | None


def list_workflow_steps(id: str, max_payload: int | None = None, app: Celery | None = None) -> list[StepInfo]:
    """Return the steps of a workflow in the order of their first call.

    Outputs that take more than ``max_payload`` bytes aren't loaded: an Omitted stands for each.

    Raises WorkflowNotFound, NotInstalled, DatabaseUnavailable.
    """
    installation = find(app)
    row_of(installation, id, 0)
    rows = installation.store.checkpoints.of_workflow(id, most=max_payload, patience=CALLER_PATIENCE)
    return [_step(installation, row) for row in rows]


def list_workflow_attempts(id: str, app: Celery | None = None) -> list[AttemptInfo]:
    """Return the attempts of a workflow, the first one first: who ran it, from when to when, and how that ended.

    Raises WorkflowNotFound, NotInstalled, DatabaseUnavailable.
    """
    installation = find(app)
    row = row_of(installation, id, 0)
    ended = installation.store.lists.attempts(id, patience=CALLER_PATIENCE)
    return [_attempt(each) for each in ended if each.attempt <= row.attempt] + _last_attempt(row, ended)


def list_workflow_messages(
    id: str, limit: int = 100, max_payload: int | None = None, app: Celery | None = None
) -> list[MessageInfo]:
    """Return the first messages that were sent to a workflow, at most ``limit``.

    Those that take more than ``max_payload`` bytes aren't loaded: an Omitted stands for each.

    Raises WorkflowNotFound, NotInstalled, DatabaseUnavailable.
    """
    installation = find(app)
    row_of(installation, id, 0)
    rows = installation.store.messages.of_workflow(id, limit=limit, most=max_payload, patience=CALLER_PATIENCE)
    return [_message(installation, row) for row in rows]


def step_name(key: str) -> str:
    """Return the name in a checkpoint's key, which has its branch and its number besides."""
    return _PLACE.sub("", key)


def _step(installation: Installation, row: StepRow) -> StepInfo:
    output, error, decode_errors = None, None, installation.codec.decode_errors
    if row.payload is not None:
        output, error = value_of(installation, row.ok, row.payload, f"The result of step {row.key}")
    elif row.ok and row.payload_size is not None:
        output = Omitted(row.payload_size)
    return StepInfo(
        key=row.key,
        name=step_name(row.key),
        seq=row.seq,
        state="RETRY" if row.ok is None else "SUCCESS" if row.ok else "FAILURE",
        output=output,
        error=error,
        tries=row.tries,
        started_at=row.started_at,
        finished_at=None if row.ok is None else row.at,
        child_id=row.child_id,
        errors=decode_errors(row.errors) + (decode_errors(row.payload.data) if row.ok is False and row.payload else ()),
        attempt=row.attempt,
        wake_at=row.wake_at,
    )


def _attempt(row: AttemptRow) -> AttemptInfo:
    return AttemptInfo(row.attempt, row.worker, row.node, row.began_at, row.ended_at, row.ending)


def _last_attempt(row: WorkflowRow, ended: list[AttemptRow]) -> list[AttemptInfo]:
    """Return the attempt that the workflow itself tells of, unless it is among those that have ended."""
    if row.attempt == 0 or any(each.attempt == row.attempt for each in ended):
        return []
    if row.state not in states.FINAL | {states.RUNNING}:
        return []
    began_at, ended_at = row.claimed_at, row.finished_at
    if began_at is not None and ended_at is not None and began_at > ended_at:
        began_at = None  # when its outcome was delivered once more
    ending = row.state if row.state in states.FINAL else None
    return [AttemptInfo(row.attempt, row.worker, row.node, began_at, ended_at, ending)]


def _message(installation: Installation, row: MessageRow) -> MessageInfo:
    if row.payload is None:
        message: Any = Omitted(row.payload_size)
    else:
        message = readable(installation, row.payload, f"Message {row.seq}")
    return MessageInfo(row.seq, row.topic, message, row.idempotency_key, row.sent_at, row.taken_by)
