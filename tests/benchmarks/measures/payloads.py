"""Large values: as an argument, as a step's result, as a workflow's result."""

from __future__ import annotations

from functools import partial
from statistics import median
from typing import Any

from tests.benchmarks.contestants import Bare, Durable, Plain
from tests.benchmarks.crew import Crew
from tests.benchmarks.measuring import Measure, Turn, Turns
from tests.benchmarks.payload import text
from tests.benchmarks.stage import Stage

SIZE = 1_000_000
ARGUMENT, STEP, RESULT = "1 MB as argument", "1 MB as step result", "1 MB as result"


def _turns(stage: Stage, crew: Crew) -> Turns:
    durable, plain, bare = crew.call(1, Durable, Plain, Bare)
    return {
        durable.name: Turn(partial(_of_durable, stage, durable), durable.empty),
        plain.name: Turn(partial(_of_plain, stage, plain), plain.empty),
        bare.name: Turn(partial(_of_bare, stage, bare), bare.empty),
    }


def _of_durable(stage: Stage, durable: Durable) -> dict[str, float]:
    return {**_of_plain(stage, durable), STEP: _rate(stage, lambda: durable.inside("keeps", SIZE))}


def _of_plain(stage: Stage, contestant: Durable | Plain) -> dict[str, float]:
    return {
        ARGUMENT: _rate(stage, lambda: contestant.whole("takes", text(SIZE))),
        RESULT: _rate(stage, lambda: contestant.whole("gives", SIZE)),
    }


def _of_bare(stage: Stage, bare: Bare) -> dict[str, float]:
    """It is the limit of all of them."""
    return dict.fromkeys(PAYLOADS.units, _rate(stage, lambda: bare.insert(text(SIZE).encode())))


def _rate(stage: Stage, act: Any) -> float:
    return SIZE / 1e6 / median(act() for _ in range(stage.size(10, 2)))


PAYLOADS = Measure(
    "payloads",
    "one value that can't be compressed; arguments and results delay() to get(), step results claim to finish",
    dict.fromkeys((ARGUMENT, STEP, RESULT), "MB/s"),
    _turns,
)
