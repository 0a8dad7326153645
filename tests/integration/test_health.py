"""How all of it stands, and which of it is a problem."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

import celery_durable as durable
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.inprocess import Inprocess
from tests.integration.attempts import begin, crash, order

pytestmark = pytest.mark.matrix


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    with closing(Inprocess(database_url, broker_url)) as shop:
        yield shop


def sweep(shop: Inprocess) -> None:
    shop.installation.recovery(lambda messages: [], sweeper="node", node=shop.node, patience=0).sweep()


def test_all_is_well(shop: Inprocess) -> None:
    """A worker that lives, and a sweep a moment ago."""
    sweep(shop)
    health = durable.check_health(shop.app)
    assert health.ok
    assert health.problems == ()
    (node,) = health.nodes
    assert (node.id, node.hostname, node.alive, node.draining, node.running) == (
        str(shop.node), "worker@test", True, False, 0,
    )  # fmt: skip
    assert health.swept_at is not None
    assert health.sweep_age is not None
    assert 0 <= health.sweep_age < 60
    assert (health.orphans, health.dead, health.undelivered, health.missing) == (0, 0, 0, ())
    assert health.timer_lag is None
    assert health.claim_lag is None


def test_nobody_works(shop: Inprocess, sql: Sql) -> None:
    """Neither a worker nor a sweep: both are told."""
    sql.execute("DELETE FROM celery_durable.node")
    health = durable.check_health(shop.app)
    assert not health.ok
    assert [problem.split(":")[0] for problem in health.problems] == ["No worker is alive", "There has been no sweep"]


def test_a_silent_worker_and_late_sweeps(shop: Inprocess, sql: Sql) -> None:
    """Its workflow is an orphan; the timers stand."""
    order(shop, lambda: None)
    begin(shop)
    shop.app.tasks["order"].apply_async(task_id="w2", countdown=100)
    sweep(shop)
    sql.execute("UPDATE celery_durable.node SET lease = interval '15 s', seen = seen - interval '100 s'")
    sql.execute("UPDATE celery_durable.sweep SET at = at - interval '100 s'")
    sql.execute("UPDATE celery_durable.workflow SET publish_at = clock_timestamp() - interval '50 s' WHERE id = 'w2'")
    health = durable.check_health(shop.app)
    assert health.orphans == 1
    assert health.timer_lag == pytest.approx(50, abs=20)
    (node,) = health.nodes
    assert (node.alive, node.running) == (False, 1)
    for beginning in ("No worker is alive", "The last sweep was", "1 running workflow(s)", "A timer has been due"):
        assert any(problem.startswith(beginning) for problem in health.problems), beginning


def test_what_waits_and_what_is_dead(shop: Inprocess, sql: Sql) -> None:
    """Counted, and no problem by itself."""
    order(shop, lambda: None, max_recovery_attempts=1)
    for _ in range(2):
        crash(shop, begin(shop))
    shop.app.tasks["order"].apply_async(task_id="w2")
    sql.execute("UPDATE celery_durable.workflow SET published_at = published_at - interval '9 s' WHERE id = 'w2'")
    sweep(shop)
    health = durable.check_health(shop.app)
    assert (health.dead, health.undelivered) == (1, 1)
    assert health.claim_lag == pytest.approx(9, abs=8)
    assert health.ok


def test_a_missing_migration(shop: Inprocess, sql: Sql) -> None:
    """Which, and the command."""
    sweep(shop)
    sql.execute("DELETE FROM celery_durable.migration WHERE number = 3")
    health = durable.check_health(shop.app)
    assert health.missing == (3,)
    assert health.problems == ("The schema lacks migrations [3]: run `celery -A yourproject durable migrate`.",)
