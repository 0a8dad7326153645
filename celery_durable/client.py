"""Workflows seen from outside: status, lists, counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from celery import Celery

from . import states
from .exceptions import WorkflowNotFound
from .installation import Installation, find
from .serialization import Payload
from .shapes import Shape
from .store import Filters
from .store.rows import WorkflowRow
from .text import is_storable

#: How long a caller waits for a database that can't be reached, in seconds.
CALLER_PATIENCE = 3.0


@dataclass(frozen=True, slots=True)
class WorkflowStatus:
    """One workflow as it stood when it was read; times are the database's."""

    id: str
    name: str
    state: str
    queue: str
    #: None if they can't be read; an Omitted if they are too large.
    args: Any
    kwargs: Any
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
    #: Host name of the worker that ran it last.
    worker: str | None = None
    #: When its last attempt began.
    claimed_at: datetime | None = None
    #: The beginning of its error, up to 200 characters: ``"ValueError: no"``.
    error_text: str | None = None


@dataclass(frozen=True, slots=True)
class Omitted:
    """Stands for a value that wasn't loaded because it is large."""

    #: Bytes, as it is stored.
    size: int

    def __repr__(self) -> str:
        return f"<{self.size:,} bytes, not loaded>"


def get_workflow_status(id: str, max_payload: int | None = None, app: Celery | None = None) -> WorkflowStatus:
    """Return how a workflow stands. Reads only; allowed in steps.

    Arguments or a result that take more than ``max_payload`` bytes aren't loaded: an Omitted stands for them.

    Raises WorkflowNotFound, NotInstalled, DatabaseUnavailable.
    """
    installation = find(app)
    return status_of(installation, row_of(installation, id, max_payload))


def list_workflows(
    *,
    state: str | Iterable[str] | None = None,
    name: str | None = None,
    id: str | None = None,
    queue: str | None = None,
    parent_id: str | None = None,
    root_id: str | None = None,
    forked_from: str | None = None,
    error: str | None = None,
    search: str | None = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
    after: WorkflowStatus | tuple[datetime, str] | None = None,
    limit: int = 100,
    max_payload: int | None = None,
    app: Celery | None = None,
) -> list[WorkflowStatus]:
    """Return the workflows that fit all filters, at most ``limit``, the newest first.

    ``error`` is a part of what is in ``error_text``, in any case; ``search`` the id, or a part of the task's name or of
    that text. ``created_after`` is included, ``created_before`` isn't. The next page is what comes ``after`` the last
    one of this page, a status or its ``(created_at, id)``: nothing is left out or shown twice, whatever is started
    meanwhile. Arguments and results that take more than ``max_payload`` bytes aren't loaded: an Omitted stands for
    each.

    Raises ValueError for an unknown state, for filters of a wrong type and for a limit that isn't a number,
    NotInstalled, DatabaseUnavailable.
    """
    installation = find(app)
    filters = {"id": id, "queue": queue, "parent_id": parent_id, "root_id": root_id, "forked_from": forked_from,
               "error": error, "created_after": created_after, "created_before": created_before}  # fmt: skip
    wanted = filters_of(state=state, name=name, search=search, **filters)
    _check_number("limit", limit)
    place = _place_of(after)
    found = [
        installation.store.lists.matching(
            each, after=place, limit=limit, most=_checked_size(max_payload), patience=CALLER_PATIENCE
        )
        for each in _alternatives(installation, wanted, search)
    ]
    return [status_of(installation, row) for row in _newest(found, limit)]


def count_workflows(
    *,
    state: str | Iterable[str] | None = None,
    name: str | None = None,
    id: str | None = None,
    queue: str | None = None,
    parent_id: str | None = None,
    root_id: str | None = None,
    forked_from: str | None = None,
    error: str | None = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
    most: int = 10_000,
    app: Celery | None = None,
) -> dict[str, int]:
    """Return how many workflows there are of each state, of those that fit the filters of ``list_workflows``.

    Counted no further than ``most``, in each state, so that it takes no longer with ten million of them.

    Raises as ``list_workflows`` does.
    """
    installation = find(app)
    wanted = filters_of(
        state=state, name=name, id=id, queue=queue, parent_id=parent_id, root_id=root_id, forked_from=forked_from,
        error=error, created_after=created_after, created_before=created_before,
    )  # fmt: skip
    _check_number("most", most)
    return installation.store.lists.count(wanted, most=most, patience=CALLER_PATIENCE)


def list_workflow_names(app: Celery | None = None) -> list[str]:
    """Return the names of the tasks that have workflows.

    Raises NotInstalled, DatabaseUnavailable.
    """
    return find(app).store.lists.names(patience=CALLER_PATIENCE)


def outcome_of(installation: Installation, row: WorkflowRow) -> tuple[Any, Exception | None]:
    """Return what a finished workflow returned, or the error it ended with."""
    if row.payload is None:
        return (Omitted(row.payload_size), None) if row.ok and row.payload_size is not None else (None, None)
    shape = _shape_of(installation, row) if row.payload.is_shaped else None
    return value_of(installation, row.ok, row.payload, f"The result of workflow {row.id}", shape)


def _shape_of(installation: Installation, row: WorkflowRow) -> Shape | None:
    """Return what a workflow's task rebuilds its results to; None where the app doesn't have the task."""
    task: Any = installation.app.tasks.get(row.name)
    if not getattr(task, "is_durable_workflow", False):
        return None
    shape: Shape | None = task.durable_shape(arguments_of(installation, row)[0])
    return shape


def value_of(
    installation: Installation, ok: bool | None, payload: Payload, what: str, shape: Shape | None = None
) -> tuple[Any, Exception | None]:
    try:
        if not ok:
            return None, installation.codec.decode_error(payload)
        return installation.codec.decode(payload, what, shape), None
    except Exception as error:  # noqa: BLE001 - one value that can't be read must not hide the rest
        return None, error


def row_of(installation: Installation, workflow_id: str, max_payload: int | None = None) -> WorkflowRow:
    """Return a workflow; raise WorkflowNotFound, also for what can't be an id."""
    most, workflows = _checked_size(max_payload), installation.store.workflows
    known = is_storable(workflow_id)
    row = workflows.by_id(workflow_id, most=most, patience=CALLER_PATIENCE) if known else None
    if row is None:
        raise WorkflowNotFound(f"There is no workflow {workflow_id!r}: its id is wrong, or retention has removed it.")
    return row


def status_of(installation: Installation, row: WorkflowRow) -> WorkflowStatus:
    """Return a workflow as callers see it."""
    args, kwargs = arguments_of(installation, row)
    result, error = outcome_of(installation, row)
    same = {name: getattr(row, name) for name in WorkflowStatus.__slots__ if name in WorkflowRow._fields}
    return WorkflowStatus(**same, args=args, kwargs=kwargs, result=result, error=error)


def arguments_of(installation: Installation, row: WorkflowRow) -> tuple[Any, Any]:
    """Return the arguments that a workflow was started with, None for what can't be read."""
    if row.body is None:
        omitted = None if row.body_size is None else Omitted(row.body_size)
        return omitted, omitted
    try:
        what = f"The message of workflow {row.id}"
        args, kwargs, _ = installation.codec.load_message(row.body, row.content_type, row.content_encoding, what)
        return tuple(args), dict(kwargs)
    except Exception:  # noqa: BLE001 - undecodable arguments are no reason to hide the workflow
        return None, None


def readable(installation: Installation, payload: Payload, what: str) -> Any:
    """Return a stored value, or the SerializationError that says why it can't be read."""
    value, error = value_of(installation, True, payload, what)
    return value if error is None else error


def filters_of(
    *, state: str | Iterable[str] | None = None, name: str | None = None, search: str | None = None, **others: Any
) -> Filters:
    """Return filters that were given by a caller, often a page's visitor; raise ValueError for what can't be one."""
    for key, value in {"name": name, "search": search, **others}.items():
        if key.startswith("created_"):
            _check_time(key, value)
        elif not (value is None or is_storable(value)):
            raise ValueError(f"{key} must be text without NUL characters and lone surrogates, not {value!r:.100}.")
    return Filters(states=_states(state), names=None if name is None else [name], **others)


def _alternatives(installation: Installation, wanted: Filters, search: str | None) -> list[Filters]:
    """Return the filters of which each finds a part of what is searched for."""
    if search is None:
        return [wanted]
    found = []
    if wanted.id in (None, search):
        found.append(replace(wanted, id=search))
    if wanted.error is None:
        found.append(replace(wanted, error=search))
    known = installation.store.lists.names(patience=CALLER_PATIENCE) if wanted.names is None else wanted.names
    if names := [name for name in known if search.lower() in name.lower()]:
        found.append(replace(wanted, names=names))
    return found


def _newest(found: list[list[WorkflowRow]], limit: int) -> list[WorkflowRow]:
    rows = {row.id: row for rows in found for row in rows}
    return sorted(rows.values(), key=lambda row: (row.created_at, row.id), reverse=True)[:limit]


def _place_of(after: WorkflowStatus | tuple[datetime, str] | None) -> tuple[datetime, str] | None:
    if after is None:
        return None
    at, workflow_id = (after.created_at, after.id) if isinstance(after, WorkflowStatus) else after
    _check_time("The time of after", at)
    if not is_storable(workflow_id):
        raise ValueError(f"The id of after must be text that Postgres can store, not {workflow_id!r:.100}.")
    return at, workflow_id


def _check_time(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, datetime) and value.tzinfo is not None):
        raise ValueError(f"{name} must be a datetime with a time zone, not {value!r:.100}.")


def _checked_size(max_payload: Any) -> int | None:
    if max_payload is not None:
        _check_number("max_payload", max_payload)
    return max_payload


def _check_number(name: str, value: Any) -> None:
    if type(value) is not int or not 0 <= value < 2**63:
        raise ValueError(f"{name} must be a whole number that isn't negative, not {value!r:.100}.")


def _states(state: str | Iterable[str] | None) -> list[str] | None:
    if state is None:
        return None
    wanted = [state] if isinstance(state, str) else list(state)
    unknown = [each for each in wanted if each not in sorted(states.ALL)]
    if unknown:
        raise ValueError(f"There is no state {unknown}; choose of {sorted(states.ALL)}.")
    return wanted
