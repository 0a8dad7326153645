"""Indexes for lists, built beside what runs: as long as that takes."""

from __future__ import annotations

from django.db import migrations

from celery_durable.contrib.django.schema import make


class Migration(migrations.Migration):
    """Applies what our own migrations lack by now; some of them aren't undone one by one."""

    atomic = False
    dependencies = (("celery_durable", "0002_history"),)
    operations = (migrations.RunPython(make, migrations.RunPython.noop),)
