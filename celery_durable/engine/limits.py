"""Time limits of a step's try, and what interrupts its body.

==================  =========================================================================
where the body is    a soft limit, or the workflow's cancellation if the step is cancellable
==================  =========================================================================
the main thread     interrupts it by a kernel timer (prefork, solo)
a gevent greenlet   interrupts it at its next switch
the event loop      cancels its task (``async def``, in every pool)
any other thread    can't: the body may read ``current.step.deadline`` and ``current.cancelled``,
                    and a try that comes back late has timed out all the same
==================  =========================================================================

A body is interrupted once. As with Celery's own soft limit it may catch the error, clean up, and return: then what it
returns is how the try has ended. A body that couldn't be interrupted in time (a long call of C code, an alarm of its
own in the place of ours, a greenlet that never switches) and returns late has timed out.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, cached_property
from types import FrameType, TracebackType
from typing import Any

from ..exceptions import ControlFlow, SoftTimeLimitExceeded, StepTimeout
from ..native import under_gevent
from ..store.shield import is_busy

#: Below this a timer would be none at all.
_AT_ONCE = 1e-6
#: An alarm that can't be raised where it has come comes again so much later.
_SOON = 1e-3
_FOR_EVER = nullcontext()


class Limit:
    """The limit of one try; as a context manager it ends with the body.

    Raises StepTimeout in the body when ``seconds`` are over, or at its end if it can't be interrupted.
    """

    #: Whether the body can be interrupted.
    interrupts = False

    def __init__(self, seconds: float | None, what: object, option: str = "soft_time_limit") -> None:
        self.seconds = seconds
        #: On the monotonic clock.
        self.deadline: float | None = None
        self._what = what
        self._option = option
        self._requested: ControlFlow | None = None
        self._raised: list[BaseException] = []
        self._is_open = False

    def __enter__(self) -> Limit:
        if self.seconds is not None:
            self.deadline = time.monotonic() + self.seconds
        self._begin()
        self._is_open = True
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, traceback: TracebackType | None) -> None:
        self._is_open = False
        self._end()
        if kind is None and self.is_over and not self.has_interrupted:
            raise self.error

    @cached_property
    def error(self) -> StepTimeout:
        """What is raised."""
        return StepTimeout(f"{self._what} ran longer than its {self._option} of {self.seconds or 0:g} s.")

    @property
    def is_over(self) -> bool:
        """Whether the deadline has passed."""
        return self.remaining is not None and self.remaining <= 0

    @property
    def remaining(self) -> float | None:
        """The seconds until the deadline."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    @property
    def has_interrupted(self) -> bool:
        """Whether an error was raised in the body, wherever that was."""
        return bool(self._raised)

    def interrupt(self, error: ControlFlow) -> None:
        """Raise ``error`` in the body, if it still runs and can be interrupted; from any thread."""

    def _begin(self) -> None:
        """Set the timer."""

    def _end(self) -> None:
        """Stop the timer."""

    def _next_error(self) -> BaseException | None:
        """Return what is to be raised in the body now; each error is raised once."""
        for error in (self._requested, self.error if self.is_over else None):
            if self._is_open and error is not None and error not in self._raised:
                self._raised.append(error)
                return error
        return None


#: One for all: it keeps nothing of the bodies that it doesn't limit.
UNLIMITED = Limit(None, "nothing")


def soft_limit(
    seconds: float | None, what: object, *, option: str = "soft_time_limit", interruptible: bool = False
) -> Limit:
    """Return the limit of a body that the calling thread is about to run; ``option`` is what its author called it.

    Limits nest and have owners: each raises an error of its own, an inner one that ends sooner leaves the outer
    one running, and an outer one that ends sooner raises through the inner block. ``interruptible``: the limit's
    ``interrupt`` works even if there are no seconds.
    """
    if seconds is None and not interruptible:
        return UNLIMITED
    return _kind()(seconds, what, option)


def is_foreign_limit(error: BaseException) -> bool:
    """Tell whether this is Celery's soft limit of the whole task, which isn't the step's outcome."""
    return isinstance(error, SoftTimeLimitExceeded) and not isinstance(error, StepTimeout)


class _Alarm(Limit):
    """A limit in the main thread, by SIGALRM; it passes on the alarm of whoever had the timer before."""

    interrupts = True

    #: Whether an alarm was put off since this was last made false; of all limits, as any of them may have the handler.
    _has_put_off = False

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._lock = threading.Lock()
        self._outer_left = self._outer_interval = 0.0

    def _begin(self) -> None:
        self._is_ending = False
        self._outer = signal.getsignal(signal.SIGALRM)
        try:
            signal.signal(signal.SIGALRM, self._ring)
            self._note_outer_timer()
            self._set_timer()
        except BaseException:
            self._end()
            raise

    def _end(self) -> None:
        self._is_ending = True
        with self._lock:
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._outer or signal.SIG_DFL)
        if self._outer_left:
            signal.setitimer(signal.ITIMER_REAL, max(self._until_outer, _AT_ONCE), self._outer_interval)

    def interrupt(self, error: ControlFlow) -> None:
        with self._lock:
            # The body may have put a handler of its own in our place; and without one, the signal ends the process.
            if self._is_open and self in _owners(signal.getsignal(signal.SIGALRM)):
                self._requested = self._requested or error
                if self._is_asked:
                    signal.pthread_kill(_main_thread(), signal.SIGALRM)

    @property
    def _is_asked(self) -> bool:
        return self._requested is not None and self._requested not in self._raised

    def _ring(self, signum: int, frame: FrameType | None) -> None:
        if self._is_ending:
            return  # whose alarm it was finds it late in a moment
        if _is_here(frame):
            # A limit begins or ends: interrupted, it would leave the timer to nobody.
            _Alarm._has_put_off = True
            signal.setitimer(signal.ITIMER_REAL, _SOON, signal.getitimer(signal.ITIMER_REAL)[1])
            return
        error = self._next_error()
        try:
            if self._is_outer_due:
                self._ring_outer(signum, frame)
        finally:
            self._set_timer()
        if error is not None:
            raise error

    @property
    def _is_outer_due(self) -> bool:
        if self._outer_left and self._until_outer <= 0:
            return True
        return any(owner._is_asked for owner in _owners(self._outer))

    def _ring_outer(self, signum: int, frame: FrameType | None) -> None:
        """Let the outer owner have its alarm as if there had been no other, and its timer as it leaves it."""
        signal.setitimer(signal.ITIMER_REAL, self._outer_interval, self._outer_interval)
        try:
            if callable(self._outer):
                self._outer(signum, frame)
            elif self._outer == signal.SIG_DFL:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.raise_signal(signal.SIGALRM)
        finally:
            self._note_outer_timer()

    def _note_outer_timer(self) -> None:
        _Alarm._has_put_off = True
        while _Alarm._has_put_off:  # an alarm at this very moment has left nothing to note
            _Alarm._has_put_off = False
            self._outer_left, self._outer_interval = signal.getitimer(signal.ITIMER_REAL)
            self._outer_since = time.monotonic()

    def _set_timer(self) -> None:
        due = [self._until_outer] if self._outer_left else []
        if self.remaining is not None and self.error not in self._raised:
            due.append(self.remaining)
        if due:
            signal.setitimer(signal.ITIMER_REAL, max(min(due), _AT_ONCE))

    @property
    def _until_outer(self) -> float:
        return self._outer_left - (time.monotonic() - self._outer_since)


def _owners(handler: Any) -> Iterator[_Alarm]:
    """Give the limits that see the alarm if this is its handler, the inner ones first."""
    while isinstance(owner := getattr(handler, "__self__", None), _Alarm):
        yield owner
        handler = owner._outer


class _GreenLimit(Limit):
    """A limit in a gevent greenlet."""

    interrupts = True

    def _begin(self) -> None:
        import gevent

        self._loop = gevent.get_hub().loop
        self._greenlet = gevent.getcurrent()
        self._ident = threading.get_ident()
        self._timer: Any = None
        self._set_timer(self.seconds)

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.stop()
            self._timer.close()

    def interrupt(self, error: ControlFlow) -> None:
        if self._is_open and not is_busy(self._ident):
            self._requested = self._requested or error
            self._loop.run_callback(self._throw)

    def _set_timer(self, seconds: float | None) -> None:
        if seconds is not None:
            self._timer = self._loop.timer(max(seconds, 0.0), ref=False)
            self._timer.start(self._ring)

    def _ring(self) -> None:
        # The loop reads the clock once a turn, and may be early.
        if self.is_over and not is_busy(self._ident):
            self._throw()
        else:
            self._end()
            self._set_timer(max(self.remaining or 0.0, _SOON))

    def _throw(self) -> None:
        error = None if is_busy(self._ident) else self._next_error()
        if error is not None:
            self._greenlet.throw(error)


def _kind() -> type[Limit]:
    """Return what can be done in this thread."""
    if under_gevent():
        return _GreenLimit
    return _Alarm if threading.current_thread() is threading.main_thread() else Limit


def _main_thread() -> int:
    ident = threading.main_thread().ident
    assert ident is not None
    return ident


def _is_here(frame: FrameType | None) -> bool:
    """Tell whether code of this module runs in or above this frame; while a body runs, none does."""
    while frame is not None:
        if frame.f_globals is _HERE:
            return True
        frame = frame.f_back
    return False


_HERE = globals()


class _Watchdog:
    """Ends this process at the earliest of some deadlines, even while C code holds the interpreter.

    The standard library's faulthandler has such a thread: it needs no interpreter lock, writes where every thread
    hung, and ends the process.
    """

    def __init__(self) -> None:
        self._forget()

    def kills_after(self, seconds: float | None) -> AbstractContextManager[None]:
        """End the process if the block takes longer."""
        return _FOR_EVER if seconds is None else self._killing_after(seconds)

    @contextmanager
    def _killing_after(self, seconds: float) -> Iterator[None]:
        owner = object()
        try:
            self._watch(owner, time.monotonic() + seconds)
            yield
        finally:
            self._release(owner)

    def _watch(self, owner: object, deadline: float) -> None:
        with self._lock:
            self._deadlines[owner] = deadline
            self._start()

    def _release(self, owner: object) -> None:
        with self._lock:
            if owner not in self._deadlines:
                return  # in the child of a fork, which has no such thread
            faulthandler.cancel_dump_traceback_later()
            del self._deadlines[owner]
            self._start()

    def _start(self) -> None:
        if self._deadlines:
            left = max(min(self._deadlines.values()) - time.monotonic(), _AT_ONCE)
            faulthandler.dump_traceback_later(left, exit=True, file=_where_tracebacks_go())

    def _forget(self) -> None:
        self._lock = threading.Lock()
        self._deadlines: dict[object, float] = {}


def _where_tracebacks_go() -> int:
    """Return a file that faulthandler can write to; Celery has put a logger in the place of sys.stderr."""
    try:
        return _unblocked(sys.__stderr__.fileno()) if sys.__stderr__ is not None else _nowhere()
    except (OSError, ValueError):
        return _nowhere()


@cache
def _nowhere() -> int:
    return os.open(os.devnull, os.O_WRONLY)


@cache
def _unblocked(descriptor: int) -> int:
    """Return the same file in a way that never waits: a pipe that nobody reads must not keep the process alive."""
    os.fstat(descriptor)
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_APPEND | os.O_NONBLOCK)
    except OSError:
        return descriptor  # no such file system, or a socket, to which there is no other way


_watchdog = _Watchdog()
hard_limit = _watchdog.kills_after

os.register_at_fork(after_in_child=_watchdog._forget)
