"""A workflow's life as a picture: lanes with bars on an axis of time. Pure; whoever draws it has its own ideas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise

from . import states
from .client import WorkflowStatus
from .errors import TryError
from .history import AttemptInfo, StepInfo

#: The key of the first lane, which no step can have.
WORKFLOW = ""
#: What is drawn where an attempt has ended otherwise than by a wait or with the workflow.
_MARKS = {"crashed": "crash", "timed out": "time-out", "handed over": "hand-over", "retried": "retry"}


@dataclass(frozen=True, slots=True)
class Bar:
    """Something that took a time, or happened at one."""

    #: Of a workflow: queued, running, suspended; a mark without length: crash, time-out, hand-over, retry.
    #: Of a step: try, wait.
    kind: str
    start: datetime
    end: datetime
    #: Of a try: SUCCESS, FAILURE, RETRY; of an attempt: how it has ended. None: it goes on.
    state: str | None = None
    #: What there is to say about it.
    label: str = ""

    @property
    def is_mark(self) -> bool:
        """Whether it has no length by nature."""
        return self.kind in _MARKS.values()


@dataclass(frozen=True, slots=True)
class Lane:
    """The bars of the workflow, or of one of its steps, in order."""

    #: The step's key; empty for the workflow itself.
    key: str
    name: str
    state: str
    bars: tuple[Bar, ...]
    #: The workflow that the step has started or awaited.
    child_id: str | None = None


@dataclass(frozen=True, slots=True)
class Timeline:
    """A workflow from its start to its end, or until now."""

    start: datetime
    end: datetime
    #: The first one is the workflow's own, the others those of its steps in the order of their first call.
    lanes: tuple[Lane, ...]


def timeline(
    status: WorkflowStatus, attempts: Sequence[AttemptInfo], steps: Iterable[StepInfo], now: datetime
) -> Timeline:
    """Return the picture of a workflow; ``now`` is the database's time, where what isn't over ends."""
    end = max(status.finished_at or now, status.created_at)
    own = Lane(WORKFLOW, status.name, status.state, tuple(_of_workflow(status, attempts, end)))
    return Timeline(status.created_at, end, (own, *(_lane(step, end) for step in steps)))


def _of_workflow(status: WorkflowStatus, attempts: Sequence[AttemptInfo], end: datetime) -> Iterator[Bar]:
    known = [attempt for attempt in attempts if attempt.started_at is not None]
    first = known[0].started_at if known else None
    yield from _stretch("queued", status.created_at, first or status.started_at or end)
    for attempt, later in pairwise([*known, None]):
        assert attempt is not None
        yield from _of_attempt(attempt, end)
        if attempt.ended_at is not None:
            began = end if later is None or later.started_at is None else later.started_at
            yield from _between(attempt, attempt.ended_at, began, status)


def _of_attempt(attempt: AttemptInfo, end: datetime) -> Iterator[Bar]:
    started_at, ended_at = attempt.started_at, attempt.ended_at or end
    assert started_at is not None
    label = f"attempt {attempt.attempt}" + (f" on {attempt.worker}" if attempt.worker else "")
    yield Bar("running", started_at, max(started_at, ended_at), attempt.ending, label)
    if attempt.ending in _MARKS:
        yield Bar(_MARKS[attempt.ending], ended_at, ended_at, attempt.ending, f"{label} {attempt.ending}")


def _between(attempt: AttemptInfo, since: datetime, until: datetime, status: WorkflowStatus) -> Iterator[Bar]:
    """Yield what lies after an attempt; after the last one that is only something while the workflow lives."""
    if attempt.ending == "suspended":
        is_last = attempt.attempt == status.attempt
        yield from _stretch("suspended", since, until, (status.waiting_for or "") if is_last else "")
    elif attempt.ending in states.FINAL and attempt.attempt == status.attempt and status.state in states.FINAL:
        return
    else:
        yield from _stretch("queued", since, until)


def _lane(step: StepInfo, end: datetime) -> Lane:
    bars = _of_wait(step, end) if step.tries == 0 else _of_tries(step, end)
    return Lane(step.key, step.name, step.state, tuple(bars), step.child_id)


def _of_wait(step: StepInfo, end: datetime) -> Iterator[Bar]:
    """Yield a sleep, or a wait for something; that of a sleep is settled when it begins."""
    over = step.finished_at if step.wake_at is None else max(step.finished_at or step.wake_at, step.wake_at)
    label = "" if step.wake_at is None else f"until {step.wake_at:%Y-%m-%d %H:%M:%S}"
    yield Bar("wait", step.started_at, max(step.started_at, min(over or end, end)), step.state, label)


def _of_tries(step: StepInfo, end: datetime) -> Iterator[Bar]:
    failed = [error for error in step.errors if error.at is not None]
    has_settled = step.state == "FAILURE" and _has_last_error(step)
    since: datetime | None = None
    for number, error in enumerate(failed, start=1):
        assert error.at is not None
        started_at = error.started_at or since or step.started_at
        if since is not None:
            yield from _stretch("wait", since, started_at)
        is_last = has_settled and number == len(failed)
        yield Bar("try", min(started_at, error.at), error.at, "FAILURE" if is_last else "RETRY", _told(error))
        since = error.at
    if not has_settled:
        yield from _last_try(step, since, end)


def _has_last_error(step: StepInfo) -> bool:
    """Tell whether the error that has settled a failed step is among its errors, or is too large to be loaded.

    A database that was busy has heard of it late, so it may lie before the start that was reckoned back from there.
    """
    last = step.errors[-1].at if step.errors else None
    return last is not None and (step.error is not None or last >= step.started_at)


def _last_try(step: StepInfo, since: datetime | None, end: datetime) -> Iterator[Bar]:
    """Yield what follows the failed tries: the one that has settled the step, or the wait for the next one."""
    if step.finished_at is None:
        due = min(step.wake_at or end, end)
        yield from _stretch("wait", since or step.started_at, due)
    elif since is None or since < step.started_at:
        if since is not None:
            yield from _stretch("wait", since, step.started_at)
        yield Bar("try", step.started_at, max(step.started_at, step.finished_at), step.state)


def _told(error: TryError) -> str:
    return f"{error.type.rpartition('.')[2]}: {error.message}"[:200]


def _stretch(kind: str, since: datetime, until: datetime, label: str = "") -> Iterator[Bar]:
    if since < until:
        yield Bar(kind, since, until, None, label)
