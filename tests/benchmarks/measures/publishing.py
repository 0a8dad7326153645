"""How fast one process publishes, while nobody takes anything."""

from __future__ import annotations

import time
from functools import partial

from tests.benchmarks.contestants import Durable, Plain
from tests.benchmarks.crew import Crew
from tests.benchmarks.measuring import Measure, Turn, Turns
from tests.benchmarks.stage import Stage

CALLS = 1_000
RATE = "delay()"
#: A queue of which no worker knows.
NOWHERE = "nowhere"


def _turns(stage: Stage, crew: Crew) -> Turns:
    contestants = crew.call(1, Durable, Plain)
    return {each.name: Turn(partial(_run, stage.size(CALLS, 50), each), partial(_clear, each)) for each in contestants}


def _clear(contestant: Durable | Plain) -> None:
    with contestant.tasks.app.connection_for_write() as connection:
        connection.default_channel.queue_purge(NOWHERE)
    contestant.empty()


def _run(calls: int, contestant: Durable | Plain) -> dict[str, float]:
    task = contestant.tasks.first_step if isinstance(contestant, Durable) else contestant.tasks.nothing
    began = time.perf_counter()
    for _ in range(calls):
        task.apply_async(queue=NOWHERE)
    return {RATE: calls / (time.perf_counter() - began)}


PUBLISHING = Measure("publishing", "calls of one process, to a queue that nobody reads", {RATE: "calls/s"}, _turns)
