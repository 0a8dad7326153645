"""Everything that the shop needs to run: servers, the payment service, workers, a beat, a directory."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from celery_durable.testing.servers import EmbeddedBroker, EmbeddedPostgres
from example_project.demo.processes import Fleet, Process

WORKERS = 2
HANG = 3
"""Seconds that the payment service hangs; `charge` gives up after one."""


@dataclass
class Stage:
    home: Path
    postgres: EmbeddedPostgres
    broker: EmbeddedBroker
    fleet: Fleet
    bank: Process

    @property
    def ledger(self) -> Path:
        return self.home / "payments.db"

    def close_the_bank(self) -> None:
        """Let it finish the calls that hang: they may still be booked."""
        self.bank.stop(timeout=HANG + 5)


@contextmanager
def stage(seed: int) -> Iterator[Stage]:
    """Start it all, and leave nothing behind."""
    with (
        tempfile.TemporaryDirectory(prefix="celery-durable-demo-", ignore_cleanup_errors=True) as directory,
        EmbeddedPostgres() as postgres,
        EmbeddedBroker() as broker,
        Fleet(Path(directory)) as fleet,
    ):
        flags = (f"--ledger={directory}/payments.db", "--port=0", f"--seed={seed}", f"--hang={HANG}")
        bank = fleet.start("payments", "example_project.payments", *flags)
        os.environ |= {
            "DATABASE_URL": postgres.url,
            "BROKER_URL": broker.url,
            "PAYMENTS_URL": _address_of(bank),
            "SHOP_HOME": directory,
            "CELERY_CONFIG_MODULE": "example_project.demo.celeryconfig",
        }
        for _ in range(WORKERS):
            fleet.start_worker()
        fleet.start_beat()
        yield Stage(Path(directory), postgres, broker, fleet, bank)


def _address_of(bank: Process) -> str:
    """The first line that it prints, when it's ready."""
    deadline = time.monotonic() + 20
    while "\n" not in bank.output():
        if not bank.is_running() or time.monotonic() > deadline:
            raise RuntimeError(f"the payment service didn't start:\n{bank.output()}")
        time.sleep(0.02)
    return bank.output().splitlines()[0]
