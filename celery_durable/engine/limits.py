"""Time limits of a step's try.

In the main thread a kernel timer interrupts the body. Elsewhere Python can't interrupt a blocking call: there
the limit is cooperative, the body may read ``current.step.deadline``, and a try that comes back late has
timed out all the same.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..exceptions import SoftTimeLimitExceeded, StepTimeout


@contextmanager
def soft_limit(seconds: float | None, what: str) -> Iterator[float | None]:
    """Raise StepTimeout in the block after ``seconds``; give its deadline on the monotonic clock.

    Limits nest: an inner one that ends sooner leaves the outer one's timer as it was, less the time spent.
    """
    if seconds is None:
        yield None
        return
    deadline = time.monotonic() + seconds
    timeout = StepTimeout(f"{what} ran longer than its soft_time_limit of {seconds:g} s")
    if threading.current_thread() is threading.main_thread():
        with _timer(seconds, timeout):
            yield deadline
    else:
        yield deadline
        if time.monotonic() > deadline:
            raise timeout


def is_foreign_limit(error: BaseException) -> bool:
    """Tell whether this is Celery's soft limit of the whole task, which isn't the step's outcome."""
    return isinstance(error, SoftTimeLimitExceeded) and not isinstance(error, StepTimeout)


@contextmanager
def _timer(seconds: float, timeout: StepTimeout) -> Iterator[None]:
    outer_left, _ = signal.getitimer(signal.ITIMER_REAL)
    if outer_left and outer_left <= seconds:
        yield  # the outer limit ends first, and its owner's timer is running already
        return
    armed = True

    def interrupt(signum: int, frame: FrameType | None) -> None:
        nonlocal armed
        if armed:
            armed = False
            raise timeout

    began = time.monotonic()
    outer_handler = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        try:
            yield
        finally:
            # An alarm may still come between here and the outer clean-up; it must not interrupt that.
            armed = False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, outer_handler or signal.SIG_DFL)
        if outer_left:
            spent = time.monotonic() - began
            signal.setitimer(signal.ITIMER_REAL, max(outer_left - spent, 0.001))
