"""The event loop of this process, on which async functions run in every pool, and how their steps wait on it.

It turns in a thread of its own (under gevent and eventlet that is a greenlet), so that the thread which has the
task can still be told to stop. The order in which asyncio tasks are made is the same on every replay, the order in
which they go on isn't: each task counts its calls for itself, in a branch of its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar
from weakref import WeakSet

from ..exceptions import Cancelled, DurableError, OwnershipLost, StepTimeout, Suspended
from ..store import StepRecord
from .context import (
    LONGEST_BLIND,
    Attempt,
    Branch,
    current_attempt,
    current_branch,
    enter_branch,
    running_step,
)
from .limits import hard_limit
from .retry import Ended, TryAgain
from .step import Answer, Body, Call, StepSpec
from .waiting import StepCall

logger = logging.getLogger("celery_durable")

T = TypeVar("T")

#: Threads for statements, and for blocking bodies that are not to block the loop.
STATEMENTS, BODIES = 8, 64
#: How long a function that was told to stop may go on, in seconds.
_GRACE = 5.0
#: Whether nothing goes on in an attempt is judged so much later: tasks that were just woken come first.
_QUIET = 0.01


class Process:
    """What one process needs for its async functions; made when it is first needed."""

    def __init__(self) -> None:
        self.statements: Executor = ThreadPoolExecutor(STATEMENTS, "celery_durable statement")
        self.bodies: Executor = ThreadPoolExecutor(BODIES, "celery_durable body")
        self.loop = asyncio.new_event_loop()
        self.loop.set_task_factory(_in_new_branch)
        threading.Thread(target=self._turn, name="celery_durable loop", daemon=True).start()

    def _turn(self) -> None:
        asyncio.set_event_loop(self.loop)
        while True:
            try:
                self.loop.run_forever()
            except (SystemExit, KeyboardInterrupt):
                # Raised by a task, which keeps it; asyncio lets it through the loop as well, and others go on.
                logger.debug("A task has raised an exit; the event loop goes on.")


_process: Process | None = None
_lock = threading.Lock()


def process() -> Process:
    """Return this process's loop and threads."""
    global _process
    with _lock:
        if _process is None:
            _process = Process()
        return _process


def _forget() -> None:
    global _process, _lock
    _process, _lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget)


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the loop, and wait for it in this thread.

    What is raised in this thread meanwhile (a limit, the end of the process) cancels it, and is raised.
    """
    return _Run(coroutine).wait()


def run_function(attempt: Attempt, coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a workflow function: its durable calls are made on the loop."""
    return run(_function(attempt, coroutine))


async def _function(attempt: Attempt, coroutine: Coroutine[Any, Any, T]) -> T:
    attempt.thread, attempt.on_loop = threading.get_ident(), True
    attempt.flights = flights = Flights(attempt)
    try:
        return await coroutine
    finally:
        await flights.land()


class _Run:
    """One coroutine on the loop, waited for elsewhere."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._coroutine = coroutine
        self._loop = process().loop
        self._ended = threading.Event()
        self._task: asyncio.Task[Any] | None = None

    def wait(self) -> Any:
        self._loop.call_soon_threadsafe(self._start, context=copy_context())
        try:
            self._ended.wait()
        except BaseException:
            self._loop.call_soon_threadsafe(self._cancel)
            self._ended.wait(_GRACE)
            raise
        assert self._task is not None
        return self._task.result()

    def _start(self) -> None:
        # Not by the loop's factory: this task is its branch's own, not a new one of it.
        self._task = asyncio.Task(self._coroutine, loop=self._loop)
        self._task.add_done_callback(lambda task: self._ended.set())

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


def _in_new_branch(loop: asyncio.AbstractEventLoop, coroutine: Any, **kwargs: Any) -> asyncio.Task[Any]:
    """Make a task; one that a workflow function makes gets a branch, by the order in which they are made."""
    branch, attempt = current_branch(), current_attempt()
    if branch is None or attempt is None or attempt.flights is None:
        return asyncio.Task(coroutine, loop=loop, **kwargs)
    context = kwargs.get("context") or copy_context()
    name = getattr(coroutine, "__name__", type(coroutine).__name__)
    task = context.run(_make_task, branch.fork(name), partial(asyncio.Task, coroutine, loop=loop, **kwargs))
    attempt.flights.tasks.add(task)
    return task


def _make_task(branch: Branch, make: Callable[[], asyncio.Task[Any]]) -> asyncio.Task[Any]:
    enter_branch(branch)
    return make()


class Flights:
    """The steps of one attempt that run on the loop, and its tasks."""

    def __init__(self, attempt: Attempt) -> None:
        #: The tasks that the function has made.
        self.tasks: WeakSet[asyncio.Task[Any]] = WeakSet()
        self._attempt = attempt
        self._loop = asyncio.get_running_loop()
        self._running = 0
        self._reason = ""
        self._parked: dict[asyncio.Future[None], float] = {}
        self._landing: asyncio.Future[None] | None = None
        self._unsaved: list[tuple[StepRecord, asyncio.Future[bool]]] = []
        self._saver: asyncio.Task[None] | None = None

    @contextmanager
    def flight(self) -> Iterator[None]:
        """Count a step that runs."""
        self._running += 1
        try:
            yield
        finally:
            self._leave()

    async def park(self, reason: str, seconds: float) -> None:
        """Wait for so long, or until nothing else goes on in the attempt; then the worker is given back."""
        released: asyncio.Future[None] = self._loop.create_future()
        self._reason = reason
        self._parked[released] = time.monotonic() + seconds
        self._leave()
        try:
            await asyncio.wait({released}, timeout=seconds)
        finally:
            del self._parked[released]
            self._running += 1
        self._attempt.check_going()

    def _leave(self) -> None:
        self._running -= 1
        if not self._running:
            self._loop.call_later(_QUIET, self._release_if_quiet)
            if self._landing is not None and not self._landing.done():
                self._landing.set_result(None)

    def _release_if_quiet(self) -> None:
        if self._parked and not self._running and self._attempt.unwinding is None:
            left = max(min(self._parked.values()) - time.monotonic(), 0.0)
            self._attempt.unwind(Suspended(self._reason, left))
            self._release()

    def _release(self) -> None:
        for released in self._parked:
            if not released.done():
                released.set_result(None)

    async def land(self) -> None:
        """Let steps end that run while the function unwinds, then cancel the tasks that it has left behind."""
        if not isinstance(self._attempt.unwinding, OwnershipLost | None):
            self._release()
            while self._running:
                self._landing = self._loop.create_future()
                await self._landing
        left = {task for task in self.tasks if not task.done()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=_GRACE)

    async def save(self, record: StepRecord) -> bool:
        """Record an outcome; those that are ready together go in one statement."""
        saved: asyncio.Future[bool] = self._loop.create_future()
        self._unsaved.append((record, saved))
        if self._saver is None:
            self._saver = asyncio.Task(self._save_all(), loop=self._loop)
        return await saved

    async def _save_all(self) -> None:
        while self._unsaved:
            batch, self._unsaved = self._unsaved, []
            await self._save(batch)
        self._saver = None

    async def _save(self, batch: list[tuple[StepRecord, asyncio.Future[bool]]]) -> None:
        try:
            done = await in_thread(process().statements, partial(self._attempt.save, [record for record, _ in batch]))
        except BaseException as error:  # noqa: BLE001 - raised in each of the steps
            for _, saved in batch:
                if not saved.done():
                    saved.set_exception(error)
            return
        for _, saved in batch:
            if not saved.done():
                saved.set_result(done)


def acall_step(
    attempt: Attempt, spec: StepSpec, body: Body, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Coroutine[Any, Any, Any]:
    """Return what is awaited for a step's value. Its key is settled now, in the order of the calls."""
    try:
        return _awaited(Call(attempt, spec, args, kwargs), body)
    except BaseException as error:  # noqa: BLE001 - raised where the step is awaited
        return _raising(error)


async def _awaited(call: Call, body: Body) -> Any:
    return (await answer_of(call, body)).get()


async def _raising(error: BaseException) -> Any:
    raise error


async def answer_of(call: Call, body: Body) -> Answer:
    """Await what a step answers."""
    if call.is_settled:
        return call.replay()
    with call.attempt.flights.flight():
        return await call.run(body, ON_LOOP)


async def in_thread(threads: Executor, call: Callable[[], T]) -> T:
    """Call something that blocks."""
    return await asyncio.get_running_loop().run_in_executor(threads, copy_context().run, call)


class OnLoop:
    """A step on the event loop: nothing of it blocks the others."""

    async def run(self, statement: Callable[[], T]) -> T:
        """Make a statement, in a thread."""
        return await in_thread(process().statements, statement)

    async def call(self, step: StepCall, body: Callable[..., Any]) -> Ended:
        """Await a body that is async; call any other in a thread."""
        if step.spec.is_async:
            return await _Body(step, body).run()
        return await in_thread(process().bodies, partial(step.call_here, body))

    async def save(self, attempt: Attempt, record: StepRecord) -> bool:
        """Record an outcome, with those that are ready by now."""
        saved: bool = await attempt.flights.save(record)
        return saved

    async def pause(self, attempt: Attempt, seconds: float) -> None:
        """Sleep; a shutdown or a cancellation is seen within a second."""
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            await asyncio.sleep(min(left, LONGEST_BLIND))
            if attempt.is_stale:
                await self.run(attempt.look)

    async def park(self, attempt: Attempt, reason: str, seconds: float) -> None:
        """Give the worker back as soon as nothing else goes on."""
        await attempt.flights.park(reason, seconds)


class _Body:
    """One run of an async body, within its limits."""

    def __init__(self, step: StepCall, body: Callable[..., Any]) -> None:
        self._step = step
        self._body = body

    async def run(self) -> Ended:
        """Await it to its end."""
        step = self._step
        with running_step(step.step), hard_limit(step.hard_limit):
            if step.soft_limit is not None:
                step.step.deadline = time.monotonic() + step.soft_limit
            task = asyncio.Task(self._body(*step.args, **step.kwargs), loop=asyncio.get_running_loop())
            interruption = await self._interruption(task)
        if isinstance(interruption, Cancelled):
            raise step.attempt.unwind(interruption)
        return Ended(error=interruption) if interruption is not None else self._ended(task)

    async def _interruption(self, task: asyncio.Task[Any]) -> StepTimeout | Cancelled | None:
        """Wait until the body ends by itself (None), or must be interrupted."""
        try:
            while not (await asyncio.wait({task}, timeout=self._patience()))[0]:
                if (reason := await self._reason_to_stop()) is not None:
                    await _cancel(task)
                    return reason
        except asyncio.CancelledError:
            await _cancel(task)
            raise
        return None

    def _patience(self) -> float | None:
        left = self._step.step.remaining()
        if self._step.spec.cancellable:
            return LONGEST_BLIND if left is None else min(left, LONGEST_BLIND)
        return left

    async def _reason_to_stop(self) -> StepTimeout | Cancelled | None:
        left, step = self._step.step.remaining(), self._step
        if left is not None and left <= 0:
            return StepTimeout(f"{step} ran longer than its soft_time_limit of {step.soft_limit:g} s")
        if step.spec.cancellable and await in_thread(process().statements, step.attempt.is_over):
            return Cancelled(f"The workflow {step.attempt.id} was cancelled while a step of it ran.")
        return None

    def _ended(self, task: asyncio.Task[Any]) -> Ended:
        if task.cancelled():
            return Ended(error=DurableError(f"{self._step} was cancelled by itself."))
        error = task.exception()
        if error is None:
            return Ended(task.result())
        if isinstance(error, Exception | TryAgain):
            return Ended(error=error)
        raise error


async def _cancel(task: asyncio.Task[Any]) -> None:
    """Cancel a body, and wait until it has cleaned up."""
    task.cancel()
    await asyncio.wait({task})


ON_LOOP = OnLoop()
