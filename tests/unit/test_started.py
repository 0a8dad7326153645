"""STARTED in the result backend: for attempts that last, and never over a later state."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from celery_durable.started import A_MOMENT, shown_if_it_lasts
from tests.fixtures.fix_wait import wait_until


def lasting(show: Callable[[], None], until: Callable[[], object]) -> None:
    with shown_if_it_lasts(show):
        wait_until(until, message="the block may end")


def test_what_lasts_is_shown_once() -> None:
    shown: list[str] = []
    lasting(lambda: shown.append("a"), lambda: shown)
    lasting(lambda: shown.append("b"), lambda: "b" in shown)
    assert shown == ["a", "b"]


def test_what_has_ended_is_not_shown() -> None:
    """Nor is what says something else of itself before its time has come."""
    shown: list[str] = []
    for number in range(100):
        with shown_if_it_lasts(lambda number=number: shown.append(f"short {number}")):
            pass
    with shown_if_it_lasts(lambda: shown.append("told")) as attempt:
        attempt.end()
        lasting(lambda: shown.append("later"), lambda: shown)
    assert shown == ["later"]


def test_an_end_waits_while_it_is_shown() -> None:
    """What is stored next is stored later, however slow the backend is."""
    begun, shown = threading.Event(), []

    def show() -> None:
        begun.set()
        time.sleep(5 * A_MOMENT)
        shown.append("STARTED")

    lasting(show, begun.is_set)
    assert shown == ["STARTED"]


def test_in_a_fork() -> None:
    """It has a thread of its own."""
    shown: list[str] = []
    lasting(lambda: shown.append("parent"), lambda: shown)
    if (child := os.fork()) == 0:
        lasting(lambda: shown.append("child"), lambda: "child" in shown)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_an_error_ends_it() -> None:
    """As anything that ends the block."""
    shown: list[str] = []
    with pytest.raises(SystemExit), shown_if_it_lasts(lambda: shown.append("a")) as attempt:
        raise SystemExit
    before = list(shown)
    attempt.show()
    assert shown == before


def test_where_no_thread_can_be_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """It isn't shown, which is all."""
    monkeypatch.setattr("celery_durable.started._threads", [])

    def no_room(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", no_room)
    with shown_if_it_lasts(lambda: None) as attempt:
        assert attempt.due
