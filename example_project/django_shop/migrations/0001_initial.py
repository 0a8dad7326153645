"""The tables, and something to sell."""

from __future__ import annotations

from typing import Any

import django.db.models.deletion
from django.db import migrations, models

#: Name, cents, stock.
PRODUCTS = [("Teapot", 29_90, 20), ("Cup", 7_50, 100), ("Samovar", 249_00, 3)]


def fill_the_shelves(apps: Any, editor: Any) -> None:
    product = apps.get_model("django_shop", "Product")
    for name, cents, stock in PRODUCTS:
        product.objects.create(name=name, cents=cents, stock=stock)


class Migration(migrations.Migration):
    initial = True

    dependencies: list[tuple[str, str]] = []

    operations = [
        migrations.CreateModel(
            name="Order",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("customer", models.EmailField(max_length=254)),
                (
                    "status",
                    models.CharField(
                        choices=[
                            ("placed", "Placed"),
                            ("waiting", "Waiting for an approval"),
                            ("reserved", "Reserved"),
                            ("shipped", "Shipped"),
                            ("refused", "Refused"),
                        ],
                        default="placed",
                        max_length=20,
                    ),
                ),
                ("is_reserved", models.BooleanField(default=False)),
                ("placed_at", models.DateTimeField(auto_now_add=True)),
            ],
            options={
                "ordering": ("-pk",),
            },
        ),
        migrations.CreateModel(
            name="Product",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("name", models.CharField(max_length=100, unique=True)),
                ("cents", models.PositiveIntegerField()),
                ("stock", models.PositiveIntegerField()),
            ],
            options={
                "ordering": ("name",),
            },
        ),
        migrations.CreateModel(
            name="OrderLine",
            fields=[
                ("id", models.BigAutoField(auto_created=True, primary_key=True, serialize=False, verbose_name="ID")),
                ("quantity", models.PositiveIntegerField()),
                (
                    "order",
                    models.ForeignKey(
                        on_delete=django.db.models.deletion.CASCADE, related_name="lines", to="django_shop.order"
                    ),
                ),
                ("product", models.ForeignKey(on_delete=django.db.models.deletion.PROTECT, to="django_shop.product")),
            ],
            options={
                "constraints": [models.UniqueConstraint(fields=("order", "product"), name="one_line_a_product")],
            },
        ),
        migrations.RunPython(fill_the_shelves, migrations.RunPython.noop),
    ]
