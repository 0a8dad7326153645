"""Workflows as users declare, start and await them. Checked by mypy and pyright, never run."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from typing_extensions import assert_type

import celery_durable as durable


class Order:
    """Any class of the app."""


@durable.workflow
def checkout(order_id: str, express: bool = False) -> int:
    """Without options."""
    return len(order_id)


@durable.workflow(queue="orders", workflow_timeout=timedelta(days=1))
def refund(order_id: str) -> Order:
    """With Celery's options and ours."""
    return Order()


@durable.workflow(bind=True, max_retries=3)
def report(self: durable.Workflow[[int], None], year: int) -> None:
    """Bound: callers don't pass ``self``."""
    assert_type(self.request.retries, Any)
    assert_type(self.name, str)


@durable.workflow
async def crawl(url: str) -> list[str]:
    """An ``async def``, without options."""
    return [url]


@durable.workflow(queue="pages")
async def count(url: str) -> int:
    """With options."""
    return len(await crawl(url))


@durable.workflow(bind=True)
async def mirror(self: durable.Workflow[[str], bytes], url: str) -> bytes:
    """Bound."""
    assert_type(self.name, str)
    return url.encode()


async def start_from_a_coroutine() -> None:
    """``adelay`` gives what ``delay`` gives; of an async workflow, too, that is a handle of its result."""
    assert_type(crawl.delay("https://example.org"), durable.WorkflowHandle[list[str]])
    assert_type(count.apply_async(("https://example.org",)).get(), int)
    assert_type(mirror.delay("https://example.org"), durable.WorkflowHandle[bytes])
    assert_type(await count.adelay("https://example.org"), durable.WorkflowHandle[int])
    assert_type(await checkout.adelay("order-1"), durable.WorkflowHandle[int])
    assert_type(await crawl("https://example.org"), list[str])
    await crawl.adelay(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def call_directly() -> None:
    """A call takes the function's arguments and returns what it returns."""
    assert_type(checkout("order-1"), int)
    assert_type(checkout("order-1", express=True), int)
    assert_type(refund("order-1"), Order)
    report(2025)
    checkout(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    checkout()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    checkout("order-1", fast=True)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    report("2025")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def start() -> None:
    """``delay`` takes the function's arguments; every way to start gives a handle of its result."""
    assert_type(checkout.delay("order-1"), durable.WorkflowHandle[int])
    assert_type(checkout.delay("order-1", express=True), durable.WorkflowHandle[int])
    assert_type(refund.delay("order-1"), durable.WorkflowHandle[Order])
    assert_type(report.delay(2025), durable.WorkflowHandle[None])
    checkout.delay(1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    checkout.delay()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    report.delay("2025")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]

    handle = checkout.apply_async(("order-1",), {"express": True}, task_id="order-1", countdown=60, queue="slow")
    assert_type(handle, durable.WorkflowHandle[int])
    assert_type(refund.AsyncResult("order-1"), durable.WorkflowHandle[Order])
    checkout.apply_async(("order-1",), task_id=1)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def wait() -> None:
    """``get`` returns what the workflow returns."""
    handle = checkout.delay("order-1")
    assert_type(handle.get(), int)
    assert_type(handle.get(timeout=10), int)
    assert_type(refund.apply_async(("order-1",)).get(), Order)
    assert_type(handle.id, str)
    assert_type(handle.state, str)
    assert_type(handle.ready(), bool)
    text: str = handle.get()  # type: ignore[assignment]  # pyright: ignore[reportAssignmentType]
    print(text)
