"""Remote control: ``celery inspect durable``, ``celery control durable_drain``.

Imported where commands are given and taken: Celery's own module of them brings most of its worker along.
"""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

from celery.worker.control import control_command, inspect_command, nok, ok

from .installation import registered
from .running import Note


@inspect_command(name="durable")
def durable(state: Any, **options: Any) -> Any:
    """List running workflows: which attempt, which steps, and since when."""
    installation = registered(state.app)
    if installation is None or installation.node is None:
        return nok(_NO_NODE)
    notes = installation.running.notes()
    return [_told(request, notes.get(request.id)) for request in installation.node.requests()]


@control_command(name="durable_drain")
def durable_drain(state: Any, **options: Any) -> Any:
    """Take no more workflows, and hand over those that run; plain tasks go on."""
    installation = registered(state.app)
    if installation is None or installation.node is None:
        return nok(_NO_NODE)
    installation.node.drain()
    running = len(installation.node.requests())
    return ok(f"takes no more workflows; hands {running} over, each after its running step")


_NO_NODE = "celery_durable isn't installed on this worker's app"


def _told(request: Any, note: Note | None) -> dict[str, Any]:
    """Return what there is to say of a request; a workflow that isn't claimed yet has no attempt."""
    steps = {} if note is None else {key: _iso(since) for key, since in sorted(note.steps.items())}
    return {
        "id": request.id,
        "name": request.name,
        "attempt": None if note is None else note.attempt,
        "since": None if note is None else _iso(note.since),
        "steps": steps,
        "pid": request.worker_pid,
    }


def _iso(since: float) -> str:
    return datetime.fromtimestamp(since, timezone.utc).isoformat(timespec="milliseconds")
