"""The protocol, checked: a machine of workers, workflows and time, against the store's real statements."""

from __future__ import annotations

import os

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.protocol.model import Focus, Protocol
from tests.protocol.mutations import MUTATIONS, Mutation
from tests.protocol.stage import Stage

#: So many examples are the same in every run; `PROTOCOL_EXAMPLES=5000` asks for as many others.
EXAMPLES, STEPS = 200, 50
LONG_RUN = int(os.environ.get("PROTOCOL_EXAMPLES", "0"))
#: Whether to look for all mistakes, or only for those that are found in seconds.
ALL = os.environ.get("PROTOCOL_MUTATIONS") == "all"
#: Within so many examples a mistake is found.
MOST_EXAMPLES = 400


def check(
    url: str, examples: int, *, mutation: Mutation | None = None, number: int | None = None, shrinks: bool = True
) -> str:
    """Run the machine so many times; return what has been done. ``number`` chooses other examples than usual."""
    stage = Stage(url)
    focus = Focus() if mutation is None else mutation.focus
    machine = type("Protocol", (Protocol,), {"stage": stage, "steps": 0, "focus": focus})
    phases = [Phase.generate, Phase.shrink] if shrinks else [Phase.generate]
    if number is not None:
        machine = seed(number)(machine)
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples, stateful_step_count=STEPS, derandomize=number is None, deadline=None,
                database=None, suppress_health_check=list(HealthCheck), phases=phases,
            ),
        )  # fmt: skip
    finally:
        stage.close()
    return f"{examples} examples, {machine.steps} steps, {stage.statements} statements, {stage.waits} waits for locks"


@pytest.mark.slow
def test_every_promise_is_kept(database_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Wherever statements stop, meet and get lost, the invariants hold, and fair sweeps end every workflow."""
    if not LONG_RUN:
        check(database_url, EXAMPLES)
        return
    done = check(database_url, LONG_RUN, number=int(os.environ.get("PROTOCOL_SEED", "1")))
    with capsys.disabled():
        print(f"\n{done}")


@pytest.mark.slow
@pytest.mark.parametrize("mutation", [mutation for mutation in MUTATIONS if ALL or mutation.is_quick], ids=str)
def test_a_mistake_is_found(database_url: str, mutation: Mutation) -> None:
    """A statement with a mistake in it breaks a promise, or a constraint, before long."""
    with mutation.made(), pytest.raises((AssertionError, psycopg.errors.CheckViolation)):
        check(database_url, MOST_EXAMPLES, mutation=mutation, number=1, shrinks=False)
