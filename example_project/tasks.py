"""The shop's jobs, durable: `fulfil.delay("order-17")`.

Kill the worker at any line: another one goes on after the last step that was completed. And while `checkout`,
`remind`, `ship` or `export` waits, for days, it is a row in Postgres and nothing else: no worker holds it.
"""

from __future__ import annotations

from celery.exceptions import SoftTimeLimitExceeded

import celery_durable as durable
from example_project import shop
from example_project.app import app

DAY = 24 * 60 * 60


@app.task(base=durable.Workflow)
def fulfil(order_id: str) -> dict[str, str]:
    reserve_stock(order_id)
    payment = charge(order_id)
    shipment = book_shipment(order_id)
    invoice = write_invoice(order_id, payment)
    notify(order_id, shipment)
    return {"payment": payment, "shipment": shipment, "invoice": invoice}


@app.task(base=durable.Workflow)
def checkout(order_id: str, approve_within: float = 2 * DAY) -> dict[str, str]:
    """Fulfil an order; a large one only if somebody approves it in time, with the order's number as the task id:

    `durable.send("order-17", True, topic="approval")`
    """
    if shop.price(order_id) > shop.APPROVAL_ABOVE:
        mail(order_id, "a large order: do you approve it?")
        if not durable.recv("approval", timeout=approve_within, default=False):
            mail(order_id, "we are sorry, we can't take your order")
            return {"refused": "it wasn't approved"}
    return fulfil.delay(order_id).get()


@app.task(base=durable.Workflow)
def remind(order_id: str, after: float = 7 * DAY) -> None:
    """Remind the customer of an order, some days later to the second, whatever was restarted meanwhile."""
    durable.sleep(after)
    mail(order_id, "how do you like what you have bought?")


@app.task(base=durable.Workflow)
def ship(order_id: str, parcels: int) -> list[str]:
    """Pack all parcels of an order at once, each by a worker of the warehouse; then send one mail with the numbers."""
    numbers = durable.gather(*[pack.delay(order_id, parcel) for parcel in range(1, parcels + 1)])
    mail(order_id, f"on their way: {', '.join(numbers)}")
    return numbers


@app.task(base=durable.Workflow)
def export(order_id: str, country: str, cleared_within: float = 14 * DAY) -> str:
    """Sell abroad, as a saga: if a step fails, or customs don't clear the parcel, all is undone, the last step first.

    `durable.send("order-17", True, topic="customs")` clears it. A step is noted as one to undo before it runs, since
    one that fails may have had its effect. What is cancelled doesn't come to the `except`: see `undo_export`.
    """
    to_undo = []
    try:
        to_undo.append(release_stock)
        reserve_stock(order_id)
        to_undo.append(refund)
        charge(order_id)
        to_undo.append(cancel_shipment)
        shipment = book_shipment(order_id)
        declare(order_id, country)
        if not durable.recv("customs", timeout=cleared_within, default=False):
            raise shop.CustomsRefused(f"{order_id}: not cleared for {country}")
    except Exception:
        for undo in reversed(to_undo):
            undo(order_id)
        raise
    notify(order_id, shipment)
    return shipment


@app.task(base=durable.Workflow)
def undo_export(order_id: str, after: float = 10) -> None:
    """Undo an export that was cancelled: `export.apply_async(…, on_cancel=undo_export.s("order-17"))`.

    It waits a little: a step that was running at the cancel runs to its end, and must not have its effect after this.
    Each of these does nothing where there is nothing to undo.
    """
    durable.sleep(after)
    cancel_shipment(order_id)
    refund(order_id)
    release_stock(order_id)


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


@app.task(base=durable.Step)
def mail(order_id: str, text: str) -> None:
    shop.mail(order_id, text)


@app.task(base=durable.Step, queue="warehouse")
def pack(order_id: str, parcel: int) -> str:
    """Called by `pack.delay(…)`, it is sent to the warehouse's queue and is as durable as if called in place."""
    return shop.pack(order_id, parcel)


@app.task(base=durable.Step)
def declare(order_id: str, country: str) -> None:
    shop.declare(order_id, country)


@app.task(base=durable.Step)
def cancel_shipment(order_id: str) -> None:
    shop.cancel_shipment(order_id)


@app.task(
    base=durable.Step,
    autoretry_for=(shop.PaymentUnavailable, SoftTimeLimitExceeded),
    max_retries=None,
    retry_backoff=0.2,
    retry_backoff_max=60,
    soft_time_limit=1,
)
def refund(order_id: str) -> None:
    """Tried until it is done: money is given back, however long the provider is away."""
    shop.refund(order_id)


@app.task(base=durable.Step)
def release_stock(order_id: str) -> None:
    shop.release_stock(order_id)
