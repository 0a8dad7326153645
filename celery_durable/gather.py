"""``durable.gather``: several steps at once."""

from __future__ import annotations

import asyncio
import inspect
import warnings
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from celery.canvas import Signature
from celery.exceptions import NotRegistered

from .client import WorkflowHandle
from .engine import loop
from .engine.context import Attempt, current_attempt, current_step
from .engine.gathering import gather_calls
from .engine.step import Answer, Call
from .exceptions import NotAllowedInStep, NotInWorkflow
from .task import Callables, StepSignature, Workflow, caller_of

MAX_CONCURRENCY = 16

#: What makes a place other than the default one, in options and in routes.
_PLACES = ("queue", "routing_key", "exchange")

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
    attempt = _caller_of(steps)
    if attempt is None:
        return _outcomes([step.plain_answer() for step in steps], return_exceptions)
    if attempt.on_loop:
        raise NotInWorkflow(
            "gather() would block the event loop: write `await durable.agather(…)` in an async workflow."
        )
    calls = [(step.bind(attempt), step.callables.body) for step in steps]
    return _outcomes(gather_calls(attempt, calls, max_concurrency), return_exceptions)


async def agather(*things: Any, return_exceptions: bool = False, max_concurrency: int = MAX_CONCURRENCY) -> list[Any]:
    """Run steps at once in an async workflow, as ``gather``: async ones on the event loop, others in threads.

    Errors and the order of values are those of ``gather``. ``asyncio.gather`` of steps works, too; but which of
    several errors comes first is then a matter of time, and needn't be the same on a replay.
    """
    steps = _steps(things, max_concurrency)
    attempt = _caller_of(steps)
    if attempt is not None and not attempt.on_loop:
        raise NotInWorkflow("Only an async workflow can await agather(): call durable.gather(…).")
    places = asyncio.Semaphore(max_concurrency)
    if attempt is None:
        answers = [step.awaited_answer for step in steps]
    else:
        answers = [partial(loop.answer_of, step.bind(attempt), step.callables.body) for step in steps]
    found = await asyncio.gather(*(_in_place(places, answer) for answer in answers), return_exceptions=True)
    if attempt is not None:
        attempt.check_going()
    return _outcomes(found, return_exceptions)


async def _in_place(places: asyncio.Semaphore, answer: Callable[[], Awaitable[Answer]]) -> Answer:
    async with places:
        return await answer()


@dataclass(frozen=True, slots=True)
class _Gathered:
    """One signature of a step."""

    callables: Callables
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def bind(self, attempt: Attempt) -> Call:
        """Settle the key of the call."""
        return Call(attempt, self.callables.spec, self.args, self.kwargs)

    def plain_answer(self) -> Answer:
        """Call the step outside a workflow; an async one is run to its end."""
        try:
            value = self.callables.call(self.args, self.kwargs)
            return Answer(loop.run(value) if inspect.iscoroutine(value) else value)
        except Exception as error:  # noqa: BLE001 - raised, or returned, when all have run
            return Answer(error=error, cause=error.__cause__)

    async def awaited_answer(self) -> Answer:
        """Await the step outside a workflow."""
        try:
            return Answer(await self.callables.acall(self.args, self.kwargs))
        except Exception as error:  # noqa: BLE001 - raised, or returned, when all have run
            return Answer(error=error, cause=error.__cause__)


def _caller_of(steps: list[_Gathered]) -> Attempt | None:
    return caller_of(steps[0].callables.spec.name) if steps else current_attempt()


def _steps(things: Iterable[Any], max_concurrency: int) -> list[_Gathered]:
    if current_step() is not None:
        raise NotAllowedInStep("A step can't gather steps: do that in the workflow, between steps.")
    if isinstance(max_concurrency, bool) or not isinstance(max_concurrency, int) or max_concurrency < 1:
        raise ValueError(f"max_concurrency must be a whole number from 1, not {max_concurrency!r}.")
    steps = []
    for thing in things:
        callables = _callables_of(thing)
        if isinstance(thing, Signature):
            _warn_of_route(thing, callables.spec.name)
        steps.append(_Gathered(callables, tuple(thing.args), dict(thing.kwargs)))
    return steps


def _callables_of(thing: Any) -> Callables:
    """Return what a signature of a step calls; raise TypeError for anything else."""
    if isinstance(thing, Signature | StepSignature):
        task = _task_of(thing)
        callables = getattr(thing, "durable_step", None) or getattr(task, "durable_step", None)
        if isinstance(callables, Callables):
            return callables
        if isinstance(task, Workflow):
            raise TypeError(f"gather() takes steps, and {thing!r} is a workflow: start it with delay().")
    raise TypeError(f"gather() takes signatures of steps, such as charge.s(1), not {thing!r}: {_advice(thing)}")


def _task_of(thing: Any) -> Any:
    """Return the task of a signature; None for a group, a chain and the like, and for a name that isn't known."""
    if isinstance(thing, Signature) and thing.subtask_type is None:
        try:
            return thing.type
        except NotRegistered:
            return None
    return None


def _advice(thing: Any) -> str:
    if inspect.iscoroutine(thing):
        return "write fetch.s(1) for fetch(1)."
    if isinstance(thing, WorkflowHandle):
        return "a workflow that was started runs by itself."
    if isinstance(thing, list | tuple | set) or inspect.isgenerator(thing):
        return "write gather(*signatures)."
    if _task_of(thing) is not None:
        return "a plain task becomes a step by durable.as_step(task).s(…)."
    return "a sequence becomes a step as a function, durable.as_step(function).s(…)."


def _warn_of_route(signature: Signature, name: str) -> None:
    """A step that is meant for other workers doesn't go there; said once for each step."""
    if name in _warned:
        return
    task, attempt = signature.type, current_attempt()
    place = _destination(signature.options) or _route_of(task, signature.args, signature.kwargs)
    workflow = None if attempt is None else task.app.tasks.get(attempt.name)
    if place is not None and (workflow is None or place != _route_of(workflow)):
        _warned.add(name)
        warnings.warn(
            f"gather() runs the step {name} in this worker, although its own place is {place!r}: {name}.delay(…) would "
            "run it there.",
            stacklevel=4,
        )


def _route_of(task: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> str | None:
    """Return where a task is sent by its own declaration, or the app's; None: where all tasks go."""
    declared = {option: getattr(task, option, None) for option in _PLACES}
    route = task.app.amqp.router.lookup_route(task.name, tuple(args), dict(kwargs or {}), {}, task)
    return _destination(declared) or _destination(route or {})


def _destination(options: Mapping[str, Any]) -> str | None:
    place = next((options[name] for name in _PLACES if options.get(name)), None)
    return None if place is None else str(getattr(place, "name", place))


def _outcomes(answers: Sequence[Answer | BaseException], return_exceptions: bool) -> list[Any]:
    """Return the values; raise the first error in the order of the arguments, or return all errors among them."""
    for answer in answers:
        if isinstance(answer, BaseException):
            raise answer  # of no step: what ends the attempt
    if return_exceptions:
        return [answer.value if answer.error is None else answer.error for answer in answers]  # type: ignore[union-attr]
    return [answer.get() for answer in answers]  # type: ignore[union-attr]
