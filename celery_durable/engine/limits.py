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
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from types import FrameType
from typing import Any

from ..exceptions import ControlFlow, SoftTimeLimitExceeded, StepTimeout
from ..native import under_gevent

#: Below this a timer would be none at all.
_AT_ONCE = 1e-6


class Limit:
    """The limit of one try: its deadline on the monotonic clock, and a way to interrupt the body before it."""

    def __init__(self, seconds: float | None, what: str) -> None:
        self.seconds = seconds
        self.deadline = None if seconds is None else time.monotonic() + seconds
        self.error: BaseException = StepTimeout(f"{what} ran longer than its soft_time_limit of {seconds or 0:g} s")

    @property
    def is_over(self) -> bool:
        """Whether the deadline has passed."""
        return self.deadline is not None and time.monotonic() >= self.deadline

    def interrupt(self, error: ControlFlow) -> None:
        """Raise ``error`` in the body, if it can be interrupted; from any thread."""


@contextmanager
def soft_limit(seconds: float | None, what: str, *, interruptible: bool = False) -> Iterator[Limit]:
    """Raise StepTimeout in the block after ``seconds``.

    Limits nest and have owners: each raises an error of its own, an inner one that ends sooner leaves the outer
    one running, and an outer one that ends sooner raises through the inner block. ``interruptible``: the limit's
    ``interrupt`` works even if there are no seconds.
    """
    if seconds is None and not interruptible:
        yield Limit(None, what)
    elif threading.current_thread() is threading.main_thread() and not under_gevent():
        with _Alarm(seconds, what) as alarm:
            yield alarm
    elif under_gevent():
        with _GreenLimit(seconds, what) as green:
            yield green
    else:
        limit = Limit(seconds, what)
        yield limit
        if limit.is_over:
            raise limit.error


def is_foreign_limit(error: BaseException) -> bool:
    """Tell whether this is Celery's soft limit of the whole task, which isn't the step's outcome."""
    return isinstance(error, SoftTimeLimitExceeded) and not isinstance(error, StepTimeout)


class _Alarm(Limit):
    """A limit in the main thread, by SIGALRM; it passes an outer owner's alarm on."""

    def __enter__(self) -> _Alarm:
        self._lock = threading.Lock()
        self._armed = True
        self._outer_left, self._outer_interval = signal.getitimer(signal.ITIMER_REAL)
        self._began = time.monotonic()
        self._outer = signal.signal(signal.SIGALRM, self._ring)
        self._requested: ControlFlow | None = None
        self._set_timer()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        # An alarm may still come between here and the outer clean-up; it must not interrupt that.
        self._armed = False
        with self._lock:
            signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._outer or signal.SIG_DFL)
        if self._outer_left:
            signal.setitimer(signal.ITIMER_REAL, self._left_to_outer(), self._outer_interval)

    def interrupt(self, error: ControlFlow) -> None:
        with self._lock:
            if self._armed:
                self._requested = error
                signal.setitimer(signal.ITIMER_REAL, _AT_ONCE)

    def _ring(self, signum: int, frame: FrameType | None) -> None:
        if not self._armed:
            return
        if self._requested is not None or self.is_over:
            self._armed = False
            raise self._requested or self.error
        if self._outer_left and self._outer_due and callable(self._outer):
            self._outer_left = self._outer_interval
            self._began = time.monotonic()
            self._outer(signum, frame)
        self._set_timer()

    def _set_timer(self) -> None:
        due = [] if self.deadline is None else [self.deadline - time.monotonic()]
        if self._outer_left:
            due.append(self._left_to_outer())
        if due:
            signal.setitimer(signal.ITIMER_REAL, max(min(due), _AT_ONCE))

    @property
    def _outer_due(self) -> bool:
        return time.monotonic() - self._began >= self._outer_left

    def _left_to_outer(self) -> float:
        return max(self._outer_left - (time.monotonic() - self._began), _AT_ONCE)


class _GreenLimit(Limit):
    """A limit in a gevent greenlet."""

    def __enter__(self) -> _GreenLimit:
        import gevent

        self._kill: Callable[..., Any] = gevent.kill
        self._greenlet = gevent.getcurrent()
        self._armed = True
        self._timeout = gevent.Timeout.start_new(self.seconds, exception=self.error, ref=False)
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._armed = False
        self._timeout.close()

    def interrupt(self, error: ControlFlow) -> None:
        if self._armed:
            self._kill(self._greenlet, exception=error, block=False)


class _Watchdog:
    """Ends this process at the earliest of some deadlines, even while C code holds the interpreter.

    The standard library's faulthandler has such a thread: it needs no interpreter lock, writes where every thread
    hung, and ends the process.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._deadlines: dict[object, float] = {}

    @contextmanager
    def kills_after(self, seconds: float | None) -> Iterator[None]:
        """End the process if the block takes longer."""
        if seconds is None:
            yield
            return
        owner = object()
        self._change(owner, time.monotonic() + seconds)
        try:
            yield
        finally:
            self._change(owner, None)

    def _change(self, owner: object, deadline: float | None) -> None:
        with self._lock:
            if deadline is None:
                self._deadlines.pop(owner, None)
            else:
                self._deadlines[owner] = deadline
            faulthandler.cancel_dump_traceback_later()
            if self._deadlines:
                left = max(min(self._deadlines.values()) - time.monotonic(), _AT_ONCE)
                faulthandler.dump_traceback_later(left, exit=True, file=_where_tracebacks_go())


def _where_tracebacks_go() -> int:
    """Return a file that faulthandler can write to; Celery has put a logger in the place of sys.stderr."""
    try:
        return sys.__stderr__.fileno() if sys.__stderr__ is not None else _null()
    except (OSError, ValueError):
        return _null()


@cache
def _null() -> int:
    return os.open(os.devnull, os.O_WRONLY)


hard_limit = _Watchdog().kills_after
