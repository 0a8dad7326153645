"""Limits of a step's try: what interrupts a body and what only finds it late, and what ends the process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from celery_durable.engine.limits import is_foreign_limit, soft_limit
from celery_durable.exceptions import Cancelled, StepTimeout
from celery_durable.store.shield import deferred_signals
from tests.fixtures.fix_wait import wait_until


@pytest.fixture(autouse=True)
def timer_is_left_alone() -> Iterator[None]:
    """No test leaves a timer or a handler behind."""
    handler = signal.getsignal(signal.SIGALRM)
    yield
    assert signal.getsignal(signal.SIGALRM) is handler
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def linger(seconds: float = 30) -> None:
    threading.Event().wait(seconds)


def test_a_body_is_interrupted_at_its_limit() -> None:
    """The error names the step and the limit."""
    began = time.monotonic()
    message = r"The step 'fetch' ran longer than its soft_time_limit of 0.05 s"
    with pytest.raises(StepTimeout, match=message), soft_limit(0.05, "The step 'fetch'"):
        linger()
    assert time.monotonic() - began < 10


def test_a_body_that_is_in_time_is_left_alone() -> None:
    """It sees its deadline on the monotonic clock."""
    with soft_limit(30, "it") as limit:
        assert limit.deadline is not None
        assert 29 < limit.deadline - time.monotonic() <= 30


def test_no_limit_is_no_deadline() -> None:
    """Nothing is set up for a step without one."""
    with soft_limit(None, "it") as limit:
        assert limit.deadline is None
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_the_bodys_own_error_passes() -> None:
    """A limit changes nothing about it."""
    with pytest.raises(KeyError), soft_limit(30, "it"):
        raise KeyError("x")


def test_an_inner_limit_that_ends_sooner_leaves_the_outer_one_running() -> None:
    """The outer one is due as if there had been no inner one."""
    with pytest.raises(StepTimeout, match="outer"), soft_limit(0.3, "outer"):  # noqa: PT012
        with pytest.raises(StepTimeout, match="inner"), soft_limit(0.05, "inner"):
            linger()
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 0 < left <= 0.25
        linger()


def test_an_outer_limit_that_ends_sooner_interrupts_the_inner_body() -> None:
    """The inner one doesn't prolong it."""
    with pytest.raises(StepTimeout, match="outer"), soft_limit(0.05, "outer"), soft_limit(30, "inner"):
        linger()


def test_outside_the_main_thread_a_late_try_has_timed_out() -> None:
    """Nothing can interrupt it there, but its result doesn't count."""

    def late() -> None:
        with soft_limit(0.02, "it") as limit:
            assert not limit.is_over
            linger(0.05)

    with ThreadPoolExecutor(1) as threads, pytest.raises(StepTimeout):
        threads.submit(late).result()


def test_outside_the_main_thread_a_try_in_time_counts() -> None:
    """Even though no timer watches it."""

    def quick() -> str:
        with soft_limit(30, "it"):
            return "done"

    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(quick).result() == "done"


def test_celerys_limit_of_the_whole_task_is_not_the_steps() -> None:
    """A step's own timeout is an outcome, the task's isn't."""
    assert is_foreign_limit(SoftTimeLimitExceeded())
    assert not is_foreign_limit(StepTimeout())
    assert not is_foreign_limit(TimeoutError())


def test_a_body_may_catch_the_timeout_and_return() -> None:
    """As with Celery's own soft limit: it is told once, and what it then returns counts."""
    with soft_limit(0.05, "it") as limit:
        try:
            linger()
        except SoftTimeLimitExceeded:
            cleaned_up = True
        linger(0.1)
    assert cleaned_up
    assert limit.has_interrupted


def test_a_body_that_could_not_be_interrupted_is_late() -> None:
    """Here it has used the process's only alarm for itself, and not given it back."""
    with pytest.raises(StepTimeout), soft_limit(0.05, "it") as limit:  # noqa: PT012
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        signal.setitimer(signal.ITIMER_REAL, 0)
        linger(0.1)
    assert not limit.has_interrupted


def test_a_call_of_c_code_is_interrupted_when_it_returns() -> None:
    """Python can't look at the alarm before."""
    done = False
    with pytest.raises(StepTimeout), soft_limit(0.02, "it") as limit:  # noqa: PT012
        hashlib.pbkdf2_hmac("sha256", b"", b"", 300_000)
        done = not limit.has_interrupted
    assert not done


def test_a_late_error_is_the_bodys_own() -> None:
    """Only a late value is a timeout."""
    with pytest.raises(KeyError), soft_limit(0.05, "it"):  # noqa: PT012
        signal.setitimer(signal.ITIMER_REAL, 0)
        linger(0.1)
        raise KeyError("x")


def test_the_error_names_the_option() -> None:
    """Where a hard limit can't be one, it acts as a soft one."""
    with pytest.raises(StepTimeout, match=r"longer than its time_limit of 0.05 s"):  # noqa: SIM117
        with soft_limit(0.05, "it", option="time_limit"):
            linger()


def test_an_outer_limit_still_holds_while_an_inner_body_cleans_up() -> None:
    """One that swallows its own timeout can't outlive the outer one."""
    with pytest.raises(StepTimeout, match="outer"), soft_limit(0.2, "outer"), soft_limit(0.05, "inner"):  # noqa: PT012
        with contextlib.suppress(StepTimeout):
            linger()
        linger()


def test_interrupting_reaches_the_body_through_an_inner_limit() -> None:
    """A cancellable step may call another one, which has a limit."""
    reason = Cancelled("over")
    outer = soft_limit(None, "outer", interruptible=True)
    with pytest.raises(Cancelled) as caught, outer, soft_limit(30, "inner"):  # noqa: PT012
        assert outer.interrupts
        threading.Timer(0.05, outer.interrupt, [reason]).start()
        linger()
    assert caught.value is reason
    assert outer.has_interrupted


def test_a_body_is_interrupted_once() -> None:
    """Its clean-up isn't."""
    outer = soft_limit(None, "it", interruptible=True)
    with outer:
        with pytest.raises(Cancelled):  # noqa: PT012
            outer.interrupt(Cancelled("over"))
            linger()
        outer.interrupt(Cancelled("over again"))
        linger(0.05)


def test_interrupting_too_late_does_nothing() -> None:
    """Neither before the body nor after it."""
    limit = soft_limit(None, "it", interruptible=True)
    limit.interrupt(Cancelled("too early"))
    with limit:
        pass
    limit.interrupt(Cancelled("too late"))
    linger(0.02)


def test_interrupting_spares_a_handler_of_the_body() -> None:
    """Nor does it end a process in which nobody waits for the alarm."""
    rung: list[int] = []
    limit = soft_limit(None, "it", interruptible=True)
    with limit:
        for handler in (lambda signum, frame: rung.append(signum), signal.SIG_DFL):
            signal.signal(signal.SIGALRM, handler)
            limit.interrupt(Cancelled("over"))
    assert not rung


class Alarm(Exception):
    """What a handler of the user raises."""


@contextlib.contextmanager
def users_alarm(seconds: float, interval: float = 0, *, raises: bool = True) -> Iterator[list[int]]:
    """A timer of the user's own, around or inside a limit."""
    rung: list[int] = []

    def ring(signum: int, frame: Any) -> None:
        rung.append(signum)
        if raises:
            raise Alarm

    handler = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds, interval)
    try:
        yield rung
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)


def test_an_alarm_of_the_user_rings_inside_a_limit() -> None:
    """It was set before the step, and is raised in its body."""
    with users_alarm(0.05), pytest.raises(Alarm), soft_limit(30, "it"):
        linger()


def test_an_alarm_of_the_user_rings_after_a_limit() -> None:
    """It is due as if there had been no limit."""
    with users_alarm(0.15), pytest.raises(Alarm):  # noqa: PT012
        with pytest.raises(StepTimeout), soft_limit(0.05, "it"):
            linger()
        left, _ = signal.getitimer(signal.ITIMER_REAL)
        assert 0 < left <= 0.1
        linger()


def test_an_alarm_of_the_user_keeps_ringing() -> None:
    """Inside a limit and after it, at its interval."""
    with users_alarm(0.02, 0.02, raises=False) as rung:
        with soft_limit(30, "it"):
            wait_until(lambda: len(rung) >= 3, message="it rings inside")
        inside = len(rung)
        wait_until(lambda: len(rung) >= inside + 3, message="it rings after")
        assert signal.getitimer(signal.ITIMER_REAL)[1] == pytest.approx(0.02)


def test_an_alarm_that_the_body_leaves_behind_dies_with_it() -> None:
    """The next step is no business of it."""
    with soft_limit(30, "it"):
        signal.signal(signal.SIGALRM, lambda signum, frame: pytest.fail("it rings"))
        signal.setitimer(signal.ITIMER_REAL, 0.02)
    linger(0.05)


def test_a_statement_of_ours_is_not_interrupted() -> None:
    """The alarm waits for its end, and then interrupts the body."""
    done = False
    with pytest.raises(StepTimeout), soft_limit(0.02, "it"):  # noqa: PT012
        with deferred_signals():
            linger(0.05)
            done = True
        pytest.fail("the body goes on")
    assert done


def test_an_alarm_never_rings_outside_the_body() -> None:
    """However it falls together with a body's begin and end: the timer is given back, and nothing else interrupted."""
    outside, room = 0, 1e-6 * max(1, seconds_of_a_pass() / 50e-6)
    with users_alarm(0.001, 0.0007, raises=False) as rung:
        for number in range(1500):
            with contextlib.suppress(StepTimeout):
                with soft_limit(room * (number % 150), "outer"), soft_limit(room * (number % 70), "inner"):
                    spin(number % 50)
                outside += 1
            assert signal.getitimer(signal.ITIMER_REAL)[1] == pytest.approx(0.0007, abs=1e-4)
    assert 0 < outside < 1500
    assert len(rung) > 10


def seconds_of_a_pass() -> float:
    """How long the longest body takes here, within limits that it doesn't reach."""

    def once() -> float:
        began = time.perf_counter()
        with soft_limit(60, "outer"), soft_limit(60, "inner"):
            spin(50)
        return time.perf_counter() - began

    return min(once() for _ in range(20))


def spin(turns: int) -> None:
    for _ in range(turns):
        sum(range(20))


def test_celerys_limit_of_the_task_may_ring_anywhere_in_ours() -> None:
    """It passes through, and the timer is given back."""

    def ring(signum: int, frame: Any) -> None:
        raise SoftTimeLimitExceeded

    handler = signal.signal(signal.SIGUSR1, ring)
    try:
        with pytest.raises(SoftTimeLimitExceeded) as caught, soft_limit(30, "it"):
            signal.raise_signal(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, handler)
    assert is_foreign_limit(caught.value)


#: Runs programs, each in a process of its own, and says how it has ended.
SERVER = """
import contextlib, ctypes, json, os, re, signal, sys, threading, time
from celery_durable.engine.limits import hard_limit, soft_limit

for line in sys.stdin:
    program, log = json.loads(line)
    began = time.monotonic()
    if (child := os.fork()) == 0:
        os.dup2(os.open(log, os.O_WRONLY | os.O_APPEND), 2)
        exec(compile(program, "<program>", "exec"))
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, time.monotonic() - began]), flush=True)
"""

Ending = Callable[[str], tuple[int, float, str]]


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield server
        server.kill()


@pytest.fixture
def ending(server: subprocess.Popen[str], tmp_path: Path) -> Ending:
    """Runs a program in a process of its own; says its exit code, how long it ran, and what it wrote to stderr."""
    log = tmp_path / "stderr"
    log.write_text("before\n")

    def run(program: str) -> tuple[int, float, str]:
        assert server.stdin is not None
        assert server.stdout is not None
        print(json.dumps([program, str(log)]), file=server.stdin, flush=True)
        code, seconds = json.loads(server.stdout.readline())
        return code, seconds, log.read_text()

    return run


BODIES = {
    "sleeping": "time.sleep(30)",
    "holding the interpreter": "ctypes.PyDLL(None).sleep(30)",
    "in a regular expression": "re.match(r'(a+)+$', 'a' * 64 + 'b')",
    "with a later deadline elsewhere": """
def later():
    with hard_limit(30):
        time.sleep(30)
threading.Thread(target=later, daemon=True).start()
time.sleep(30)
""",
}
#: What has become of stderr before the limit begins.
STDERRS = {
    "closed": "os.close(2)",
    "a file": "os.dup2(os.open(os.readlink('/proc/self/fd/2'), os.O_WRONLY), 2)",
    "a socket": "import socket; ends = socket.socketpair(); os.dup2(ends[0].fileno(), 2)",
    "a pipe that nobody reads": """
reader, writer = os.pipe()
os.dup2(writer, 2)
os.set_blocking(2, False)
with contextlib.suppress(BlockingIOError):
    while True:
        os.write(2, bytes(4096))
os.set_blocking(2, True)
""",
}


@pytest.mark.parametrize("body", BODIES)
def test_a_hard_limit_ends_the_process(ending: Ending, body: str) -> None:
    """Whatever the body does, and it is told where it hung."""
    code, seconds, errors = ending(f"limit = hard_limit(0.2)\nlimit.__enter__()\n{BODIES[body]}")
    assert code == 1
    assert 0.2 <= seconds < 5
    assert "Timeout (0:00:00" in errors
    assert 'File "<program>"' in errors


@pytest.mark.parametrize("stderr", STDERRS)
def test_a_hard_limit_ends_the_process_whatever_stderr_is(ending: Ending, stderr: str) -> None:
    """Telling where it hung is a favour; a file is appended to."""
    code, seconds, errors = ending(f"{STDERRS[stderr]}\nwith hard_limit(0.2):\n    time.sleep(30)")
    assert code == 1
    assert 0.2 <= seconds < 5
    assert errors.startswith("before\n")
    assert (stderr == "a file") == ("Timeout (0:00:00" in errors)


def test_a_hard_limit_ends_with_its_body(ending: Ending) -> None:
    """And one that was set around it doesn't."""
    code, seconds, _ = ending("""
with hard_limit(0.4):
    with hard_limit(0.1):
        pass
    time.sleep(30)
""")
    assert code == 1
    assert 0.4 <= seconds < 5
    assert ending("with hard_limit(0.1): pass\ntime.sleep(0.2)")[0] == 0


def test_a_hard_limit_leaves_a_child_of_the_body_alone(ending: Ending) -> None:
    """A process that the body has forked has no such limit, and can leave the body."""
    code, _, _ = ending("""
with hard_limit(0.2):
    child = os.fork()
if child == 0:
    time.sleep(0.3)
    os._exit(7)
os._exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
""")
    assert code == 7


def test_an_alarm_without_a_handler_ends_the_process_inside_a_limit_too(ending: Ending) -> None:
    """The user has asked for that."""
    code, _, _ = ending("""
signal.setitimer(signal.ITIMER_REAL, 0.05)
with soft_limit(30, "it"):
    time.sleep(30)
""")
    assert code == -signal.SIGALRM


GREEN = """
from gevent import monkey
monkey.patch_all()
import gevent, threading, time
from celery_durable.engine.limits import soft_limit
from celery_durable.exceptions import Cancelled, StepTimeout
from celery_durable.store.shield import deferred_signals

answered = []

def ended(seconds, body, inner=None):
    began = time.monotonic()
    limit = soft_limit(seconds, "it", interruptible=True)
    try:
        with limit:
            body(limit)
        how = "returned"
    except BaseException as error:
        how = type(error).__name__
    assert time.monotonic() - began < 5, how
    time.sleep(0.1)  # nothing is raised later
    return how

def interrupted(limit):
    gevent.spawn_later(0.05, limit.interrupt, Cancelled("over"))
    time.sleep(30)

def interrupted_at_its_end(limit):
    limit.interrupt(Cancelled("over"))

def swallows(limit):
    try:
        time.sleep(30)
    except StepTimeout:
        time.sleep(0.05)

def holds(limit):
    end = time.monotonic() + 0.2
    while time.monotonic() < end:
        pass

def speaks(limit):
    with deferred_signals():
        limit.interrupt(Cancelled("not now"))
        time.sleep(0.2)
    answered.append(True)
    time.sleep(30)

def behind_the_loops_clock():
    # The loop has read the clock before this.
    end = time.monotonic() + 0.3
    while time.monotonic() < end:
        pass
    return ended(0.1, lambda limit: time.sleep(30))

def nested(limit):
    try:
        with soft_limit(0.05, "inner"):
            time.sleep(30)
    except StepTimeout as error:
        assert "inner" in str(error)
    time.sleep(30)

def within(limit):
    with soft_limit(30, "inner"):
        time.sleep(30)

assert threading.current_thread() is threading.main_thread()
results = [
    ended(0.1, lambda limit: time.sleep(30)), ended(0.1, lambda limit: None), ended(0.1, interrupted),
    ended(None, interrupted_at_its_end), ended(0.1, swallows), ended(0.1, holds), ended(0.2, nested),
    ended(0.1, within), behind_the_loops_clock(), ended(0.1, speaks),
]
assert answered == [True]
side_by_side = [gevent.spawn(ended, 0.1 * number, lambda limit: time.sleep(30)) for number in range(1, 6)]
gevent.joinall(side_by_side)
print(*results, *(greenlet.value for greenlet in side_by_side))
"""


def test_greenlets_are_interrupted_where_they_give_way() -> None:
    """Each by its own limit; one that never gives way is late."""
    done = subprocess.run([sys.executable, "-c", GREEN], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == [
        "StepTimeout", "returned", "Cancelled", "returned", "returned", *["StepTimeout"] * 5, *["StepTimeout"] * 5,
    ], done.stderr  # fmt: skip
