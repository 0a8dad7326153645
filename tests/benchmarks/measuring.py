"""What a measure is, and the rounds in which its contestants take turns."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median
from typing import Any

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
    """Something that is measured. ``open`` starts the contestants, which the stack closes, and returns their turns.

    ``units`` has the unit of each figure that a turn returns.
    """

    name: str
    says: str
    units: Mapping[str, str]
    open: Callable[[Stage, ExitStack], Turns]
    #: More rounds tell nothing new of what takes long and hardly varies.
    most_rounds: int = 100


@dataclass
class Figures:
    """The values of all rounds, by figure and contestant."""

    values: dict[str, dict[str, list[float]]] = field(default_factory=lambda: defaultdict(lambda: defaultdict(list)))
    units: dict[str, str] = field(default_factory=dict)

    def add(self, measure: Measure, contestant: str, measured: Mapping[str, float]) -> None:
        """Keep what a turn has returned."""
        for figure, value in measured.items():
            self.units[figure] = measure.units[figure]
            self.values[figure][contestant].append(value)

    def of(self, figure: str, contestant: str) -> list[float]:
        """The values of all rounds; none if it wasn't measured."""
        return self.values.get(figure, {}).get(contestant, [])

    def compared(self, figure: str, one: str, other: str, by: Callable[[float, float], float]) -> float | None:
        """The median of what each round's two values are to each other; None if one of them wasn't measured."""
        pairs = zip(self.of(figure, one), self.of(figure, other), strict=False)
        compared = [by(*pair) for pair in pairs]
        return median(compared) if compared else None


def take_turns(measure: Measure, stage: Stage, rounds: int, figures: Figures) -> None:
    """Measure: a round that warms up and doesn't count, then the others, each beginning with another contestant."""
    with ExitStack() as stack:
        turns = list(measure.open(stage, stack).items())
        for number in range(min(rounds, measure.most_rounds) + 1):
            for contestant, turn in turns[number % len(turns) :] + turns[: number % len(turns)]:
                turn.prepare()
                stage.checkpoint()
                measured = turn.act()
                if number:
                    figures.add(measure, contestant, measured)
