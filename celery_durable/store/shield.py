"""Keeps Python's signal handlers out of a statement.

A handler that raises while COMMIT is on its way leaves the caller with an exception and the database with the
row. Celery's pool processes raise SystemExit on SIGTERM and SIGQUIT and the soft time limit on SIGUSR1. A
signal mask wouldn't do: another thread takes the signal, and Python runs the handler in this one.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_DEFERRED = (signal.SIGTERM, signal.SIGQUIT, signal.SIGINT, signal.SIGUSR1, signal.SIGALRM)


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Hold handlers back while the block runs; the first that was due runs right after it.

    Only the main thread runs handlers, so elsewhere this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[tuple[int, FrameType | None]] = []
    handlers = _replace_handlers(lambda signum, frame: arrived.append((signum, frame)))
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        if arrived:
            signum, frame = arrived[0]
            handlers[signum](signum, frame)


def _replace_handlers(note: Callable[[int, FrameType | None], None]) -> dict[int, Callable[..., Any]]:
    handlers = {signum: signal.getsignal(signum) for signum in _DEFERRED}
    ours = {int(signum): handler for signum, handler in handlers.items() if callable(handler)}
    for signum in ours:
        signal.signal(signum, note)
    return ours
