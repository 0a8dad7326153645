"""How Postgres runs the statements that every workflow makes, in a database with a long past."""

from __future__ import annotations

from tests.fixtures.fix_postgres import Sql
from tests.integration.test_plans import STATEMENTS, explained

SHOWN = (("workflows", "claim"), ("checkpoints", "save"), ("workflows", "finish"), ("workflows", "wake"))
_OPTIONS = "ANALYZE, COSTS OFF, TIMING OFF, SUMMARY OFF, BUFFERS OFF"
#: From then on Postgres has one plan for all parameters, as it has in a worker.
_USES = 10
_WIDTH = 118
_UNTOLD = ("Index Searches:", "Sort Method:", "Storage:")


def plans(full: Sql) -> dict[str, str]:
    """Return each plan as text, as our sessions have it; the node of the workflow that they are about lives."""
    full.execute(f"ALTER DATABASE {full.connection.info.dbname} SET enable_seqscan = off")
    full.execute("UPDATE celery_durable.node SET seen = clock_timestamp(), lease = '1 h'")
    return {name: _plan(full, table, name) for table, name in SHOWN}


def _plan(full: Sql, table: str, name: str) -> str:
    rows = explained(full, table, name, STATEMENTS[table, name], _OPTIONS, _USES)
    lines = [line for (line,) in rows if not line.strip().startswith(_UNTOLD)]
    return "\n".join(line if len(line) <= _WIDTH else f"{line[: _WIDTH - 1]}…" for line in lines)
