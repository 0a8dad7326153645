"""The protocol, checked: a machine of workers, workflows and time, against the store's real statements."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.protocol.model import Protocol
from tests.protocol.mutations import MUTATIONS, Mutation
from tests.protocol.stage import Stage

#: Of a short run; `PROTOCOL_EXAMPLES=5000` makes a long one, with examples of its own.
EXAMPLES, STEPS = 100, 40
#: Until a mistake is found.
ENOUGH = 400


def check(url: str, examples: int, *, derandomize: bool, phases: Sequence[Phase] = tuple(Phase)) -> int:
    """Run the machine; return how many rules that were."""
    stage = Stage(url)
    machine = type("Protocol", (Protocol,), {"stage": stage, "steps": 0})
    try:
        run_state_machine_as_test(
            machine,
            settings=settings(
                max_examples=examples, stateful_step_count=STEPS, derandomize=derandomize, deadline=None, database=None,
                suppress_health_check=list(HealthCheck), print_blob=True, phases=phases,
            ),
        )  # fmt: skip
    finally:
        stage.close()
    print(f"{examples} examples, {machine.steps} steps, {stage.statements} statements, {stage.waits} waits for a lock")
    return machine.steps


@pytest.mark.slow
def test_every_promise_is_kept(database_url: str) -> None:
    """Wherever statements stop, meet and get lost, the invariants hold, and fair sweeps end every workflow."""
    examples = int(os.environ.get("PROTOCOL_EXAMPLES", "0"))
    check(database_url, examples or EXAMPLES, derandomize=not examples)


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_a_mistake_is_found(database_url: str, mutation: Mutation) -> None:
    """A statement with a mistake breaks a promise before long."""
    with mutation.made(), pytest.raises(AssertionError):
        check(database_url, ENOUGH, derandomize=True, phases=[Phase.generate])
