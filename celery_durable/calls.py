"""Durable calls that aren't steps: where they are allowed, and how they run there."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from . import inline
from .engine.context import Attempt, current_attempt, current_step, in_plain_function, only_bodies_here
from .engine.loop import ON_LOOP
from .engine.step import Call, StepSpec
from .engine.waiting import IN_THREAD, Waiting, complete
from .exceptions import NotAllowedInStep, NotInWorkflow
from .text import printable

T = TypeVar("T")

#: A B-tree of Postgres takes keys of 2,700 bytes; nobody needs names of such a length.
MOST_CHARACTERS = 255


def forbid_in_step(what: str) -> None:
    """Raise NotAllowedInStep in a step."""
    if current_step() is not None:
        raise NotAllowedInStep(f"A step can't {what}: do that in the workflow, between steps.")


def caller_of(what: str) -> Attempt | None:
    """Return the attempt that makes a durable call; None outside a workflow.

    Raises NotAllowedInStep in a step, NotInWorkflow in a thread that a workflow body has made.
    """
    forbid_in_step(what)
    attempt = current_attempt()
    if attempt is not None:
        attempt.check_caller()
    elif only_bodies_here() and inline.running_task() is None:
        raise NotInWorkflow(f"A thread that a workflow has made itself can't {what}: do that in the workflow's own.")
    return attempt


def only_in_workflow(what: str) -> Attempt:
    """Return the attempt that makes a durable call; raise NotInWorkflow outside a workflow."""
    attempt = caller_of(what)
    if attempt is not None:
        return attempt
    forbid_in_plain_function(what)
    raise NotInWorkflow(f"Only a workflow can {what}.")


def forbid_in_plain_function(what: str) -> None:
    """Raise NotInWorkflow in a workflow function that is called directly, or in eager mode."""
    if in_plain_function():
        raise NotInWorkflow(
            f"A workflow function that is called directly, or in eager mode, runs without a database and can't {what}: "
            "run it by the fixture durable_run of celery_durable.testing."
        )


def bind(attempt: Attempt, name: str, *args: Any, **kwargs: Any) -> Call:
    """Settle the key of a durable call."""
    return Call(attempt, StepSpec(f"durable.{name}"), args, kwargs)


def run_here(attempt: Attempt, start: Callable[[Waiting], Coroutine[Any, Any, T]], instead: str) -> T:
    """Make a durable call in the workflow's thread; raise NotInWorkflow on an event loop, which it would block."""
    if attempt.on_loop:
        raise NotInWorkflow(f"That would block the event loop: write `{instead}` in an async workflow.")
    return complete(start(IN_THREAD))


def awaited(
    attempt: Attempt, start: Callable[[Waiting], Coroutine[Any, Any, T]], instead: str
) -> Coroutine[Any, Any, T]:
    """Return what is awaited for a durable call in an async workflow; raise NotInWorkflow in any other."""
    if not attempt.on_loop:
        raise NotInWorkflow(f"Only an async workflow can await that: write `{instead}`.")
    return attempt.flights.carry(start(ON_LOOP))


def check_name(value: Any, what: str) -> str:
    """Return a topic or a key; raise TypeError or ValueError for what can't be one."""
    if not isinstance(value, str):
        raise TypeError(f"{what} must be a string, not {value!r:.100}.")
    if not 0 < len(value) <= MOST_CHARACTERS or printable(value) != value:
        raise ValueError(
            f"{what} must have 1 to {MOST_CHARACTERS} characters, without NUL and lone surrogates; this one has "
            f"{len(value)}."
        )
    return value
