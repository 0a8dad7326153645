"""A time axis on which both steps of milliseconds and waits of days can be seen: long idle spans are folded.

Where something runs, time goes on evenly. A span in which nothing does, and which would leave no room for the rest, is
a fold: as wide as any other fold, however long it is. Positions are in percent of the width, times in seconds.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

#: A span is folded if it is so many times as long as all that isn't.
_DOMINATES = 3
#: Of the width: of one fold, of all folds, and what each part between two folds has at least, if there are few.
_FOLD = 7.0
_FOLDS = 45.0
_PART = 15.0
_PARTS = 60.0
#: Of the width, between two ticks and between two clock times.
_TICK = 9.0
_CLOCK = 16.0
_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_ROUND = (
    *(digit * 10.0**power for power in range(-6, 0) for digit in (1, 2, 5)),
    1, 2, 5, 10, 15, 30,
    *(_MINUTE * number for number in (1, 2, 5, 10, 15, 30)),
    *(_HOUR * number for number in (1, 2, 3, 6, 12)),
    *(_DAY * number for number in (1, 2, 7, 14, 30, 90, 365)),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the axis on which time goes on evenly; all of a fold is one, too."""

    start: float
    end: float
    left: float
    right: float
    folded: bool


@dataclass(frozen=True, slots=True)
class Tick:
    """A place on the axis: so many seconds after the start of its part."""

    left: float
    after: float
    start: float


class Axis:
    """Where each time of a picture is."""

    def __init__(self, end: float, busy: Iterable[tuple[float, float]]) -> None:
        """Lay out the time from 0 to ``end``; it is idle where it isn't ``busy``."""
        self.parts = _laid_out(_folded(_spans(end, busy)))
        self._starts = [part.start for part in self.parts]

    def at(self, time: float) -> float:
        """Return the place of a time; one outside of the axis is at its edge."""
        part = self.parts[max(0, bisect_right(self._starts, time) - 1)]
        done = (time - part.start) / (part.end - part.start) if part.end > part.start else 0
        return part.left + (part.right - part.left) * min(max(done, 0), 1)

    @property
    def folds(self) -> list[Part]:
        """What is folded."""
        return [part for part in self.parts if part.folded]

    def ticks(self) -> Iterator[Tick]:
        """Return the ticks, at round distances from the start of their part."""
        for part in self.parts:
            if not part.folded and part.end > part.start:
                yield from _ticks(part)

    def clocks(self) -> Iterator[Part]:
        """Return the parts at whose start there is room for the time of day."""
        free = 0.0
        for part in self.parts:
            if not part.folded and part.left >= free:
                free = part.left + _CLOCK
                yield part


def _spans(end: float, busy: Iterable[tuple[float, float]]) -> list[tuple[float, float, bool]]:
    """Cut the time into spans: start, end, whether something runs."""
    spans: list[tuple[float, float, bool]] = []
    reached = 0.0
    for start, stop in sorted(busy):
        if start > reached:
            spans.append((reached, start, False))
        if stop > max(start, reached):
            spans.append((max(start, reached), stop, True))
        reached = max(reached, start, stop)
    return [*spans, (reached, end, False)] if reached < end else spans


def _folded(spans: Sequence[tuple[float, float, bool]]) -> list[tuple[float, float, bool]]:
    """Say of each span whether it is folded; what isn't is joined with its neighbours."""
    shortest = _shortest_fold(spans)
    found: list[tuple[float, float, bool]] = []
    for start, stop, runs in spans:
        fold = not runs and stop - start >= shortest
        if found and not fold and not found[-1][2]:
            found[-1] = (found[-1][0], stop, False)
        else:
            found.append((start, stop, fold))
    return found


def _shortest_fold(spans: Sequence[tuple[float, float, bool]]) -> float:
    """Return from which length on idle spans are folded: all that are shorter leave room for what runs."""
    rest = sum(stop - start for start, stop, runs in spans if runs)
    for length in sorted(stop - start for start, stop, runs in spans if not runs):
        if length > _DOMINATES * rest > 0:
            return length
        rest += length
    return float("inf")


def _laid_out(spans: Sequence[tuple[float, float, bool]]) -> list[Part]:
    folds = sum(folded for _, _, folded in spans)
    width = min(_FOLD, _FOLDS / folds) if folds else 0.0
    shares = _shares([stop - start for start, stop, folded in spans if not folded], 100.0 - folds * width)
    widths = [width if folded else next(shares) for _, _, folded in spans]
    edges = [sum(widths[:place]) for place in range(len(widths) + 1)]
    parts = [
        Part(start, stop, left, right, folded)
        for (start, stop, folded), (left, right) in zip(spans, pairwise(edges), strict=True)
    ]
    return parts or [Part(0.0, 0.0, 0.0, 100.0, False)]


def _shares(lengths: Sequence[float], width: float) -> Iterator[float]:
    """Share the width by length, but leave to each part what shows that there is something in it."""
    total = sum(lengths)
    if not total:
        return iter(())
    least = min(_PART, _PARTS / len(lengths))
    wanted = [max(least, width * length / total) for length in lengths]
    spare = [each - least for each in wanted]
    # What the small ones have got is taken from the others, each by what it has to spare.
    excess = sum(wanted) - width
    given = excess / sum(spare) if sum(spare) else 0.0
    return iter([each - extra * given for each, extra in zip(wanted, spare, strict=True)])


def _ticks(part: Part) -> Iterator[Tick]:
    length, width = part.end - part.start, part.right - part.left
    most = max(1, int(width / _TICK))
    step = next((each for each in _ROUND if length / each <= most), length)
    for number in range(1, int(length / step) + 1):
        left = part.left + width * number * step / length
        if left <= part.right - _TICK / 2:
            yield Tick(left, number * step, part.start)
