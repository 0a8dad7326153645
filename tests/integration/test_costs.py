"""docs/cost-model.md is true: what it says is measured again; where the code has changed, `python -m tests.costs`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.costs.measuring import beside_an_insert, costs, quiet_server, sizes
from tests.fixtures.fix_postgres import _new_database
from tests.fixtures.pages import rows

pytestmark = pytest.mark.slow

PAGE = "docs/cost-model.md"
TOLERANCE = 0.15
#: Bytes of the log for what makes a row a checkpoint: its workflow is locked, so that no other attempt has it.
MOST_BEYOND_AN_INSERT = 120


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """A server on which only the operations write."""
    with quiet_server() as url:
        yield url


def in_page(columns: int) -> dict[str, list[str]]:
    """The rows of the page's tables that have so many columns and begin with a name."""
    return {row[0]: row[1:] for row in rows(PAGE) if len(row) == columns}


def number(cell: str) -> float:
    return float(cell.replace(",", ""))


def test_operations_cost_what_the_page_says(server: str) -> None:
    """The same statements in the same number of round trips, and about as much in the log."""
    said = in_page(columns=4)
    with _new_database(server, "template0") as url:
        measured = costs(url)
    for name, cost in measured.items():
        statements, round_trips, wal = said[name]
        assert ", ".join(f"`{each}`" for each in cost.statements) == statements, name
        assert cost.round_trips == int(round_trips), name
        assert cost.wal == pytest.approx(number(wal), rel=TOLERANCE), name


def test_what_stays_is_what_the_page_says(server: str) -> None:
    """Tables and indexes grow by about as much."""
    said = in_page(columns=2)
    with _new_database(server, "template0") as url:
        measured = sizes(url)
    for what, size in measured.items():
        assert size == pytest.approx(number(said[what][0]), rel=TOLERANCE), what


def test_a_step_writes_hardly_more_than_its_row(server: str) -> None:
    """Whatever the row costs, the fence around it adds little."""
    with _new_database(server, "template0") as url:
        step, insert, beyond = beside_an_insert(url)
    assert 0 < insert <= step
    assert beyond <= MOST_BEYOND_AN_INSERT
