"""SIGKILL while workflows wait for each other: every message comes once, every child is started once."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.crash.crew import Crew, crew
from tests.crash.test_every_hook import nothing_is_left
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_wait import wait_until

pytestmark = [pytest.mark.crash, pytest.mark.slow]

RESULT = ["hello!", "hello", 1, 2, 3, "talked"]
#: The calls of the function: sleep, a child, a message, a wait for one, an event, a wait for one, two children,
#: a third one, the wait for all.
CALLS = range(1, 11)
CASES = [
    *(("call_starting", nth, "process") for nth in CALLS),
    *(("call_recorded", nth, "process") for nth in CALLS),
    ("call_registered", 1, "process"),
    *((hook, nth, "process") for hook in ("suspending", "suspended") for nth in (1, 2, 3)),
    ("claimed", 2, "process"),
    ("suspended", 1, "worker"),
    ("call_recorded", 3, "worker"),
]


@pytest.fixture(scope="module")
def all_hands(
    module_database_url: str, module_broker: Broker, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Crew]:
    with crew(tmp_path_factory.mktemp("waits"), module_database_url, module_broker) as made:
        yield made


@pytest.fixture
def hands(all_hands: Crew) -> Iterator[Crew]:
    """Two workers that are well."""
    all_hands.muster()
    yield all_hands
    all_hands.show_logs()


@pytest.mark.parametrize(("hook", "nth", "whom"), CASES)
def test_a_wait_survives_a_kill(hands: Crew, hook: str, nth: int, whom: str) -> None:
    """Killed before, in or after any of its calls, a workflow goes on, and nobody else notices."""
    workflow_id = hands.start("waits", hands.plan(hook, nth, whom))
    hands.await_kill(workflow_id)
    assert hands.result(workflow_id) == RESULT
    children = hands.sql.all("SELECT id FROM celery_durable.workflow WHERE parent_id = %s", workflow_id)
    assert len(children) == 4
    runs = [hands.ledger.count("leaf", child) for (child,) in children]
    assert sorted(runs) == ([0, 1, 1, 1] if whom == "process" else pytest.approx(sorted(runs), abs=1))
    messages = "SELECT count(taken_by) FROM celery_durable.message WHERE workflow = ANY(%s)"
    assert hands.sql.value(messages, [workflow_id, *(child for (child,) in children)]) == 2
    wait_until(lambda: nothing_is_left(hands), message="nothing is left")
    untold = "SELECT count(*) FROM celery_durable.message WHERE NOT told"
    wait_until(lambda: hands.sql.value(untold) == 0, message="the sweep has noted what was taken before it was told")
    assert hands.sql.value("SELECT count(*) FROM celery_durable.awaiting WHERE waiter = %s", workflow_id) == 0
