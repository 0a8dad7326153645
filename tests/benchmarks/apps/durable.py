"""The work as workflows of celery_durable; everything but the addresses is as it comes."""

from __future__ import annotations

import json
import os

from celery import Celery

import celery_durable as durable

app = Celery(
    "durable_bench",
    broker=os.environ["BENCH_DURABLE_BROKER"],
    backend=os.environ["BENCH_DURABLE_BROKER"],
    set_as_current=False,
)
app.conf.broker_connection_retry_on_startup = True
durable.install(
    app, database_url=os.environ["BENCH_DURABLE_DATABASE"], **json.loads(os.environ.get("BENCH_SETTINGS", "{}"))
)


@durable.step
def nothing(number: int) -> int:
    return number


@app.task(base=durable.Workflow)
def steps(count: int) -> int:
    for number in range(count):
        nothing(number)
    return count
