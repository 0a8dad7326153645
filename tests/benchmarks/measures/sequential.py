"""Trivial steps one after the other, in one workflow at a time."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.benchmarks.contestants import Absurd, Dbos, Durable, Limit, Plain
from tests.benchmarks.crew import Crew
from tests.benchmarks.measuring import Measure, Turn, Turns
from tests.benchmarks.stage import Stage

#: Steps of a workflow, and how many workflows a turn has, one after the other.
SIZES = {50: 5, 500: 1}
WITHIN, WHOLE = "{} steps, claim to finish", "{} steps, delay() to get()"
#: The statement that a step makes, in a loop in the same worker: what is left of the limit for the rest of a step.
BARE = "its statement"
#: As many as take a good second.
TRANSACTIONS = 3_000


def _turns(stage: Stage, crew: Crew) -> Turns:
    *runners, limit = crew.call(1, Durable, Dbos, Absurd, Plain, Limit)
    turns = {each.name: Turn(partial(_of_all_sizes, stage, each), each.empty) for each in runners}
    durable = runners[0]
    turns[BARE] = Turn(lambda: dict.fromkeys(SEQUENTIAL.units, durable.statements(500)), durable.empty)
    return {**turns, limit.name: Turn(partial(_of_limit, stage, limit), limit.empty)}


def _of_all_sizes(stage: Stage, contestant: Any) -> dict[str, float]:
    measured = {}
    for steps, times in SIZES.items():
        runs = [contestant.run(steps) for _ in range(stage.size(times, 1))]
        inside, whole = map(sum, zip(*runs, strict=True))
        measured[WITHIN.format(steps)] = steps * len(runs) / inside
        measured[WHOLE.format(steps)] = steps * len(runs) / whole
    return measured


def _of_limit(stage: Stage, limit: Limit) -> dict[str, float]:
    """It is the limit of all of them."""
    return dict.fromkeys(SEQUENTIAL.units, limit.rate(stage.size(TRANSACTIONS, 300)))


SEQUENTIAL = Measure(
    "sequential",
    "trivial steps, one workflow after the other; one pool process, one client",
    {figure.format(steps): "steps/s" for steps in SIZES for figure in (WITHIN, WHOLE)},
    _turns,
)
