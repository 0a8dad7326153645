"""The app under chaos: a workflow of every kind. Bodies say in the ledger when they begin and how they end.

A body returns its label and a word that no other run of it has, so what a replay sees tells which run it was.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
import uuid
import zlib
from datetime import timedelta
from typing import Any

from celery import Celery

import celery_durable as durable
from celery_durable.engine.observer import Observer
from celery_durable.installation import installed_on
from tests.chaos.kinds import MESSAGES, NAP
from tests.chaos.ledger import Writer

QUEUE = "chaos"
RETRIES = 1_000

app = Celery("chaos", broker=os.environ["BROKER_URL"], backend=os.environ.get("RESULT_BACKEND") or None)
app.conf.update(
    task_default_queue=QUEUE,
    broker_connection_retry_on_startup=True,
    worker_send_task_events=True,
    broker_transport_options={"socket_timeout": 5, "socket_connect_timeout": 5},
)
durable.install(app, database_url=os.environ["DATABASE_URL"], **json.loads(os.environ["DURABLE_SETTINGS"]))
ledger = Writer(os.environ["LEDGER"])


class Witness(Observer):
    """Notes whom the recovery takes for dead."""

    def recovered(self, duty: str, workflow_ids: list[str]) -> None:
        for workflow_id in workflow_ids if duty == "rescue" else ():
            ledger.write("rescue", workflow_id)


installed_on(app).observers.add(Witness())


# Steps


def begin() -> dict[str, Any]:
    """Say that a body begins; the facts by which it says more."""
    facts = {"key": durable.current.step.key, "attempt": durable.current.step.attempt, "nonce": uuid.uuid4().hex}
    ledger.write("begin", durable.current.workflow_id, **facts)
    return facts


def end(label: str, facts: dict[str, Any], failures: int) -> str:
    """Say how the body ends, and end it so."""
    if durable.current.step.attempt <= failures:
        ledger.write("fail", durable.current.workflow_id, **facts)
        raise ConnectionError(label)
    ledger.write("end", durable.current.workflow_id, **facts)
    return f"{label} {facts['nonce']}"


def length(label: str) -> float:
    """How long a body takes, in seconds: most are short, some aren't."""
    number = zlib.crc32(f"{durable.current.workflow_id} {label}".encode())
    return 0.4 if number % 20 == 0 else number % 7 * 0.003


OFTEN = {"autoretry_for": (ConnectionError,), "max_retries": RETRIES}


@app.task(base=durable.Step, retry_backoff=0.05, retry_backoff_max=1, **OFTEN)
def work(label: str, failures: int = 0) -> str:
    facts = begin()
    time.sleep(length(label))
    return end(label, facts, failures)


@app.task(base=durable.Step, retry_backoff=1, retry_backoff_max=2, retry_jitter=False, **OFTEN)
def stubborn(label: str, failures: int = 0) -> str:
    """Its tries are so far apart that the workflow gives its worker back."""
    return end(label, begin(), failures)


@app.task(base=durable.Step, **OFTEN)
async def awork(label: str) -> str:
    facts = begin()
    await asyncio.sleep(length(label))
    return end(label, facts, 0)


@app.task(base=durable.Step, atomic=True, **OFTEN)
def book(label: str) -> str:
    """Have an effect in the database, in the transaction of the checkpoint."""
    facts = begin()
    durable.current.connection.execute(
        "INSERT INTO effect (workflow, key, nonce) VALUES (%s, %s, %s)",
        [durable.current.workflow_id, facts["key"], facts["nonce"]],
    )
    time.sleep(length(label))
    return end(label, facts, 0)


# Workflows; `kinds.py` says what each of them must return.


@app.task(base=durable.Workflow)
def sequential(number: int) -> list[Any]:
    return [work(f"s{step}") for step in range(2 + number % 6)]


@app.task(base=durable.Workflow)
def gathered(number: int) -> list[Any]:
    together = durable.gather(*(work.s(f"g{step}", step % 3 // 2) for step in range(6)), max_concurrency=3)
    return [*together, work("after")]


@app.task(base=durable.Workflow)
def retrying(number: int) -> list[Any]:
    return [work("r0", 2), stubborn("r1", 1), work("r2", number % 3)]


@app.task(base=durable.Workflow)
def sleeping(number: int) -> list[Any]:
    before = work("before")
    durable.sleep(timedelta(seconds=NAP))
    after = work("after")
    durable.sleep(0.1)
    return [before, after, work("last")]


@app.task(base=durable.Workflow)
def receiving(number: int) -> list[Any]:
    """Take numbered messages of two topics."""
    return [[durable.recv("chat"), durable.recv("talk"), work(f"m{turn}")] for turn in range(MESSAGES)]


@app.task(base=durable.Workflow)
def speaking(number: int, listener: str) -> list[Any]:
    done = [work("one")]
    durable.set_event("half", number)
    durable.send(listener, f"hello from {number}", topic="greeting")
    done.append(work("two"))
    durable.set_event("whole", number)
    return done


@app.task(base=durable.Workflow)
def listening(number: int) -> list[Any]:
    """Hear of a child by its events, a message, and its end."""
    child = speaking.delay(number, durable.current.workflow_id)
    heard = [durable.get_event(child.id, "half"), durable.recv("greeting"), durable.get_event(child.id, "whole")]
    return [*heard, child.get()]


@app.task(base=durable.Workflow)
def having_children(number: int) -> list[Any]:
    """Start children in every way, and await them all."""
    some = [sequential.delay(number), sleeping.delay(number)]
    first = durable.wait_first(some) in some
    more = durable.enqueue_many([sequential.s(0), sequential.s(1)])
    return [first, work("between"), durable.gather(*some, *more, retrying.s(number))]


@app.task(base=durable.Workflow)
def booking(number: int) -> list[Any]:
    return [book("b0"), work("between"), book("b1")]


@app.task(base=durable.Workflow)
async def asynchronous(number: int) -> list[Any]:
    async def line(name: str) -> list[str]:
        first = await awork(f"{name}0")
        await durable.asleep(0.5)
        return [first, await awork(f"{name}1")]

    return [*await asyncio.gather(*map(line, "xyz")), await awork("end")]


@app.task(base=durable.Workflow)
def linked(before: list[Any], label: str) -> list[Any]:
    """A link of a chain."""
    return [*before, work(label)]


@app.task(base=durable.Workflow)
def long_running(number: int) -> list[Any]:
    """Go on for so long that it can be cancelled in the middle, and resumed."""
    done = []
    for step in range(12):
        done.append(work(f"l{step}"))
        if step % 4 == 3:
            durable.sleep(0.4)
    return done
