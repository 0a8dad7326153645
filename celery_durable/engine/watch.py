"""Watches a workflow while a cancellable step runs, and interrupts the step when the workflow is over."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .context import LONGEST_BLIND, Attempt
from .limits import Limit

#: A body that can't be interrupted at this moment is interrupted so much later, in seconds.
_AGAIN = 0.05


@contextmanager
def watching(attempt: Attempt, limit: Limit) -> Iterator[None]:
    """Interrupt the body of a limit within about a second after the workflow was cancelled, or its time was up.

    The block begins before the body and ends after it, and the thread with the block.
    """
    if not limit.interrupts:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(attempt, limit, done), name="celery_durable watch", daemon=True)
    try:
        thread.start()
        yield
    finally:
        done.set()


def _watch(attempt: Attempt, limit: Limit, done: threading.Event) -> None:
    while not done.wait(_AGAIN if attempt.over else LONGEST_BLIND):
        if attempt.is_over() and attempt.over is not None:
            limit.interrupt(attempt.over)
