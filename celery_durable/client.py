"""Workflows seen from outside: status, lists."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from celery import Celery

from . import states
from .errors import TryError
from .exceptions import WorkflowNotFound
from .installation import Installation, find
from .serialization import Payload
from .shapes import Shape
from .store.rows import StepRow, WorkflowRow
from .text import is_storable

#: How long a caller waits for a database that can't be reached, in seconds.
CALLER_PATIENCE = 3.0

#: What a key has besides the step's name: its branch, and its number.
_PLACE = re.compile(r"(\[[^\[\]]*\])?(#\d+)?$")


@dataclass(frozen=True, slots=True)
class WorkflowStatus:
    """One workflow as it stood when it was read; times are the database's."""

    id: str
    name: str
    state: str
    queue: str
    args: tuple[Any, ...] | None
    kwargs: dict[str, Any] | None
    result: Any
    error: Exception | None
    attempt: int
    crashes: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    wake_at: datetime | None
    deadline: datetime | None
    waiting_for: str | None
    parent_id: str | None
    root_id: str | None
    forked_from: str | None
    node: str | None
    dispatched: bool | None


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


def step_name(key: str) -> str:
    """Return the name in a checkpoint's key, which has its branch and its number besides."""
    return _PLACE.sub("", key)


def get_workflow_status(id: str, app: Celery | None = None) -> WorkflowStatus:
    """Return how a workflow stands. Reads only; allowed in steps.

    Raises WorkflowNotFound, NotInstalled, DatabaseUnavailable.
    """
    installation = find(app)
    return _status(installation, row_of(installation, id))


def list_workflows(
    *,
    state: str | Iterable[str] | None = None,
    name: str | None = None,
    queue: str | None = None,
    parent_id: str | None = None,
    root_id: str | None = None,
    forked_from: str | None = None,
    limit: int = 100,
    app: Celery | None = None,
) -> list[WorkflowStatus]:
    """Return the newest workflows that fit all filters, at most ``limit``.

    Raises ValueError for an unknown state, for a filter that isn't text and for a limit that isn't a number,
    NotInstalled, DatabaseUnavailable.
    """
    installation = find(app)
    filters = {"name": name, "queue": queue, "parent_id": parent_id, "root_id": root_id, "forked_from": forked_from}
    _check_filters(filters, limit)
    rows = installation.store.workflows.matching(
        states=_states(state), **filters, limit=limit, patience=CALLER_PATIENCE
    )
    return [_status(installation, row) for row in rows]


def list_workflow_steps(id: str, app: Celery | None = None) -> list[StepInfo]:
    """Return the steps of a workflow in the order of their first call.

    Raises WorkflowNotFound, NotInstalled, DatabaseUnavailable.
    """
    installation = find(app)
    row_of(installation, id)
    rows = installation.store.checkpoints.of_workflow(id, patience=CALLER_PATIENCE)
    return [_step(installation, row) for row in rows]


def outcome_of(installation: Installation, row: WorkflowRow) -> tuple[Any, Exception | None]:
    """Return what a finished workflow returned, or the error it ended with."""
    if row.payload is None:
        return None, None
    shape = _shape_of(installation, row) if row.payload.is_shaped else None
    return _value(installation, row.ok, row.payload, f"The result of workflow {row.id}", shape)


def _shape_of(installation: Installation, row: WorkflowRow) -> Shape | None:
    """Return what a workflow's task rebuilds its results to; None where the app doesn't have the task."""
    task: Any = installation.app.tasks.get(row.name)
    if not getattr(task, "is_durable_workflow", False):
        return None
    shape: Shape | None = task.durable_shape(_arguments(installation, row)[0])
    return shape


def _value(
    installation: Installation, ok: bool | None, payload: Payload, what: str, shape: Shape | None = None
) -> tuple[Any, Exception | None]:
    try:
        if not ok:
            return None, installation.codec.decode_error(payload)
        return installation.codec.decode(payload, what, shape), None
    except Exception as error:  # noqa: BLE001 - one value that can't be read must not hide the rest
        return None, error


def row_of(installation: Installation, workflow_id: str) -> WorkflowRow:
    """Return a workflow; raise WorkflowNotFound, also for what can't be an id."""
    known = is_storable(workflow_id)
    row = installation.store.workflows.by_id(workflow_id, patience=CALLER_PATIENCE) if known else None
    if row is None:
        raise WorkflowNotFound(f"There is no workflow {workflow_id!r}: its id is wrong, or retention has removed it.")
    return row


def _status(installation: Installation, row: WorkflowRow) -> WorkflowStatus:
    args, kwargs = _arguments(installation, row)
    result, error = outcome_of(installation, row)
    same = {name: getattr(row, name) for name in WorkflowStatus.__slots__ if name in WorkflowRow.__slots__}
    return WorkflowStatus(**same, args=args, kwargs=kwargs, result=result, error=error)


def _arguments(installation: Installation, row: WorkflowRow) -> tuple[tuple[Any, ...] | None, dict[str, Any] | None]:
    if row.body is None:
        return None, None
    try:
        what = f"The message of workflow {row.id}"
        args, kwargs, _ = installation.codec.load_message(row.body, row.content_type, row.content_encoding, what)
        return tuple(args), dict(kwargs)
    except Exception:  # noqa: BLE001 - undecodable arguments are no reason to hide the workflow
        return None, None


def _step(installation: Installation, row: StepRow) -> StepInfo:
    output, error, decode_errors = None, None, installation.codec.decode_errors
    if row.payload is not None:
        output, error = _value(installation, row.ok, row.payload, f"The result of step {row.key}")
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
    )


def _check_filters(filters: Mapping[str, Any], limit: Any) -> None:
    """Raise ValueError for what can't be in Postgres, which often comes from a page's visitor."""
    for name, value in filters.items():
        if not (value is None or is_storable(value)):
            raise ValueError(f"{name} must be text without NUL characters and lone surrogates, not {value!r:.100}.")
    if type(limit) is not int or not 0 <= limit < 2**63:
        raise ValueError(f"limit must be a whole number that isn't negative, not {limit!r:.100}.")


def _states(state: str | Iterable[str] | None) -> list[str] | None:
    if state is None:
        return None
    wanted = [state] if isinstance(state, str) else list(state)
    unknown = [each for each in wanted if each not in sorted(states.ALL)]
    if unknown:
        raise ValueError(f"There is no state {unknown}; choose of {sorted(states.ALL)}.")
    return wanted
