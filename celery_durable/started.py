"""Shows STARTED in Celery's result backend, for attempts that last.

Most attempts of short workflows have ended before anybody could have looked, and the backend would have cost them more
than all else. So a thread of the process shows what still runs a moment after its claim.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger("celery_durable")

#: Seconds after the claim; at most twice as many, as the thread doesn't wake up for each attempt.
A_MOMENT = 0.05


class Started:
    """An attempt that is to be shown if it lasts."""

    def __init__(self, show: Callable[[], None]) -> None:
        self.due = time.monotonic() + A_MOMENT
        self._show: Callable[[], None] | None = show
        self._lock = threading.Lock()

    def show(self) -> None:
        """Show it, unless it is over."""
        with self._lock:
            if self._show is not None:
                self._show()

    def end(self) -> None:
        """From here on it isn't shown any more: another state comes. Waits if it is being shown at this moment."""
        with self._lock:
            self._show = None


class _Thread:
    """Shows what is due, in the order of the claims."""

    def __init__(self) -> None:
        self._attempts: deque[Started] = deque()
        self._bell = threading.Event()
        threading.Thread(target=self._run, name="celery_durable started", daemon=True).start()

    def add(self, attempt: Started) -> None:
        self._attempts.append(attempt)
        self._bell.set()

    def _run(self) -> None:
        while True:
            self._bell.wait()
            self._bell.clear()
            while self._attempts:
                time.sleep(A_MOMENT)
                self._show_due()

    def _show_due(self) -> None:
        now = time.monotonic()
        while self._attempts and self._attempts[0].due <= now:
            self._attempts.popleft().show()


@contextmanager
def shown_if_it_lasts(show: Callable[[], None]) -> Iterator[Started]:
    """Show an attempt by ``show`` if the block lasts, and never after it."""
    attempt = Started(show)
    try:
        _thread().add(attempt)
    except RuntimeError as error:  # there is no room for one more thread
        logger.debug("STARTED isn't stored, by which nothing is lost, as it is only shown: %s", error)
    try:
        yield attempt
    finally:
        attempt.end()


_threads: list[_Thread] = []
_lock = threading.Lock()


def _thread() -> _Thread:
    """Return the thread of this process."""
    with _lock:
        if not _threads:
            _threads.append(_Thread())
        return _threads[0]


def _forget() -> None:
    global _lock
    _threads.clear()
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_forget)
