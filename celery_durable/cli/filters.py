"""Which workflows a command is for: by ids, or by filters."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, TypeVar

import click
from celery.bin.base import CeleryOption

import celery_durable as durable

from .. import states
from .command import standard_input
from .output import number

F = TypeVar("F", bound=Callable[..., Any])

#: Workflows in one statement.
BATCH = 500
#: Workflows are counted no further, in each state.
MOST = 10_000

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhdw]?)")


def seconds_of(value: str) -> float:
    """Return a duration that was given as seconds, or as a number with one of the units s, m, h, d, w."""
    from ..config import LONGEST

    match = _DURATION.fullmatch(value)
    seconds = float(match[1]) * _UNITS[match[2] or "s"] if match else LONGEST + 1
    if seconds > LONGEST:
        raise click.BadParameter(f"{value!r} is no duration: write seconds, or 90s, 30m, 12h, 7d, 2w.")
    return seconds


def time_of(value: str) -> datetime:
    """Return a time that was given in ISO 8601, without a zone a local one, or as how long ago it was."""
    if _DURATION.fullmatch(value):
        return datetime.now(timezone.utc) - timedelta(seconds=seconds_of(value))
    try:
        return datetime.fromisoformat(value).astimezone()
    except (ValueError, OverflowError):
        raise click.BadParameter(
            f"{value!r} is no time: write 2026-11-28T12:00, or how long ago it was: 90s, 30m, 12h, 7d."
        ) from None


STATE = click.Choice(sorted(states.ALL), case_sensitive=False)

_OPTIONS: dict[str, dict[str, Any]] = {
    "state": {"type": STATE, "multiple": True, "help": "In this state; give it again for another one."},
    "name": {"help": "Of this task."},
    "queue": {"help": "Of this queue."},
    "parent_id": {"help": "Started by this workflow."},
    "root_id": {"help": "Started by this workflow, or by what that has started."},
    "forked_from": {"help": "Forked from this workflow."},
    "error": {"help": "With this in its error, in any case."},
    "created_after": {"type": time_of, "metavar": "TIME", "help": "Since 2026-11-28T12:00, or 12h: twelve hours ago."},
    "created_before": {"type": time_of, "metavar": "TIME", "help": "Before that time."},
}


def filter_options(command: F) -> F:
    """Let a command take the filters of ``list_workflows``."""
    for name, facts in reversed(_OPTIONS.items()):
        flag = f"--{name.replace('_', '-')}"
        command = click.option(flag, name, cls=CeleryOption, help_group="Filters", **facts)(command)
    return command


def filters_in(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the filters among a command's options that were given."""
    return {name: given[name] for name in _OPTIONS if given.get(name) not in (None, ())}


def ids_in(ids: Sequence[str], filters: Mapping[str, Any]) -> list[str] | None:
    """Return the ids that were given as arguments, or one a line by standard input; None: filters were given.

    Raises click.UsageError for neither of them, and for both.
    """
    if ids and filters:
        raise click.UsageError("Name the workflows by ids, or by filters, not by both.")
    if filters:
        return None
    named = [each for each in ids if each != "-"]
    if "-" in ids or (not ids and not standard_input().isatty()):
        named += [each.rstrip("\r\n") for each in standard_input() if each.strip()]
    if not named and "-" not in ids:
        raise click.UsageError("Which workflows? Give ids, - to read them from standard input, or filters.")
    return list(dict.fromkeys(named))


def counted(app: Any, filters: Mapping[str, Any]) -> dict[str, int]:
    """Return how many workflows match, by state."""
    found: dict[str, int] = durable.count_workflows(**filters, most=MOST, app=app)
    return {state: count for state, count in found.items() if count}


def told(counts: Mapping[str, int]) -> str:
    """Return counts by state as text."""
    return ", ".join(f"{number(count, MOST)} {state}" for state, count in sorted(counts.items())) or "none"


def matching(app: Any, filters: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield the ids of all workflows that match by now, in batches, the newest first."""
    after = None
    while page := durable.list_workflows(**filters, after=after, limit=BATCH, max_payload=0, app=app):
        yield [status.id for status in page]
        after = page[-1]
