"""The form of an order."""

from __future__ import annotations

from typing import Any

from django import forms

from .models import Order, OrderLine, Product


class OrderForm(forms.Form):
    """A quantity for each product, and where to write to."""

    customer = forms.EmailField(label="Your e-mail address")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._products = {f"product-{product.pk}": product for product in Product.objects.all()}
        for name, product in self._products.items():
            self.fields[name] = forms.IntegerField(
                label=str(product), min_value=0, max_value=100, initial=0, required=False
            )

    def clean(self) -> dict[str, Any]:
        """Refuse an order of nothing."""
        cleaned: dict[str, Any] = super().clean()
        if not self.errors and not self._wanted(cleaned):
            raise forms.ValidationError("Please choose something.")
        return cleaned

    def save(self) -> Order:
        """Write the order down."""
        order = Order.objects.create(customer=self.cleaned_data["customer"])
        OrderLine.objects.bulk_create(
            OrderLine(order=order, product=product, quantity=quantity)
            for product, quantity in self._wanted(self.cleaned_data)
        )
        return order

    def _wanted(self, cleaned: dict[str, Any]) -> list[tuple[Product, int]]:
        return [(product, cleaned[name]) for name, product in self._products.items() if cleaned.get(name)]
