"""The chaos' judge: it sees every kind of broken promise, and excuses what a fault explains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.chaos.checker import Evidence, Outcome, Row, findings
from tests.chaos.faults import Fault
from tests.chaos.ledger import Entry
from tests.chaos.load import Started
from tests.chaos.stage import hangs_in

A, B, C, D = (letter * 32 for letter in "abcd")
WORK = "tests.chaos.app.work"
BOOK = "tests.chaos.app.book"


def entry(what: str, key: str, nonce: str, at: float, pid: int = 1, workflow: str = "w") -> Entry:
    return Entry(what, workflow, key, 1, nonce, pid, at)


def evidence(**changes: Any) -> Evidence:
    """One workflow of two steps that went as it should."""
    return replace(
        Evidence(
            started=[Started("w", "sequential", 0)],
            undone=["never"],
            purchases=frozenset(["w"]),
            rows={"w": Row("w", "tests.chaos.app.sequential", "SUCCESS", [f"s0 {A}", f"s1 {B}"])},
            outcomes={
                ("w", WORK): Outcome("w", WORK, True, f"s0 {A}", 2.0),
                ("w", f"{WORK}#2"): Outcome("w", f"{WORK}#2", True, f"s1 {B}", 4.0),
            },
            effects=[],
            entries=[
                entry("begin", WORK, A, 1.0),
                entry("end", WORK, A, 1.5),
                entry("begin", f"{WORK}#2", B, 3.0),
                entry("end", f"{WORK}#2", B, 3.5),
            ],
            faults=[],
        ),
        **changes,
    )


def row(state: str = "SUCCESS", result: Any = (f"s0 {A}", f"s1 {B}")) -> dict[str, Row]:
    return {"w": Row("w", "tests.chaos.app.sequential", state, list(result))}


def rerun(first: Entry, *, key: str = f"{WORK}#2", end: str | None = None) -> list[Entry]:
    """The entries when the second step began twice."""
    ends = [] if end is None else [entry(end, key, first.nonce, first.at + 0.1)]
    good = evidence().entries
    return [*good[:2], first, *ends, entry("rescue", "", "", 2.8), *good[2:]]


def test_nothing_is_found_where_all_went_well() -> None:
    """Good evidence has no findings."""
    assert list(findings(evidence())) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rows": {}, "purchases": frozenset()}, "was started, and isn't there"),
        ({"rows": {}, "started": []}, "was committed, and was never started"),
        ({"undone": ["w"]}, "was rolled back, and is there"),
        ({"rows": row("FAILURE")}, "should be SUCCESS"),
        ({"rows": row("RUNNING")}, "should be SUCCESS"),
        ({"rows": row(result=[f"s0 {A}"])}, "returned"),
        ({"rows": row(result=[f"s1 {B}", f"s0 {A}"])}, "returned"),
        ({"rows": row(result=[f"s0 {C}", f"s1 {B}"])}, "which no body has returned"),
        ({"effects": [("w", BOOK, C)]}, "without a checkpoint"),
        ({"entries": rerun(entry("begin", f"{WORK}#2", C, 2.5))}, "ran again without a cause"),
        ({"entries": rerun(entry("begin", f"{WORK}#2", C, 2.5), end="end")}, "ran again without a cause"),
        ({"entries": [*evidence().entries, entry("begin", WORK, C, 9.0, pid=7)]}, "began after"),
        ({"started": [Started("w", "sequential", 0, cancelled_at=0.5)]}, "should be CANCELLED"),
    ],
)
def test_a_broken_promise_is_found(changes: dict[str, Any], words: str) -> None:
    """Each way in which a promise can be broken has its sentence."""
    assert any(words in each for each in findings(evidence(**changes)))


def test_a_step_that_begins_after_a_cancellation_is_found() -> None:
    """A second after `cancel` has returned no step begins; once the workflow is resumed, it may."""
    cancelled = Started("w", "sequential", 0, cancelled_at=0.5)
    assert any("after its workflow was cancelled" in each for each in findings(evidence(started=[cancelled])))
    resumed = replace(cancelled, resumed_at=0.6)
    assert list(findings(evidence(started=[resumed]))) == []


def test_an_atomic_effect_must_be_there_once() -> None:
    """The effect of an atomic step is the one that its checkpoint tells of, and no other."""
    outcomes = {**evidence().outcomes, ("w", BOOK): Outcome("w", BOOK, True, f"b0 {C}", 5.0)}
    for effects in ([], [("w", BOOK, D)], [("w", BOOK, C), ("w", BOOK, C)]):
        assert any("has the effects" in each for each in findings(evidence(outcomes=outcomes, effects=effects)))
    assert not list(findings(evidence(outcomes=outcomes, effects=[("w", BOOK, C)])))


def test_a_sleep_that_ends_early_is_found() -> None:
    """Between the steps around a sleep lies all of it."""
    short = Row("w", "tests.chaos.app.sleeping", "SUCCESS", [f"before {A}", f"after {B}", "last"])
    entries = [entry("begin", WORK, A, 1.0), entry("end", WORK, A, 1.1), entry("begin", f"{WORK}#2", B, 2.0)]
    found = findings(evidence(rows={"w": short}, started=[], entries=entries, outcomes={}))
    assert any("slept for" in each for each in found)


def test_a_fault_excuses_one_more_run_of_what_it_has_hit() -> None:
    """A kill excuses that what ran in its process runs once more; not twice, and nothing of another process."""
    kill = Fault("worker killed", 2.6, 2.7, frozenset([5]))
    first = entry("begin", f"{WORK}#2", C, 2.5, pid=5)
    assert list(findings(evidence(entries=rerun(first), faults=[kill]))) == []
    twice = [*rerun(first), entry("begin", f"{WORK}#2", D, 2.9, pid=5)]
    assert any("without a cause" in each for each in findings(evidence(entries=twice, faults=[kill])))
    other = Fault("worker killed", 2.6, 2.7, frozenset([6]))
    assert any("without a cause" in each for each in findings(evidence(entries=rerun(first), faults=[other])))


def test_a_late_recovery_is_found() -> None:
    """What an undisturbed kill has left is enqueued again within a lease and a sweep."""
    kill = Fault("worker killed", 2.6, 2.7, frozenset([5]))
    entries = rerun(entry("begin", f"{WORK}#2", C, 2.5, pid=5))
    late = [replace(each, at=60.0) if each.what == "rescue" else each for each in entries]
    assert any("was enqueued again" in each for each in findings(evidence(entries=late, faults=[kill])))


def test_a_failed_try_needs_no_excuse() -> None:
    """What fails is tried again."""
    first = entry("begin", f"{WORK}#2", C, 2.5)
    assert list(findings(evidence(entries=rerun(first, end="fail")))) == []


def test_a_lost_connection_excuses_only_what_is_atomic() -> None:
    """A transaction that breaks begins again; a plain body whose outcome is on its way doesn't."""
    cut = Fault("connections cut", 2.6, 2.7, breaks_transactions=True)
    plain = entry("begin", f"{WORK}#2", C, 2.5)
    assert any("without a cause" in each for each in findings(evidence(entries=rerun(plain), faults=[cut])))
    atomic = [entry("begin", BOOK, C, 2.5), entry("begin", BOOK, D, 2.9)]
    assert list(findings(evidence(entries=[*evidence().entries, *atomic], faults=[cut]))) == []


def test_a_body_that_begins_late_in_a_process_that_stood_still_is_excused() -> None:
    """Nobody can look at the workflow between a look and the body."""
    late = [*evidence().entries, entry("begin", WORK, C, 9.0, pid=7)]
    pause = Fault("worker paused", 1.0, 8.9, frozenset([7]))
    assert list(findings(evidence(entries=late, faults=[pause]))) == []


def test_a_worker_that_hangs_in_our_code_is_told_from_one_that_hangs_in_celerys() -> None:
    """Threads of the node that wait for their next turn are in every stack, and hold nothing up."""
    idle = (
        '  File "/app/celery_durable/native.py", line 79 in wait\n  File "/lib/billiard/pool.py", line 1733 in join\n'
    )
    assert hangs_in(idle) == []
    assert hangs_in(idle + '  File "/app/celery_durable/node.py", line 211 in _hand_over\n') != []
