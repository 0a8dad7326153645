"""Products and orders in the admin, beside the workflows."""

from __future__ import annotations

from django.contrib import admin, messages
from django.db.models import QuerySet
from django.http import HttpRequest
from django.urls import reverse
from django.utils.html import format_html

import celery_durable as durable
from celery_durable.exceptions import DurableError

from .models import Order, OrderLine, Product


@admin.register(Product)
class ProductAdmin(admin.ModelAdmin):
    """The stock."""

    list_display = ("name", "cents", "stock")


class OrderLines(admin.TabularInline):
    """What was ordered; it doesn't change any more."""

    model = OrderLine
    readonly_fields = ("product", "quantity")
    can_delete = False
    max_num = 0


@admin.register(Order)
class OrderAdmin(admin.ModelAdmin):
    """Orders, which somebody approves here. They are placed in the shop."""

    list_display = ("__str__", "customer", "status", "placed_at", "workflow")
    list_filter = ("status",)
    fields = readonly_fields = ("customer", "status", "placed_at", "workflow")
    inlines = (OrderLines,)
    actions = ("approve", "turn_down")

    def has_add_permission(self, request: HttpRequest) -> bool:
        """Nobody has it."""
        return False

    @admin.display(description="checkout")
    def workflow(self, order: Order) -> str:
        """Link to the workflow with its steps."""
        url = reverse("admin:celery_durable_workflow_change", args=[order.workflow_id])
        return str(format_html('<a href="{}">{}</a>', url, order.workflow_id))

    @admin.action(description="Approve selected orders", permissions=["change"])
    def approve(self, request: HttpRequest, chosen: QuerySet[Order]) -> None:
        """Let those go on that wait for an approval."""
        self._answer(request, chosen, True)

    @admin.action(description="Turn selected orders down", permissions=["change"])
    def turn_down(self, request: HttpRequest, chosen: QuerySet[Order]) -> None:
        """Let those that wait for an approval be refused."""
        self._answer(request, chosen, False)

    def _answer(self, request: HttpRequest, chosen: QuerySet[Order], answer: bool) -> None:
        for order in chosen:
            try:
                durable.send(order.workflow_id, answer, topic="approval", idempotency_key="approval")
            except DurableError as error:
                self.message_user(request, f"{order}: {error}", messages.ERROR)
            else:
                self.message_user(request, f"{order}: it is told.", messages.SUCCESS)
