"""Durable execution for the Celery apps that people already have.

``import celery_durable as durable`` is the whole interface; see the README. Each name is loaded when it is first used,
so that neither ``celery --help`` nor a module that only declares one thing pays for the rest.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from . import exceptions

    # What is there already, as a step
    from .adapter import as_step

    # Set-up
    from .app import install

    # Starting
    from .bulk import enqueue_many

    # Status
    from .client import (
        Omitted,
        WorkflowStatus,
        count_workflows,
        get_workflow_status,
        list_workflow_names,
        list_workflows,
    )
    from .events import aget_event, aset_event, get_event, list_workflow_events, set_event
    from .handle import WorkflowHandle
    from .health import Health, NodeInfo, check_health

    # In workflows and steps
    from .here import current
    from .history import (
        AttemptInfo,
        MessageInfo,
        StepInfo,
        list_workflow_attempts,
        list_workflow_messages,
        list_workflow_steps,
    )

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
    from .outboxes import outbox
    from .patches import deprecate_patch, patched

    # Encryption
    from .seal import PayloadCodec

    # Declaring
    from .task import Step, Workflow, step, workflow
    from .timers import asleep, asleep_until, sleep, sleep_until
    from .together import agather, await_first, gather, wait_first
    from .values import now, random, uuid4

#: The room of each public name, as the imports above have it. No room is called like a public name of another one:
#: importing it would put the module in the name's place.
_ROOMS = {
    "adapter": ("as_step",),
    "app": ("install",),
    "bulk": ("enqueue_many",),
    "client": (
        "Omitted",
        "WorkflowStatus",
        "count_workflows",
        "get_workflow_status",
        "list_workflow_names",
        "list_workflows",
    ),
    "events": ("aget_event", "aset_event", "get_event", "list_workflow_events", "set_event"),
    "handle": ("WorkflowHandle",),
    "health": ("Health", "NodeInfo", "check_health"),
    "here": ("current",),
    "history": (
        "AttemptInfo",
        "MessageInfo",
        "StepInfo",
        "list_workflow_attempts",
        "list_workflow_messages",
        "list_workflow_steps",
    ),
    "management": (
        "cancel_workflow",
        "cancel_workflows",
        "fork_workflow",
        "fork_workflows",
        "resume_workflow",
        "resume_workflows",
    ),
    "messages": ("arecv", "asend", "recv", "send"),
    "outboxes": ("outbox",),
    "patches": ("deprecate_patch", "patched"),
    "seal": ("PayloadCodec",),
    "task": ("Step", "Workflow", "step", "workflow"),
    "timers": ("asleep", "asleep_until", "sleep", "sleep_until"),
    "together": ("agather", "await_first", "gather", "wait_first"),
    "values": ("now", "random", "uuid4"),
}

__all__ = [
    "AttemptInfo",
    "Health",
    "MessageInfo",
    "NodeInfo",
    "Omitted",
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
    "check_health",
    "count_workflows",
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
    "list_workflow_attempts",
    "list_workflow_events",
    "list_workflow_messages",
    "list_workflow_names",
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


if not TYPE_CHECKING:  # A type checker that sees it takes any name for a public one.

    def __getattr__(name: str) -> Any:
        if name == "exceptions":
            return import_module(".exceptions", __name__)
        for room, names in _ROOMS.items():
            if name in names:
                value = getattr(import_module(f".{room}", __name__), name)
                globals()[name] = value
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
