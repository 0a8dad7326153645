"""The same job in plain Celery, with the settings that careful people use: `fulfil("order-17")`.

README.md says what breaks here.
"""

from __future__ import annotations

from celery import chain
from celery.exceptions import SoftTimeLimitExceeded
from celery.result import AsyncResult

from example_project import shop
from example_project.app import app


def fulfil(order_id: str) -> AsyncResult:
    return chain(
        reserve_stock.si(order_id),
        charge.si(order_id),
        book_shipment.s(order_id),
        write_invoice.s(order_id),
        notify.s(order_id),
    ).delay()


@app.task(acks_late=True, reject_on_worker_lost=True)
def reserve_stock(order_id: str) -> None:
    shop.reserve_stock(order_id)


@app.task(
    acks_late=True,
    reject_on_worker_lost=True,
    autoretry_for=(shop.PaymentUnavailable, SoftTimeLimitExceeded),
    max_retries=10,
    retry_backoff=True,
    retry_backoff_max=2,
    soft_time_limit=1,
)
def charge(order_id: str) -> str:
    return shop.charge(order_id)


@app.task(acks_late=True, reject_on_worker_lost=True)
def book_shipment(payment: str, order_id: str) -> dict[str, str]:
    return {"payment": payment, "shipment": shop.book_shipment(order_id)}


@app.task(acks_late=True, reject_on_worker_lost=True)
def write_invoice(done: dict[str, str], order_id: str) -> dict[str, str]:
    return {**done, "invoice": shop.write_invoice(order_id, done["payment"])}


@app.task(acks_late=True, reject_on_worker_lost=True)
def notify(done: dict[str, str], order_id: str) -> dict[str, str]:
    shop.notify(order_id, done["shipment"])
    return done
