"""The shop's job, durable: `fulfil.delay("order-17")`.

Kill the worker at any line: another one goes on after the last step that was completed.
"""

from __future__ import annotations

from celery.exceptions import SoftTimeLimitExceeded

import celery_durable as durable
from example_project import shop
from example_project.app import app


@app.task(base=durable.Workflow)
def fulfil(order_id: str) -> dict[str, str]:
    reserve_stock(order_id)
    payment = charge(order_id)
    shipment = book_shipment(order_id)
    invoice = write_invoice(order_id, payment)
    notify(order_id, shipment)
    return {"payment": payment, "shipment": shipment, "invoice": invoice}


@app.task(base=durable.Step)
def reserve_stock(order_id: str) -> None:
    shop.reserve_stock(order_id)


@app.task(
    base=durable.Step,
    autoretry_for=(shop.PaymentUnavailable, SoftTimeLimitExceeded),
    max_retries=10,
    retry_backoff=0.2,
    retry_backoff_max=2,
    soft_time_limit=1,
)
def charge(order_id: str) -> str:
    """May run more than once; the key is the same each time, so that the customer pays once."""
    return shop.charge(order_id, idempotency_key=durable.current.idempotency_key)


@app.task(base=durable.Step)
def book_shipment(order_id: str) -> str:
    return shop.book_shipment(order_id)


@app.task(base=durable.Step)
def write_invoice(order_id: str, payment: str) -> str:
    return shop.write_invoice(order_id, payment)


@app.task(base=durable.Step)
def notify(order_id: str, shipment: str) -> None:
    shop.notify(order_id, shipment)
