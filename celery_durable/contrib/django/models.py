"""The workflows as models: for the admin, and for queries of the project's own. Write through ``celery_durable``."""

from __future__ import annotations

from typing import Any

from django.db import models

from ... import states
from .schema import table


class Workflow(models.Model):
    """One durable instance of a workflow task."""

    #: What the admin shows besides the columns: a WorkflowStatus and StepInfos.
    shown: Any = None
    shown_steps: Any = ()

    id = models.TextField(primary_key=True)
    name = models.TextField()
    queue = models.TextField()
    state = models.TextField(choices=[(state, state) for state in sorted(states.ALL)])
    attempt = models.IntegerField()
    crashes = models.IntegerField()
    waiting_for = models.TextField(null=True)
    parent_id = models.TextField(null=True)
    root_id = models.TextField(null=True)
    forked_from = models.TextField(null=True)
    created_at = models.DateTimeField()
    started_at = models.DateTimeField(null=True)
    finished_at = models.DateTimeField(null=True)
    wake_at = models.DateTimeField(null=True)
    deadline = models.DateTimeField(null=True)

    class Meta:
        """Its table is made by plain SQL."""

        managed = False
        db_table = table("workflow")
        default_permissions = ("change", "view")
        ordering = ("-created_at",)

    def __str__(self) -> str:
        return self.id
