"""What is aimed at: policies as values."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

from tests.benchmarks.measures import events, imports, many, memory, parallel, pickup, resume, sequential, short
from tests.benchmarks.measuring import Cell, Figures


@dataclass(frozen=True)
class Target:
    """How a figure of ours is to stand to another one: the median over the rounds lies within these bounds."""

    says: str
    ours: Cell
    other: Cell | None
    at_least: float | None = None
    at_most: float | None = None
    by: Callable[[float, float], float] = operator.truediv
    unit: str = ""

    def measured(self, figures: Figures) -> float | None:
        """Return how it stands; None if it wasn't measured."""
        if self.other is None:
            return figures.compared(self.ours, self.ours, lambda ours, _: ours)
        return figures.compared(self.ours, self.other, self.by)

    def met(self, value: float) -> bool:
        """Return whether this is good enough."""
        return (self.at_least is None or value >= self.at_least) and (self.at_most is None or value <= self.at_most)

    @property
    def bound(self) -> str:
        """As it is read."""
        return f"≥ {self.at_least:g}{self.unit}" if self.at_least is not None else f"≤ {self.at_most:g}{self.unit}"


def _times(figure: str, other: str, bound: float) -> Target:
    """At least so many times the rate of another contestant."""
    ratio = f"{figure}: ratio to {other}"
    return Target(ratio, Cell(figure, "celery_durable"), Cell(figure, other), at_least=bound)


def _more(figure: str, bound: float, unit: str) -> Target:
    """At most so much more than plain Celery."""
    says, ours, plain = f"{figure}: beyond celery", Cell(figure, "celery_durable"), Cell(figure, "celery")
    return Target(says, ours, plain, at_most=bound, by=operator.sub, unit=f" {unit}")


def _within(figure: str, other: str, bound: float, says: str) -> Target:
    """At most so many times another figure of ours."""
    return Target(says, Cell(figure, "celery_durable"), Cell(other, "celery_durable"), at_most=bound)


_LONG, _BRIEF = sequential.WITHIN.format(500), sequential.WHOLE.format(50)
_FIRST = pickup.FIGURE
_FEW, _MOST = resume.FIGURE.format(resume.FEW), resume.FIGURE.format(resume.MOST)

TARGETS = (
    _times(_LONG, "pgbench", 0.65),
    _times(_LONG, "dbos", 9),
    _times(_LONG, "absurd", 3),
    _times(_LONG, "celery", 7),
    _times(_BRIEF, "pgbench", 0.50),
    _times(many.RATE, "pgbench", 0.50),
    _times(many.RATE, "dbos", 6),
    _times(many.RATE, "celery", 6),
    _times(short.RATE, "celery", 0.55),
    _times(short.RATE, "dbos", 1.5),
    Target(_FEW, Cell(_FEW, "celery_durable"), None, at_most=10, unit=" ms"),
    Target(f"{_FEW}: ratio of dbos to this", Cell(_FEW, "dbos"), Cell(_FEW, "celery_durable"), at_least=100),
    # Linear is a hundred times; the rest is what a hundred megabytes of Python objects do to the caches.
    _within(_MOST, _FEW, 150, f"{_MOST}: ratio to {resume.FEW:,}"),
    Target(f"{_FIRST}: ratio to celery", Cell(_FIRST, "celery_durable"), Cell(_FIRST, "celery"), at_most=1.3),
    _within(parallel.GATHERED, parallel.IN_TURN, 0.1, f"{parallel.GATHERED}: ratio to in turn"),
    _within(parallel.GATHERED_ASYNC, parallel.IN_TURN, 0.1, f"{parallel.GATHERED_ASYNC}: ratio to in turn"),
    _more(memory.OWN, 12, "MB"),
    _more(imports.FIGURE, 60, "ms"),
    _within(events.ON, events.OFF, 1.10, f"{events.ON}: ratio to without"),
)  # fmt: skip
