"""How attempts have ended, and the last sweeps."""

from __future__ import annotations

from django.db import migrations

from celery_durable.contrib.django.schema import make


class Migration(migrations.Migration):
    """Applies what our own migrations lack by now; some of them aren't undone one by one."""

    atomic = False
    dependencies = (("celery_durable", "0001_initial"),)
    operations = (migrations.RunPython(make, migrations.RunPython.noop),)
