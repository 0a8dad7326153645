"""Statements, round trips and bytes, which don't depend on the machine: as docs/cost-model.md has them."""

from __future__ import annotations


def costs() -> list[tuple[str, str, str, str]]:
    """Measure each operation on a server of its own: its name, statements, round trips and bytes of the log."""
    from tests.costs.measuring import costs, quiet_server
    from tests.fixtures.fix_postgres import _new_database

    with quiet_server() as server, _new_database(server, "template0") as url:
        measured = costs(url)
    return [
        (name, ", ".join(cost.statements), str(cost.round_trips), f"{cost.wal:,.0f}") for name, cost in measured.items()
    ]
