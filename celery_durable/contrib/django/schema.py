"""Our schema, made by ``manage.py migrate``: plain SQL files, which Django only starts."""

from __future__ import annotations

import sys
from typing import Any

from django.conf import settings
from django.db import connections

from ...store import markers
from ...store.migrate import clear, drop, migrate
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


def forget(using: str, **facts: Any) -> None:
    """Remove all workflows after Django has flushed the test database, as it does after each test that commits.

    It empties the tables of managed models only. A flush of any other database leaves the workflows alone.
    """
    # Both a flush and a migration end in this signal; only a migration has a plan.
    if "plan" not in facts and using == alias_of_workflows() and _is_testing():
        clear(url_of(using), schema_name())


def _is_testing() -> bool:
    """Tell whether Django has set up its environment for tests."""
    testing = sys.modules.get("django.test.utils")
    return hasattr(getattr(testing, "_TestState", None), "saved_data")
