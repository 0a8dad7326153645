"""The work as workflows of celery_durable; everything but the addresses is as it comes."""

from __future__ import annotations

import asyncio
import os
import time
from datetime import datetime, timezone

from celery import Celery

import celery_durable as durable
from celery_durable.engine.context import current_attempt
from celery_durable.serialization import Payload
from celery_durable.store import StepRecord
from tests.benchmarks.payload import text

app = Celery(
    "durable_bench",
    broker=os.environ["BENCH_DURABLE_BROKER"],
    backend=os.environ["BENCH_DURABLE_BROKER"],
    set_as_current=False,
)
app.conf.broker_connection_retry_on_startup = True
durable.install(app, database_url=os.environ["BENCH_DURABLE_DATABASE"])


@durable.step
def nothing(number: int) -> int:
    return number


@durable.step
async def nothing_async(number: int) -> int:
    return number


@durable.step
def now() -> float:
    return time.time()


@durable.step
def much(size: int) -> str:
    return text(size)


@app.task(base=durable.Workflow)
def steps(count: int) -> int:
    for number in range(count):
        nothing(number)
    return count


@app.task(base=durable.Workflow)
def statements(count: int) -> float:
    """Make the statement of so many trivial steps, and nothing else of them; return the seconds that it took."""
    attempt, value = current_attempt(), Payload(b"1")
    began = time.perf_counter()
    for number in range(count):
        attempt.save([StepRecord(f"statement#{number}", number, 1, "1", bytes(8), None, True, value)])
    return time.perf_counter() - began


@app.task(base=durable.Workflow)
def equal_steps(count: int) -> float:
    """Tell when all of them were done."""
    for _ in range(count):
        nothing(0)
    return time.time()


@app.task(base=durable.Workflow)
def gathered(count: int) -> int:
    return len(durable.gather(*(nothing.s(number) for number in range(count))))


@app.task(base=durable.Workflow)
async def gathered_async(count: int) -> int:
    return len(await asyncio.gather(*(nothing_async(number) for number in range(count))))


@app.task(base=durable.Workflow)
def first_step() -> float:
    return now()


@app.task(base=durable.Workflow)
def takes(argument: str) -> int:
    return len(argument)


@app.task(base=durable.Workflow)
def gives(size: int) -> str:
    return text(size)


@app.task(base=durable.Workflow)
def keeps(size: int) -> int:
    return len(much(size))


@app.task(base=durable.Workflow)
def sleeps_until(due: float) -> None:
    durable.sleep_until(datetime.fromtimestamp(due, tz=timezone.utc))
