"""A timeline in the terminal: one row a lane, one or more characters a bar."""

from __future__ import annotations

import math
from datetime import datetime

from rich.text import Text

from ..timeline import Bar, Lane, Timeline

#: How a bar looks where the terminal has Unicode, and where it hasn't.
_GLYPHS = {
    "queued": ("┄", "."),
    "running": ("━", "="),
    "suspended": ("╌", "-"),
    "wait": ("─", "-"),
    "SUCCESS": ("■", "#"),
    "FAILURE": ("✗", "x"),
    "RETRY": ("✗", "x"),
    "now": ("□", "o"),
    "crash": ("!", "!"),
    "time-out": ("T", "T"),
    "hand-over": ("»", ">"),
    "retry": ("↻", "r"),
}
_STYLES = {
    "queued": "bright_black",
    "running": "cyan",
    "suspended": "bright_black",
    "wait": "bright_black",
    "SUCCESS": "green",
    "FAILURE": "red",
    "RETRY": "yellow",
    "now": "cyan",
    "crash": "bold red",
    "time-out": "bold red",
    "hand-over": "bold yellow",
    "retry": "bold yellow",
}
_MEANINGS = {
    "queued": "queued",
    "running": "running",
    "suspended": "suspended",
    "wait": "wait",
    "SUCCESS": "done",
    "RETRY": "failed",
    "now": "goes on",
    "crash": "crash",
    "time-out": "time limit",
    "hand-over": "hand-over",
    "retry": "run anew",
}


def draw(lane: Lane, time: Timeline, width: int, *, ascii_only: bool) -> Text:
    """Return a lane as a row of so many characters. What is waiting hides no try, and nothing hides a mark."""
    row = [(" ", "")] * width
    for bar in sorted(lane.bars, key=lambda bar: (bar.is_mark, bar.kind in ("try", "running"))):
        kind = _kind(bar)
        first, last = _columns(bar, time, width)
        for column in range(first, last):
            row[column] = (_GLYPHS[kind][ascii_only], _STYLES[kind])
    drawn = Text(no_wrap=True)
    for char, style in row:
        drawn.append(char, style)
    return drawn


def legend(time: Timeline, *, ascii_only: bool) -> Text:
    """Return what the glyphs mean that a timeline has."""
    there = {_kind(bar) for lane in time.lanes for bar in lane.bars}
    if "FAILURE" in there:
        there.add("RETRY")
    drawn = Text()
    for kind, meaning in _MEANINGS.items():
        if kind in there:
            drawn.append(_GLYPHS[kind][ascii_only], _STYLES[kind]).append(f" {meaning}   ")
    return drawn


def _kind(bar: Bar) -> str:
    return bar.kind if bar.kind != "try" else bar.state or "now"


def _columns(bar: Bar, time: Timeline, width: int) -> tuple[int, int]:
    """Return the columns of a bar; one at least, however short it is."""
    first = min(math.floor(_share(bar.start, time) * width), width - 1)
    return first, first + 1 if bar.is_mark else max(math.ceil(_share(bar.end, time) * width), first + 1)


def _share(at: datetime, time: Timeline) -> float:
    whole = (time.end - time.start).total_seconds()
    return min(max((at - time.start).total_seconds() / whole, 0.0), 1.0) if whole > 0 else 0.0
