"""The schema of the first version, and the model of its workflows."""

from __future__ import annotations

from django.db import migrations, models

from celery_durable import states
from celery_durable.contrib.django.schema import make, remove, table


class Migration(migrations.Migration):
    """Made on a connection of its own, so that it waits for nothing that this one holds."""

    initial = True
    atomic = False
    dependencies = ()
    operations = (
        migrations.RunPython(make, remove),
        migrations.CreateModel(
            name="Workflow",
            fields=[
                ("id", models.TextField(primary_key=True, serialize=False)),
                ("name", models.TextField()),
                ("queue", models.TextField()),
                ("state", models.TextField(choices=[(state, state) for state in sorted(states.ALL)])),
                ("attempt", models.IntegerField()),
                ("crashes", models.IntegerField()),
                ("waiting_for", models.TextField(null=True)),
                ("parent_id", models.TextField(null=True)),
                ("root_id", models.TextField(null=True)),
                ("forked_from", models.TextField(null=True)),
                ("created_at", models.DateTimeField()),
                ("started_at", models.DateTimeField(null=True)),
                ("finished_at", models.DateTimeField(null=True)),
                ("wake_at", models.DateTimeField(null=True)),
                ("deadline", models.DateTimeField(null=True)),
            ],
            options={
                "db_table": table("workflow"),
                "ordering": ("-created_at",),
                "managed": False,
                "default_permissions": ("change", "view"),
            },
        ),
    )
