"""A Celery app without durable tasks, to try the worker fixtures on."""

from __future__ import annotations

import os
import time

from celery import Celery

from tests.fixtures.ledger import record

app = Celery("plain", broker=os.environ.get("BROKER_URL"))
app.conf.task_default_queue = os.environ.get("CELERY_DURABLE_TEST_QUEUE", "celery")
app.conf.broker_connection_retry_on_startup = True
app.conf.beat_schedule = {"tick": {"task": "note", "schedule": 0.2, "args": ("tick",)}}


@app.task(name="note")
def note(*args: object) -> None:
    record("note", *args)


@app.task(name="linger")
def linger(seconds: float) -> None:
    record("began")
    time.sleep(seconds)
    record("ended")
