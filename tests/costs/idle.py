"""What nodes without work ask of Postgres: the real loops of many workers, turned by a clock that needn't wait."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from unittest.mock import patch

from celery_durable.beat import TASK
from celery_durable.native import Loop
from celery_durable.node import Node
from tests.costs.measuring import name_of
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.proxy import PostgresProxy

#: The numbers of nodes for which docs/scaling.md says it.
COUNTS = (1, 10, 100)
#: Seconds until all have begun, and for which statements are counted then, both on the simulated clock: so many that
#: each interval of the settings goes into them without a rest.
_BEGIN, _COUNTED = 17.0, 60.0
_WHERE_TIME_IS_READ = ("celery_durable.node.time", "celery_durable.heartbeat.time")


def idle_statements(url: str, nodes: int, *, beat: bool) -> dict[str, float]:
    """Return how many statements of each name there are a second on an empty, migrated database.

    Of so many nodes with the settings as they come, and with Celery's beat beside them or without it.
    """
    clock, turns = _Clock(), _Turns()
    with (
        PostgresProxy(url) as proxy,
        closing(Inprocess(proxy.url, "memory://", auto_migrate=True)) as shop,
        _loops(shop, nodes, clock) as loops,
    ):
        for loop in [*loops, _Beat(shop, clock)] if beat else loops:
            turns.add(loop, clock)
        turns.take(clock, _BEGIN)
        proxy.reset()
        turns.take(clock, _COUNTED)
        found = Counter(proxy.statements())
    return {name_of(statement): number / _COUNTED for statement, number in found.items()}


class _Clock:
    """Stands for the module ``time`` in loops; it goes on when it is told to."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        return self.now


class _Turns:
    """Lets loops take their turns, each when it is due or was rung for, one after the other."""

    def __init__(self) -> None:
        self._due: dict[Loop, float] = {}
        self._rung: set[Loop] = set()

    def add(self, loop: Loop, clock: _Clock) -> None:
        """Let a loop take its first turn now."""
        self._due[loop] = clock.now
        loop.bell.ring = partial(self._ring, loop, clock)  # type: ignore[method-assign]

    def take(self, clock: _Clock, seconds: float) -> None:
        """Go on for so long."""
        end = clock.now + seconds
        while self._due[loop := min(self._due, key=self._due.__getitem__)] < end:
            clock.now = max(clock.now, self._due[loop])
            self._rung.discard(loop)
            due = loop.turn()
            self._due[loop] = clock.now if loop in self._rung else due
        clock.now = end

    def _ring(self, loop: Loop, clock: _Clock) -> None:
        self._rung.add(loop)
        self._due[loop] = clock.now


class _Beat(Loop):
    """Celery's beat, and a worker that takes its task at once."""

    def __init__(self, shop: Inprocess, clock: _Clock) -> None:
        super().__init__("beat")
        self._task, self._clock = shop.app.tasks[TASK], clock
        self._interval: float = shop.app.conf.beat_schedule[TASK]["schedule"]

    def turn(self) -> float:
        self._task()
        return self._clock.now + self._interval


@contextmanager
def _loops(shop: Inprocess, nodes: int, clock: _Clock) -> Iterator[list[Loop]]:
    """Give the loops of so many workers' main processes, which share a connection: that changes no statement."""
    installation = shop.installation
    installation.store.nodes.leave(shop.node, patience=0)  # it is older than ours, and would be the one that sweeps
    with ExitStack() as patches:
        for place in _WHERE_TIME_IS_READ:
            patches.enter_context(patch(place, clock))
        patches.enter_context(patch.object(installation, "store_of_one_thread", lambda: installation.store))
        each = [Node(installation, f"worker@{number}") for number in range(nodes)]
        loops: list[Loop] = [loop for node in each for loop in (node._heartbeat, node)]
        yield loops
        for loop in loops:
            loop.leave()
            loop.bell.close()
