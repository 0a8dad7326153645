"""Trivial steps at once, beside as many one after the other."""

from __future__ import annotations

from functools import partial
from statistics import median

from tests.benchmarks.contestants import Durable
from tests.benchmarks.crew import Crew
from tests.benchmarks.measuring import Measure, Turn, Turns
from tests.benchmarks.stage import Stage

STEPS = 100
#: The workflow that does it, by figure.
WAYS = {
    f"{STEPS} steps in turn": "steps",
    f"{STEPS} steps by durable.gather": "gathered",
    f"{STEPS} steps by asyncio.gather": "gathered_async",
}
IN_TURN, GATHERED, GATHERED_ASYNC = WAYS


def _turns(stage: Stage, crew: Crew) -> Turns:
    (durable,) = crew.call(1, Durable)
    return {durable.name: Turn(partial(_run, stage, durable), durable.empty)}


def _run(stage: Stage, durable: Durable) -> dict[str, float]:
    """From claim to finish; the median of several, as each takes milliseconds."""
    times = stage.size(10, 2)
    return {
        figure: 1_000 * median(durable.inside(workflow, STEPS) for _ in range(times))
        for figure, workflow in WAYS.items()
    }


PARALLEL = Measure("parallel", "100 trivial steps of one workflow, claim to finish", dict.fromkeys(WAYS, "ms"), _turns)
