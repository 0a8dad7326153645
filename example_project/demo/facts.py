"""What happened, as the shop's journal and the provider's ledger show it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from example_project.payments import Charge

STEPS = ("reserve_stock", "charge", "book_shipment", "write_invoice", "notify")


class Body(NamedTuple):
    """One run of a step's body: a line of the journal, written as its first act."""

    at: float
    step: str
    order: str
    worker: int


class Journal:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = 0
        self._last: dict[str, Body] = {}
        self.bodies: list[Body] = []

    def refresh(self) -> None:
        """Read what was written since."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        whole = new[: new.rfind(b"\n") + 1]
        self._read += len(whole)
        for entry in map(json.loads, whole.splitlines()):
            body = Body(entry["at"], entry["what"], entry["order"], entry["worker"])
            self.bodies.append(body)
            self._last[body.order] = body

    def in_hand(self, worker: int) -> set[str]:
        """Orders that this worker has begun to work on, and isn't about to finish."""
        return {b.order for b in self._last.values() if b.worker == worker and b.step != STEPS[-1]}

    def notified(self) -> set[str]:
        return {body.order for body in self.bodies if body.step == STEPS[-1]}

    def next_body(self, orders: Collection[str], after: float) -> Body | None:
        return next((b for b in self.bodies if b.at > after and b.order in orders), None)


class Completed(NamedTuple):
    """One completed step, as the database has it."""

    order: str
    step: str
    at: float
    skipped: int
    """How many later attempts began behind it."""


class Kill(NamedTuple):
    at: float
    worker: str
    orders: frozenset[str]
    """Those that the worker had in hand."""


@dataclass
class Losses:
    """What was done to the orders."""

    kills: list[Kill] = field(default_factory=list)
    flushed: list[int] = field(default_factory=list)
    """For each time that the broker was flushed: how many messages were in the queue."""


def run_again(completed: Iterable[Completed], journal: Journal) -> list[Body]:
    """Bodies that began after their step was completed. There must be none."""
    done = {(step.order, step.step): step.at for step in completed}
    return [body for body in journal.bodies if body.at > done.get((body.order, body.step), body.at)]


def resumed_after(kill: Kill, journal: Journal) -> float | None:
    """Seconds until the first of the killed worker's orders went on."""
    body = journal.next_body(kill.orders, kill.at)
    return body.at - kill.at if body else None


def charged_twice(charges: Iterable[Charge]) -> list[str]:
    return sorted(order for order, times in Counter(c.order for c in charges).items() if times > 1)
