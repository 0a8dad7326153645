"""A workflow is taken up behind many completed steps."""

from __future__ import annotations

from collections.abc import Callable

from tests.benchmarks.contestants import Dbos, Durable
from tests.benchmarks.crew import Crew
from tests.benchmarks.measuring import Measure, Turn, Turns
from tests.benchmarks.stage import Stage

FIGURE = "resume over {:,} steps"
SIZES = (1_000, 10_000, 100_000)


def _turns(stage: Stage, crew: Crew) -> Turns:
    durable, *others = crew.call(1, Durable, Dbos)
    sizes = SIZES[: stage.size(len(SIZES), 2)]
    turns = {durable.name: Turn(_act(durable, sizes), durable.empty)}
    return {**turns, **{each.name: Turn(_act(each, SIZES[:1]), each.empty) for each in others}}


def _act(contestant: Durable | Dbos, sizes: tuple[int, ...]) -> Callable[[], dict[str, float]]:
    return lambda: {FIGURE.format(steps): 1_000 * contestant.replay(steps) for steps in sizes}


RESUME = Measure(
    "resume",
    "claim to the end of the replay (DBOS: first step to last)",
    {FIGURE.format(steps): "ms" for steps in SIZES},
    _turns,
)
