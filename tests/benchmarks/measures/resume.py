"""A workflow is taken up behind many completed steps."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from statistics import median

from tests.benchmarks.contestants import Dbos, Durable
from tests.benchmarks.crew import Crew
from tests.benchmarks.measuring import Measure, Turn, Turns
from tests.benchmarks.stage import Stage

FIGURE = "resume over {:,} steps"
#: Steps, and how often a turn takes up so many; the median counts.
SIZES = {1_000: 5, 10_000: 1, 100_000: 1}
FEW, *_, MOST = SIZES


def _turns(stage: Stage, crew: Crew) -> Turns:
    durable, *others = crew.call(1, Durable, Dbos)
    sizes = dict(list(SIZES.items())[: stage.size(len(SIZES), 2)])
    turns = {durable.name: Turn(partial(_run, durable, sizes), durable.empty)}
    return {**turns, **{each.name: Turn(partial(_run, each, {FEW: 1}), each.empty) for each in others}}


def _run(contestant: Durable | Dbos, sizes: Mapping[int, int]) -> dict[str, float]:
    return {
        FIGURE.format(steps): 1_000 * median(contestant.replay(steps) for _ in range(times))
        for steps, times in sizes.items()
    }


RESUME = Measure(
    "resume",
    "claim to the end of the replay (DBOS: first step to last)",
    {FIGURE.format(steps): "ms" for steps in SIZES},
    _turns,
)
