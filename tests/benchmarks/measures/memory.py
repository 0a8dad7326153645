"""What a pool's process holds."""

from __future__ import annotations

from functools import partial

from tests.benchmarks.contestants import Durable, Plain
from tests.benchmarks.crew import Crew
from tests.benchmarks.measuring import Measure, Turn, Turns
from tests.benchmarks.stage import Stage

RUNS = 100
#: Its own pages; with its share of those it has in common; all of them.
FIGURES = {
    "memory of a pool process, USS": "uss",
    "memory of a pool process, PSS": "pss",
    "memory of a pool process, RSS": "rss",
}
OWN, *_ = FIGURES


def _turns(stage: Stage, crew: Crew) -> Turns:
    contestants = crew.call(1, Durable, Plain, fresh=True)
    return {each.name: Turn(partial(_run, stage.size(RUNS, 10), each), each.empty) for each in contestants}


def _run(runs: int, contestant: Durable | Plain) -> dict[str, float]:
    for _ in range(runs):
        contestant.run(3)
    (process,) = contestant.process.children()
    held = process.memory_full_info()
    return {figure: getattr(held, kind) / 1e6 for figure, kind in FIGURES.items()}


MEMORY = Measure(
    "memory",
    "one fresh pool process after 100 workflows (celery: chains) of 3 steps",
    dict.fromkeys(FIGURES, "MB"),
    _turns,
    most_rounds=1,
    warms_up=False,
)
