"""What ``manage.py check`` says of the settings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Error, Warning, register
from django.utils.module_loading import autodiscover_modules

from ...exceptions import ConfigurationError
from ...installation import Installation, installations
from ...text import summary
from .databases import connection_of
from .schema import alias_of_workflows, schema_name
from .transactions import Alias


@register()
def check_settings(app_configs: Any, **kwargs: Any) -> list[CheckMessage]:
    """Report settings with which workflows couldn't be started, run or seen."""
    return [*_of_alias(), *_of_apps()]


def _of_alias() -> Iterator[CheckMessage]:
    alias = alias_of_workflows()
    if alias is None:
        yield Error(
            "celery_durable.contrib.django is installed, but CELERY_DURABLE_DATABASE isn't set.",
            hint='Name the alias of the Postgres database in which the workflows live, such as "default".',
            id="celery_durable.E001",
        )
        return
    try:
        connection_of(alias)
    except ConfigurationError as error:
        yield Error(str(error), id="celery_durable.E002")
    else:
        yield from _of_pooling(alias)


def _of_pooling(alias: str) -> Iterator[CheckMessage]:
    pooled = settings.DATABASES[alias].get("DISABLE_SERVER_SIDE_CURSORS", False)
    if pooled and not getattr(settings, "CELERY_DURABLE_PGBOUNCER", False):
        yield Warning(
            f"The database {alias!r} has DISABLE_SERVER_SIDE_CURSORS, as behind pgbouncer in transaction mode.",
            hint="If it is reached through pgbouncer, set CELERY_DURABLE_PGBOUNCER = True.",
            id="celery_durable.W001",
        )


def _of_apps() -> Iterator[CheckMessage]:
    found = list(installations())
    if not found:
        yield Warning(
            "celery_durable is installed on no Celery app in this process, so nothing can be started from it.",
            hint="Import the app in the project's __init__.py, and call durable.install(app) where it is made.",
            id="celery_durable.W002",
        )
    yield from _of_modules()
    for installation in found:
        yield from _of_app(installation)


def _of_modules() -> Iterator[CheckMessage]:
    """Import all tasks, so that their steps can be checked, whichever check of Django's comes first."""
    try:
        # Not by Celery's loader, which runs all checks itself.
        autodiscover_modules("tasks")
    except Exception as error:  # noqa: BLE001 - a module of tasks is any code, and no reason to stop every command
        yield Warning(
            f"The tasks of the installed apps can't be imported ({summary(error)}), and weren't checked.",
            hint="A worker that imports them doesn't start: mend the module.",
            id="celery_durable.W003",
        )


def _of_app(installation: Installation) -> Iterator[CheckMessage]:
    try:
        config = installation.read_config()
    except ConfigurationError as error:
        yield Error(str(error), id="celery_durable.E003")
        return
    for setting, of_app, of_django in (
        ("CELERY_DURABLE_DATABASE", config.database, alias_of_workflows()),
        ("CELERY_DURABLE_SCHEMA", config.schema, schema_name()),
    ):
        if of_app != of_django:
            yield _disagreement(installation.app.main, setting, of_app, of_django)
    for task in list(installation.app.tasks.values()):
        place = getattr(getattr(task, "durable_spec", None), "atomic", None)
        if isinstance(place, Alias):
            yield from _of_step(task.name, place)


def _disagreement(app: Any, setting: str, of_app: str | None, of_django: str | None) -> Error:
    return Error(
        f"{setting} is {of_django!r}, but the Celery app {app} has {of_app!r}: its workflows are elsewhere than the "
        "admin and `manage.py migrate` look for them.",
        hint='Give the app Django\'s settings: app.config_from_object("django.conf:settings", namespace="CELERY").',
        id="celery_durable.E004",
    )


def _of_step(name: str, place: Alias) -> Iterator[CheckMessage]:
    try:
        connection_of(place.alias)
    except ConfigurationError as error:
        yield Error(f"The step {name} is atomic={place.alias!r}. {error}", id="celery_durable.E005")
