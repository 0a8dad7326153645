"""The work as plain tasks of Celery, with nothing durable about it."""

from __future__ import annotations

import os
import time

from celery import Celery

from tests.benchmarks.payload import text

app = Celery(
    "plain_bench",
    broker=os.environ["BENCH_PLAIN_BROKER"],
    backend=os.environ["BENCH_PLAIN_BROKER"],
    set_as_current=False,
)
app.conf.broker_connection_retry_on_startup = True


@app.task
def nothing(number: int = 0) -> int:
    return number


@app.task
def now() -> float:
    """A trivial task that tells when it ran."""
    return time.time()


@app.task
def takes(argument: str) -> int:
    return len(argument)


@app.task
def gives(size: int) -> str:
    return text(size)
