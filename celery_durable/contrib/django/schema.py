"""Our schema, made by ``manage.py migrate``: plain SQL files, which Django only starts."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.db import connections

from ...store import markers
from ...store.migrate import drop, migrate
from .databases import url_of


def alias_of_workflows() -> str | None:
    """Return the alias of the database in which the workflows live; None: Django doesn't reach it."""
    alias: str | None = getattr(settings, "CELERY_DURABLE_DATABASE", None)
    return alias


def schema_name() -> str:
    """Return the name of the schema."""
    return str(getattr(settings, "CELERY_DURABLE_SCHEMA", "celery_durable"))


def table(name: str) -> str:
    """Return a table's name for a model: Django puts quotes around all of it."""
    schema = schema_name().replace('"', '""')
    return f'{schema}"."{name}'


def make(apps: Any, editor: Any) -> None:
    """Bring the schema up to date where the workflows live; in another Postgres make the table of markers."""
    alias = editor.connection.alias
    if alias == alias_of_workflows():
        migrate(url_of(alias), schema_name())
    elif connections[alias].vendor == "postgresql":
        with editor.connection.cursor() as cursor:
            cursor.execute(markers.script(schema_name()))


def remove(apps: Any, editor: Any) -> None:
    """Drop the schema, with all workflows."""
    if editor.connection.vendor == "postgresql":
        drop(url_of(editor.connection.alias), schema_name())
