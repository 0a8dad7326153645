"""The app for INSTALLED_APPS."""

from __future__ import annotations

from django.apps import AppConfig
from django.db.models.signals import post_migrate


class CeleryDurableConfig(AppConfig):
    """Schema, admin and system checks; the models are read, never written."""

    name = "celery_durable.contrib.django"
    label = "celery_durable"
    verbose_name = "Durable workflows"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Register the system checks; hear of flushes."""
        from . import checks, schema  # noqa: F401 - importing registers the checks

        post_migrate.connect(schema.forget, sender=self)
