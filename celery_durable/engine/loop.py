"""Steps on the event loop: how they wait there, and for each other."""

from __future__ import annotations

import asyncio
import inspect
import math
import operator
import threading
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, TypeVar, cast
from weakref import WeakSet

from ..exceptions import ControlFlow, DurableError, OwnershipLost, Suspended
from ..store import StepRecord
from ..store.rows import Wakers
from .context import LONGEST_BLIND, Attempt, logger, running_step
from .limits import Limit, hard_limit
from .process import GRACE, cancel, in_thread, process
from .process import run as run
from .retry import Ended
from .step import Answer, Body, Call, StepSpec
from .waiting import NOTHING, InThread, StepCall, must_find_out

T = TypeVar("T")

#: Seconds between two looks whether a function still waits for something of its own.
_LONGEST_PAUSE = 1.0
#: Whether nothing goes on in an attempt is judged so much later: tasks that were just woken come first.
_QUIET = 0.01


def run_function(attempt: Attempt, coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a workflow function: its durable calls are made on the loop."""
    return run(_function(attempt, coroutine))


async def _function(attempt: Attempt, coroutine: Coroutine[Any, Any, T]) -> T:
    attempt.thread, attempt.on_loop = threading.get_ident(), True
    attempt.flights = flights = Flights(attempt)
    left = 0
    try:
        value = await coroutine
        left = flights.under_way()
        return value
    finally:
        await flights.land()
        attempt.thread = 0  # a task that can't be stopped has nothing to say any more
        if left:
            logger.warning(
                "The function of workflow %s returned while %d asyncio tasks of it were still under way; they were "
                "cancelled. Await what counts.", attempt.id, left,
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Parked:
    """Something that waits without a worker."""

    #: On the monotonic clock.
    due: float
    reason: str
    wakers: Wakers


class Flights:
    """The steps of one attempt that run on the loop, and its tasks."""

    def __init__(self, attempt: Attempt) -> None:
        #: The tasks that the function has made.
        self.tasks: WeakSet[asyncio.Task[Any]] = WeakSet()
        self._attempt = attempt
        self._loop = asyncio.get_running_loop()
        self._function = asyncio.current_task()
        #: The tasks that are inside a durable call, with how many they are in.
        self._inside: Counter[asyncio.Task[Any] | None] = Counter()
        self._looks_again = False
        #: The steps themselves, which run in tasks of their own; and how many of them aren't parked.
        self._steps: set[asyncio.Task[Any]] = set()
        self._running = 0
        self._parked: dict[asyncio.Future[None], _Parked] = {}
        self._unsaved: list[tuple[StepRecord, asyncio.Future[bool]]] = []
        self._saver: asyncio.Task[None] | None = None
        self._turns = _Turns(attempt) if must_find_out(attempt) else None
        if self._turns is None:
            attempt.take_suspicion()

    async def fly(self, call: Call, body: Body) -> Answer:
        """Run a step."""
        return await self.carry(self._run(call, body))

    async def carry(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a durable call in a task of its own: no TaskGroup stops it with its caller while the function unwinds."""
        self._running += 1
        task, caller = asyncio.Task(coroutine, loop=self._loop), asyncio.current_task()
        self._steps.add(task)
        task.add_done_callback(self._has_landed)
        self._inside[caller] += 1
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            if not self._is_waited_for:
                await cancel(task)
            raise
        finally:
            self._inside[caller] -= 1
        return task.result()

    async def _run(self, call: Call, body: Body) -> Answer:
        if self._turns is None:
            return await call.run(body, ON_LOOP)
        with await self._turns.begin():
            return await call.run(body, ON_LOOP)

    def _has_landed(self, task: asyncio.Task[Any]) -> None:
        self._steps.discard(task)
        if not task.cancelled():
            task.exception()  # looked at, also if nobody awaits it any more
        self._leave()

    async def park(self, reason: str, seconds: float | None, wakers: Wakers) -> None:
        """Wait for so long, or until nothing else goes on in the attempt; then the worker is given back."""
        if self._turns is not None:
            self._turns.end()
        released: asyncio.Future[None] = self._loop.create_future()
        due = math.inf if seconds is None else time.monotonic() + seconds
        self._parked[released] = _Parked(due, reason, wakers)
        self._leave()
        try:
            await asyncio.wait({released}, timeout=seconds)
        finally:
            del self._parked[released]
            self._running += 1
        self._attempt.check_going()

    def _leave(self) -> None:
        self._running -= 1
        if self._attempt.unwinding is not None:
            self._release()
        if not self._running and not self._looks_again:
            self._looks_again = True
            self._loop.call_later(_QUIET, self._release_if_quiet, _QUIET)

    def _release_if_quiet(self, pause: float) -> None:
        """Give the worker back if nothing goes on; look again while the function waits for something of its own."""
        self._looks_again = False
        if self._running or not self._parked or self._attempt.unwinding is not None:
            return
        if any(self._goes_on(task) for task in (self._function, *self.tasks)):
            self._looks_again = True
            pause = min(2 * pause, _LONGEST_PAUSE)
            self._loop.call_later(pause, self._release_if_quiet, pause)
        else:
            first = min(self._parked.values(), key=lambda parked: parked.due)
            seconds = None if first.due == math.inf else max(first.due - time.monotonic(), 0.0)
            wakers = reduce(operator.or_, (parked.wakers for parked in self._parked.values()))
            self._attempt.unwind(Suspended(first.reason, seconds, wakers))
            self._release()

    def _goes_on(self, task: asyncio.Task[Any] | None) -> bool:
        """Tell whether a task waits for something that no durable call of this function brings."""
        if task is None or task.done() or self._inside[task] > 0:
            return False
        return not _waits_for_tasks(task)

    def _release(self) -> None:
        for released in self._parked:
            if not released.done():
                released.set_result(None)

    @property
    def _is_waited_for(self) -> bool:
        """Whether steps may end although the function unwinds: all but those of a lost attempt."""
        return not isinstance(self._attempt.unwinding, OwnershipLost | None)

    def under_way(self) -> int:
        """Return how many of the function's tasks haven't ended."""
        return sum(not task.done() for task in self.tasks)

    async def land(self) -> None:
        """Let steps end that run while the function unwinds, then cancel the tasks that it has left behind."""
        if self._is_waited_for:
            self._release()
            await self._land_steps()
        left = {task for task in self.tasks if not task.done()}
        for task in left:
            task.cancel()
        if left:
            await asyncio.wait(left, timeout=GRACE)

    async def _land_steps(self) -> None:
        try:
            while self._steps:
                await asyncio.wait(self._steps)
        except asyncio.CancelledError:
            for step in self._steps:
                step.cancel()
            while self._steps:
                await asyncio.wait(self._steps)
            raise

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
            done = await self._save_together([record for record, _ in batch])
            for _, saved in batch:
                if not saved.done():
                    saved.set_result(done)
        self._saver = None

    async def _save_together(self, records: list[StepRecord]) -> bool:
        try:
            return await in_thread(process().statements, partial(self._attempt.save, records))
        except Exception as error:  # noqa: BLE001 - raised again by the one that is to blame
            # Nothing is lost: each step now finds out for itself.
            name = self._attempt.id
            logger.warning("%d steps of workflow %s couldn't be recorded at once: %r", len(records), name, error)
            return False


def _waits_for_tasks(task: asyncio.Task[Any]) -> bool:
    """Tell whether a task only waits for others: by awaiting them, a gather, asyncio.wait or a TaskGroup."""
    awaited: Any = task.get_coro()
    while awaited is not None:
        code = getattr(awaited, "cr_code", None) or getattr(awaited, "gi_code", None)
        if code is not None and (code.co_filename, code.co_name) in _WAIT_FOR_TASKS:
            return True
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    waiter = getattr(task, "_fut_waiter", None)
    return isinstance(waiter, asyncio.Task | asyncio.tasks._GatheringFuture)  # type: ignore[attr-defined]


_TASKS = asyncio.tasks.__file__
_WAIT_FOR_TASKS = {
    (_TASKS, "_wait"),
    (_TASKS, "_wait_for_one"),
    (_TASKS.replace("tasks.py", "taskgroups.py"), "__aexit__"),
}


class _Turns:
    """One step tries at a time, each with its try written before its body, until it is known which one crashes."""

    def __init__(self, attempt: Attempt) -> None:
        self._attempt = attempt
        self._lock = asyncio.Lock()
        self._holder: asyncio.Task[Any] | None = None
        self._waiting = 0
        #: How many of those are left that were waiting when the first turn ended: the others didn't run at the crash.
        self._suspects: int | None = None

    async def begin(self) -> Any:
        """Wait for a turn; the block that this returns is its longest extent."""
        self._waiting += 1
        try:
            await self._lock.acquire()
        finally:
            self._waiting -= 1
        if self._suspects == 0:
            self._lock.release()
        else:
            self._holder = asyncio.current_task()
            self._attempt.after_crash = True
        return self._turn()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.end()

    def end(self) -> None:
        """End the turn of the running task, if it has one."""
        if self._holder is None or self._holder is not asyncio.current_task():
            return
        self._holder = None
        self._suspects = self._waiting if self._suspects is None else self._suspects - 1
        self._lock.release()


def acall_step(
    attempt: Attempt, spec: StepSpec, body: Body, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Coroutine[Any, Any, Any]:
    """Return what is awaited for a step's value. Its key is settled now, in the order of the calls."""
    try:
        coroutine: Any = _awaited(Call(attempt, spec, args, kwargs), body)
    except BaseException as error:  # noqa: BLE001 - raised where the step is awaited
        return _raising(error)
    coroutine.__name__ = coroutine.__qualname__ = spec.name  # asyncio's complaint says what was never awaited
    return cast("Coroutine[Any, Any, Any]", coroutine)


async def _awaited(call: Call, body: Body) -> Any:
    return (await answer_of(call, body)).get()


async def _raising(error: BaseException) -> Any:
    raise error


async def answer_of(call: Call, body: Body) -> Answer:
    """Await what a step answers."""
    if call.is_settled:
        return call.replay()
    flights: Flights = call.attempt.flights
    return await flights.fly(call, body)


async def awaited_within(limit: Limit, coroutine: Coroutine[Any, Any, T]) -> T:
    """Await an async step that is part of another one, within its own limit; one that catches that may return."""
    task = asyncio.ensure_future(coroutine)
    try:
        done, _ = await asyncio.wait({task}, timeout=limit.seconds)
    except asyncio.CancelledError:
        await cancel(task)
        raise
    if not done:
        await cancel(task)
        if task.cancelled():
            raise limit.error
    return task.result()


class FromThread(InThread):
    """A step of a thread; an async body of it runs on the event loop all the same, within its limits there."""

    async def call(self, step: StepCall, body: Callable[..., Any]) -> Ended:
        """Run a body once, and wait for it in this thread."""
        if step.spec.is_async:
            return run(_AsyncBody(step, partial(body, *step.args, **step.kwargs)).run())
        ended = step.call_here(body)
        return run(_AsyncBody(step, lambda: ended.value).run()) if _goes_on(step, ended) else ended


class OnLoop:
    """A step on the event loop: nothing of it blocks the others."""

    async def run(self, statement: Callable[[], T]) -> T:
        """Make a statement, in a thread."""
        return await in_thread(process().statements, statement)

    async def call(self, step: StepCall, body: Callable[..., Any]) -> Ended:
        """Await a body that is async; call any other in a thread, which can't be interrupted."""
        if step.spec.is_async:
            return await _AsyncBody(step, partial(body, *step.args, **step.kwargs)).run()
        called = in_thread(process().bodies, partial(_call_in_thread, step, body))
        try:
            ended = await asyncio.shield(called)
        except asyncio.CancelledError:
            await asyncio.wait({called})
            raise
        return await _AsyncBody(step, lambda: ended.value).run() if _goes_on(step, ended) else ended

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

    async def park(self, attempt: Attempt, reason: str, seconds: float | None, wakers: Wakers = NOTHING) -> None:
        """Give the worker back as soon as nothing else goes on."""
        await attempt.flights.park(reason, seconds, wakers)


def _call_in_thread(step: StepCall, body: Body) -> Ended:
    try:
        return step.call_here(body)
    finally:
        step.attempt.engine.observers.tell("branch_ended", step.attempt.id, step.step.key)


def _goes_on(step: StepCall, ended: Ended) -> bool:
    """Tell whether a body that wraps an async one has returned what is to be awaited."""
    return step.spec.wraps_async and inspect.isawaitable(ended.value)


class _AsyncBody:
    """One run of an async body, within its limits."""

    def __init__(self, step: StepCall, body: Callable[[], Any]) -> None:
        self._step = step
        self._body = body
        self._limit = step.limit

    async def run(self) -> Ended:
        """Await it to its end."""
        step, seconds = self._step.step, self._limit.seconds
        with running_step(step), hard_limit(self._step.hard_limit):
            step.deadline = None if seconds is None else time.monotonic() + seconds
            task = asyncio.Task(self._called(), loop=asyncio.get_running_loop())
            try:
                interruption = await self._interruption(task)
            finally:
                self._step.attempt.engine.observers.tell("body_awaited", self._step.attempt.id, step.key)
        if interruption is not None:
            self._step.attempt.engine.observers.tell("step_interrupted", self._step.attempt.id, step.key)
        return self._ended(task, interruption)

    async def _called(self) -> Any:
        value = self._body()
        return await value if inspect.isawaitable(value) else value

    async def _interruption(self, task: asyncio.Task[Any]) -> Exception | ControlFlow | None:
        """Wait until the body has ended; return what has interrupted it."""
        try:
            while not (await asyncio.wait({task}, timeout=self._patience()))[0]:
                reason = await self._reason_to_stop()
                if reason is not None and not task.done():
                    await cancel(task)
                    return reason
        except asyncio.CancelledError:
            await cancel(task)
            raise
        return None

    def _patience(self) -> float | None:
        left = self._step.step.remaining()
        if self._step.spec.cancellable:
            return LONGEST_BLIND if left is None else min(left, LONGEST_BLIND)
        return left

    async def _reason_to_stop(self) -> Exception | ControlFlow | None:
        left, attempt = self._step.step.remaining(), self._step.attempt
        if left is not None and left <= 0:
            return self._limit.error
        if self._step.spec.cancellable and await in_thread(process().statements, attempt.is_over):
            return attempt.over
        return None

    def _ended(self, task: asyncio.Task[Any], interruption: Exception | ControlFlow | None) -> Ended:
        """Return how the try has ended. A body that has caught its cancellation may have returned all the same."""
        error: BaseException | None = None
        if task.cancelled():
            error = interruption or DurableError(f"{self._step} has ended by a CancelledError of its own.")
        else:
            error = task.exception()
        if error is None:
            return Ended(task.result())
        if isinstance(error, ControlFlow):
            raise self._step.attempt.unwind(error)
        return Ended(error=error) if isinstance(error, Exception) else self._step.ended_by(error)


FROM_THREAD, ON_LOOP = FromThread(), OnLoop()
