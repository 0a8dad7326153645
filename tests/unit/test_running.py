"""What a process notes of the workflows that it runs, and what its parent reads of that."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from celery_durable import running
from celery_durable.running import SLOT, SLOTS, Note, Running


@pytest.fixture
def board(monkeypatch: pytest.MonkeyPatch) -> Running:
    board = Running()
    board.share()
    return board


def in_child(board: Running, act: Callable[[], None], index: int = 0) -> None:
    """Do something in a forked process of the pool, and wait for its end."""
    pid = os.fork()
    if pid == 0:
        running.current_process = lambda: SimpleNamespace(index=index)
        act()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0


def test_in_one_process() -> None:
    """Threads and greenlets run several at once, each with its steps; what has ended isn't there any more."""
    board = Running()
    began = time.time()
    board.claimed("a", 1)
    board.claimed("b", 3)
    board.step_starting("a", "charge")
    board.step_starting("a", "ship")
    board.step_recorded("a", "charge")
    board.call_starting("b", "durable.recv")
    notes = board.notes()
    assert (list(notes["a"].steps), list(notes["b"].steps), notes["b"].attempt) == (["ship"], ["durable.recv"], 3)
    assert began <= notes["a"].since <= notes["a"].steps["ship"] <= time.time()
    board.finished("a", "SUCCESS")
    board.suspended("b", "message")
    assert board.notes() == {}


@pytest.mark.parametrize("end", ["finished", "suspended", "handed_over", "fenced"])
def test_in_a_pool_process(board: Running, end: str) -> None:
    """The parent reads what its children have noted, until that has ended."""

    def begin() -> None:
        board.claimed("order/'é'", 2)
        board.step_starting("order/'é'", "charge#2")

    def finish() -> None:
        begin()
        getattr(board, end)("order/'é'", *(["x"] if end in ("finished", "suspended") else []))

    in_child(board, begin, index=3)
    in_child(board, begin, index=SLOTS)  # nobody has so many
    (note,) = board.notes().values()
    assert (note.id, note.attempt, list(note.steps)) == ("order/'é'", 2, ["charge#2"])
    in_child(board, finish, index=3)
    assert board.notes() == {}


def test_the_last_attempt_counts(board: Running) -> None:
    """A process that has died may have left an earlier one."""
    in_child(board, lambda: board.claimed("a", 2), index=1)
    in_child(board, lambda: board.claimed("a", 1), index=5)
    assert board.notes()["a"].attempt == 2


def test_a_pool_process_has_one(board: Running) -> None:
    """How an attempt has ended isn't always told: the next one takes its place."""

    def act() -> None:
        board.claimed("a", 1)
        board.claimed("b", 1)

    in_child(board, act)
    assert list(board.notes()) == ["b"]


def test_long_notes(board: Running) -> None:
    """Of more steps than there is room for, some are told."""
    name = "漢" * 255

    def act() -> None:
        board.claimed(name, 1)
        for number in range(1000):
            board.step_starting(name, f"step#{number}")

    in_child(board, act)
    (note,) = board.notes().values()
    assert note.id == name
    assert 50 < len(note.steps) < SLOT


def test_a_note_that_is_being_written(board: Running) -> None:
    """It isn't read: neither is the half of it."""
    in_child(board, lambda: board.claimed("a", 1))
    assert board._memory is not None
    board._memory[0:1] = b"\x01"
    assert board.notes() == {}
    in_child(board, lambda: board.claimed("b", 1))  # whoever has died in the middle of it doesn't spoil the next one
    assert list(board.notes()) == ["b"]


def test_those_that_nobody_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A green pool keeps a bounded number of them."""
    monkeypatch.setattr(running, "_MOST", 2)
    board = Running()
    for name in "abc":
        board.claimed(name, 1)
    assert list(board.notes()) == ["b", "c"]


def test_unknown_workflows() -> None:
    """What was never claimed here is none of its affairs."""
    board = Running()
    board.step_starting("a", "charge")
    board.step_recorded("a", "charge")
    board.finished("a", "SUCCESS")
    assert board.notes() == {}
    assert Note("a", 1, 0.0).steps == {}


def test_a_step_costs_next_to_nothing(board: Running) -> None:
    """Its two notes take less than 50 µs of the processor, where the step's statement takes hundreds."""
    reader, writer = os.pipe()

    def act() -> None:
        board.claimed("a" * 36, 1)
        began = time.process_time()
        for _ in range(1000):
            board.step_starting("a" * 36, "charge")
            board.step_recorded("a" * 36, "charge")
        os.write(writer, f"{(time.process_time() - began) / 1000}".encode())

    in_child(board, act)
    assert float(os.read(reader, 100)) < 50e-6
    os.close(reader)
    os.close(writer)
