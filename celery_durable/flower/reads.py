"""What the pages read, by the public interface alone."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from typing import Any

from celery import Celery

from .. import client, history
from ..client import WorkflowStatus
from ..events import list_workflow_events
from ..exceptions import WorkflowNotFound
from ..health import Health, check_health
from ..history import AttemptInfo, MessageInfo, StepInfo

#: Workflows of a page.
PAGE = 50
#: Up to which the workflows of a state are counted.
MOST_COUNTED = 10_000
#: Bytes: a larger value isn't loaded. An error may have a traceback of 32 KiB.
MOST_OF_VALUE = 64 * 1024
#: Children that are counted, those that are shown as bars, and those of them whose steps are shown, too.
MOST_CHILDREN = 500
MOST_DRAWN = 50
MOST_OPENED = 20


@dataclass(frozen=True, slots=True)
class Filters:
    """What a list is asked for; None asks for nothing."""

    state: str | None = None
    name: str | None = None
    id: str | None = None
    queue: str | None = None
    parent_id: str | None = None
    error: str | None = None
    search: str | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None

    def given(self, *without: str) -> dict[str, Any]:
        """Return those that are asked for, as the interface takes them."""
        found = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in without}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True, slots=True)
class Listing:
    """A page of the list; ``older`` is the workflow after which the next page begins."""

    workflows: list[WorkflowStatus]
    older: WorkflowStatus | None
    #: By state; None for a search.
    counts: Mapping[str, int] | None
    names: list[str]


@dataclass(frozen=True, slots=True)
class Seen:
    """All of one workflow, and as much of its children as is shown with it."""

    status: WorkflowStatus
    steps: list[StepInfo]
    attempts: list[AttemptInfo]
    messages: list[MessageInfo]
    events: Mapping[str, Any]
    #: By their ids.
    children: Mapping[str, Seen]
    now: datetime


def read_list(app: Celery, filters: Filters, after: tuple[datetime, str] | None) -> Listing:
    """Return the newest workflows that fit, or those after one of them; raise ValueError, DurableError."""
    found = client.list_workflows(**filters.given(), after=after, limit=PAGE + 1, max_payload=0, app=app)
    # What a search finds can't be counted without reading all of it.
    counts = None if filters.search else client.count_workflows(**filters.given("state"), most=MOST_COUNTED, app=app)
    names = client.list_workflow_names(app=app)
    return Listing(found[:PAGE], found[PAGE - 1] if len(found) > PAGE else None, counts, names)


def read_workflow(app: Celery, workflow_id: str, opened: Collection[str] = ()) -> Seen:
    """Return all of a workflow, with the steps of those children that are opened; raise DurableError."""
    status = client.get_workflow_status(workflow_id, max_payload=MOST_OF_VALUE, app=app)
    return _seen(
        app,
        status,
        attempts=history.list_workflow_attempts(workflow_id, app=app),
        messages=history.list_workflow_messages(workflow_id, max_payload=MOST_OF_VALUE, app=app),
        events=list_workflow_events(workflow_id, max_payload=MOST_OF_VALUE, app=app),
        opened=sorted(opened)[:MOST_OPENED],
    )


def read_health(app: Celery) -> Health:
    """Return how the workers, the recovery and the database are; raise DurableError."""
    return check_health(app)


def _seen(app: Celery, status: WorkflowStatus, *, opened: Collection[str], **more: Any) -> Seen:
    steps = history.list_workflow_steps(status.id, max_payload=MOST_OF_VALUE, app=app)
    others = [each for each in opened if each != status.id]
    found = client.list_workflows(parent_id=status.id, limit=MOST_CHILDREN, max_payload=0, app=app)
    # The first ones are those that are at the top of the picture.
    drawn = {step.child_id for step in [each for each in steps if each.child_id][:MOST_DRAWN]}
    children = {child.id: _child(app, child, others, is_drawn=child.id in drawn) for child in found}
    return Seen(status=status, steps=steps, children=children, now=datetime.now(timezone.utc), **more)


def _child(app: Celery, status: WorkflowStatus, opened: Collection[str], *, is_drawn: bool) -> Seen:
    try:
        attempts = history.list_workflow_attempts(status.id, app=app) if is_drawn else []
        if status.id in opened:
            return _seen(app, status, attempts=attempts, messages=[], events={}, opened=opened)
    except WorkflowNotFound:  # removed between two looks
        attempts = []
    return Seen(status, [], attempts, [], {}, {}, datetime.now(timezone.utc))
