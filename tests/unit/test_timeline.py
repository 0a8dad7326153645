"""The picture of a workflow: which bars there are, from when to when."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest

from celery_durable import AttemptInfo, StepInfo, WorkflowStatus
from celery_durable.errors import TryError
from celery_durable.timeline import Bar, Lane, timeline

START = datetime(2026, 1, 1, tzinfo=timezone.utc)


def at(seconds: float) -> datetime:
    return START + timedelta(seconds=seconds)


def status(state: str = "RUNNING", **facts: Any) -> WorkflowStatus:
    fields = dict.fromkeys(each for each in WorkflowStatus.__slots__)
    return WorkflowStatus(**{**fields, "id": "w1", "name": "order", "state": state, "created_at": START, **facts})


def attempt(number: int, began: float, ended: float | None = None, ending: str | None = None) -> AttemptInfo:
    return AttemptInfo(number, "w@a", "n", at(began), None if ended is None else at(ended), ending)


def step(state: str = "SUCCESS", began: float = 1, ended: float | None = 2, **facts: Any) -> StepInfo:
    given = {"key": "charge", "name": "charge", "seq": 1, "state": state, "output": None, "error": None, "tries": 1,
             "started_at": at(began), "child_id": None}  # fmt: skip
    return StepInfo(**{**given, "finished_at": None if ended is None else at(ended), **facts})


def failed(began: float, ended: float) -> TryError:
    return TryError("builtins.OSError", "no", "", at(ended), at(began))


def drawn(lane: Lane) -> list[tuple[Any, ...]]:
    return [
        ((bar.start - START).total_seconds(), (bar.end - START).total_seconds(), bar.kind, bar.state)
        for bar in lane.bars
    ]


def own(*attempts: AttemptInfo, now: float = 100, **facts: Any) -> list[tuple[Any, ...]]:
    return drawn(timeline(status(**facts), attempts, [], at(now)).lanes[0])


def lane(info: StepInfo, now: float = 100) -> Lane:
    return timeline(status(), [], [info], at(now)).lanes[1]


def test_a_workflow_from_its_start_to_its_end() -> None:
    """A wait, a crash and a hand-over between."""
    attempts = (
        attempt(1, 2, 3, "suspended"), attempt(2, 10, 12, "crashed"), attempt(3, 20, 21, "handed over"),
        attempt(4, 22, 30, "SUCCESS"),
    )  # fmt: skip
    assert own(*attempts, state="SUCCESS", attempt=4, finished_at=at(30)) == [
        (0, 2, "queued", None), (2, 3, "running", "suspended"), (3, 10, "suspended", None),
        (10, 12, "running", "crashed"), (12, 12, "crash", "crashed"), (12, 20, "queued", None),
        (20, 21, "running", "handed over"), (21, 21, "hand-over", "handed over"), (21, 22, "queued", None),
        (22, 30, "running", "SUCCESS"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("facts", "attempts", "last"),
    [
        ({"state": "ENQUEUED", "attempt": 0}, (), (0, 100, "queued", None)),
        ({"state": "RUNNING", "attempt": 1}, (attempt(1, 2),), (2, 100, "running", None)),
        ({"state": "SUSPENDED", "attempt": 1}, (attempt(1, 2, 5, "suspended"),), (5, 100, "suspended", None)),
        ({"state": "ENQUEUED", "attempt": 1}, (attempt(1, 2, 5, "FAILURE"),), (5, 100, "queued", None)),
        ({"state": "CANCELLED", "attempt": 0, "finished_at": at(7)}, (), (0, 7, "queued", None)),
        (
            {"state": "CANCELLED", "attempt": 1, "finished_at": at(7)}, (attempt(1, 2, 5, "suspended"),),
            (5, 7, "suspended", None),
        ),
        (
            {"state": "DEAD", "attempt": 1, "finished_at": at(5)}, (attempt(1, 2, 5, "crashed"),),
            (5, 5, "crash", "crashed"),
        ),
    ],
)  # fmt: skip
def test_what_is_last(facts: dict[str, Any], attempts: tuple[AttemptInfo, ...], last: tuple[Any, ...]) -> None:
    """What goes on ends now; after the end there is nothing."""
    assert own(*attempts, **facts)[-1] == last


def test_attempts_of_an_old_worker_are_missing() -> None:
    """What isn't known isn't drawn, and breaks nothing."""
    assert own(AttemptInfo(2, None, None, None, at(9), "SUCCESS"), state="SUCCESS", attempt=2, finished_at=at(9)) == [
        (0, 9, "queued", None)
    ]


def test_tries_and_the_waits_between_them() -> None:
    """The last one has settled the step."""
    info = step(began=10, ended=11, tries=3, errors=(failed(1, 2), failed(4, 5)))
    assert drawn(lane(info)) == [
        (1, 2, "try", "RETRY"), (2, 4, "wait", None), (4, 5, "try", "RETRY"), (5, 10, "wait", None),
        (10, 11, "try", "SUCCESS"),
    ]  # fmt: skip
    assert lane(info).bars[0].label == "OSError: no"


def test_a_failure_is_among_its_errors_or_it_was_not_loaded() -> None:
    """Drawn once either way."""
    info = step("FAILURE", 4, 5, tries=2, errors=(failed(1, 2), failed(4, 5)))
    assert drawn(lane(info))[-1] == (4, 5, "try", "FAILURE")
    assert drawn(lane(replace(info, errors=info.errors[:1]))) == drawn(lane(info))


def test_a_failure_of_which_the_database_has_heard_late() -> None:
    """It is one try all the same."""
    info = step("FAILURE", 6, 7, errors=(failed(1, 2),), error=OSError("no"))
    assert drawn(lane(info)) == [(1, 2, "try", "FAILURE")]


def test_a_step_that_waits_for_its_next_try() -> None:
    """Until that is due, or until now."""
    info = step("RETRY", 1, None, tries=1, errors=(failed(1, 2),), wake_at=at(50))
    assert drawn(lane(info)) == [(1, 2, "try", "RETRY"), (2, 50, "wait", None)]
    assert drawn(lane(info, now=30))[-1] == (2, 30, "wait", None)


@pytest.mark.parametrize(
    ("info", "bar"),
    [
        (step("SUCCESS", 3, 3, tries=0, wake_at=at(40)), (3, 40, "wait", "SUCCESS")),
        (step("SUCCESS", 3, 3, tries=0, wake_at=at(400)), (3, 100, "wait", "SUCCESS")),
        (step("SUCCESS", 3, 9, tries=0), (3, 9, "wait", "SUCCESS")),
        (step("RETRY", 3, None, tries=0, wake_at=at(400)), (3, 100, "wait", "RETRY")),
    ],
    ids=["sleep", "sleep that goes on", "recv", "recv that goes on"],
)
def test_waits(info: StepInfo, bar: tuple[Any, ...]) -> None:
    """A sleep is settled when it begins: it is drawn as long as it takes."""
    assert drawn(lane(info)) == [bar]


def test_marks_have_no_length_by_nature() -> None:
    """Others may be as short."""
    assert Bar("crash", START, START).is_mark
    assert not Bar("try", START, START).is_mark
