"""Several things at once: ``durable.gather``, ``durable.wait_first``."""

from __future__ import annotations

import asyncio
import inspect
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from celery.canvas import Signature
from celery.exceptions import NotRegistered

from .adapter import StepSignature
from .callables import Callables, caller_of
from .calls import awaited, bind, only_in_workflow, run_here
from .engine import loop
from .engine.context import Attempt, current_attempt, current_step
from .engine.gathering import gather_calls
from .engine.step import Answer, Body, Call
from .engine.wait import Ends, first_of
from .engine.waiting import IN_THREAD, complete
from .exceptions import NotAllowedInStep, NotInWorkflow
from .handle import WorkflowHandle, end_of
from .options import callers_level
from .task import Workflow

MAX_CONCURRENCY = 16
_FIRST = "wait for the first of several workflows"

#: What makes a place other than the default one, in options and in routes.
_PLACES = ("queue", "routing_key", "exchange")

_warned: set[str] = set()


def gather(*things: Any, return_exceptions: bool = False, max_concurrency: int = MAX_CONCURRENCY) -> list[Any]:
    """Run steps at once, await workflows together, and return their values in the order of the arguments.

    Takes signatures of steps, ``charge.s(1)`` or ``durable.as_step(function, name=…).s(1)``; each runs inline, in a
    thread of this process, at most ``max_concurrency`` of them at a time. Takes signatures of workflows, which are
    started as children, and handles of workflows; all of them are awaited together, without a worker, and the last one
    that ends wakes this one. All that was gathered runs to its end. Then, as with ``asyncio.gather``, the first error
    in the order of the arguments is raised, or with ``return_exceptions`` all errors stand among the values.

    Every step is kept for itself: what has finished doesn't run again when another one fails or the worker dies. A
    step that backs off for long lets the others go on; when all that are left do so, the worker is given back.
    After the worker has died twice in a row, steps run one at a time until it is known which of them kills it.
    Outside a workflow steps are called one after the other.

    Raises TypeError for anything else, NotAllowedInStep, NotInWorkflow in an async workflow (await ``agather`` there),
    and outside a workflow for anything but steps.
    """
    gathered = _gathered(things, max_concurrency)
    attempt = _caller_of(gathered)
    if attempt is None:
        return _outcomes([each.plain_answer() for each in _only_steps(gathered)], return_exceptions)
    if attempt.on_loop:
        raise NotInWorkflow(
            "gather() would block the event loop: write `await durable.agather(…)` in an async workflow."
        )
    bound = [each.bind(attempt) for each in gathered]
    steps = [each for each in bound if isinstance(each, _BoundStep)]
    answers = dict(
        zip(steps, gather_calls(attempt, [(step.call, step.body) for step in steps], max_concurrency), strict=True)
    )
    ends = _ends(attempt, bound)
    awaited = iter(complete(ends.run(IN_THREAD)) if ends else ())
    found = [answers[each] if isinstance(each, _BoundStep) else next(awaited) for each in bound]
    return _outcomes(found, return_exceptions)


def agather(
    *things: Any, return_exceptions: bool = False, max_concurrency: int = MAX_CONCURRENCY
) -> Coroutine[Any, Any, list[Any]]:
    """Return what an async workflow awaits to run steps at once and to await workflows, as ``gather``.

    Async steps run on the event loop, others in threads. Errors and the order of values are those of ``gather``.
    ``asyncio.gather`` works, too; but which of several errors comes first is then a matter of time, and needn't be the
    same on a replay.
    """
    gathered = _gathered(things, max_concurrency)
    attempt = _caller_of(gathered)
    if attempt is not None and not attempt.on_loop:
        raise NotInWorkflow("Only an async workflow can await agather(): call durable.gather(…).")
    return _agather(attempt, gathered, return_exceptions, asyncio.Semaphore(max_concurrency))


async def _agather(
    attempt: Attempt | None, gathered: list[_Gathered], return_exceptions: bool, places: asyncio.Semaphore
) -> list[Any]:
    if attempt is None:
        found = await asyncio.gather(*(_in_place(places, each.awaited_answer) for each in _only_steps(gathered)))
        return _outcomes(found, return_exceptions)
    bound = [await each.abind(attempt) for each in gathered]
    running = [
        _in_place(places, partial(loop.answer_of, each.call, each.body))
        for each in bound
        if isinstance(each, _BoundStep)
    ]
    ends = _ends(attempt, bound)
    waits = [attempt.flights.carry(ends.run(loop.ON_LOOP))] if ends else []
    landed = await asyncio.gather(*waits, *running, return_exceptions=True)
    attempt.check_going()
    for each in landed[: len(waits)]:
        if isinstance(each, BaseException):
            raise each
    ended: list[Answer] = landed[0] if waits else []  # type: ignore[assignment]
    awaited, answers = iter(ended), iter(landed[len(waits) :])
    return _outcomes([next(answers if isinstance(each, _BoundStep) else awaited) for each in bound], return_exceptions)


async def _in_place(places: asyncio.Semaphore, answer: Callable[[], Awaitable[Answer]]) -> Answer:
    async with places:
        return await answer()


def wait_first(handles: Iterable[WorkflowHandle[Any]]) -> WorkflowHandle[Any]:
    """Return the handle of the first of these workflows that ends, and wait for that without a worker.

    The same on every replay; the others run on. Raises ValueError for none at all, TypeError for anything but handles,
    WorkflowNotFound, NotInWorkflow, NotAllowedInStep.
    """
    attempt = only_in_workflow(_FIRST)
    by_id, call = _firsts(attempt, handles)
    answer = run_here(attempt, partial(first_of, call, list(by_id)), "await durable.await_first(…)")
    return by_id[answer.get()]


def await_first(handles: Iterable[WorkflowHandle[Any]]) -> Coroutine[Any, Any, WorkflowHandle[Any]]:
    """Return what an async workflow awaits for the first of some workflows, as ``wait_first``."""
    attempt = only_in_workflow(_FIRST)
    by_id, call = _firsts(attempt, handles)
    first = awaited(attempt, partial(first_of, call, list(by_id)), "durable.wait_first(…)")

    async def handle() -> WorkflowHandle[Any]:
        return by_id[(await first).get()]

    return handle()


def _firsts(attempt: Attempt, handles: Iterable[WorkflowHandle[Any]]) -> tuple[dict[str, WorkflowHandle[Any]], Call]:
    by_id = {}
    for handle in handles:
        if not isinstance(handle, WorkflowHandle):
            raise TypeError(f"wait_first() takes handles of workflows, not {handle!r:.100}: start them with delay().")
        by_id[handle.target_in(attempt)] = handle
    if not by_id:
        raise ValueError("wait_first() needs at least one handle.")
    return by_id, bind(attempt, "wait_first", *by_id)


@dataclass(frozen=True, slots=True, eq=False)
class _BoundStep:
    """A step that is to run, under its key."""

    call: Call
    body: Body


@dataclass(frozen=True, slots=True, eq=False)
class _BoundEnd:
    """A workflow that is to be awaited, under the key of that."""

    call: Call
    target: str


class _Gathered(Protocol):
    """One of the things that are gathered."""

    def bind(self, attempt: Attempt) -> _BoundStep | _BoundEnd: ...
    async def abind(self, attempt: Attempt) -> _BoundStep | _BoundEnd: ...


@dataclass(frozen=True, slots=True)
class _Step:
    """A signature of a step."""

    callables: Callables
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def bind(self, attempt: Attempt) -> _BoundStep:
        """Settle the key of the call."""
        return _BoundStep(Call(attempt, self.callables.spec, self.args, self.kwargs), self.callables.body)

    async def abind(self, attempt: Attempt) -> _BoundStep:
        """Settle the key of the call."""
        return self.bind(attempt)

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


@dataclass(frozen=True, slots=True)
class _Handle:
    """A workflow that runs already."""

    handle: WorkflowHandle[Any]

    def bind(self, attempt: Attempt) -> _BoundEnd:
        """Settle the key of the wait for it."""
        target = self.handle.target_in(attempt)
        return _BoundEnd(end_of(attempt, target, self.handle.durable_shape), target)

    async def abind(self, attempt: Attempt) -> _BoundEnd:
        """Settle the key of the wait for it."""
        return self.bind(attempt)


@dataclass(frozen=True, slots=True)
class _Start:
    """A signature of a workflow."""

    signature: Signature

    def bind(self, attempt: Attempt) -> _BoundEnd:
        """Start it as a child, and settle the key of the wait for it."""
        return _Handle(self.signature.clone().apply_async()).bind(attempt)

    async def abind(self, attempt: Attempt) -> _BoundEnd:
        """Start it without blocking the event loop."""
        return _Handle(await self.signature.type.astart(self.signature)).bind(attempt)


def _ends(attempt: Attempt, bound: Iterable[_BoundStep | _BoundEnd]) -> Ends | None:
    ends = [each for each in bound if isinstance(each, _BoundEnd)]
    return Ends([each.call for each in ends], [each.target for each in ends]) if ends else None


def _only_steps(gathered: list[_Gathered]) -> list[_Step]:
    """Return the steps; raise NotInWorkflow if there is anything else, before any of them is called."""
    steps = [each for each in gathered if isinstance(each, _Step)]
    if len(steps) < len(gathered):
        only_in_workflow("gather workflows")
    return steps


def _caller_of(gathered: list[_Gathered]) -> Attempt | None:
    steps = [each for each in gathered if isinstance(each, _Step)]
    return caller_of(steps[0].callables.spec.name) if steps else current_attempt()


def _gathered(things: Iterable[Any], max_concurrency: int) -> list[_Gathered]:
    if current_step() is not None:
        raise NotAllowedInStep("A step can't gather steps: do that in the workflow, between steps.")
    if isinstance(max_concurrency, bool) or not isinstance(max_concurrency, int) or max_concurrency < 1:
        raise ValueError(f"max_concurrency must be a whole number from 1, not {max_concurrency!r}.")
    return [_of(thing) for thing in things]


def _of(thing: Any) -> _Gathered:
    """Return how a thing is gathered; raise TypeError for what can't be."""
    if isinstance(thing, WorkflowHandle):
        return _Handle(thing)
    if isinstance(thing, Signature | StepSignature):
        task = _task_of(thing)
        callables = getattr(thing, "durable_step", None) or getattr(task, "durable_step", None)
        if isinstance(callables, Callables):
            if isinstance(thing, Signature):
                _warn_of_route(thing, callables.spec.name)
                _warn_of_options(thing, callables.spec.name)
            return _Step(callables, tuple(thing.args), dict(thing.kwargs))
        if isinstance(task, Workflow):
            return _Start(thing)
    raise TypeError(
        f"gather() takes signatures of steps and workflows, such as charge.s(1), and handles, not {thing!r}: "
        f"{_advice(thing)}"
    )


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
    if isinstance(thing, list | tuple | set) or inspect.isgenerator(thing):
        return "write gather(*signatures)."
    if _task_of(thing) is not None:
        return "a plain task becomes a step by durable.as_step(task).s(…)."
    return "a sequence becomes a step as a function, durable.as_step(function).s(…)."


#: What is meant for a message, and gather sends none.
_OF_MESSAGES = ("countdown", "eta", "expires", "link", "link_error", "priority")


def _warn_of_options(signature: Signature, name: str) -> None:
    unheeded = sorted(option for option in _OF_MESSAGES if signature.options.get(option))
    if unheeded:
        warnings.warn(
            f"gather() runs the step {name} inline, where {', '.join(unheeded)} of its signature mean nothing: "
            f"{name}.apply_async(…) sends it.",
            stacklevel=callers_level(),
        )


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
            stacklevel=callers_level(),
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
