"""The app for INSTALLED_APPS."""

from __future__ import annotations

from django.apps import AppConfig


class CeleryDurableConfig(AppConfig):
    """Schema, admin and system checks; the models are read, never written."""

    name = "celery_durable.contrib.django"
    label = "celery_durable"
    verbose_name = "Durable workflows"
    default_auto_field = "django.db.models.BigAutoField"

    def ready(self) -> None:
        """Register the system checks."""
        from . import checks  # noqa: F401 - importing registers them
