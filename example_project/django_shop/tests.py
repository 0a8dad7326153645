"""The project's own tests, as a project with pytest-django has them: no worker runs.

In Celery's eager mode a checkout is a plain function. What is placed without it waits in the database for a worker.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.admin.sites import site
from django.core import mail
from django.db import transaction
from django.test import Client

import celery_durable as durable
from celery_durable.exceptions import WorkflowConflict, WorkflowNotFound
from example_project import shop
from example_project.payments import Ledger, Payments

from . import celery_app
from .models import Order, OrderLine, Product
from .tasks import call_off, reserve_stock


class ReliablePayments(Payments):
    """A provider that never fails: without a worker nothing is tried again."""

    def mood(self) -> str:
        return "ok"


@pytest.fixture
def bank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    """The book of a payment provider, which is served."""
    ledger = Ledger(tmp_path / "payments.db")
    server = ReliablePayments(("127.0.0.1", 0), ledger, seed=1, hang=0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    monkeypatch.setattr(shop, "PAYMENTS_URL", f"http://127.0.0.1:{server.server_port}")
    yield ledger
    server.shutdown()
    thread.join()
    server.server_close()
    ledger.close()


@pytest.fixture
def eager(db: None, bank: Ledger) -> Iterator[None]:
    """Whatever is started runs at once."""
    celery_app.conf.update(task_always_eager=True, task_eager_propagates=True)
    yield
    celery_app.conf.update(task_always_eager=False, task_eager_propagates=False)


def product(name: str = "Kettle", stock: int = 5) -> Product:
    return Product.objects.create(name=name, cents=10_00, stock=stock)


def ordered(wanted: Product, quantity: int) -> Order:
    order = Order.objects.create(customer="ann@example.com")
    OrderLine.objects.create(order=order, product=wanted, quantity=quantity)
    return order


def form(wanted: Product, quantity: int) -> dict[str, Any]:
    return {"customer": "ann@example.com", f"product-{wanted.pk}": quantity}


def test_an_order(client: Client, eager: None, bank: Ledger) -> None:
    """It is charged and shipped, the stock is less by what was ordered, and the customer is told."""
    kettle = product()
    page = client.post("/", form(kettle, 2), follow=True)
    order = Order.objects.get()
    kettle.refresh_from_db()
    assert page.redirect_chain == [(order.get_absolute_url(), 302)]
    assert (order.status, kettle.stock) == (Order.Status.SHIPPED, 3)
    assert bank.balance(order.workflow_id) == 20_00
    assert [each.subject for each in mail.outbox] == [f"Your {order}"]


def test_sold_out(client: Client, eager: None, bank: Ledger) -> None:
    """Nothing of the order is taken, and the customer is told."""
    kettle, cup = product(), product("Cup of tea", stock=1)
    client.post("/", form(kettle, 2) | form(cup, 2))
    kettle.refresh_from_db()
    assert (Order.objects.get().status, kettle.stock) == (Order.Status.REFUSED, 5)
    assert "no more than 1 of Cup of tea" in mail.outbox[0].body
    assert bank.charges() == []


@pytest.mark.parametrize("quantity", [0, -1, 101, "many"])
def test_a_form_that_is_no_order(client: Client, db: None, quantity: Any) -> None:
    """It is shown again, with an error."""
    page = client.post("/", form(product(), quantity))
    assert 'class="errorlist' in page.content.decode()
    assert not Order.objects.exists()


def test_a_checkout_that_is_cancelled(eager: None, bank: Ledger) -> None:
    """Its stock and its money are given back, once."""
    kettle = product()
    order = ordered(kettle, 2)
    reserve_stock(order.pk)
    bank.book("key", order.workflow_id, 20_00)
    for _ in range(2):
        call_off.delay(order.pk)
    kettle.refresh_from_db()
    assert (kettle.stock, bank.balance(order.workflow_id)) == (5, 0)


def test_an_order_and_its_checkout(client: Client, transactional_db: None) -> None:
    """They are committed together; the page shows what there is of it."""
    page = client.post("/", form(product(), 1), follow=True)
    order = Order.objects.get()
    assert durable.get_workflow_status(order.workflow_id).args == (order.pk,)
    assert 'http-equiv="refresh"' in page.content.decode()


def test_an_order_that_is_rolled_back(client: Client, transactional_db: None) -> None:
    """Neither is there."""
    with transaction.atomic():
        client.post("/", form(product(), 1))
        (order,) = Order.objects.all()
        transaction.set_rollback(True)
    assert not Order.objects.exists()
    with pytest.raises(WorkflowNotFound):
        durable.get_workflow_status(order.workflow_id)


def test_a_checkout_that_cannot_be_started(client: Client, transactional_db: None) -> None:
    """There is no order then, either."""
    last = ordered(product(), 1)
    call_off.apply_async([last.pk], task_id=f"order-{last.pk + 1}")
    with pytest.raises(WorkflowConflict):
        client.post("/", form(product("Cup of tea"), 1))
    assert list(Order.objects.all()) == [last]


def test_the_admin(admin_client: Client, transactional_db: None) -> None:
    """Orders are shown, linked to their workflows, and answered; one without a workflow is an error that is shown."""
    assert {Order, Product} <= site._registry.keys()
    admin_client.post("/", form(product(), 1))
    (order,) = Order.objects.all()
    link = f'href="/admin/celery_durable/workflow/{order.workflow_id}/change/"'
    assert link in admin_client.get("/admin/django_shop/order/").content.decode()
    forgotten = ordered(product("Cup of tea"), 1)
    answer = {"action": "approve", "_selected_action": [order.pk, forgotten.pk]}
    page = admin_client.post("/admin/django_shop/order/", answer, follow=True).content.decode()
    assert f"Order {order.pk}: it is told." in page
    assert f"Order {forgotten.pk}: There is no workflow" in page
