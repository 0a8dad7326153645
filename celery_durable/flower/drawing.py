"""The picture of a timeline: SVG, made of elements, so that whatever a text says is text.

A row is a lane: the workflow, a step, or what a child has done. A bar is a try, a wait or a time in a queue. Places are
in percent, so that the picture is as wide as its page, and lines and letters aren't stretched with it. Colours are the
style sheet's: an element's class says what it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, tzinfo
from xml.etree.ElementTree import Element, SubElement, tostring

from ..text import printable
from ..timeline import Bar, Lane
from . import shown
from .axis import Axis, Part

#: From one second to another one.
Span = tuple[float, float]
#: In pixels: of a row, of the axis, and of each kind of bar.
ROW = 26
HEAD = 40
_HEIGHTS = {"try": 14, "running": 14, "suspended": 8, "queued": 6, "wait": 4}
#: What stands in a mark.
SIGNS = {"crash": "✕", "time-out": "!", "hand-over": "⇄", "retry": "↻"}
#: Percent of the width that a fold must have for its length to be written in it.
_ROOM = 4.0


@dataclass(frozen=True, slots=True)
class Row:
    """A lane, and how deep it is nested: 0 is the workflow itself, 1 a step of it."""

    lane: Lane
    depth: int


@dataclass(frozen=True, slots=True)
class Picture:
    """Two drawings of one width: the axis above, the rows below it."""

    head: str
    body: str
    kinds: tuple[str, ...]


def draw(rows: Sequence[Row], start: datetime, end: datetime, zone: tzinfo) -> Picture:
    """Return the picture of these rows from ``start`` to ``end``."""
    pen = _Pen(rows, start, end, zone)
    return Picture(_text_of(pen.head()), _text_of(pen.body()), tuple(sorted(pen.kinds())))


class _Pen:
    def __init__(self, rows: Sequence[Row], start: datetime, end: datetime, zone: tzinfo) -> None:
        self.rows = rows
        self.start = start
        self.zone = zone
        self.with_day = start.astimezone(zone).date() != end.astimezone(zone).date()
        self.axis = Axis(max(0.0, self.second(end)), self.busy())

    def second(self, time: datetime) -> float:
        return (time - self.start).total_seconds()

    def busy(self) -> Iterator[Span]:
        """Return when something ran: tries, children, and the workflow itself while it doesn't wait in its place."""
        waits = []
        runs = []
        for row in self.rows:
            for bar in row.lane.bars:
                span = (self.second(bar.start), self.second(bar.end))
                if bar.kind == "try" or (bar.kind == "running" and row.depth):
                    yield span
                elif bar.kind == "running":
                    runs.append(span)
                elif bar.kind == "wait":
                    waits.append(span)
        yield from _without(runs, waits)

    def kinds(self) -> set[str]:
        """Return what is in the picture, as its legend calls it."""
        bars = (bar for row in self.rows for bar in row.lane.bars)
        return {_kind(bar, "-") for bar in bars} | ({"fold"} if self.axis.folds else set())

    def head(self) -> Element:
        """Draw the axis: above the time of day, below the distance from it."""
        svg = _svg(HEAD)
        for fold in self.axis.folds:
            self.fold(svg, fold, HEAD)
            if fold.right - fold.left >= _ROOM:
                _write(svg, (fold.left + fold.right) / 2, HEAD - 8, shown.duration(fold.end - fold.start), "length")
        for tick in self.axis.ticks():
            _line(svg, tick.left, HEAD - 6, HEAD, "tick")
            _write(svg, tick.left, HEAD - 10, f"+{shown.duration(tick.after)}", "after")
        for part in self.axis.clocks():
            time = self.start.fromtimestamp(self.start.timestamp() + part.start, self.zone)
            _line(svg, part.left, 0, HEAD, "tick")
            _write(svg, part.left, 13, shown.clock(time, self.zone, with_day=self.with_day), "clock")
        return svg

    def body(self) -> Element:
        """Draw all rows."""
        height = ROW * len(self.rows)
        svg = _svg(height)
        svg.append(_hatching())
        for number in range(1, len(self.rows), 2):
            _rect(svg, 0, 100, number * ROW, ROW, "stripe")
        for fold in self.axis.folds:
            self.fold(svg, fold, height)
        for tick in self.axis.ticks():
            _line(svg, tick.left, 0, height, "tick")
        for number, row in enumerate(self.rows):
            for bar in row.lane.bars:
                if not bar.is_mark:
                    self.bar(svg, bar, row, number * ROW)
        # After all bars, so that none of them hides one.
        for number, row in enumerate(self.rows):
            for bar in row.lane.bars:
                if bar.is_mark:
                    self.mark(svg, bar, number * ROW, height)
        return svg

    def fold(self, svg: Element, fold: Part, height: int) -> None:
        band = _rect(svg, fold.left, fold.right, 0, height, "fold")
        _title(band, f"{shown.duration(fold.end - fold.start)} in which nothing ran, drawn short")
        _line(svg, fold.left, 0, height, "edge")
        _line(svg, fold.right, 0, height, "edge")

    def bar(self, svg: Element, bar: Bar, row: Row, top: int) -> None:
        tall = _HEIGHTS.get(bar.kind, 8)
        left, right = self.axis.at(self.second(bar.start)), self.axis.at(self.second(bar.end))
        drawn = _rect(svg, left, right, top + (ROW - tall) / 2, tall, f"bar {_kind(bar, ' ')}")
        drawn.set("rx", "2")
        if bar.kind == "suspended":
            drawn.set("fill", "url(#durable-hatching)")
        _title(drawn, self.said(bar, row))

    def mark(self, svg: Element, bar: Bar, top: int, height: int) -> None:
        place = self.axis.at(self.second(bar.start))
        group = SubElement(svg, "g", {"class": f"mark {bar.kind}"})
        _title(group, f"{bar.label or bar.kind} at {shown.moment(bar.start, self.zone)}")
        _line(group, place, top, height, "edge")
        SubElement(group, "circle", {"cx": _percent(place), "cy": str(top + ROW / 2), "r": "8"})
        _write(group, place, top + ROW / 2 + 4, SIGNS[bar.kind], "sign")

    def said(self, bar: Bar, row: Row) -> str:
        """Return what a bar tells when it is pointed at."""
        what = " ".join(filter(None, [_kind(bar, " "), bar.label and f"({bar.label})"]))
        lasted = shown.between(bar.start, bar.end)
        when = f"{shown.moment(bar.start, self.zone)} to {shown.moment(bar.end, self.zone)}"
        return printable(f"{row.lane.key or row.lane.name}: {what}\n{lasted}\n{when}", shown.MOST)


def _kind(bar: Bar, separator: str) -> str:
    """Return what a bar is; of a try also how it has ended."""
    return f"try{separator}{(bar.state or 'running').lower()}" if bar.kind == "try" else bar.kind


def _without(runs: Sequence[Span], waits: Sequence[Span]) -> Iterator[Span]:
    """Return the parts of the runs that no wait covers."""
    waiting = sorted(waits)
    for start, end in runs:
        reached = start
        for wait_start, wait_end in waiting:
            if wait_end <= reached:
                continue
            if wait_start >= end:
                break
            if wait_start > reached:
                yield reached, wait_start
            reached = wait_end
        if reached < end:
            yield reached, end


def _svg(height: int) -> Element:
    return Element("svg", {"width": "100%", "height": str(height), "aria-hidden": "true"})


def _hatching() -> Element:
    definitions = Element("defs")
    size = {"width": "6", "height": "6", "patternUnits": "userSpaceOnUse", "patternTransform": "rotate(45)"}
    pattern = SubElement(definitions, "pattern", {"id": "durable-hatching", **size})
    SubElement(pattern, "rect", {"width": "2", "height": "6", "class": "hatch"})
    return definitions


def _rect(parent: Element, left: float, right: float, top: float, height: float, kind: str) -> Element:
    place = {"x": _percent(left), "width": _percent(max(right - left, 0.01)), "y": f"{top:g}", "height": f"{height:g}"}
    return SubElement(parent, "rect", {"class": kind, **place})


def _line(parent: Element, left: float, top: float, bottom: float, kind: str) -> None:
    place = {"x1": _percent(left), "x2": _percent(left), "y1": f"{top:g}", "y2": f"{bottom:g}"}
    SubElement(parent, "line", {"class": kind, **place})


def _write(parent: Element, left: float, bottom: float, text: str, kind: str) -> None:
    SubElement(parent, "text", {"class": kind, "x": _percent(left), "y": f"{bottom:g}"}).text = text


def _title(parent: Element, text: str) -> None:
    title = Element("title")
    title.text = text
    parent.insert(0, title)


def _percent(place: float) -> str:
    return f"{place:.3f}%"


def _text_of(svg: Element) -> str:
    return tostring(svg, encoding="unicode")
