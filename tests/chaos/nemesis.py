"""Who strikes: rounds of faults at once, and now and then a calm, in which everything must come right."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import kombu
import psycopg

from tests.chaos.faults import Fault, faults, strike
from tests.chaos.ledger import now
from tests.chaos.stage import LEASE, SLACK, SWEEP, Stage

CALM_SHARE = 0.15
AT_ONCE = 3
#: From the instant at which all workers are up: a lease until one of them is a witness, one for the silent node.
BOUND = 2 * LEASE + SWEEP + SLACK

#: Workflows that somebody should have cared for by now, if what is promised of the recovery holds.
OVERDUE = """
SELECT w.id, w.state,
    coalesce(w.publish_at::text, w.wake_at::text, 'its worker is silent')
FROM celery_durable.workflow w LEFT JOIN celery_durable.node n ON n.id = w.node
WHERE w.state = 'RUNNING' AND (n.id IS NULL OR n.seen < clock_timestamp() - make_interval(secs => %(lease)s))
OR w.state = 'SUSPENDED' AND w.wake_at < clock_timestamp() - make_interval(secs => %(sweep)s)
OR w.state = 'ENQUEUED' AND w.published_at IS NULL
    AND w.publish_at < clock_timestamp() - make_interval(secs => %(sweep)s)
OR w.finished_at < clock_timestamp() - make_interval(secs => 10 * %(lease)s) AND NOT w.dispatched AND w.node IS NOT NULL
    AND (n.id IS NULL OR n.seen < clock_timestamp() - make_interval(secs => %(lease)s))
"""


@dataclass
class Nemesis:
    """Strikes by the seed's dice, and keeps a journal."""

    stage: Stage
    seed: int
    say: Callable[[str], None]
    journal: list[Fault] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    calms: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._faults = faults()
        self._over = threading.Event()
        self._tender = threading.Thread(target=self._tend, daemon=True)

    def begin(self) -> None:
        """Let whoever dies be replaced from now on, and wait until all are at work."""
        self._tender.start()
        self.calm()

    def rage(self, seconds: float) -> None:
        """Strike for so long. Everything is healed at the end."""
        give_up_at = now() + seconds
        number = 0
        with ThreadPoolExecutor(AT_ONCE) as hands:
            while now() < give_up_at:
                dice = random.Random(f"{self.seed} round {number}")
                list(hands.map(self._strike, self._choose(dice)))
                self._rest(dice)
                number += 1

    def calm(self) -> None:
        """Wait until all workers are up; from then on nothing may be overdue for longer than the bound."""
        self._await(self.stage.all_up, 60, "the workers don't come up")
        began = now()
        self._await(lambda: not self._overdue(), BOUND, "after all workers were up for so long, overdue are")
        self.calms.append(now() - began)

    def stop(self) -> None:
        """Let nobody be replaced any more."""
        self._over.set()
        self._tender.join()

    def _choose(self, dice: random.Random) -> list[tuple[str, random.Random]]:
        names = [*self._faults]
        weights = [weight for _, weight in self._faults.values()]
        chosen = dice.choices(names, weights, k=dice.randint(1, AT_ONCE))
        return [(name, random.Random(dice.random())) for name in dict.fromkeys(chosen)]

    def _strike(self, chosen: tuple[str, random.Random]) -> None:
        name, dice = chosen
        time.sleep(dice.uniform(0, 0.7))
        try:
            fault = strike(name, self._faults[name][0], self.stage, dice)
        except (psycopg.OperationalError, kombu.exceptions.OperationalError, OSError) as error:
            # Another fault has been faster, and there is nobody to strike at.
            self.say(f"{name}: {type(error).__name__}")
            return
        if fault is not None:
            self.journal.append(fault)
            self.say(f"{name} ({fault.end - fault.begin:.1f} s)")

    def _rest(self, dice: random.Random) -> None:
        if dice.random() < CALM_SHARE:
            self.say("calm")
            self.calm()
        else:
            time.sleep(dice.uniform(0, 0.8))

    def _overdue(self) -> list[tuple[str, ...]]:
        with self.stage.sql() as connection:
            limits = {"lease": LEASE + SWEEP + SLACK, "sweep": SWEEP + SLACK}
            return connection.execute(OVERDUE, limits).fetchall()

    def _await(self, condition: Callable[[], bool], seconds: float, complaint: str) -> None:
        give_up_at = now() + seconds
        while not condition():
            if now() > give_up_at:
                self.findings.append(f"{complaint} ({seconds:g} s): {self._overdue()[:5]}")
                return
            time.sleep(0.1)

    def _tend(self) -> None:
        while not self._over.wait(0.2):
            self.stage.tend()
