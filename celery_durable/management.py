"""Workflows steered from outside."""

from __future__ import annotations

from typing import Any

from celery import Celery

from .client import CALLER_PATIENCE, WorkflowHandle, get_workflow_status
from .engine.context import current_step
from .envelope import send_stored
from .exceptions import NotAllowedInStep, WorkflowConflict
from .installation import find


def resume_workflow(id: str, app: Celery | None = None) -> WorkflowHandle[Any]:
    """Let a workflow go on that is CANCELLED, DEAD or in FAILURE; return its handle.

    Its completed steps don't run again, failed ones run anew with all their tries, and no deadline holds any more.
    Once this has returned, it is as durable as a start: a broker that doesn't answer only delays it.

    Raises WorkflowNotFound, WorkflowConflict if it is in any other state, NotAllowedInStep, NotInstalled,
    DatabaseUnavailable.
    """
    if current_step() is not None:
        raise NotAllowedInStep("A step can't resume a workflow: do that in the workflow, between steps.")
    installation = find(app)
    workflows = installation.store.workflows
    message = workflows.resume(id, installation.config.republish_after, patience=CALLER_PATIENCE)
    if message is None:
        state = get_workflow_status(id, installation.app).state
        raise WorkflowConflict(f"The workflow {id} is {state}: only one that has ended without success can be resumed.")
    refused = send_stored(installation.app, [message])
    if refused:
        workflows.unsent(refused, patience=CALLER_PATIENCE)
    return WorkflowHandle(id, app=installation.app)
