"""The table at the end, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from example_project import shop
from example_project.demo.facts import (
    Completed,
    Journal,
    Kill,
    Losses,
    charged_twice,
    resumed_after,
    run_again,
)
from example_project.payments import Ledger

SHOWN = 5
"""How many orders a complaint names."""


@dataclass
class Report:
    orders: list[str]
    rows: list[tuple[str, str]] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    """Sentences; none if all is well."""

    def finished(self, orders: Iterable[str]) -> None:
        missing = sorted(set(self.orders) - set(orders))
        self._row("orders finished", f"{len(self.orders) - len(missing)} of {len(self.orders)}")
        self._expect_none(missing, "orders not finished")

    def bodies(self, journal: Journal) -> None:
        ran = {(body.order, body.step) for body in journal.bodies}
        self._row("step bodies run", f"{len(journal.bodies)}, for {len(ran)} steps")

    def resumed(self, completed: list[Completed], kills: list[Kill], journal: Journal) -> None:
        waits = [resumed_after(kill, journal) for kill in kills]
        shown = ["never" if wait is None else f"{wait:.1f} s" for wait in waits]
        self._row("first step resumed after", ", ".join(shown) or "-")
        if None in waits:
            self.wrong.append("a killed worker's orders were not resumed")
        self._row("steps skipped on resume", str(sum(step.skipped for step in completed)))
        again = [f"{body.order} {body.step}" for body in run_again(completed, journal)]
        self._row("completed steps run again", str(len(again)))
        self._expect_none(again, "steps that ran after they were completed")

    def losses(self, losses: Losses, kills: int, flushes: int) -> None:
        self._row("workers killed", str(len(losses.kills)))
        lost = sum(losses.flushed)
        self._row("broker flushed", f"{len(losses.flushed)}, messages lost: {lost}")
        if len(losses.kills) < kills or len(losses.flushed) < flushes:
            self.wrong.append(f"all was over before {kills} kills and {flushes} flushes")

    def payments(self, ledger: Path) -> None:
        book = Ledger(ledger)
        calls, charges = book.calls(), book.charges()
        book.close()
        failed, hung = calls.get("fail", 0), calls.get("hang before", 0) + calls.get("hang after", 0)
        self._row("calls to the provider", f"{sum(calls.values())}, failed: {failed}, hung: {hung}")
        twice = charged_twice(charges)
        self._row("doubled charges", str(len(twice)))
        self._expect_none(twice, "orders charged more than once")
        paid = {charge.order: charge.cents for charge in charges}
        unpaid = [order for order in self.orders if paid.get(order) != shop.price(order)]
        self._expect_none(unpaid, "orders not paid, or not with their price")

    def invoices(self, home: Path) -> None:
        missing = [o for o in self.orders if not (home / "invoices" / f"{o}.txt").exists()]
        self._row("invoices", str(len(self.orders) - len(missing)))
        self._expect_none(missing, "orders without an invoice")

    def _row(self, fact: str, value: str) -> None:
        self.rows.append((fact, value))

    def _expect_none(self, found: list[str], what: str) -> None:
        if found:
            some = ", ".join(found[:SHOWN])
            more = len(found) - SHOWN
            self.wrong.append(f"{what}: {some}{f' and {more} more' if more > 0 else ''}")
