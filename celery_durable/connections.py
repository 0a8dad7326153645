"""Connections that the app's own code keeps for each thread: closed when the thread or the code has gone astray."""

from __future__ import annotations

import sys

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


def _close() -> None:
    django_db, django_conf = sys.modules.get("django.db"), sys.modules.get("django.conf")
    # A library may import Django where it isn't set up; then there are no connections, and looking for them fails.
    if django_db is not None and django_conf is not None and django_conf.settings.configured:
        django_db.connections.close_all()
