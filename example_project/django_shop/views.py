"""The pages of the shop."""

from __future__ import annotations

from django.db import transaction
from django.http import HttpRequest, HttpResponse
from django.shortcuts import get_object_or_404, redirect, render

import celery_durable as durable
from celery_durable.exceptions import WorkflowNotFound

from .forms import OrderForm
from .models import Order
from .tasks import call_off, checkout


def shop(request: HttpRequest) -> HttpResponse:
    """Show what there is to buy, and take an order."""
    form = OrderForm(request.POST or None)
    if form.is_valid():
        return redirect(place(form))
    return render(request, "django_shop/shop.html", {"form": form})


def place(form: OrderForm) -> Order:
    """Place an order: it and its checkout are there together, or neither is."""
    with transaction.atomic():
        order = form.save()
        checkout.apply_async([order.pk], task_id=order.workflow_id, on_cancel=call_off.s(order.pk))
    return order


def order(request: HttpRequest, pk: int) -> HttpResponse:
    """Show how an order goes on. The page reloads itself until there is nothing more to come."""
    order = get_object_or_404(Order, pk=pk)
    try:
        workflow = durable.get_workflow_status(order.workflow_id)
        steps = durable.list_workflow_steps(order.workflow_id)
    except WorkflowNotFound:  # it has finished long ago
        workflow, steps = None, []
    context = {"order": order, "workflow": workflow, "steps": steps, "is_done": not workflow or workflow.finished_at}
    return render(request, "django_shop/order.html", context)
