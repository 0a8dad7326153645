"""Runs an attempt: the function from the top under its history, then the one statement that ends it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import states
from ..exceptions import (
    Cancelled,
    CodecError,
    ControlFlow,
    HandedOver,
    PayloadTooLarge,
    SerializationError,
    Suspended,
    ends_process,
)
from ..store.rows import StoredMessage
from .context import WHILE_ALIVE, Attempt, Engine, logger, running
from .outcome import Completed, Failed, Leaving, Outcome, Retried, Stopped, Superseded, Waiting
from .waiting import NOTHING


def call_body(attempt: Attempt, body: Callable[[], Any], translate: Callable[[Exception], Outcome | None]) -> Outcome:
    """Call the workflow function; nothing is written yet.

    ``translate`` knows the exceptions with which a task system says something else than "failed". A SystemExit
    that Celery's pool raises on a signal passes through: there is no outcome then.
    """
    try:
        with running(attempt):
            value = body()
    except ControlFlow as reason:
        return _unwound(attempt.unwinding or reason)
    except Exception as error:  # noqa: BLE001 - whatever it raises is the workflow's outcome
        if attempt.unwinding is not None:
            return _unwound(attempt.unwinding)
        if attempt.nondeterminism is not None:
            return failed(attempt.engine, attempt.nondeterminism, dead=True)
        return translate(error) or failed(attempt.engine, error)
    except BaseException as error:
        # A group of the errors of asyncio tasks may hold what unwinds the function; an exit of the process never does.
        if ends_process(error):
            raise
        if attempt.unwinding is not None:
            return _unwound(attempt.unwinding)
        return failed(attempt.engine, attempt.engine.codec.rebuilt(error))
    if attempt.unwinding is not None:
        # The function has swallowed what unwinds it; its return value means nothing.
        return _unwound(attempt.unwinding)
    if attempt.nondeterminism is not None:
        return failed(attempt.engine, attempt.nondeterminism, dead=True)
    return _completed(attempt, value)


def failed(engine: Engine, error: Exception, *, dead: bool = False) -> Failed:
    """Return the outcome of a function that raised, or that can't go on."""
    return Failed(error, engine.codec.encode_error(error), states.DEAD if dead else states.FAILURE)


def finish(attempt: Attempt, outcome: Completed | Failed, *, dispatched: bool) -> Outcome:
    """Commit an outcome. ``dispatched``: nothing waits for Celery to deliver it."""
    tell = attempt.engine.observers.tell
    tell("finishing", attempt.id, outcome.state)
    store = attempt.engine.store
    done, woken = store.workflows.finish(
        attempt.fence,
        outcome.state,
        outcome.payload,
        store.awaits.notifying([attempt.id], attempt.engine.republish_after),
        error=None if isinstance(outcome, Completed) else attempt.engine.codec.headline(outcome.error),
        dispatched=dispatched,
        patience=WHILE_ALIVE,
    )
    attempt.send(woken)
    if not done and not _was_ours(attempt, outcome.state):
        return _lost(attempt)
    tell("finished", attempt.id, outcome.state)
    return outcome


def suspend(attempt: Attempt, outcome: Waiting) -> Outcome:
    """Commit a suspension; what it waits for may have come meanwhile, then it goes on at once."""
    tell = attempt.engine.observers.tell
    tell("suspending", attempt.id, outcome.reason)
    done, message = attempt.engine.store.workflows.suspend(
        attempt.fence, outcome.reason, outcome.seconds, outcome.wakers,
        republish_after=attempt.engine.republish_after, patience=WHILE_ALIVE,
    )  # fmt: skip
    if not done:
        # If this is our own suspension, whose answer was lost, it may have been woken, and its message wasn't sent.
        attempt.engine.store.workflows.unsent([attempt.id], patience=WHILE_ALIVE)
        return _lost(attempt)
    tell("suspended", attempt.id, outcome.reason)
    if message is not None:
        attempt.send([message])
    return outcome


def hand_over(attempt: Attempt) -> Outcome:
    """Commit a hand-over, and send the message with which another worker goes on."""
    tell = attempt.engine.observers.tell
    tell("handing_over", attempt.id)
    message = attempt.engine.store.workflows.release(
        attempt.fence, attempt.engine.republish_after, patience=WHILE_ALIVE
    )
    if message is None:
        # If this is our own hand-over, whose answer was lost, its message hasn't been sent.
        attempt.engine.store.workflows.unsent([attempt.id], patience=WHILE_ALIVE)
        return _lost(attempt)
    tell("handed_over", attempt.id)
    attempt.send([message])
    return Leaving()


def run_again(attempt: Attempt, outcome: Retried, message: StoredMessage | None) -> Outcome:
    """Commit Celery's own retry of the whole workflow."""
    assert message is not None, "a retry without its message isn't one"
    done = attempt.engine.store.workflows.again(
        attempt.fence, message, attempt.successor_retries, outcome.seconds, patience=WHILE_ALIVE
    )
    return outcome if done else _lost(attempt)


def _completed(attempt: Attempt, value: Any) -> Outcome:
    codec, what = attempt.engine.codec, f"The result of workflow {attempt.id}"
    try:
        payload = codec.encode(value, what, attempt.shape)
        # Celery's links and backends get plain data: they know no hint.
        return Completed(codec.decode(payload, what), payload)
    except CodecError as error:
        logger.error("The workflow %s waits for a payload codec that can take its result: %s", attempt.id, error)
        return Waiting("payload codec for the result", attempt.engine.republish_after, NOTHING)
    except (SerializationError, PayloadTooLarge, MemoryError) as error:
        return failed(attempt.engine, error)


def _unwound(reason: ControlFlow) -> Outcome:
    if isinstance(reason, Suspended):
        return Waiting(reason.reason, reason.seconds, reason.wakers or NOTHING)
    if isinstance(reason, HandedOver):
        return Leaving()
    if isinstance(reason, Cancelled):
        return Stopped()
    return Superseded()


def _was_ours(attempt: Attempt, state: str) -> bool:
    """Tell whether our own statement had been committed, and only its answer was lost."""
    look = attempt.engine.store.workflows.look(attempt.fence, patience=WHILE_ALIVE)
    return look is not None and look.mine and look.state == state


def _lost(attempt: Attempt) -> Outcome:
    look = attempt.engine.store.workflows.look(attempt.fence, patience=WHILE_ALIVE)
    if look is not None and look.mine and (look.state in (states.CANCELLED, states.ENQUEUED) or look.late):
        return Stopped()
    attempt.engine.observers.tell("fenced", attempt.id)
    return Superseded()
