"""What becomes of an order: the workflow of its checkout, and that of its end before the time.

An `atomic="default"` step commits what it does by the ORM together with its checkpoint: both have happened once, or
neither has. The others may run again if their worker dies in them; `charge` brings the same key then.
"""

from __future__ import annotations

from typing import Any

from celery import shared_task
from celery.exceptions import SoftTimeLimitExceeded
from django.core.mail import send_mail

import celery_durable as durable
from example_project.shop import PaymentDeclined, PaymentUnavailable, ask_provider

from .models import Order, OrderLine, Product

DAY = 24 * 60 * 60
#: Cents. An order of more needs somebody's approval.
APPROVAL_ABOVE = 50_00
#: Seconds that the payment provider has for an answer.
PATIENCE = 5


class SoldOut(Exception):
    """There isn't enough of a product."""


class NotApproved(Exception):
    """Nobody has approved a large order in time, or somebody has said no."""


@shared_task(base=durable.Workflow)
def checkout(order_id: int, approve_within: float = 2 * DAY) -> str:
    """Sell what was ordered; return the parcel's number, or why there is none."""
    try:
        cents = reserve_stock(order_id)
        if cents > APPROVAL_ABOVE:
            wait_for_approval(order_id, approve_within)
        charge(order_id, cents)
    except (SoldOut, NotApproved, PaymentDeclined) as refusal:
        refuse(order_id)
        mail(order_id, f"We are sorry: {refusal}.")
        return f"refused: {refusal}"
    parcel = ship(order_id)
    mail(order_id, f"It is on its way, in the parcel {parcel}.")
    return parcel


def wait_for_approval(order_id: int, seconds: float) -> None:
    """Wait without a worker until the order is approved in the admin; raise NotApproved."""
    note_waiting(order_id)
    if not durable.recv("approval", timeout=seconds, default=False):
        raise NotApproved("your order wasn't approved")


@shared_task(base=durable.Workflow)
def call_off(order_id: int) -> None:
    """Undo what a cancelled checkout has done: started by its cancellation, in the same statement.

    A charge that was running then has ended when this begins. Each step does nothing where there is nothing to undo.
    """
    durable.sleep(PATIENCE)
    refund(order_id)
    refuse(order_id)


@shared_task(base=durable.Step, atomic="default")
def reserve_stock(order_id: int) -> int:
    """Take what was ordered from the stock and return what it costs, in cents; raise SoldOut."""
    lines = _lines(order_id)
    for line, product in lines:
        if product.stock < line.quantity:
            raise SoldOut(f"we have no more than {product.stock} of {product.name}")
        product.stock -= line.quantity
    Product.objects.bulk_update([product for _, product in lines], ["stock"])
    _update(order_id, is_reserved=True, status=Order.Status.RESERVED)
    return sum(line.quantity * product.cents for line, product in lines)


@shared_task(base=durable.Step, atomic="default")
def refuse(order_id: int) -> None:
    """Put back what was reserved, if anything was."""
    if Order.objects.select_for_update().get(pk=order_id).is_reserved:
        lines = _lines(order_id)
        for line, product in lines:
            product.stock += line.quantity
        Product.objects.bulk_update([product for _, product in lines], ["stock"])
    _update(order_id, is_reserved=False, status=Order.Status.REFUSED)


@shared_task(base=durable.Step, atomic="default")
def note_waiting(order_id: int) -> None:
    """Show in the admin that the order needs an approval."""
    _update(order_id, status=Order.Status.WAITING)


@shared_task(
    base=durable.Step,
    autoretry_for=(PaymentUnavailable, SoftTimeLimitExceeded),
    max_retries=10,
    retry_backoff=0.2,
    retry_backoff_max=30,
    soft_time_limit=PATIENCE,
)
def charge(order_id: int, cents: int) -> str:
    """Charge the customer and return the payment's id; raise PaymentDeclined.

    May run more than once; the key is the same each time, so that the customer pays once.
    """
    order = {"order": f"order-{order_id}", "cents": cents}
    return str(ask_provider("charges", order, durable.current.idempotency_key)["id"])


@shared_task(
    base=durable.Step,
    autoretry_for=(PaymentUnavailable, SoftTimeLimitExceeded),
    max_retries=None,
    retry_backoff=0.2,
    soft_time_limit=PATIENCE,
)
def refund(order_id: int) -> None:
    """Give back what the customer has paid for the order, if anything: tried until it is done."""
    ask_provider("refunds", {"order": f"order-{order_id}"})


@shared_task(base=durable.Step, atomic="default")
def ship(order_id: int) -> str:
    """Hand the parcel over and return its number."""
    _update(order_id, is_reserved=False, status=Order.Status.SHIPPED)
    return f"parcel-{order_id:06}"


@shared_task(base=durable.Step)
def mail(order_id: int, text: str) -> None:
    """Tell the customer."""
    order = Order.objects.get(pk=order_id)
    send_mail(f"Your {order}", text, None, [order.customer])


def _lines(order_id: int) -> list[tuple[OrderLine, Product]]:
    """Return the lines of an order with their products, locked in one order so that no two checkouts deadlock."""
    lines = OrderLine.objects.filter(order=order_id).order_by("product_id")
    products = {
        product.pk: product
        for product in Product.objects.filter(orderline__order=order_id).order_by("pk").select_for_update()
    }
    return [(line, products[line.product_id]) for line in lines]


def _update(order_id: int, **values: Any) -> None:
    Order.objects.filter(pk=order_id).update(**values)
