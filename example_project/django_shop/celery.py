"""The project's Celery app."""

from __future__ import annotations

import os

from celery import Celery

import celery_durable as durable

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "example_project.django_shop.settings")

app = Celery("django_shop")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks()

durable.install(app)
