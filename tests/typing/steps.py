"""Steps as users declare and call them. Checked by mypy and pyright, never run."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Coroutine
from typing import Any

from typing_extensions import assert_type

import celery_durable as durable


class Gateway:
    """A library's client."""

    def charge(self, cents: int, currency: str = "EUR") -> str:
        """Return the payment's id."""
        return f"{cents} {currency}"


@durable.step
def reserve(order_id: str) -> list[str]:
    """Without options."""
    return [order_id]


@durable.step(autoretry_for=(ConnectionError,), max_retries=10, retry_backoff=0.5, soft_time_limit=5)
def charge(order_id: str, cents: int) -> str:
    """With options; ``current`` is typed."""
    assert_type(durable.current.idempotency_key, str)
    assert_type(durable.current.step.attempt, int)
    assert_type(durable.current.step.remaining(), "float | None")
    return f"{order_id} {cents}"


@durable.step(bind=True)
def ship(self: durable.Step[[str], bool], order_id: str) -> bool:
    """Bound: callers don't pass ``self``."""
    if not order_id:
        raise self.retry()
    return True


@durable.step
async def fetch(url: str) -> bytes:
    """An ``async def`` step, without options."""
    return url.encode()


@durable.step(max_retries=3, retry_backoff=0.5)
async def quote(order_id: str, cents: int) -> float:
    """With options."""
    return cents / 100


@durable.step(bind=True)
async def confirm(self: durable.Step[[str], bool], order_id: str) -> bool:
    """Bound."""
    raise self.retry(countdown=0.5)


class Client:
    """A library's asynchronous client."""

    async def read(self, key: str) -> list[int]:
        """Return what is there."""
        return [len(key)]


@durable.workflow
async def gathers(order_id: str) -> float:
    """An async step is awaited for its value, a sync one by ``acall``."""
    assert_type(await assert_type(fetch("https://example.org"), Coroutine[Any, Any, bytes]), bytes)
    assert_type(await quote(order_id, cents=100), float)
    assert_type(await confirm(order_id), bool)
    assert_type(await assert_type(charge.acall(order_id, 1250), Coroutine[Any, Any, str]), str)
    assert_type(await charge.acall(order_id, cents=1250), str)
    assert_type(await quote.acall(order_id, 100), float)
    both = await asyncio.gather(quote(order_id, 100), fetch("https://example.org"))
    assert_type(both[0], float)
    assert_type(both[1], bytes)
    read = durable.as_step(Client().read, max_retries=3)
    assert_type(await read("key"), list[int])
    assert_type(await read.acall("key"), list[int])
    assert_type(await durable.as_step(fetch, name="page")("https://example.org"), bytes)
    assert_type(await durable.as_step(len).acall("abc"), int)
    fetch("https://example.org")  # type: ignore[unused-coroutine]  # pyright: ignore[reportUnusedCoroutine]
    await fetch(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    await charge.acall(order_id)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    await charge(order_id, 1250)  # type: ignore[misc]  # pyright: ignore[reportGeneralTypeIssues]
    return await quote(order_id, 100)


@durable.workflow
def fulfil(order_id: str) -> str:
    """Steps take their function's arguments and return what it returns."""
    assert_type(reserve(order_id), list[str])
    payment = charge(order_id, cents=1250)
    assert_type(payment, str)
    assert_type(ship(order_id), bool)
    charge(order_id)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    charge(order_id, "1250")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    ship(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(durable.current.workflow_id, str)
    assert_type(durable.current.attempt, int)
    return payment


@durable.workflow
def inline() -> None:
    """``as_step`` keeps the signature of any callable."""
    pay = durable.as_step(Gateway().charge, name="pay", max_retries=10)
    assert_type(pay(1250, currency="USD"), str)
    assert_type(pay.name, str)
    pay("1250")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    assert_type(durable.as_step(lambda: 42, name="answer")(), int)
    assert_type(durable.as_step(len)("abc"), int)
    assert_type(durable.as_step(functools.partial(reserve, "order-1"))(), list[str])
    assert_type(durable.as_step(charge)("order-1", 1250), str)
    durable.as_step("charge")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue, reportArgumentType]


def send() -> None:
    """Outside a workflow a step is a Celery task, whose result has the step's type."""
    assert_type(charge.delay("order-1", 1250).get(timeout=10), str)
    assert_type(charge.delay("order-1", 1250).id, str)
    assert_type(charge.apply_async(("order-1", 1250), countdown=10).get(), str)
    assert_type(quote.delay("order-1", 1250).get(), float)
    charge.delay("order-1")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
