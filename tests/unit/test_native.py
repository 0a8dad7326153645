"""The bell: wakes a polling thread, and watches processes."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator

import pytest

from celery_durable.exceptions import ConfigurationError
from celery_durable.native import Bell, Loop, original
from tests.fixtures.fix_wait import wait_until

needs_pidfd = pytest.mark.skipif(sys.platform != "linux", reason="processes are watched on Linux only")

UNDER_EVENTLET = """
import eventlet
eventlet.monkey_patch()
from celery_durable.native import check_eventlet
check_eventlet()
"""
PATCHED = {
    "gevent": "from gevent import monkey; monkey.patch_all()",
    "eventlet": "import eventlet; eventlet.monkey_patch()",
}
ORIGINALS = """
import select, time
from celery_durable.native import original
print(original("time", "sleep") is time.sleep, "green" in repr(original("_thread", "start_new_thread")))
"""


@pytest.fixture
def bell() -> Iterator[Bell]:
    bell = Bell()
    yield bell
    bell.close()


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


def test_a_ring_ends_the_wait_of_another_thread(bell: Bell) -> None:
    """Nobody waits for the rest of a long interval."""
    thread = threading.Thread(target=bell.wait, args=(60,))
    thread.start()
    bell.ring()
    thread.join(10)
    assert not thread.is_alive()


def test_a_ring_before_the_wait_is_kept_once(bell: Bell) -> None:
    """No ring is lost between two waits, and many rings are one."""
    for _ in range(100_000):
        bell.ring()
    began = time.monotonic()
    bell.wait(60)
    assert time.monotonic() - began < 10
    began = time.monotonic()
    bell.wait(0.05)
    assert time.monotonic() - began >= 0.04


def test_a_wait_ends_by_itself(bell: Bell) -> None:
    """A time that has passed already is no wait."""
    assert bell.wait(-1) == []


@needs_pidfd
def test_the_death_of_a_watched_process_ends_the_wait(bell: Bell, child: subprocess.Popen[bytes]) -> None:
    """It is told once, by its process id."""
    bell.watch({child.pid})
    assert bell.wait(0) == []
    child.kill()
    assert bell.wait(20) == [child.pid]
    assert bell.wait(0) == []


@needs_pidfd
def test_a_death_is_told_once(bell: Bell, child: subprocess.Popen[bytes]) -> None:
    """Although the pool goes on to name the process, as it does while its main thread is held up."""
    bell.watch({child.pid})
    child.kill()
    assert bell.wait(20) == [child.pid]
    bell.watch({child.pid})
    assert bell.wait(0.05) == []


def test_a_process_that_is_not_watched_any_more_is_not_told(bell: Bell, child: subprocess.Popen[bytes]) -> None:
    """The pool has retired it in its own way."""
    bell.watch({child.pid})
    bell.watch(set())
    child.kill()
    wait_until(lambda: child.poll() is not None)
    assert bell.wait(0) == []


def test_a_process_that_is_gone_already_is_no_error(bell: Bell) -> None:
    """Between the listing of a pool's processes and the watch they may end."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    bell.watch({process.pid})
    assert bell.wait(0) == []


def test_without_a_green_pool_the_originals_are_the_modules_own() -> None:
    """Nothing is patched here."""
    assert original("time", "sleep") is time.sleep


@pytest.mark.parametrize("pool", PATCHED)
def test_under_a_green_pool_the_originals_are_not_the_patched_ones(pool: str) -> None:
    """The node thread must be a thread of the operating system."""
    pytest.importorskip(pool)
    answer = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PATCHED[pool] + ORIGINALS], capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == ["False", "False"]


def test_eventlet_needs_a_psycopg_that_yields(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a statement would hold up the whole worker, so that is an error which names the remedy."""
    pytest.importorskip("eventlet")
    command = [sys.executable, "-W", "ignore", "-c", UNDER_EVENTLET]
    monkeypatch.delenv("PSYCOPG_WAIT_FUNC", raising=False)
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode != 0
    assert ConfigurationError.__name__ in refused.stderr
    assert "PSYCOPG_WAIT_FUNC=wait_select" in refused.stderr
    monkeypatch.setenv("PSYCOPG_WAIT_FUNC", "wait_select")
    subprocess.run(command, check=True)


class Busy(Loop):
    """Holds a lock most of the time."""

    def __init__(self) -> None:
        super().__init__("busy")
        self.lock = threading.Lock()
        self.turns = 0

    def turn(self) -> float:
        """Work with the lock."""
        with self.lock:
            time.sleep(0.02)
        self.turns += 1
        return time.monotonic() + 0.001


def test_no_process_is_forked_while_a_loop_holds_a_lock() -> None:
    """A pool process that is made in the middle of a turn would wait for ever for what the loop's thread had locked."""
    loop = Busy()
    loop.start()
    wait_until(lambda: loop.turns)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12: threads and forks, which are the matter here
        children = [_fork(lambda: loop.lock.acquire(blocking=False)) for _ in range(20)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 20
    before = loop.turns
    wait_until(lambda: loop.turns > before)
    loop.stop(5)


def _fork(works: Callable[[], bool]) -> int:
    child = os.fork()
    if child == 0:
        os._exit(0 if works() else 1)
    return child
