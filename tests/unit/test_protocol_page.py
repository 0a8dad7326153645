"""docs/protocol.md against the code: its statements, its files, its instants."""

from __future__ import annotations

import re

from celery_durable.engine.observer import HOOKS
from tests.fixtures.pages import CHECKOUT, read, rows

PAGE = "docs/protocol.md"
STORE = CHECKOUT / "celery_durable" / "store"
#: Nothing is committed between these and the next hook.
NO_INSTANTS = {"body_starting", "body_ended", "step_interrupted", "branch_ended", "body_awaited"}


def test_every_statement_exists() -> None:
    """Each query that the page names is in the file that it names."""
    named = set(re.findall(r"`([a-z]+)\.([a-z_]+)`", read(PAGE)))
    assert len(named) > 30
    for file, query in named:
        assert f"-- name: {query}\n" in (STORE / f"{file}.sql").read_text(), f"{file}.{query}"


def test_every_file_exists() -> None:
    """Each file that the page names is there, and each invariant is seen by a test of ours."""
    for path in re.findall(r"`((?:tests|celery_durable)/[\w/.]+)`", read(PAGE)):
        assert (CHECKOUT / path).is_file(), path
    invariants = [row for row in rows(PAGE) if row[0].isdigit()]
    assert [int(row[0]) for row in invariants] == list(range(1, 14))
    assert all("`tests/" in row[2] or row[2].startswith("the same") for row in invariants)


def test_every_instant_is_told() -> None:
    """Each hook at which a worker can die has its line, and no line is of a hook that isn't there."""
    told = {hook for row in rows(PAGE) for hook in re.findall(r"`(\w+)`", row[0]) if len(row) == 4}
    assert told & set(HOOKS) == set(HOOKS) - NO_INSTANTS
    assert {name for name in told if "." not in name} <= set(HOOKS)
