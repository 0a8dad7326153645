"""Nodes: heartbeats, the witness, the drain flag, the election of the one that sweeps."""

from __future__ import annotations

import uuid
from typing import Any
from uuid import UUID

import pytest

from tests.fixtures.rig import Rig

pytestmark = pytest.mark.matrix


def node_row(rig: Rig, node: UUID) -> Any:
    # Before a node's second heartbeat as_of is -infinity, which Python has no value for.
    return rig.sql.one(
        "SELECT hostname, pid, seen, unbroken, nullif(as_of, '-infinity') AS as_of, active, accepted, draining"
        " FROM celery_durable.node WHERE id = %s", node
    )  # fmt: skip


def age(rig: Rig, node: UUID, seconds: float) -> None:
    rig.sql.execute(
        "UPDATE celery_durable.node SET seen = seen - make_interval(secs => %s),"
        " unbroken = unbroken - make_interval(secs => %s) WHERE id = %s", seconds, seconds, node
    )  # fmt: skip


def test_the_first_heartbeat_registers_a_node(rig: Rig) -> None:
    """It knows nothing of before, so its list isn't proof of anything yet."""
    node = rig.node(["w1"], accepted={"celery": "2025-01-01T00:00:00.000000+00:00"})
    row = node_row(rig, node)
    assert (row.hostname, row.pid, row.active, row.draining) == ("worker@test", 1, ["w1"], False)
    assert row.accepted == {"celery": "2025-01-01T00:00:00.000000+00:00"}
    assert row.as_of is None


def test_a_heartbeat_carries_the_time_of_the_one_before(rig: Rig) -> None:
    """The list was collected after that time, so it holds all that was claimed by then."""
    node = uuid.uuid4()
    first = rig.beat(node)
    rig.beat(node, ["w1"], as_of=first.seen)
    row = node_row(rig, node)
    assert (row.as_of, row.active) == (first.seen, ["w1"])
    assert row.seen > first.seen


def test_regular_heartbeats_are_unbroken(rig: Rig) -> None:
    """A gap of less than half a lease doesn't count."""
    node = rig.node()
    age(rig, node, 4)
    before = node_row(rig, node).unbroken
    rig.beat(node)
    assert node_row(rig, node).unbroken == before


def test_a_gap_ends_the_time_as_a_witness(rig: Rig) -> None:
    """After half a lease of silence a node can't tell who else was silent."""
    node = rig.node()
    age(rig, node, 6)
    beat = rig.beat(node)
    assert node_row(rig, node).unbroken == beat.seen


def test_the_oldest_living_node_is_elected(rig: Rig) -> None:
    """The next one is as soon as that one is silent, drains or leaves."""
    first, second = rig.node(), rig.node()
    assert (rig.beat(first).elected, rig.beat(second).elected) == (True, False)
    rig.drain(first)
    assert (rig.beat(first).elected, rig.beat(second).elected) == (False, True)
    third = rig.node()
    age(rig, second, 11)
    assert rig.beat(third).elected
    rig.beat(second)
    assert rig.beat(second).elected, "it is back, and older"
    rig.nodes.leave(second, patience=0)
    assert rig.beat(third).elected


def test_a_node_without_others_is_elected_at_once(rig: Rig) -> None:
    """A sole worker sweeps from its first heartbeat on."""
    assert rig.beat(uuid.uuid4()).elected


def test_draining_is_for_good(rig: Rig) -> None:
    """A heartbeat on its way doesn't undo it, and each answer tells it."""
    node = rig.node()
    assert rig.beat(node, draining=True).draining
    assert rig.beat(node, draining=False).draining


def test_a_node_leaves_only_without_runs(rig: Rig) -> None:
    """Otherwise it is found to be silent, and they are rescued."""
    idle, busy = rig.node(), rig.node()
    rig.run("w1", busy)
    rig.nodes.leave(idle, patience=0)
    rig.nodes.leave(busy, patience=0)
    assert [row.id for row in rig.sql.all("SELECT id FROM celery_durable.node")] == [busy]


def test_silent_nodes_are_forgotten_once_they_own_nothing(rig: Rig) -> None:
    """Neither runs nor outcomes that Celery hasn't delivered."""
    living, gone, running, delivering = (rig.node() for _ in range(4))
    rig.run("w1", running)
    rig.finish(rig.run("w2", delivering), dispatched=False)
    for node in (gone, running, delivering):
        age(rig, node, 3700)
    assert rig.nodes.forget(patience=0) == 1
    left = {row.id for row in rig.sql.all("SELECT id FROM celery_durable.node")}
    assert left == {living, running, delivering}
