"""What a node does by itself, without a worker."""

from __future__ import annotations

from celery_durable.node import Pace


def test_the_pace_of_what_goes_round() -> None:
    """Each turn is some seconds away, and no second has more of them than it may."""
    pace = Pace(3, most=100)
    delays = [pace.next() for _ in range(1000)]
    assert 2.9 < delays[0] < delays[99] + 0.1 < 4.2
    assert 8.9 < delays[999] - delays[0] < 9.1
    assert delays[0] + 0.9 < delays[100]
