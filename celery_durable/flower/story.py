"""What the page of one workflow says, made of what was read."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from datetime import datetime, tzinfo
from functools import cached_property
from typing import Any

from .. import states
from ..client import Omitted, WorkflowStatus
from ..history import StepInfo
from ..text import printable, summary
from ..timeline import Lane, timeline
from . import shown
from .drawing import SIGNS, Picture, Row, draw
from .parts import ErrorShown, Label, Links, MessageShown, StepShown
from .reads import MOST_CHILDREN, Seen

#: Lanes of the picture, and steps below it, of which the first and the last are shown.
MOST_LANES = 500
#: Characters of all values of a page together, and the least of one value.
_MOST_OF_ALL = 500_000
_LEAST = 500
#: Characters of arguments that stand in one line.
_LINE = 100
_LEGEND = {
    "try-success": "a try that succeeded",
    "try-failure": "a try that failed",
    "try-retry": "a try that failed and is tried again",
    "running": "a worker has it",
    "wait": "a wait: sleep, message, event, child, or between two tries",
    "suspended": "suspended: no worker has it",
    "queued": "enqueued",
    "crash": "its worker died",
    "time-out": "ended by a time limit",
    "hand-over": "handed over at a shutdown",
    "retry": "tried again as a whole",
    "fold": "nothing ran: drawn short",
}


class Story:
    """One workflow as its page tells it."""

    def __init__(self, seen: Seen, opened: Collection[str], links: Links, zone: tzinfo) -> None:
        self.seen = seen
        self.status = seen.status
        self.attempts = seen.attempts
        self.opened = set(opened)
        self.links = links
        self.zone = zone
        self.is_live = seen.status.state in states.LIVE
        self.has_failed = seen.status.error is not None or seen.status.error_text is not None
        self.can_resume = seen.status.state in states.FINAL - {states.SUCCESS}
        self.lanes = timeline(seen.status, seen.attempts, seen.steps, seen.now)

    # Facts

    @cached_property
    def facts(self) -> list[tuple[str, str, str | None]]:
        """Return name, text and link of what is known of it."""
        status, links = self.status, self.links
        root = status.root_id if status.root_id != status.id else None
        found = [
            ("Waits for", status.waiting_for, None),
            ("Worker", status.worker, links.worker(status.worker)),
            ("Queue", status.queue, None),
            ("Attempts", str(status.attempt), None),
            ("Crashes since the last new checkpoint", str(status.crashes) if status.crashes else None, None),
            ("Created", self.moment(status.created_at), None),
            ("Started", self.moment(status.started_at), None),
            ("Finished", self.moment(status.finished_at), None),
            ("Wakes", self.moment(status.wake_at), None),
            ("Deadline", self.moment(status.deadline), None),
            ("Parent", status.parent_id, status.parent_id and links.workflow(status.parent_id)),
            ("Root", root, root and links.workflow(root)),
            ("Forked from", status.forked_from, status.forked_from and links.workflow(status.forked_from)),
            ("Children", self.count_of_children, links.listed(parent_id=status.id)),
            ("Outcome", "not delivered by Celery yet" if status.dispatched is False else None, None),
            ("In Flower", "as a task" if links.task(status.id) else None, links.task(status.id)),
        ]
        return [(name, text, url) for name, text, url in found if text]

    @property
    def count_of_children(self) -> str | None:
        """Return how many were seen."""
        count = len(self.seen.children)
        return (f"{count}" if count < MOST_CHILDREN else f"{count}+") if count else None

    @property
    def lasted(self) -> str:
        """Return how long it has been from its creation on."""
        return shown.between(self.lanes.start, self.lanes.end)

    # Values

    @cached_property
    def arguments(self) -> str:
        """Return how it was called."""
        args, kwargs = self.status.args, self.status.kwargs
        if isinstance(args, Omitted):
            return shown.value(args)
        if args is None:
            return "They can't be read here: Flower's app lacks their serializer, or doesn't accept it."
        given = [*map(shown.value, args), *(f"{name}={shown.value(value)}" for name, value in (kwargs or {}).items())]
        between = ", " if sum(map(len, given)) < _LINE else ",\n"
        return printable(between.join(given), shown.MOST) or "none"

    @cached_property
    def outcome(self) -> str | None:
        """Return what it has returned or raised."""
        status = self.status
        if status.error is not None:
            return _error_text(status.error)
        if status.error_text is not None:
            return status.error_text
        if status.state != states.SUCCESS:
            return None
        return shown.value(status.result)

    @cached_property
    def most(self) -> int:
        """Return how many characters of each value there is room for."""
        count = sum(1 + len(step.errors) for step in self.seen.steps) + len(self.seen.messages) + len(self.seen.events)
        return max(_LEAST, min(shown.MOST, _MOST_OF_ALL // max(1, count)))

    # Steps

    @property
    def count_of_steps(self) -> str:
        """Return how many there are."""
        return f"{len(self.seen.steps):,}"

    @cached_property
    def steps(self) -> list[StepShown]:
        """Return its steps; of very many the first and the last."""
        return [self.step(number, step) for number, step in _ends(list(enumerate(self.seen.steps)))]

    def step(self, number: int, step: StepInfo) -> StepShown:
        """Return a step."""
        has_value = step.state == states.SUCCESS and step.error is None and not self.waits(step)
        value = shown.value(step.output, self.most) if has_value else None
        errors = list(self.errors(step))
        brief = value if value is not None else errors[-1].brief if errors else ""
        return StepShown(
            key=step.key,
            anchor=f"step-{number}",
            state="WAITING" if self.waits(step) else step.state,
            brief=printable(" ".join(brief[:400].split()), 120),
            tried=f"{step.tries} tries" if step.tries > 1 else "",
            lasted=_length(self.lanes.lanes[number + 1]),
            when=self.when(step),
            links=self.step_links(step),
            value=value,
            errors=errors,
        )

    def waits(self, step: StepInfo) -> bool:
        """Tell whether a step is a wait that goes on; a sleep is settled when it begins."""
        if step.tries or not self.is_live:
            return False
        return step.finished_at is None or (step.wake_at is not None and step.wake_at > self.seen.now)

    def when(self, step: StepInfo) -> str:
        """Return when a step was run, in which attempt, and when its next try is due."""
        parts = [self.moment(step.started_at), f"attempt {step.attempt}"]
        if step.wake_at is not None and (step.tries == 0 or step.finished_at is None):
            parts.append(f"until {self.moment(step.wake_at)}")
        elif step.finished_at is not None:
            parts[0] += f" to {self.moment(step.finished_at)}"
        return " · ".join(parts)

    def step_links(self, step: StepInfo) -> list[tuple[str, str]]:
        """Return where a step leads to."""
        if step.child_id is None:
            return []
        return [(f"workflow {step.child_id}", self.links.workflow(step.child_id))]

    def errors(self, step: StepInfo) -> Iterator[ErrorShown]:
        """Return the errors of its tries, and that of a result that can't be read."""
        for number, each in enumerate(step.errors, 1):
            at = f" · {self.moment(each.at)}" if each.at is not None else ""
            yield ErrorShown(
                title=f"Try {number}{at} · {each.type}",
                message=printable(each.message, self.most),
                traceback=printable(each.traceback, self.most),
                brief=f"{each.type}: {each.message}",
            )
        if step.error is not None and not step.errors:
            yield self.outcome_error(summary(step.error))
        elif step.state == states.FAILURE and step.error is None:
            yield self.outcome_error("Its error is too large for this page.")

    def outcome_error(self, text: str) -> ErrorShown:
        """Return what keeps an outcome from being shown."""
        return ErrorShown("Its outcome", printable(text, self.most), "", text)

    # Messages and events

    @cached_property
    def messages(self) -> list[MessageShown]:
        """Return what was sent to it."""
        return [
            MessageShown(
                sent=self.moment(each.sent_at),
                topic=each.topic,
                text=shown.value(each.message, self.most),
                taken_by=each.taken_by or "nobody yet",
                idempotency_key=each.idempotency_key,
            )
            for each in self.seen.messages
        ]

    @cached_property
    def events(self) -> list[tuple[str, str]]:
        """Return what it has published."""
        return [(key, shown.value(value, self.most)) for key, value in self.seen.events.items()]

    # The picture

    @cached_property
    def rows(self) -> list[tuple[Row, Label]]:
        """Return all lanes: its own, and those of the children that are opened."""
        first, *others = self.lanes.lanes
        return [(Row(first, 0), self.label(first, 0, self.status, None)), *self.step_rows(self.seen, others, 1)]

    def step_rows(self, seen: Seen, lanes: Sequence[Lane], depth: int) -> Iterator[tuple[Row, Label]]:
        """Return the lanes of steps; what a child has done is in that of the first step which is about it."""
        left = dict(seen.children)
        for number, lane in enumerate(lanes):
            child = left.pop(lane.child_id or "", None)
            anchor = f"#step-{number}" if seen is self.seen else None
            if child is None:
                url = self.links.workflow(lane.child_id) if lane.child_id else anchor
                yield Row(lane, depth), self.label(lane, depth, None, url)
                continue
            own, *steps = timeline(child.status, child.attempts, child.steps, child.now).lanes
            nested = Lane(lane.key, lane.name, child.status.state, (*lane.bars, *own.bars), lane.child_id)
            yield Row(nested, depth), self.label(nested, depth, child.status, self.links.workflow(child.status.id))
            if child.status.id in self.opened:
                yield from self.step_rows(child, steps, depth + 1)

    def label(self, lane: Lane, depth: int, status: WorkflowStatus | None, url: str | None) -> Label:
        toggled = self.opened ^ {status.id} if status is not None and depth else None
        return Label(
            text=shown.last(lane.key or lane.name),
            title=lane.key or lane.name if status is None or not depth else f"{lane.key}: {status.name} {status.id}",
            depth=depth,
            state=lane.state,
            lasted=_length(lane),
            url=url,
            toggle=None if toggled is None else self.links.unfolded(toggled),
            open=status is not None and status.id in self.opened,
        )

    @cached_property
    def labels(self) -> list[Label]:
        """Return what stands before the lanes that are shown."""
        return [label for _, label in _ends(self.rows)]

    @property
    def left_out(self) -> int:
        """Return how many lanes aren't shown."""
        return max(0, len(self.rows) - MOST_LANES)

    @cached_property
    def picture(self) -> Picture:
        """Draw the lanes that are shown."""
        return draw([row for row, _ in _ends(self.rows)], self.lanes.start, self.lanes.end, self.zone)

    @property
    def legend(self) -> list[tuple[str, str, str]]:
        """Return what is in the picture, its sign and what it means."""
        return [(kind, SIGNS.get(kind, ""), text) for kind, text in _LEGEND.items() if kind in self.picture.kinds]

    def moment(self, time: datetime | None) -> str:
        """Return a point in time."""
        return shown.moment(time, self.zone)


def _error_text(error: BaseException) -> str:
    notes = "\n".join(map(str, getattr(error, "__notes__", ())))
    return printable("\n".join(filter(None, [summary(error), notes])), shown.MOST)


def _ends(found: list[Any]) -> list[Any]:
    """Return the first and the last of very many."""
    if len(found) <= MOST_LANES:
        return found
    return [*found[:100], *found[100 - MOST_LANES :]]


def _length(lane: Lane) -> str:
    bars = [bar for bar in lane.bars if bar.end > bar.start]
    return shown.between(min(bar.start for bar in bars), max(bar.end for bar in bars)) if bars else ""
