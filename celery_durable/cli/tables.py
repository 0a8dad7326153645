"""What people see in the terminal: tables, by rich. No text of a workflow's is taken for markup."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

import click

try:
    from rich.console import Console, RenderableType
    from rich.table import Table
    from rich.text import Text
except ImportError as error:
    raise click.ClickException("Tables need rich: pip install 'celery-durable[cli]', or pass --json.") from error

import celery_durable as durable

from ..timeline import WORKFLOW, Timeline
from .chart import draw, legend
from .output import LONGEST_VALUE, duration, line, moment, short, text_of

_STYLES = {
    "ENQUEUED": "cyan",
    "RUNNING": "bold cyan",
    "SUSPENDED": "blue",
    "SUCCESS": "green",
    "FAILURE": "red",
    "CANCELLED": "yellow",
    "DEAD": "bold red",
    "RETRY": "yellow",
}
#: Characters of a chart: at least, and where the width of the terminal isn't known.
_NARROWEST, _CHART = 20, 60
#: Characters of a table that goes into a file or a pipe: nothing is cut off there.
_ENDLESS = 10_000
#: Steps in a timeline; of more the first and the last ones.
_MOST_LANES = 200


class Page:
    """Prints parts of a page, each with its title."""

    def __init__(self, *, no_color: bool) -> None:
        self._console = Console(highlight=False, markup=False, emoji=False, color_system=None if no_color else "auto")
        self._on_terminal = self._console.is_terminal
        if not self._on_terminal:
            self._console = Console(highlight=False, markup=False, emoji=False, width=_ENDLESS)

    def workflows(self, found: Iterable[durable.WorkflowStatus]) -> None:
        """Print a list."""
        table = _table("id", "task", "state", "created", "took", "what")
        for status in found:
            what = status.error_text or _waits(status) or (status.worker if status.state == "RUNNING" else "") or ""
            took = _took(status.started_at, status.finished_at)
            table.add_row(
                Text(line(status.id)), line(status.name), _state(status.state), moment(status.created_at), took,
                Text(short(what, 200)),
            )  # fmt: skip
        self._console.print(table)

    def facts(self, status: durable.WorkflowStatus, *, full: bool) -> None:
        """Print how a workflow stands, what it was given, and what has become of it; cut off unless ``full``."""
        limit = sys.maxsize if full else LONGEST_VALUE
        facts: dict[str, RenderableType] = {
            "id": line(status.id),
            "task": line(status.name),
            "state": _state(status.state),
            "queue": line(status.queue),
            "created": moment(status.created_at),
            "started": moment(status.started_at),
            "finished": _with(moment(status.finished_at), _took(status.started_at, status.finished_at)),
            "attempt": f"{status.attempt}" + (f", {status.crashes} crashes" if status.crashes else ""),
            "worker": line(status.worker or ""),
            "waits for": line(_waits(status)),
            "deadline": moment(status.deadline),
            "parent": line(status.parent_id or ""),
            "root": line(status.root_id or "") if status.root_id != status.id else "",
            "forked from": line(status.forked_from or ""),
            "args": short(text_of(status.args), limit),
            "kwargs": short(text_of(status.kwargs), limit),
        }
        if status.error is not None or status.error_text:
            facts["error"] = short(status.error_text or text_of(status.error), limit)
        elif status.state == "SUCCESS":
            facts["result"] = short(text_of(status.result), limit)
        self._grid(facts)

    def timeline(self, time: Timeline, steps: Sequence[durable.StepInfo]) -> None:
        """Print the steps, each with its bars on the same axis of time."""
        seconds = (time.end - time.start).total_seconds()
        ascii_only, width = self._console.options.ascii_only, self._chart_width()
        table = _table("step", "state", f"{moment(time.start)} + {duration(seconds)}", "took", "tries", "child")
        table.columns[2].no_wrap = True
        tries = {step.key: step.tries for step in steps}
        for lane in _shortened(time.lanes):
            took = sum((bar.end - bar.start).total_seconds() for bar in lane.bars if bar.kind in ("try", "running"))
            name = Text(line(lane.name), "bold") if lane.key == WORKFLOW else Text(line(lane.key))
            table.add_row(
                name, _state(lane.state), draw(lane, time, width, ascii_only=ascii_only),
                duration(took) if took else "",
                str(tries.get(lane.key) or ""), Text(line(lane.child_id or "")),
            )  # fmt: skip
        if len(time.lanes) > _MOST_LANES:
            table.caption = f"{len(time.lanes) - _MOST_LANES:,} steps in between aren't shown; --json has all of them"
        self._print("", table)
        self._console.print(legend(time, ascii_only=ascii_only))

    def attempts(self, attempts: Sequence[durable.AttemptInfo]) -> None:
        """Print who has run it; nothing if that was one attempt, of which the facts tell."""
        table = _table("attempt", "worker", "started", "ended", "how")
        for each in attempts:
            table.add_row(
                str(each.attempt), Text(line(each.worker or "")), moment(each.started_at), moment(each.ended_at),
                each.ending or "runs",
            )  # fmt: skip
        if len(attempts) > 1:
            self._print("attempts", table)

    def messages(self, messages: Sequence[durable.MessageInfo]) -> None:
        """Print what was sent to it."""
        table = _table("message", "topic", "sent", "taken by")
        for each in messages:
            table.add_row(
                Text(short(text_of(each.message))),
                Text(line(each.topic)),
                moment(each.sent_at),
                Text(line(each.taken_by or "")),
            )
        if messages:
            self._print("messages", table)

    def events(self, events: Mapping[str, Any]) -> None:
        """Print what it has published."""
        table = _table("event", "value")
        for key, value in events.items():
            table.add_row(Text(line(key)), Text(short(text_of(value))))
        if events:
            self._print("events", table)

    def errors(self, status: durable.WorkflowStatus, steps: Sequence[durable.StepInfo], *, tracebacks: bool) -> None:
        """Print the errors of all tries of all steps."""
        told = [(step.key, error) for step in steps for error in step.errors]
        if told:
            self._console.print(Text("\nerrors", "bold"))
        for key, error in told:
            self._console.print(Text(f"{line(key)}  {moment(error.at)}  {short(f'{error.type}: {error.message}')}"))
            if tracebacks:
                self._traceback(error.traceback)
        own = getattr(status.error, "traceback_text", "")
        if tracebacks and own:
            self._console.print(Text(f"\n{line(status.name)}", "bold"))
            self._traceback(own)

    def _traceback(self, text: str) -> None:
        for each in text.splitlines():
            self._console.print(Text(f"  {line(each)}"))

    def _grid(self, facts: Mapping[str, RenderableType]) -> None:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(overflow="fold")
        for name, value in facts.items():
            if value:
                grid.add_row(name, Text(value) if isinstance(value, str) else value)
        self._console.print(grid)

    def _print(self, title: str, table: Table) -> None:
        self._console.print(Text(f"\n{title}", "bold") if title else "")
        self._console.print(table)

    def _chart_width(self) -> int:
        return max(self._console.width // 2, _NARROWEST) if self._on_terminal else _CHART


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", caption_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _state(state: str) -> Text:
    return Text(state, _STYLES.get(state, ""))


def _waits(status: durable.WorkflowStatus) -> str:
    if status.waiting_for is None:
        return ""
    return _with(status.waiting_for, f"until {moment(status.wake_at)}" if status.wake_at else "")


def _took(started_at: datetime | None, finished_at: datetime | None) -> str:
    if started_at is None or finished_at is None:
        return ""
    return duration(max((finished_at - started_at).total_seconds(), 0.0))


def _with(text: str, more: str) -> str:
    return f"{text} ({more})" if text and more else text or more


def _shortened(lanes: Sequence[Any]) -> list[Any]:
    if len(lanes) <= _MOST_LANES:
        return list(lanes)
    return [*lanes[: _MOST_LANES // 2], *lanes[-_MOST_LANES // 2 :]]
