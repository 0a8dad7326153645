"""What a call of a step comes to: a checkpointed one in a workflow, a plain one elsewhere."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from . import inline
from .engine import loop
from .engine.context import Attempt, current_attempt, current_plain_step, current_step, only_bodies_here, plain_step
from .engine.limits import soft_limit
from .engine.step import Body, StepSpec, call_step
from .exceptions import NotInWorkflow
from .outboxes import runner

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Callables:
    """A step's policies, and what they call: ``body`` in a workflow, plainly ``run`` elsewhere."""

    spec: StepSpec
    run: Body
    body: Body

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the step; an async one gives a coroutine to an async function, and so does what wraps one.

        In a step that isn't async it is run to its end.
        """
        attempt = caller_of(self.spec.name)
        if attempt is None:
            value = self._call_plainly(args, kwargs)
            return loop.run(value) if inspect.iscoroutine(value) and _is_in_sync_step() else value
        if self.spec.wraps_async and attempt.on_loop:
            return loop.acall_step(attempt, self.spec, self.body, args, kwargs)
        return call_step(attempt, self.spec, self.body, args, kwargs, loop.FROM_THREAD)

    def acall(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        """Return what is awaited for the step's value; its key is settled now."""
        attempt = caller_of(self.spec.name)
        if attempt is None:
            plain = functools.partial(self._call_plainly, args, kwargs)
            return cast("Coroutine[Any, Any, Any]", plain()) if self.spec.is_async else _awaited(off_the_loop(plain))
        if not attempt.on_loop:
            raise NotInWorkflow(f"Only an async workflow can await acall(): call the step {self.spec.name} itself.")
        return loop.acall_step(attempt, self.spec, self.body, args, kwargs)

    def _call_plainly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call it as part of another step, where its own limit holds as well, or outside a workflow."""
        outer, spec = current_step(), self.spec
        if outer is None:
            with plain_step(spec.name):
                value = self.run(*args, **kwargs)
            return _in_plain_step(spec.name, value) if inspect.iscoroutine(value) else value
        if spec.soft_time_limit is None:
            return self.run(*args, **kwargs)
        limit, attempt = soft_limit(spec.soft_time_limit, f"The step {spec.name!r}"), current_attempt()
        if spec.is_async:
            return loop.awaited_within(limit, self.run(*args, **kwargs))
        try:
            with limit, outer.until(limit.deadline):
                value = self.run(*args, **kwargs)
        finally:
            # The outer body may catch the error, and nobody else would hear of it.
            if limit.has_interrupted and attempt is not None:
                attempt.engine.observers.tell("step_interrupted", attempt.id, outer.key)
        return loop.awaited_within(limit, value) if inspect.iscoroutine(value) else value


def _is_in_sync_step() -> bool:
    """Tell whether the calling code belongs to a step, and can't await anything."""
    is_in_step = current_step() is not None or current_plain_step() is not None
    return is_in_step and asyncio._get_running_loop() is None


def caller_of(name: str) -> Attempt | None:
    """Return the attempt that a step called here belongs to; None makes it a plain call.

    Raises NotInWorkflow in a thread that a workflow body has made.
    """
    if current_step() is not None:
        return None
    attempt = current_attempt()
    if attempt is None and only_bodies_here() and inline.running_task() is None:
        raise NotInWorkflow(
            f"The step {name} was called in a thread that the workflow made itself, where it can't be kept: call "
            "steps in the workflow's own thread, and make threads inside a step."
        )
    return attempt


async def off_the_loop(blocking: Callable[[], T]) -> T:
    """Await something that blocks, in a thread."""
    return await asyncio.to_thread(blocking)


async def in_outbox(blocking: Callable[[], T]) -> T:
    """Await what an outbox on an asynchronous connection takes; without one, in a thread."""
    run = runner()
    return await (asyncio.to_thread(blocking) if run is None else run(blocking))


async def _awaited(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Await a call that may return a coroutine."""
    value = await coroutine
    return await value if inspect.iscoroutine(value) else value


async def _in_plain_step(name: str, coroutine: Coroutine[Any, Any, T]) -> T:
    with plain_step(name):
        return await coroutine
