"""Durable execution for the Celery apps that people already have.

``import celery_durable as durable`` is the whole interface; see the README.
"""

from __future__ import annotations

from . import exceptions

# What is there already, as a step
from .adapter import as_step

# Set-up
from .app import install

# Starting
from .bulk import enqueue_many

# Status
from .client import StepInfo, WorkflowStatus, get_workflow_status, list_workflow_steps, list_workflows

# In workflows and steps
from .current import current
from .events import aget_event, aset_event, get_event, list_workflow_events, set_event
from .gather import agather, await_first, gather, wait_first
from .handle import WorkflowHandle

# Management
from .management import (
    cancel_workflow,
    cancel_workflows,
    fork_workflow,
    fork_workflows,
    resume_workflow,
    resume_workflows,
)
from .messages import arecv, asend, recv, send
from .outbox import outbox
from .patches import deprecate_patch, patched

# Encryption
from .seal import PayloadCodec

# Declaring
from .task import Step, Workflow, step, workflow
from .timers import asleep, asleep_until, sleep, sleep_until
from .values import now, random, uuid4
from .version import __version__

__all__ = [
    "PayloadCodec",
    "Step",
    "StepInfo",
    "Workflow",
    "WorkflowHandle",
    "WorkflowStatus",
    "__version__",
    "agather",
    "aget_event",
    "arecv",
    "as_step",
    "asend",
    "aset_event",
    "asleep",
    "asleep_until",
    "await_first",
    "cancel_workflow",
    "cancel_workflows",
    "current",
    "deprecate_patch",
    "enqueue_many",
    "exceptions",
    "fork_workflow",
    "fork_workflows",
    "gather",
    "get_event",
    "get_workflow_status",
    "install",
    "list_workflow_events",
    "list_workflow_steps",
    "list_workflows",
    "now",
    "outbox",
    "patched",
    "random",
    "recv",
    "resume_workflow",
    "resume_workflows",
    "send",
    "set_event",
    "sleep",
    "sleep_until",
    "step",
    "uuid4",
    "wait_first",
    "workflow",
]
