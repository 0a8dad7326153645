"""The worked example of docs/scaling.md, computed from the tables of docs/cost-model.md."""

from __future__ import annotations

from docs.tables import table
from tests.fixtures.pages import rows

#: Workflows a second, steps of each, and days for which they are kept.
RATE, STEPS, DAYS = 100, 10, 14
_DAY = 86_400


def worked_example() -> str:
    """Return the table: what each workflow costs, and what all of them do."""
    said = {row[0]: row[1:] for row in rows("docs/cost-model.md")}
    statements, waits, kilobytes = map(_number, said[f"with {STEPS} steps"])
    kept = _number(said["a finished workflow"][0]) + STEPS * _number(said["a step"][0])
    wal, tables = RATE * kilobytes / 1e3, RATE * kept * _DAY / 1e9
    return table(
        ("what", "each workflow", f"{RATE} of them a second"),
        [
            ("statements", f"{statements:,.0f}", f"{RATE * statements:,.0f} a second"),
            ("commits that wait for the disk", f"{waits:,.0f}", f"{RATE * waits:,.0f} a second"),
            (
                "WAL, without images of pages",
                f"{kilobytes:.1f} kB",
                f"{wal:.2f} MB a second, {wal * _DAY / 1e3:.0f} GB a day",
            ),
            (
                "tables and indexes",
                f"{kept / 1e3:.1f} kB",
                f"{tables:.0f} GB a day, {tables * DAYS:.0f} GB in {DAYS} days",
            ),
            ("messages of the broker", "1", f"{RATE} a second"),
        ],
    )


def _number(cell: str) -> float:
    return float(cell.replace(",", ""))
