"""Many small workflows, beside as many plain tasks."""

from __future__ import annotations

from collections.abc import Callable

from tests.benchmarks.contestants import Dbos, Durable, Plain
from tests.benchmarks.crew import Crew
from tests.benchmarks.measuring import Measure, Turn, Turns
from tests.benchmarks.stage import Stage

WORKFLOWS, STEPS = 2_000, 3
RATE = f"workflows of {STEPS} steps (celery: tasks), start to result"


def _turns(stage: Stage, crew: Crew) -> Turns:
    runners = crew.call(2, Durable, Dbos, Plain)
    return {each.name: Turn(_act(stage, each), each.empty) for each in runners}


def _act(stage: Stage, contestant: Durable | Dbos | Plain) -> Callable[[], dict[str, float]]:
    many = stage.size(WORKFLOWS, 50)
    if isinstance(contestant, Plain):
        return lambda: {RATE: many / contestant.run_tasks(many)}
    return lambda: {RATE: many / contestant.run_many(many, STEPS)}


SHORT = Measure(
    "short", "2,000 small workflows at once; two pool processes", {RATE: "workflows/s"}, _turns, most_rounds=3
)
