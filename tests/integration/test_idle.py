"""Workers without work: what all of them together ask of Postgres, counted on the wire."""

from __future__ import annotations

import pytest

from tests.costs.idle import COUNTS, idle_statements
from tests.fixtures.pages import rows

pytestmark = pytest.mark.slow

#: Statements a second of a hundred nodes, with the settings as they come and with Celery's beat.
MOST_OF_A_HUNDRED = 30


def test_idle_nodes_cost_what_the_page_says(database_url: str) -> None:
    """One beats more for each node, and however many there are, one of them sweeps."""
    said = {row[0]: row[1:] for row in rows("docs/scaling.md") if len(row) == 4}
    for nodes in COUNTS:
        alone, beside = (idle_statements(database_url, nodes, beat=beat) for beat in (False, True))
        assert [f"{sum(found.values()):,.1f}" for found in (alone, beside)] == said[str(nodes)][1:]
        assert f"{alone.pop('beat'):,.1f}" == said[str(nodes)][0]
        assert set(alone.values()) == {0.2}, "each statement of a sweep once in an interval"
        if nodes == 100:
            assert sum(beside.values()) <= MOST_OF_A_HUNDRED
