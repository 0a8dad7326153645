"""Soft limits of a step's try: a kernel timer in the main thread, a late verdict elsewhere."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from celery_durable.engine.limits import is_foreign_limit, soft_limit
from celery_durable.exceptions import StepTimeout


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
