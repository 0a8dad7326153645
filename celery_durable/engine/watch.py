"""Watches a workflow while a cancellable step runs, and interrupts the step when the workflow is over."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from ..exceptions import Cancelled, ControlFlow
from .context import LONGEST_BLIND, Attempt


class Interruptible(Protocol):
    """A body that an error can be raised in."""

    def interrupt(self, error: ControlFlow) -> None:
        """Raise an error in it; from any thread."""


@contextmanager
def watching(attempt: Attempt | None, body: Interruptible) -> Iterator[None]:
    """Interrupt ``body`` within about a second after the workflow was cancelled, or its time was up."""
    if attempt is None:
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(attempt, body, done), name="celery_durable watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()


def _watch(attempt: Attempt, body: Interruptible, done: threading.Event) -> None:
    while not done.wait(LONGEST_BLIND):
        if attempt.is_over():
            body.interrupt(Cancelled(f"The workflow {attempt.id} was cancelled while a step of it ran."))
            return
