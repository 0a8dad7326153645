"""What this process has for its async functions: one event loop, and threads for what would block it.

The loop turns in a thread of its own (under gevent and eventlet that is a greenlet), so that the thread which has the
task can still be told to stop. The order in which asyncio tasks are made is the same on every replay, the order in
which they go on isn't: each task counts its calls for itself, in a branch of its own.
"""

from __future__ import annotations

import asyncio
import logging
import os
import queue
import selectors
import threading
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Executor, Future
from contextvars import copy_context
from functools import partial
from typing import Any, ParamSpec, TypeVar

from ..exceptions import ControlFlow, DurableError, SoftTimeLimitExceeded
from ..native import under_eventlet, under_gevent
from .context import Branch, current_attempt, current_branch, current_step, enter_branch

logger = logging.getLogger("celery_durable")

P = ParamSpec("P")
T = TypeVar("T")

#: Threads for statements, and for blocking bodies that are not to block the loop.
STATEMENTS, BODIES = 8, 64
#: How long a function that was told to stop may go on, in seconds.
GRACE = 5.0


class Process:
    """The loop and the threads; made when they are first needed."""

    def __init__(self) -> None:
        self.statements = Threads(STATEMENTS, "celery_durable statement")
        self.bodies = Threads(BODIES, "celery_durable body")
        self.loop = _GreenLoop() if under_gevent() or under_eventlet() else asyncio.new_event_loop()
        self.loop.set_task_factory(_in_new_branch)
        self._thread = threading.Thread(target=self._turn, name="celery_durable loop", daemon=True)
        self._thread.start()

    @property
    def is_here(self) -> bool:
        """Whether the calling thread is that of the loop."""
        return threading.get_ident() == self._thread.ident

    def _turn(self) -> None:
        asyncio.set_event_loop(self.loop)
        while True:
            try:
                self.loop.run_forever()
            except (SystemExit, KeyboardInterrupt):
                # Raised by a task, which keeps it; asyncio lets it through the loop as well, and others go on.
                logger.debug("A task has raised an exit; the event loop goes on.")


class _GreenLoop(asyncio.SelectorEventLoop):
    """A loop that hides while it waits.

    Greenlets share a thread, and asyncio keeps the running loop by thread: were ours always there, other greenlets
    couldn't call ``asyncio.run``, and Django would refuse them its database.
    """

    def __init__(self) -> None:
        # The default selector is now what the green pool has made of it.
        self._selector_that_hides: Any = type("Hiding", (_Hiding, selectors.DefaultSelector), {})()
        super().__init__(self._selector_that_hides)

    def run_forever(self) -> None:
        """Run, whatever other loops run in other greenlets."""
        self._selector_that_hides.others = asyncio._get_running_loop()
        asyncio._set_running_loop(None)
        try:
            super().run_forever()
        finally:
            asyncio._set_running_loop(self._selector_that_hides.others)


class _Hiding:
    #: The loop that the other greenlets see.
    others: asyncio.AbstractEventLoop | None = None

    def select(self, timeout: float | None = None) -> Any:
        ours = asyncio._get_running_loop()
        asyncio._set_running_loop(self.others)
        try:
            return super().select(timeout)  # type: ignore[misc]
        finally:
            self.others = asyncio._get_running_loop()
            asyncio._set_running_loop(ours)


class Threads(Executor):
    """Threads that are made when they are needed, and used again; calls come from one thread.

    Those of the standard library's executors hold up the end of the process until their calls have ended.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._made = 0
        self._idle = threading.Semaphore(0)
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def submit(self, call: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Call it in one of the threads, as soon as one is free."""
        future: Future[T] = Future()
        self.call(partial(_answer, future, partial(call, *args, **kwargs)))
        return future

    def call(self, call: Callable[[], None]) -> None:
        """Call something that raises nothing in one of the threads, as soon as one is free."""
        self._calls.put(call)
        if not self._idle.acquire(blocking=False):
            self._add()

    def queue(self, calls: Iterable[Callable[[], None]]) -> None:
        """Call what raises nothing in the threads that are there, at least one; ``grow`` makes more."""
        for call in calls:
            self._calls.put(call)
        if self.waiting and not self._made:
            self._add()

    @property
    def waiting(self) -> int:
        """How many calls wait for a thread."""
        return self._calls.qsize()

    def grow(self) -> None:
        """Make a thread for each call that waits."""
        for _ in range(self.waiting):
            self._add()

    def _add(self) -> None:
        if self._made >= self._most:
            return
        self._made += 1
        try:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        except RuntimeError:
            self._made -= 1
            if not self._made:
                raise  # there is room for no thread at all; otherwise those that are there do it

    def end(self) -> None:
        """Let each thread end as soon as it is free; then nothing is called any more."""
        for _ in range(self._made):
            self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            self._idle.release()


def _answer(future: Future[T], call: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        value = call()
    except BaseException as error:  # noqa: BLE001 - raised in whoever waits for it
        future.set_exception(error)
    else:
        future.set_result(value)


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


def in_thread(threads: Executor, call: Callable[[], T]) -> asyncio.Future[T]:
    """Return what is awaited for a call that blocks, and which goes on when nobody awaits it any more."""
    return asyncio.get_running_loop().run_in_executor(threads, copy_context().run, call)


async def cancel(task: asyncio.Future[Any]) -> None:
    """Cancel a task, and wait until it has cleaned up."""
    task.cancel()
    await asyncio.wait({task})


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on the loop, and wait for it in this thread, at most until the deadline of the running step.

    What is raised in this thread meanwhile (a limit, the end of the process) cancels it, and is raised when it has
    cleaned up. A coroutine that has caught that, and goes on, has caught the limit.
    """
    if process().is_here:
        coroutine.close()
        raise RuntimeError("Code on the event loop can't wait for an async function without await.")
    step = current_step()
    return _Run(coroutine).wait(None if step is None else step.remaining())


class _Run:
    """One coroutine on the loop, waited for elsewhere."""

    def __init__(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._coroutine = coroutine
        self._loop = process().loop
        self._ended = threading.Event()
        self._task: asyncio.Task[Any] | None = None

    def wait(self, seconds: float | None) -> Any:
        self._loop.call_soon_threadsafe(self._start, context=copy_context())
        try:
            if not self._ended.wait(seconds):
                self._cancel()
                self._ended.wait()
                return None if self._was_cancelled else self._result()  # the limit says it itself, at its end
        except BaseException as error:
            self._cancel()
            self._ended.wait(None if isinstance(error, Exception) else GRACE)
            if isinstance(error, SoftTimeLimitExceeded) and not self._was_cancelled:
                return self._result()
            raise
        return self._result()

    def _start(self) -> None:
        # Not by the loop's factory: this task is its branch's own, not a new one of it.
        self._task = asyncio.Task(self._coroutine, loop=self._loop)
        self._task.add_done_callback(lambda task: self._ended.set())

    def _cancel(self) -> None:
        self._loop.call_soon_threadsafe(lambda: self._task and self._task.cancel())

    @property
    def _was_cancelled(self) -> bool:
        return self._task is None or self._task.cancelled()

    def _result(self) -> Any:
        assert self._task is not None
        if self._task.cancelled():
            raise DurableError("An async function has ended by a CancelledError, although nobody has cancelled it.")
        return self._task.result()


def _in_new_branch(loop: asyncio.AbstractEventLoop, coroutine: Any, **kwargs: Any) -> asyncio.Task[Any]:
    """Make a task; one that a workflow function makes gets a branch, by the order in which they are made."""
    make = partial(asyncio.Task, coroutine, loop=loop)
    branch, attempt = current_branch(), current_attempt()
    if branch is None or attempt is None or attempt.flights is None:
        return make(**kwargs)
    # A copy, because a context that the caller keeps may be that of several tasks.
    context = kwargs.pop("context", None) or copy_context()
    name = getattr(coroutine, "__name__", type(coroutine).__name__)
    task: asyncio.Task[Any] = context.copy().run(_make_in, branch.fork(name), partial(make, **kwargs))
    attempt.flights.tasks.add(task)
    task.add_done_callback(_retrieve_control_flow)
    return task


def _retrieve_control_flow(task: asyncio.Task[Any]) -> None:
    """Let asyncio not complain of an unwinding that only the function itself was to hear of."""
    if not task.cancelled() and isinstance(task._exception, ControlFlow):
        task.exception()


def _make_in(branch: Branch, make: Callable[[], asyncio.Task[Any]]) -> asyncio.Task[Any]:
    enter_branch(branch)
    return make()
