"""``durable.gather``: several steps at once."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from celery.canvas import Signature

from .engine import loop
from .engine.context import Attempt, current_attempt, current_step
from .engine.gathering import gather_calls
from .engine.step import Answer, Call
from .exceptions import NotAllowedInStep, NotInWorkflow
from .options import check_count
from .task import Callables

MAX_CONCURRENCY = 16

_warned: set[str] = set()


def gather(*things: Any, return_exceptions: bool = False, max_concurrency: int = MAX_CONCURRENCY) -> list[Any]:
    """Run steps at once, and return their values in the order of the arguments.

    Takes signatures of steps, ``charge.s(1)`` or ``durable.as_step(function, name=…).s(1)``; each runs inline, in a
    thread of this process, at most ``max_concurrency`` of them at a time. All of them run to their end. Then, as with
    ``asyncio.gather``, the first error in the order of the arguments is raised, or with ``return_exceptions`` all
    errors stand among the values.

    Every step is kept for itself: what has finished doesn't run again when another one fails or the worker dies. A
    step that backs off for long lets the others go on; when all that are left do so, the worker is given back.
    After the worker has died twice in a row, steps run one at a time until it is known which of them kills it.
    Outside a workflow the steps are called one after the other.

    Raises TypeError for anything else than steps, NotAllowedInStep, NotInWorkflow in an async workflow (await
    ``agather`` there).
    """
    steps = _steps(things, max_concurrency)
    attempt = current_attempt()
    if attempt is None:
        return _outcomes([_plain_answer(step) for step in steps], return_exceptions)
    if attempt.on_loop:
        raise NotInWorkflow(
            "gather() would block the event loop: write `await durable.agather(…)` in an async workflow."
        )
    calls = [(step.bind(attempt), step.callables.blocking) for step in steps]
    return _outcomes(gather_calls(attempt, calls, max_concurrency), return_exceptions)


async def agather(*things: Any, return_exceptions: bool = False, max_concurrency: int = MAX_CONCURRENCY) -> list[Any]:
    """Run steps at once in an async workflow, as ``gather``: async ones on the event loop, others in threads.

    Errors and the order of values are those of ``gather``. ``asyncio.gather`` of steps works, too; but which of
    several errors comes first is then a matter of time, and needn't be the same on a replay.
    """
    steps = _steps(things, max_concurrency)
    attempt = current_attempt()
    if attempt is None:
        return list(await asyncio.gather(*(step.acall() for step in steps), return_exceptions=return_exceptions))
    if not attempt.on_loop:
        raise NotInWorkflow("Only an async workflow can await agather(): call durable.gather(…).")
    places = asyncio.Semaphore(max_concurrency)
    calls = [(step.bind(attempt), step.callables.body) for step in steps]
    answers = await asyncio.gather(*(_answer(places, call, body) for call, body in calls), return_exceptions=True)
    attempt.check_going()
    return _outcomes(answers, return_exceptions)


async def _answer(places: asyncio.Semaphore, call: Call, body: Any) -> Answer:
    async with places:
        return await loop.answer_of(call, body)


@dataclass(frozen=True, slots=True)
class _Gathered:
    """One signature of a step."""

    callables: Callables
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def bind(self, attempt: Attempt) -> Call:
        return Call(attempt, self.callables.spec, self.args, self.kwargs)

    def acall(self) -> Any:
        return self.callables.acall(self.args, self.kwargs)


def _steps(things: Iterable[Any], max_concurrency: int) -> list[_Gathered]:
    if current_step() is not None:
        raise NotAllowedInStep("A step can't gather steps: do that in the workflow, between steps.")
    if not check_count(max_concurrency, "max_concurrency"):
        raise ValueError("max_concurrency must be at least 1.")
    return [_step(thing) for thing in things]


def _step(thing: Any) -> _Gathered:
    callables = getattr(thing, "durable_step", None)
    if callables is None and isinstance(thing, Signature):
        callables = getattr(thing.type, "durable_step", None) if thing.subtask_type is None else None
    if not isinstance(callables, Callables) or not hasattr(thing, "args"):
        raise TypeError(
            f"gather() takes signatures of steps, such as charge.s(1), not {thing!r}: a plain task becomes a step by "
            "durable.as_step(task).s(…)."
        )
    _warn_of_route(thing, callables)
    return _Gathered(callables, tuple(thing.args), dict(thing.kwargs))


def _warn_of_route(thing: Any, callables: Callables) -> None:
    """A step that has a queue of its own doesn't go there."""
    name = callables.spec.name
    if name in _warned or not isinstance(thing, Signature):
        return
    task = thing.type
    if thing.options.get("queue") or getattr(task, "queue", None) or task.app.amqp.router.lookup_route(task.name):
        _warned.add(name)
        warnings.warn(
            f"gather() runs the step {name} in this worker, although it has a route of its own: {name}.delay(…) would "
            "run it there.",
            stacklevel=4,
        )


def _plain_answer(step: _Gathered) -> Answer:
    try:
        return Answer(step.callables.call(step.args, step.kwargs))
    except Exception as error:  # noqa: BLE001 - raised, or returned, when all have run
        return Answer(error=error)


def _outcomes(answers: Sequence[Answer | BaseException], return_exceptions: bool) -> list[Any]:
    """Return the values; raise the first error in the order of the arguments, or return all errors among them."""
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer  # of no step: what ends the attempt
    if return_exceptions:
        return [answer.value if answer.error is None else answer.error for answer in answers]  # type: ignore[union-attr]
    return [answer.get() for answer in answers]  # type: ignore[union-attr]
