"""The shop's Celery app."""

from __future__ import annotations

import os

from celery import Celery

import celery_durable as durable

app = Celery(
    "shop",
    broker=os.environ.get("BROKER_URL", "redis://localhost:6379/0"),
    include=["example_project.tasks", "example_project.plain"],
)
app.config_from_envvar("CELERY_CONFIG_MODULE", silent=True)

durable.install(app, database_url=os.environ.get("DATABASE_URL", "postgresql://localhost/shop"))
