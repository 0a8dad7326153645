"""Workflows of trivial steps at once."""

from __future__ import annotations

from functools import partial
from typing import Any

from tests.benchmarks.contestants import Dbos, Durable, Limit, Plain
from tests.benchmarks.crew import Crew
from tests.benchmarks.measures.sequential import TRANSACTIONS
from tests.benchmarks.measuring import Measure, Turn, Turns
from tests.benchmarks.stage import Stage

WORKFLOWS, STEPS = 20, 50
RATE = f"{WORKFLOWS} workflows of {STEPS} steps, start to result"


def _turns(stage: Stage, crew: Crew) -> Turns:
    *runners, limit = crew.call(2, Durable, Dbos, Plain, Limit)
    turns = {each.name: Turn(partial(_run, stage, each), each.empty) for each in runners}
    return {**turns, limit.name: Turn(lambda: {RATE: limit.rate(stage.size(TRANSACTIONS, 300))}, limit.empty)}


def _run(stage: Stage, contestant: Any) -> dict[str, float]:
    workflows = stage.size(WORKFLOWS, 4)
    return {RATE: workflows * STEPS / contestant.run_many(workflows, STEPS)}


MANY = Measure("many", "workflows at once; two pool processes, two clients", {RATE: "steps/s"}, _turns)
