"""Keeps Python's signal handlers out of a statement.

A handler that raises while COMMIT is on its way leaves the caller with an exception and the database with the
row. Celery's pool processes raise SystemExit on SIGTERM and SIGQUIT and the soft time limit on SIGUSR1. A
signal mask wouldn't do: another thread takes the signal, and Python runs the handler in this one.
"""

from __future__ import annotations

# What the functions of `signal` call. Those make enumerations of what goes in and out, at ten times the price.
import _signal  # type: ignore[import-not-found]
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import FrameType
from typing import Any

#: In the order in which they are replaced, the likeliest to raise first; they are answered in the reverse order,
#: so that the end of the process isn't lost behind a time limit.
_DEFERRED = (signal.SIGALRM, signal.SIGUSR1, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)

_Handler = Callable[..., Any]

#: Threads, under gevent greenlets, that have a statement on its way.
_busy: set[int] = set()


def is_busy(ident: int) -> bool:
    """Tell whether a thread or greenlet is in the middle of a statement, where nothing may be raised."""
    return ident in _busy


@contextmanager
def deferred_signals() -> Iterator[None]:
    """Hold handlers back while the block runs; those that were due run right after it.

    Only the main thread runs handlers. A greenlet is busy meanwhile, which whoever would raise in it asks.
    """
    ident = threading.get_ident()
    _busy.add(ident)
    try:
        with _deferred() if threading.current_thread() is threading.main_thread() else nullcontext():
            yield
    finally:
        _busy.discard(ident)


@contextmanager
def _deferred() -> Iterator[None]:
    arrived: dict[int, FrameType | None] = {}
    handlers: dict[int, _Handler] = {}
    try:
        _replace_handlers(handlers, lambda signum, frame: arrived.setdefault(signum, frame))
        yield
    finally:
        for signum, handler in handlers.items():
            _signal.signal(signum, handler)
        for signum in reversed(_DEFERRED):
            if signum in arrived:
                handlers[signum](signum, arrived[signum])


def _replace_handlers(handlers: dict[int, _Handler], note: _Handler) -> None:
    for signum in _DEFERRED:
        handler = _signal.getsignal(signum)
        if callable(handler):
            handlers[signum] = handler
            _signal.signal(signum, note)
