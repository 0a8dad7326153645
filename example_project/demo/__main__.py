"""Run the order shop on a real Postgres and a real broker, kill its workers, and count what happened.

Exit status: 0 if every order was fulfilled and paid once, 1 if anything is wrong.
"""

from __future__ import annotations

import argparse
import random
import signal
import sys
import time
from types import FrameType

from example_project.demo.facts import Journal
from example_project.demo.jobs import Durable, Job, Plain
from example_project.demo.mayhem import Mayhem
from example_project.demo.report import Report
from example_project.demo.screen import Screen
from example_project.demo.stage import stage


def main() -> int:
    options = parse()
    leave_tidily_on_signals()
    began = time.monotonic()
    orders = [f"order-{n}" for n in range(1, options.orders + 1)]
    screen = Screen(len(orders))
    screen.say(f"Postgres, a broker, a payment service, two workers and a beat start (seed {options.seed})")
    with stage(options.seed) as on:
        journal = Journal(on.home / "journal.jsonl")
        job: Job = Plain(journal) if options.plain else Durable(on.postgres.url)
        mayhem = Mayhem(on.fleet, on.broker, journal, screen, random.Random(options.seed))
        with screen:
            job.start(orders)
            mayhem.run(orders, job, options.kills, options.flushes)
        on.close_the_bank()

        report = Report(orders)
        report.finished(job.fulfilled())
        report.bodies(journal)
        report.losses(mayhem.losses, options.kills, options.flushes)
        if isinstance(job, Durable):
            report.resumed(job.completed_steps(), mayhem.losses.kills, journal)
        report.payments(on.ledger)
        report.invoices(on.home)
        screen.table([*report.rows, ("took", f"{time.monotonic() - began:.0f} s")])
        if report.wrong:
            logs = {} if options.plain else {process.name: process.output() for process in on.fleet.all}
            screen.complain(report.wrong, logs)
    return 1 if report.wrong else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m example_project.demo", description=__doc__)
    parser.add_argument("--orders", type=int, default=40, help="how many (default: 40)")
    parser.add_argument("--kills", type=int, default=3, help="how many workers to kill (default: 3)")
    parser.add_argument("--flushes", type=int, default=1, help="how often to flush the broker (default: 1)")
    parser.add_argument("--seed", type=int, default=random.randrange(10_000), help="(default: a random one)")
    parser.add_argument("--plain", action="store_true", help="run plain.py instead, to see what breaks")
    return parser.parse_args()


def leave_tidily_on_signals() -> None:
    """The first signal ends the demo; the next ones don't disturb the cleaning up."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def leave(number: int, _frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for number in numbers:
        signal.signal(number, leave)


if __name__ == "__main__":
    sys.exit(main())
