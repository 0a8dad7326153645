"""What a message says of itself is believed only as far as the database can bear it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import pytest

from celery_durable.request import MOST_QUEUES, Registry, published_at


class Request(SimpleNamespace):
    """As much of a request as the registry looks at."""

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@pytest.mark.parametrize("published", [None, 7, "soon", "2024-01-01T00:00:00+99:00", "0001-01-01T00:00:00+23:00", []])
def test_what_is_no_time_is_left_out(published: Any) -> None:
    """Postgres would refuse it, and with it every sweep."""
    assert published_at({"published": published}) is None


def test_a_time_is_told_in_one_zone() -> None:
    """As texts such times are compared."""
    told = published_at({"published": "2026-01-01T02:00:00+02:00"})
    assert told is not None
    assert told.isoformat() == "2026-01-01T00:00:00+00:00"


def test_a_heartbeat_stays_small() -> None:
    """However many queues messages name."""
    registry = Registry(threading.Lock())
    for number in range(MOST_QUEUES + 10):
        registry.accepted(f"queue-{number}", "2026-01-01T00:00:00.000000+00:00")
    assert len(registry.snapshot()[1]) == MOST_QUEUES


@pytest.mark.parametrize("odd", ["a\x00b", "\ud800", "", "x" * 256, 5, None])
def test_odd_ids_are_no_part_of_a_heartbeat(odd: Any) -> None:
    """They can't be claimed, and Postgres would refuse the heartbeat."""
    registry, request = Registry(threading.Lock()), Request(id=odd)
    registry.add(request)
    registry.remove(request, delivered=True)
    assert registry.snapshot()[0] == set()


def test_a_death_that_is_told_twice_counts_once() -> None:
    """The second time the workflow may run here again."""
    registry, request = Registry(threading.Lock()), Request(id="w1")
    registry.add(request)
    assert registry.remove(request, delivered=False)
    assert not registry.remove(request, delivered=False)


def test_an_outcome_stays_active_until_it_is_confirmed() -> None:
    """Else another node's sweep would deliver it a second time."""
    registry, request = Registry(threading.Lock()), Request(id="w1")
    registry.add(request)
    registry.remove(request, delivered=True)
    assert registry.snapshot()[0] == registry.delivered() == {"w1"}
    registry.confirmed({"w1"})
    assert registry.snapshot()[0] == set()


def test_an_outcome_is_not_confirmed_while_its_workflow_runs_here_again() -> None:
    """Else the end of the next attempt, a cancellation, would count as delivered while its body still runs."""
    registry, first, second = Registry(threading.Lock()), Request(id="w1"), Request(id="w1")
    registry.add(first)
    registry.remove(first, delivered=True)
    registry.add(second)
    assert registry.delivered() == set()
    assert registry.snapshot()[0] == {"w1"}
    registry.remove(second, delivered=False)
    assert registry.delivered() == {"w1"}


def test_an_outcome_is_not_confirmed_after_a_crash_of_the_next_attempt() -> None:
    """The row tells of that attempt by now, whose end nobody has delivered."""
    registry, first, second = Registry(threading.Lock()), Request(id="w1"), Request(id="w1")
    registry.add(first)
    registry.remove(first, delivered=True)
    registry.add(second)
    registry.remove(second, delivered=False, hold=True)
    registry.let_go(["w1"])
    assert registry.delivered() == registry.snapshot()[0] == set()


def test_a_lost_run_stays_active_until_the_database_knows() -> None:
    """Else another node would find that nobody lists it, and count a crash of what is being handed over."""
    registry, request = Registry(threading.Lock()), Request(id="w1")
    registry.add(request)
    assert registry.remove(request, delivered=False, hold=True)
    assert (registry.snapshot()[0], registry.runs("w1")) == ({"w1"}, False)
    registry.let_go(["w1"])
    assert registry.snapshot()[0] == set()
