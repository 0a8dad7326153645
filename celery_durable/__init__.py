"""Durable execution for the Celery apps that people already have.

``import celery_durable as durable`` is the whole interface; see the README.
"""

from __future__ import annotations

from . import exceptions

# Set-up
from .app import install

# Status
from .client import (
    StepInfo,
    WorkflowHandle,
    WorkflowStatus,
    get_workflow_status,
    list_workflow_steps,
    list_workflows,
)

# In workflows and steps
from .current import current
from .gather import agather, gather

# Management
from .management import resume_workflow

# Declaring
from .task import Step, Workflow, as_step, step, workflow
from .version import __version__

__all__ = [
    "Step",
    "StepInfo",
    "Workflow",
    "WorkflowHandle",
    "WorkflowStatus",
    "__version__",
    "agather",
    "as_step",
    "current",
    "exceptions",
    "gather",
    "get_workflow_status",
    "install",
    "list_workflow_steps",
    "list_workflows",
    "resume_workflow",
    "step",
    "workflow",
]
