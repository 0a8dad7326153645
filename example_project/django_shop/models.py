"""What the shop has and what it was asked for."""

from __future__ import annotations

from django.db import models
from django.urls import reverse


class Product(models.Model):
    """Something to buy."""

    name = models.CharField(max_length=100, unique=True)
    cents = models.PositiveIntegerField()
    stock = models.PositiveIntegerField()

    class Meta:
        ordering = ("name",)

    def __str__(self) -> str:
        return f"{self.name}, {self.cents / 100:.2f}"


class Order(models.Model):
    """What a customer has asked for. Its checkout is a workflow, which has the order's number in its id."""

    class Status(models.TextChoices):
        """How the order stands, to be shown: nothing is decided by it."""

        PLACED = "placed"
        WAITING = "waiting", "Waiting for an approval"
        RESERVED = "reserved"
        SHIPPED = "shipped"
        REFUSED = "refused"

    customer = models.EmailField()
    status = models.CharField(max_length=20, choices=Status.choices, default=Status.PLACED)
    is_reserved = models.BooleanField(default=False)
    placed_at = models.DateTimeField(auto_now_add=True)

    class Meta:
        ordering = ("-pk",)

    def __str__(self) -> str:
        return f"order {self.pk}"

    def get_absolute_url(self) -> str:
        """The page that shows how it goes on."""
        return str(reverse("order", args=[self.pk]))

    @property
    def workflow_id(self) -> str:
        """The id of its checkout: however often that is started, there is one."""
        return f"order-{self.pk}"


class OrderLine(models.Model):
    """So many of a product."""

    order = models.ForeignKey(Order, models.CASCADE, related_name="lines")
    product = models.ForeignKey(Product, models.PROTECT)
    quantity = models.PositiveIntegerField()

    class Meta:
        constraints = (models.UniqueConstraint(fields=["order", "product"], name="one_line_a_product"),)

    def __str__(self) -> str:
        return f"{self.quantity} x {self.product}"
