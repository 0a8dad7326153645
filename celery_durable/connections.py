"""Connections that the app's own code keeps for each thread: closed when the thread or the code has gone astray."""

from __future__ import annotations

import sys
from typing import Any

from .engine.observer import Observer


class DjangoConnections(Observer):
    """Closes Django's connections of the calling thread, where Django is in use.

    After a task Celery does that itself, but it doesn't know of the threads of a ``gather``. And a step that was
    interrupted in the middle of a query leaves a connection on which no other query can be made.
    """

    def branch_ended(self, workflow_id: str, key: str) -> None:
        """Close what a step in a thread of its own has opened."""
        _close()

    def step_interrupted(self, workflow_id: str, key: str) -> None:
        """Close what a step may have left in the middle of a query."""
        _close()

    def body_awaited(self, workflow_id: str, key: str) -> None:
        """Close what is broken, or older than ``CONN_MAX_AGE``, in the thread in which all async code queries."""
        asgiref, django_db = sys.modules.get("asgiref.sync"), _django_db()
        if asgiref is not None and django_db is not None:
            asgiref.SyncToAsync.single_thread_executor.submit(django_db.close_old_connections)


def _close() -> None:
    if (django_db := _django_db()) is not None:
        django_db.connections.close_all()


def _django_db() -> Any:
    """Return Django's module of connections; None where a library has imported it, but it isn't set up."""
    django_db, django_conf = sys.modules.get("django.db"), sys.modules.get("django.conf")
    return django_db if django_conf is not None and django_conf.settings.configured else None
