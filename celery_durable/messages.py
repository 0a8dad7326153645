"""Messages between workflows, and from anywhere to a workflow: ``durable.send``, ``durable.recv``."""

from __future__ import annotations

import uuid
from collections.abc import Coroutine
from datetime import timedelta
from functools import partial
from typing import Any

from celery import Celery

from . import outboxes
from .callables import in_outbox
from .calls import awaited, bind, caller_of, check_name, forbid_in_plain_function, only_in_workflow, run_here
from .client import CALLER_PATIENCE
from .config import timeout_of
from .engine.context import Attempt
from .engine.post import post
from .engine.wait import Reception
from .engine.waiting import Waiting
from .envelope import check_id, send_stored
from .exceptions import DatabaseUnavailable, WorkflowFinished, WorkflowNotFound
from .installation import Installation, find
from .store import Letter

_NO_TOPIC = ""


def send(
    workflow_id: str,
    message: Any,
    topic: str | None = None,
    idempotency_key: str | None = None,
    app: Celery | None = None,
) -> None:
    """Send a message to a workflow that runs, waits, or hasn't started yet.

    Once this has returned, the message is kept until the workflow takes it by ``recv``: each message once, and of a
    topic in the order in which they were sent. The same ``idempotency_key`` again sends nothing. In a workflow it is
    a durable call: sent once, however many attempts there are. In an ``outbox`` it is sent by the caller's commit.

    Raises WorkflowNotFound, WorkflowFinished, SerializationError, PayloadTooLarge, NotAllowedInStep, NotInstalled,
    DatabaseUnavailable (try again with an ``idempotency_key``: if only the answer was lost, that is the same message).
    """
    attempt = caller_of("send messages")
    name, idempotency_key = _topic(topic), _key(idempotency_key)
    if attempt is None:
        _send(find(app), check_id(workflow_id), message, name, idempotency_key)
        return
    run_here(attempt, _posting(attempt, workflow_id, message, name, idempotency_key), "await durable.asend(…)")


def asend(
    workflow_id: str,
    message: Any,
    topic: str | None = None,
    idempotency_key: str | None = None,
    app: Celery | None = None,
) -> Coroutine[Any, Any, None]:
    """Return what is awaited to send a message as ``send`` does, without blocking the event loop."""
    attempt = caller_of("send messages")
    name, idempotency_key = _topic(topic), _key(idempotency_key)
    if attempt is None:
        return in_outbox(partial(_send, find(app), check_id(workflow_id), message, name, idempotency_key))
    posting = _posting(attempt, workflow_id, message, name, idempotency_key)
    return awaited(attempt, posting, "durable.send(…)")


def recv(topic: str | None = None, timeout: float | timedelta | None = None, default: Any = None) -> Any:
    """Return the oldest message that was sent to this workflow under a topic, and wait for one without a worker.

    Each message is received once: it is taken together with the checkpoint that keeps it. ``timeout`` is in seconds or
    a timedelta, counts from the first call over every crash, and then ``default`` is returned; None waits for ever.

    Raises NotInWorkflow, NotAllowedInStep, SerializationError for a default that can't be kept.
    """
    attempt = only_in_workflow("receive messages")
    return run_here(attempt, _receiving(attempt, topic, timeout, default), "await durable.arecv(…)")


def arecv(
    topic: str | None = None, timeout: float | timedelta | None = None, default: Any = None
) -> Coroutine[Any, Any, Any]:
    """Return what an async workflow awaits to receive a message, as ``recv``."""
    attempt = only_in_workflow("receive messages")
    return awaited(attempt, _receiving(attempt, topic, timeout, default), "durable.recv(…)")


def _receiving(attempt: Attempt, topic: str | None, timeout: float | timedelta | None, default: Any) -> Any:
    name, limit = _topic(topic), timeout_of(timeout)
    call = bind(attempt, "recv", topic)
    wait = Reception(call, name, limit, call.encode(default))

    async def receive(waiting: Waiting) -> Any:
        (answer,) = await wait.run(waiting)
        return answer.get()

    return receive


def _posting(attempt: Attempt, workflow_id: str, message: Any, topic: str, key: str | None) -> Any:
    call = bind(attempt, "send", workflow_id, message, topic)
    letter = Letter(check_id(workflow_id), topic, key or call.idempotency_key, call.encode(message))
    return partial(post, call, letter)


def _send(installation: Installation, workflow_id: str, message: Any, topic: str, key: str | None) -> None:
    forbid_in_plain_function("send messages")
    payload = installation.codec.encode(message, f"The message to workflow {workflow_id}")
    letter = Letter(workflow_id, topic, key or str(uuid.uuid4()), payload)
    box = outboxes.current(installation)
    if not (_send_now(installation, letter) if box is None else box.put(letter)):
        raise _unsendable(installation, workflow_id)


def _send_now(installation: Installation, letter: Letter) -> bool:
    republish_after = installation.config.republish_after
    send = installation.store.messages.send
    try:
        sent, woken = send(letter, republish_after, patience=0)
    except DatabaseUnavailable:
        sent, woken = send(letter, republish_after, patience=CALLER_PATIENCE)
        # If only the answer was lost, the workflow was woken then, and its own message is still to be sent.
        installation.store.workflows.unsent([letter.workflow], patience=CALLER_PATIENCE)
    if woken is not None and (refused := send_stored(installation.app, [woken])):
        installation.store.workflows.unsent(refused, patience=CALLER_PATIENCE)
    return sent


def _unsendable(installation: Installation, workflow_id: str) -> Exception:
    row = installation.store.workflows.by_id(workflow_id, patience=CALLER_PATIENCE)
    if row is None:
        return WorkflowNotFound(f"There is no workflow {workflow_id!r} to send a message to.")
    return WorkflowFinished(f"The workflow {workflow_id} is {row.state}: it takes no messages any more.")


def _key(key: str | None) -> str | None:
    return None if key is None else check_name(key, "An idempotency key")


def _topic(topic: str | None) -> str:
    return _NO_TOPIC if topic is None else check_name(topic, "A topic")
