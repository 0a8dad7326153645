"""Threads, locks and polling of the operating system, whatever a green pool has patched."""

from __future__ import annotations

import importlib
import logging
import os
import select
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Any

from .exceptions import ConfigurationError, DatabaseUnavailable

logger = logging.getLogger("celery_durable")

#: Seconds that a fork waits for loops which are in the middle of something.
_LONGEST_STOP = 3.0


def original(module: str, name: str) -> Any:
    """Return what a module of the standard library had before gevent or eventlet patched it."""
    if "gevent.monkey" in sys.modules:
        return sys.modules["gevent.monkey"].get_original(module, name)
    if "eventlet.patcher" in sys.modules:
        return getattr(sys.modules["eventlet.patcher"].original(module), name)
    return getattr(importlib.import_module(module), name)


def under_gevent() -> bool:
    """Tell whether gevent runs this process."""
    monkey = sys.modules.get("gevent.monkey")
    return monkey is not None and bool(monkey.is_module_patched("threading"))


def under_eventlet() -> bool:
    """Tell whether eventlet runs this process."""
    patcher = sys.modules.get("eventlet.patcher")
    return patcher is not None and bool(patcher.is_monkey_patched("socket"))


def check_eventlet() -> None:
    """Raise ConfigurationError where a statement would hold up the whole eventlet worker."""
    if not under_eventlet():
        return
    if os.environ.get("PSYCOPG_WAIT_FUNC") != "wait_select":
        raise ConfigurationError(
            "Under eventlet, psycopg's own waiting blocks the whole worker: set the environment variable "
            "PSYCOPG_WAIT_FUNC=wait_select before the worker starts, or use the gevent pool."
        )


class Bell:
    """Wakes a polling thread from anywhere, signal handlers included; watches processes on Linux."""

    def __init__(self, *, green: bool = False) -> None:
        self._green = green
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._reader, False)
        os.set_blocking(self._writer, False)
        # Eventlet's own os.read doesn't say that the pipe is empty: it waits for the next ring.
        self._read, self._write = original("os", "read"), original("os", "write")
        self._poll = original("select", "poll")()
        self._poll.register(self._reader)
        self._processes: dict[int, int] = {}  # pidfd -> pid
        self._dead: set[int] = set()
        self._heard: int | None = None

    def ring(self) -> None:
        """End the current or the next wait."""
        with suppress(BlockingIOError):  # the pipe is full of rings that nobody has answered yet
            self._write(self._writer, b"!")

    def wait(self, seconds: float) -> list[int]:
        """Wait until a ring, a death or so many seconds; return the processes that have died."""
        if self._green:
            if select.select([self._reader], [], [], max(seconds, 0))[0]:
                self._answer()
            return []  # a green pool has no processes
        ready = self._poll.poll(max(seconds, 0) * 1000)
        died = []
        for descriptor, _ in ready:
            if descriptor == self._reader:
                self._answer()
            elif descriptor in self._processes:
                died.append(self._processes[descriptor])
                self._dead.add(self._processes[descriptor])
                self._forget(descriptor)
        return died

    def watch(self, pids: set[int]) -> None:
        """Watch these processes, and no others."""
        # The pool may name a dead process for as long as its main thread is held up: it is told of once.
        self._dead &= pids
        watched = set(self._processes.values())
        for pid in pids - watched - self._dead:
            self._add(pid)
        for descriptor, pid in list(self._processes.items()):
            if pid not in pids:
                self._forget(descriptor)

    def listen(self, descriptor: int | None) -> None:
        """End waits when there is something to be read from this descriptor, too; it stays its owner's."""
        if self._green or descriptor == self._heard:
            return
        if self._heard is not None:
            with suppress(KeyError, OSError):  # closed by its owner
                self._poll.unregister(self._heard)
        if descriptor is not None:
            self._poll.register(descriptor, original("select", "POLLIN"))
        self._heard = descriptor

    def close(self) -> None:
        """Close all descriptors."""
        for descriptor in list(self._processes):
            self._forget(descriptor)
        os.close(self._reader)
        os.close(self._writer)

    def _answer(self) -> None:
        try:
            while self._read(self._reader, 512):
                pass
        except BlockingIOError:
            return

    def _add(self, pid: int) -> None:
        open_process = getattr(os, "pidfd_open", None)
        if open_process is None:
            return
        try:
            descriptor = open_process(pid)
        except OSError:
            return  # gone already, or a kernel without pidfds: Celery itself notices later
        self._processes[descriptor] = pid
        self._poll.register(descriptor)

    def _forget(self, descriptor: int) -> None:
        self._poll.unregister(descriptor)
        del self._processes[descriptor]
        os.close(descriptor)


class Loop:
    """A native thread that takes turns: at a due time, at a ring, or when a watched process has died.

    ``speaks``: it uses what the worker's other code uses, too (the broker, Celery's app). Eventlet's locks can't
    be shared between threads, so there such a loop is a green one.
    """

    #: Seconds until what failed is tried again.
    RETRY = 1.0

    def __init__(self, name: str, *, speaks: bool = False) -> None:
        self._green = speaks and under_eventlet()
        self.bell = Bell(green=self._green)
        #: Held while it does something. What is forked meanwhile would wait for ever for the locks that it holds.
        self.at_work: Any = nullcontext() if self._green else original("_thread", "allocate_lock")()
        _loops.add(self)
        self._name = name
        self._stopping = False
        self._ended = False

    def turn(self) -> float:
        """Do what is due, and return when the next turn is, on the monotonic clock."""
        raise NotImplementedError

    def died(self, pids: list[int]) -> None:
        """Take notice of dead processes."""

    def leave(self) -> None:
        """Do what is left when the thread ends."""

    def start(self) -> None:
        """Begin."""
        if self._green:
            sys.modules["eventlet"].spawn_n(self._run)
        else:
            original("_thread", "start_new_thread")(self._run, ())

    def stop(self, seconds: float) -> None:
        """End after the current turn; wait for that, but not longer than this."""
        self._stopping = True
        self.bell.ring()
        give_up_at = time.monotonic() + seconds
        while not self._ended and time.monotonic() < give_up_at:
            time.sleep(0.005)
        if not self._ended:
            logger.warning("The %s thread didn't end in time; other nodes find what it leaves.", self._name)

    def attempt(self, duty: Callable[[], None]) -> bool:
        """Do one duty; an error is logged, and the duty is done again at the next turn."""
        try:
            duty()
        except DatabaseUnavailable as error:
            logger.warning("%s", error)
            return False
        except Exception:
            logger.exception("A duty of the %s thread failed; it is done again at its next turn.", self._name)
            return False
        return True

    def _take_turn(self) -> None:
        try:
            with self.at_work:
                due = self.turn()
            died = self.bell.wait(due - time.monotonic())
            if died:
                with self.at_work:
                    self.died(died)
        except Exception:
            logger.exception("A turn of the %s thread failed; the next one comes soon.", self._name)
            self.bell.wait(self.RETRY)

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._take_turn()
            self.leave()
            self.bell.close()
        except BaseException:
            logger.exception("The %s thread has ended by an error; other nodes find what it leaves.", self._name)
        finally:
            self._ended = True


_loops: weakref.WeakSet[Loop] = weakref.WeakSet()
_stopped: list[Any] = []


def _stop_for_fork() -> None:
    """Let no loop be in the middle of something, unless that takes too long: the worker's main loop is what forks."""
    give_up_at = time.monotonic() + _LONGEST_STOP
    for loop in list(_loops):
        if not loop._green and loop.at_work.acquire(True, max(give_up_at - time.monotonic(), 0)):
            _stopped.append(loop.at_work)


def _go_on_after_fork() -> None:
    while _stopped:
        _stopped.pop().release()


os.register_at_fork(before=_stop_for_fork, after_in_parent=_go_on_after_fork, after_in_child=_go_on_after_fork)
