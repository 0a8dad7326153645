"""Forty orders go in; workers are killed and the broker is flushed while they are worked on."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import redis

from celery_durable.testing.servers import EmbeddedBroker
from example_project.demo.facts import STEPS, Journal, Kill, Losses
from example_project.demo.jobs import Job
from example_project.demo.processes import Fleet
from example_project.demo.screen import Screen

PATIENCE = 30.0
"""Seconds without any progress, after which we give up."""


def moments(dice: random.Random, bodies: int, kills: int, flushes: int) -> list[tuple[float, str]]:
    """When to do what, by how many step bodies have begun: at random, but all of it while there's work."""
    deaths = [(bodies * (0.05 + 0.7 * (n + dice.random()) / kills), "kill") for n in range(kills)]
    return sorted([*deaths, *((bodies * dice.uniform(0.1, 0.4), "flush") for _ in range(flushes))])


class Mayhem:
    def __init__(
        self, fleet: Fleet, broker: EmbeddedBroker, journal: Journal, screen: Screen, dice: random.Random
    ) -> None:
        self._fleet = fleet
        self._broker = broker
        self._journal = journal
        self._screen = screen
        self._dice = dice
        self.losses = Losses()

    def run(self, orders: Sequence[str], job: Job, kills: int, flushes: int) -> None:
        """Return when all orders have come to an end, or nothing has moved for a long time."""
        plan = moments(self._dice, len(orders) * len(STEPS), kills, flushes)
        doing = {"kill": self._kill, "flush": self._flush}
        not_before = moved_at = time.monotonic()
        seen = (0, 0)
        while seen[0] < len(orders) and time.monotonic() < moved_at + PATIENCE:
            time.sleep(0.02)
            self._journal.refresh()
            now = (len(job.ended()), len(self._journal.bodies))
            if now != seen:
                seen, moved_at = now, time.monotonic()
                self._screen.progress(*now)
            if plan and plan[0][0] <= now[1] and time.monotonic() >= not_before and doing[plan[0][1]]():
                del plan[0]
                not_before = time.monotonic() + self._dice.uniform(0, 0.5)

    def _kill(self) -> bool:
        """Kill a worker that has work; start another one."""
        busy = [worker for worker in self._fleet.workers if self._journal.in_hand(worker.pid)]
        if not busy:
            return False
        victim = self._dice.choice(busy)
        self._fleet.kill_worker(victim)
        killed_at = time.time()
        self._journal.refresh()
        kill = Kill(killed_at, victim.name, frozenset(self._journal.in_hand(victim.pid)))
        self.losses.kills.append(kill)
        replacement = self._fleet.start_worker()
        self._screen.say(f"kill -9 {victim.name}, orders in hand: {len(kill.orders)}, {replacement.name} starts")
        return True

    def _flush(self) -> bool:
        with redis.Redis.from_url(self._broker.url) as client:
            waiting = int(client.llen("celery"))
        self._broker.flush()
        self.losses.flushed.append(waiting)
        self._screen.say(f"flushall on the broker, messages in the queue: {waiting}")
        return True
