"""How soon an idle worker begins."""

from __future__ import annotations

import time
from functools import partial
from statistics import median
from typing import Any

from tests.benchmarks.contestants import Durable, Plain
from tests.benchmarks.crew import Crew
from tests.benchmarks.measuring import Measure, Turn, Turns
from tests.benchmarks.stage import Stage

TIMES = 100
FIGURE = "delay() to the first step (celery: to the task)"


def _turns(stage: Stage, crew: Crew) -> Turns:
    durable, plain = crew.call(1, Durable, Plain)
    times = stage.size(TIMES, 10)
    return {
        durable.name: Turn(partial(_run, times, durable.tasks.first_step), durable.empty),
        plain.name: Turn(partial(_run, times, plain.tasks.now), plain.empty),
    }


def _run(times: int, task: Any) -> dict[str, float]:
    """The task returns when its (first step's) body began, by the same clock."""
    return {FIGURE: 1_000 * median(_pickup(task) for _ in range(times))}


def _pickup(task: Any) -> float:
    began = time.time()
    return task.delay().get(timeout=60) - began


PICKUP = Measure("pickup", "an idle worker of one process", {FIGURE: "ms"}, _turns)
