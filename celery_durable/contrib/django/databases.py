"""Which database an alias of Django's means."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from weakref import WeakSet

from psycopg import conninfo, pq

from ...exceptions import ConfigurationError

#: Stores that keep idle sessions in a database of Django's.
_stores: WeakSet[Any] = WeakSet()
_OF_DJANGO = {"NAME": "dbname", "USER": "user", "PASSWORD": "password", "HOST": "host", "PORT": "port"}


def connection_of(alias: str) -> Any:
    """Return this thread's connection of an alias; raise ConfigurationError if that can't be a Postgres of ours."""
    from django.core.exceptions import ImproperlyConfigured
    from django.db import connections
    from django.utils.connection import ConnectionDoesNotExist

    try:
        connection = connections[alias]
    except ConnectionDoesNotExist as error:
        known = ", ".join(sorted(connections))
        raise ConfigurationError(f"There is no alias {alias!r} in Django's DATABASES, only {known}.") from error
    except ImproperlyConfigured as error:
        raise ConfigurationError(
            f"durable_database is {alias!r}, an alias of Django's, but Django isn't set up here ({error})."
        ) from error
    if connection.vendor != "postgresql":
        raise ConfigurationError(
            f"The database {alias!r} of Django's DATABASES is {connection.display_name}: workflows and atomic steps "
            "need an alias that leads to Postgres. (Workflows may have durable_database_url in its place.)"
        )
    return connection


def url_of(alias: str) -> str:
    """Return where an alias leads now, as libpq writes it; raise ConfigurationError.

    While tests run, that is the database that they have made.
    """
    settings = connection_of(alias).settings_dict
    return _url(*(str(settings.get(name) or "") for name in _OF_DJANGO), _frozen(settings.get("OPTIONS") or {}))


def release_before_drop(store: Any) -> None:
    """Let a store close its idle sessions when Django is about to make or drop a database, as its tests do.

    Postgres drops none that somebody is connected to. Django's own connection for such work is what tells.
    """
    from django.db.backends.signals import connection_created

    _stores.add(store)
    connection_created.connect(_release, dispatch_uid="celery_durable")


def _release(connection: Any, **kwargs: Any) -> None:
    from django.db.backends.base.base import NO_DB_ALIAS

    if connection.alias == NO_DB_ALIAS:
        for store in list(_stores):
            store.close()


@lru_cache(maxsize=32)
def _url(*facts: Any) -> str:
    *known, options = facts
    given = {name: value for name, value in zip(_OF_DJANGO.values(), known, strict=True) if value}
    return conninfo.make_conninfo("", **{**dict(options), **given})


def _frozen(options: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """Return those options that libpq knows; the others are Django's and its driver's."""
    return tuple(sorted((name, str(value)) for name, value in options.items() if name in _libpq_options()))


@lru_cache(maxsize=1)
def _libpq_options() -> frozenset[str]:
    return frozenset(option.keyword.decode() for option in pq.Conninfo.get_defaults())
