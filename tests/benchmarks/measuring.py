"""What a measure is, and the rounds in which its contestants take turns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from tests.benchmarks.crew import Crew
from tests.benchmarks.stage import Stage


@dataclass(frozen=True)
class Turn:
    """What a contestant does in each round, and how it is made ready for it."""

    act: Callable[[], Mapping[str, float]]
    prepare: Callable[[], Any] = lambda: None


#: A contestant's turns by its name.
Turns = Mapping[str, Turn]


@dataclass(frozen=True)
class Measure:
    """Something that is measured. ``units`` has the unit of each figure; ``turns`` calls the contestants."""

    name: str
    says: str
    units: Mapping[str, str]
    turns: Callable[[Stage, Crew], Turns]
    #: More rounds tell nothing new of what takes long and hardly varies.
    most_rounds: int = 1_000
    #: Whether a first round is taken that doesn't count.
    warms_up: bool = True


@dataclass(frozen=True)
class Cell:
    """A figure of a contestant."""

    figure: str
    contestant: str


@dataclass
class Figures:
    """The values of all rounds."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    units: dict[str, str] = field(default_factory=dict)

    def add(self, measure: Measure, contestant: str, measured: Mapping[str, float]) -> None:
        """Keep what a turn has returned."""
        for figure, value in measured.items():
            self.units[figure] = measure.units[figure]
            self.values[figure][contestant].append(value)

    def of(self, cell: Cell) -> list[float]:
        """The values of all rounds; none if it wasn't measured."""
        return self.values.get(cell.figure, {}).get(cell.contestant, [])

    def compared(self, one: Cell, other: Cell, by: Callable[[float, float], float]) -> float | None:
        """The median of what the two are to each other in each round; None if one of them wasn't measured."""
        compared = [by(*pair) for pair in zip(self.of(one), self.of(other), strict=False)]
        return median(compared) if compared else None


def take_turns(measure: Measure, stage: Stage, crew: Crew, rounds: int, figures: Figures) -> None:
    """Measure: a round that warms up and doesn't count, then the others, each beginning with another contestant.

    A quick run has no warm-up.
    """
    turns = list(measure.turns(stage, crew).items())
    warm_up = measure.warms_up and not stage.quick
    for number in range(0 if warm_up else 1, min(rounds, measure.most_rounds) + 1):
        first = number % len(turns)
        for contestant, turn in turns[first:] + turns[:first]:
            turn.prepare()
            stage.checkpoint()
            measured = turn.act()
            if number:
                figures.add(measure, contestant, measured)
