"""Many workflows that sleep, and are due at the same moment."""

from __future__ import annotations

import sys
import time
from functools import partial

import celery_durable as durable
from tests.benchmarks.contestants import Durable
from tests.benchmarks.crew import Crew
from tests.benchmarks.measuring import Measure, Turn, Turns
from tests.benchmarks.stage import Stage

WORKFLOWS = 10_000
WOKEN, GROWTH = "sleeping workflows, due to ended", "growth of the worker meanwhile"
#: Seconds until they are due: more than the five below which a sleep keeps its process, and some for each to begin.
SLEEP, EACH = 7, 1 / 80
PAUSE = 0.1


def _turns(stage: Stage, crew: Crew) -> Turns:
    (contestant,) = crew.call(2, Durable)
    return {contestant.name: Turn(partial(_run, stage.size(WORKFLOWS, 20), contestant), contestant.empty)}


def _run(count: int, contestant: Durable) -> dict[str, float]:
    before, due = contestant.process.memory(), time.time() + SLEEP + count * EACH
    signature = contestant.tasks.sleeps_until.s(due)
    for start in range(0, count, 1_000):
        durable.enqueue_many([signature.clone() for _ in range(min(1_000, count - start))])
    time.sleep(max(0, due - time.time()))
    asleep = contestant.in_state("SUSPENDED")
    while contestant.in_state("SUCCESS") < count:
        time.sleep(PAUSE)
    measured = {GROWTH: contestant.process.memory() - before}
    if asleep < count:
        print(
            f"Only {asleep:,} of {count:,} workflows slept when they were due: their end isn't told.", file=sys.stderr
        )
        return measured
    return {WOKEN: count / (time.time() - due), **measured}


SLEEPING = Measure(
    "sleeping",
    "10,000 workflows that are due at one moment; two pool processes",
    {WOKEN: "workflows/s", GROWTH: "MB"},
    _turns,
    most_rounds=1,
    warms_up=False,
)
