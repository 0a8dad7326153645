"""What it costs to show each step in Flower."""

from __future__ import annotations

from functools import partial
from statistics import median

from tests.benchmarks.contestants import Durable
from tests.benchmarks.crew import Crew
from tests.benchmarks.measuring import Measure, Turn, Turns
from tests.benchmarks.stage import Stage

STEPS = 500
OFF, ON = f"{STEPS} steps without step events", f"{STEPS} steps with step events"
COMMANDS = {OFF: "disable_events", ON: "enable_events"}


def _turns(stage: Stage, crew: Crew) -> Turns:
    (durable,) = crew.call(1, Durable)
    return {durable.name: Turn(partial(_run, stage, durable), durable.empty)}


def _run(stage: Stage, durable: Durable) -> dict[str, float]:
    """The worker is told as operators tell it, by `celery control`: step events follow its own."""
    took = {figure: [_timed(durable, command) for _ in range(stage.size(2, 1))] for figure, command in COMMANDS.items()}
    durable.tasks.app.control.disable_events(reply=True, limit=1)
    return {figure: 1_000 * median(times) for figure, times in took.items()}


def _timed(durable: Durable, command: str) -> float:
    durable.tasks.app.control.broadcast(command, reply=True, limit=1)
    return durable.inside("steps", STEPS)


EVENTS = Measure("events", "the same workflow, claim to finish", dict.fromkeys(COMMANDS, "ms"), _turns)
