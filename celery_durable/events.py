"""What a workflow publishes for everyone: ``durable.set_event``, ``durable.get_event``."""

from __future__ import annotations

import time
from collections.abc import Coroutine
from datetime import timedelta
from functools import partial
from typing import Any

from celery import Celery

from . import states
from .callables import off_the_loop
from .calls import awaited, bind, caller_of, check_name, only_in_workflow, run_here
from .client import CALLER_PATIENCE, Omitted, readable
from .config import timeout_of
from .engine.context import Attempt, in_plain_function
from .engine.post import publish
from .engine.wait import Listening
from .engine.waiting import Waiting
from .envelope import check_id
from .exceptions import WorkflowNotFound
from .handle import pauses
from .installation import Installation, find

_READ = "wait for events"


def set_event(key: str, value: Any) -> None:
    """Publish a value of this workflow under a key, for everyone to read; the latest one counts.

    Published once, however many attempts there are. In a workflow function that is called directly, or in eager mode,
    it does nothing.

    Raises NotInWorkflow, NotAllowedInStep, SerializationError, PayloadTooLarge.
    """
    attempt = _publisher()
    if attempt is not None:
        run_here(attempt, _publishing(attempt, key, value), "await durable.aset_event(…)")


def aset_event(key: str, value: Any) -> Coroutine[Any, Any, None]:
    """Return what an async workflow awaits to publish a value, as ``set_event``."""
    attempt = _publisher()
    return _nothing() if attempt is None else awaited(attempt, _publishing(attempt, key, value), "durable.set_event(…)")


def get_event(
    workflow_id: str,
    key: str,
    timeout: float | timedelta | None = None,
    default: Any = None,
    app: Celery | None = None,
) -> Any:
    """Return the latest value that a workflow has published under a key, and wait for the first one.

    ``timeout`` is in seconds or a timedelta; when it has passed, or the other workflow has finished without publishing,
    ``default`` is returned. In a workflow this is a durable call, which waits without a worker and sees the same value
    on every replay; anywhere else it asks the database again and again. An event of its own that a workflow hasn't set
    can only come from another task of an async one: anywhere else it waits for ever without a ``timeout``.

    Raises WorkflowNotFound, NotAllowedInStep, NotInstalled, DatabaseUnavailable.
    """
    attempt = _reader()
    check_name(key, "The key of an event")
    if attempt is None:
        return _read(find(app), check_id(workflow_id), key, timeout_of(timeout), default)
    return run_here(attempt, _listening(attempt, workflow_id, key, timeout, default), "await durable.aget_event(…)")


def aget_event(
    workflow_id: str,
    key: str,
    timeout: float | timedelta | None = None,
    default: Any = None,
    app: Celery | None = None,
) -> Coroutine[Any, Any, Any]:
    """Return what is awaited for an event, as ``get_event``, without blocking the event loop."""
    attempt = _reader()
    check_name(key, "The key of an event")
    if attempt is None:
        return off_the_loop(partial(_read, find(app), check_id(workflow_id), key, timeout_of(timeout), default))
    return awaited(attempt, _listening(attempt, workflow_id, key, timeout, default), "durable.get_event(…)")


def list_workflow_events(id: str, max_payload: int | None = None, app: Celery | None = None) -> dict[str, Any]:
    """Return all that a workflow has published, by key. Allowed in steps.

    A value that can't be read is the SerializationError that says why; one that takes more than ``max_payload`` bytes
    is an Omitted. Raises WorkflowNotFound, NotInstalled, DatabaseUnavailable.
    """
    installation = find(app)
    found = installation.store.events.of_workflow(id, most=max_payload, patience=CALLER_PATIENCE)
    if not found and not installation.store.workflows.names_of([id], patience=CALLER_PATIENCE):
        raise WorkflowNotFound(f"There is no workflow {id!r}: its id is wrong, or retention has removed it.")
    return {
        key: Omitted(size) if payload is None else readable(installation, payload, f"The event {key} of workflow {id}")
        for key, (payload, size) in found.items()
    }


def _publisher() -> Attempt | None:
    return None if in_plain_function() else only_in_workflow("publish events")


def _reader() -> Attempt | None:
    return only_in_workflow(_READ) if in_plain_function() else caller_of(_READ)


def _publishing(attempt: Attempt, key: str, value: Any) -> Any:
    call = bind(attempt, "set_event", check_name(key, "The key of an event"), value)
    return partial(publish, call, key, call.encode(value))


def _listening(attempt: Attempt, workflow_id: str, key: str, timeout: float | timedelta | None, default: Any) -> Any:
    call = bind(attempt, "get_event", check_id(workflow_id), key)
    wait = Listening(call, workflow_id, key, timeout_of(timeout), call.encode(default))

    async def listen(waiting: Waiting) -> Any:
        (answer,) = await wait.run(waiting)
        return answer.get()

    return listen


def _read(installation: Installation, workflow_id: str, key: str, timeout: float | None, default: Any) -> Any:
    for pause in pauses(timeout):
        found = installation.store.events.get(workflow_id, key, patience=CALLER_PATIENCE)
        if found is None:
            raise WorkflowNotFound(
                f"There is no workflow {workflow_id!r}: its id is wrong, or retention has removed it."
            )
        state, payload = found
        if payload is not None:
            return installation.codec.decode(payload, f"The event {key} of workflow {workflow_id}")
        if state in states.FINAL:
            break
        time.sleep(pause)
    return default


async def _nothing() -> None:
    return None
