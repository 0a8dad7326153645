"""Writes the tables and plans of the cost model and of Scaling: ``python -m tests.costs``, in about a minute."""

from __future__ import annotations

import logging

from celery_durable.store.migrate import migrate
from docs.tables import table, write
from tests.costs.idle import COUNTS, idle_statements
from tests.costs.measuring import Cost, beside_an_insert, costs, quiet_server, sizes
from tests.costs.operations import WAKE
from tests.costs.plans import plans
from tests.costs.sizing import worked_example
from tests.fixtures.fix_postgres import _new_database
from tests.integration.test_plans import filled


def measured() -> dict[str, str]:
    """Measure everything, and return it as it stands in the page."""
    with quiet_server() as server:
        with _new_database(server, "template0") as url:
            operations = costs(url)
        with _new_database(server, "template0") as url:
            things = _of_sizes(sizes(url))
        with _new_database(server, "template0") as url:
            beside = _beside(*beside_an_insert(url))
        with _new_database(server, "template0") as url:
            migrate(url)
            idle = _of_idle(url)
        with _new_database(server, "template0") as url, filled(url) as full:
            shown = {f"plan of {name}": f"\n```text\n{plan}\n```\n\n" for name, plan in plans(full).items()}
    tables = {"costs": _of_costs(operations), "in short": _in_short(operations), "sizes": things}
    return {**tables, "step beside an insert": beside, "idle nodes": idle, **shown}


def _in_short(measured: dict[str, Cost]) -> str:
    """What whole workflows cost; the two requests of an end are waited for together."""
    run, steps, nap = ["start", "claim", "finish"], ["step"] * 10, ["`sleep`, without the worker", WAKE, "claim"]
    lives = {"without steps": run, "with 10 steps": run + steps, "with 10 steps and a long sleep": run + steps + nap}
    rows = []
    for life, operations in lives.items():
        total = [measured[operation] for operation in operations]
        statements = sum(len(cost.statements) for cost in total)
        waits = statements - 1 - operations.count(WAKE)
        rows.append((life, str(statements), str(waits), f"{sum(cost.wal for cost in total) / 1000:.1f}"))
    return table(("a workflow", "statements", "round trips waited for", "kilobytes of WAL"), rows)


def _of_costs(measured: dict[str, Cost]) -> str:
    rows = [
        (name, ", ".join(f"`{each}`" for each in cost.statements), str(cost.round_trips), f"{cost.wal:,.0f}")
        for name, cost in measured.items()
    ]
    return table(("operation", "statements", "round trips", "bytes of WAL"), rows)


def _of_sizes(measured: dict[str, float]) -> str:
    return table(("what", "bytes"), [(what, f"{size:,.0f}") for what, size in measured.items()])


def _beside(step: float, insert: float, beyond: float) -> str:
    header = "a step", "a plain `INSERT` of its row", "what a step writes more"
    return table(header, [(f"{step:,.0f}", f"{insert:,.0f}", f"{beyond:,.0f}")])


def _of_idle(url: str) -> str:
    rows = []
    for nodes in COUNTS:
        alone, beside = (idle_statements(url, nodes, beat=beat) for beat in (False, True))
        numbers = alone["beat"], sum(alone.values()), sum(beside.values())
        rows.append((str(nodes), *(f"{number:,.1f}" for number in numbers)))
    return table(("workers", "heartbeats", "all statements", "and with Celery's beat"), rows)


if __name__ == "__main__":
    logging.disable(logging.ERROR)
    write(measured())
    write({"sizing": worked_example()})
