"""Collects what the checker needs, and what must not be left behind."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psutil

from tests.chaos.checker import Evidence, Outcome, Row, decoded
from tests.chaos.ledger import now, read
from tests.chaos.load import Load
from tests.chaos.nemesis import Nemesis
from tests.chaos.stage import Stage

ROWS = """
SELECT w.id, w.name, w.state, o.value FROM celery_durable.workflow w
LEFT JOIN celery_durable.output o ON o.workflow = w.id AND o.ok
"""
OUTCOMES = "SELECT workflow, key, ok, value, extract(epoch FROM at)::float8 FROM celery_durable.checkpoint"

#: What must be empty in the end: name, query.
LEFT_BEHIND = {
    "unfinished workflows": "SELECT id, state FROM celery_durable.workflow WHERE finished_at IS NULL",
    "undelivered outcomes": "SELECT id, state FROM celery_durable.workflow WHERE NOT dispatched",
    "ends that still have a node": (
        "SELECT id, node FROM celery_durable.workflow WHERE finished_at IS NOT NULL AND node IS NOT NULL"
    ),
    "ends without an outcome": (
        "SELECT id, state FROM celery_durable.workflow w WHERE finished_at IS NOT NULL"
        " AND NOT EXISTS (SELECT FROM celery_durable.output o WHERE o.workflow = w.id)"
    ),
    "unsettled checkpoints of successes": (
        "SELECT c.workflow, c.key FROM celery_durable.checkpoint c JOIN celery_durable.workflow w ON w.id = c.workflow"
        " WHERE w.state = 'SUCCESS' AND c.ok IS NULL"
    ),
    "waits of successes": (
        "SELECT a.* FROM celery_durable.awaiting a JOIN celery_durable.workflow w ON w.id = a.waiter"
        " WHERE w.state = 'SUCCESS'"
    ),
    "messages that nobody took": "SELECT workflow, topic, seq FROM celery_durable.message WHERE taken_by IS NULL",
    "messages of which nobody was told": "SELECT workflow, topic, seq FROM celery_durable.message WHERE NOT told",
    "cancellations asked for": "SELECT * FROM celery_durable.cancellation",
    "rows without a workflow": " UNION ALL ".join(
        f"SELECT '{table}', {column} FROM celery_durable.{table} t"
        f" WHERE NOT EXISTS (SELECT FROM celery_durable.workflow w WHERE w.id = t.{column})"
        for table, column in {
            "input": "workflow", "output": "workflow", "checkpoint": "workflow", "message": "workflow",
            "event": "workflow", "awaiting": "waiter", "on_cancel": "workflow",
        }.items()
    ),
}  # fmt: skip

#: What must be empty once all workers have ended.
LEFT_OPEN = {
    "connections": (
        "SELECT pid, state, query FROM pg_stat_activity WHERE backend_type = 'client backend'"
        " AND pid <> pg_backend_pid() AND pid <> ALL (%s)"
    ),
    "locks": "SELECT locktype, relation::regclass, pid FROM pg_locks WHERE pid <> pg_backend_pid() AND pid <> ALL (%s)",
    "nodes that could have signed off": "SELECT hostname FROM celery_durable.node WHERE hostname = ANY (%s)",
}


def collect(stage: Stage, load: Load, nemesis: Nemesis) -> Evidence:
    """Read everything."""
    with stage.sql() as connection:
        offset = now() - _one(connection, "SELECT extract(epoch FROM clock_timestamp())::float8")
        rows = [Row(*row[:3], decoded(row[3])) for row in connection.execute(ROWS)]
        outcomes = [Outcome(*row[:3], decoded(row[3]), row[4] + offset) for row in connection.execute(OUTCOMES)]
        effects = connection.execute("SELECT workflow, key, nonce FROM effect").fetchall()
        purchases = frozenset(row[0] for row in connection.execute("SELECT workflow FROM purchase"))
    return Evidence(
        started=load.started,
        undone=load.undone,
        purchases=purchases,
        rows={row.id: row for row in rows},
        outcomes={(outcome.workflow, outcome.key): outcome for outcome in outcomes},
        effects=effects,
        entries=list(read(stage.ledger)),
        faults=nemesis.journal,
    )


def left_behind(stage: Stage) -> Iterator[str]:
    """Rows that shouldn't be there."""
    with stage.sql() as connection:
        for name, query in LEFT_BEHIND.items():
            rows = connection.execute(query).fetchall()
            if rows:
                yield f"{name}: {len(rows)}, {rows[:3]}"


def left_open(stage: Stage, ours: list[int], signed_off: list[str]) -> Iterator[str]:
    """Connections, locks and nodes of workers that have ended."""
    with stage.sql() as connection:
        for name, query in LEFT_OPEN.items():
            rows = connection.execute(query, [signed_off if name.startswith("nodes") else ours]).fetchall()
            if rows:
                yield f"{name}: {len(rows)}, {rows[:3]}"


def unfinished(stage: Stage) -> list[Any]:
    """What hasn't ended yet."""
    with stage.sql() as connection:
        return connection.execute(
            "SELECT id, name, state, attempt, node, publish_at, wake_at, waiting_for FROM celery_durable.workflow"
            " WHERE finished_at IS NULL OR NOT dispatched ORDER BY created_at"
        ).fetchall()


def own_backends(stage: Stage) -> list[int]:
    """The sessions of this process: they have no application name of a worker's."""
    ports = {connection.laddr.port for connection in psutil.Process().net_connections() if connection.laddr}
    with stage.sql() as connection:
        rows = connection.execute("SELECT pid, client_port FROM pg_stat_activity WHERE client_port IS NOT NULL")
        return [pid for pid, port in rows if port in ports or port == -1]


def _one(connection: Any, query: str) -> float:
    return float(connection.execute(query).fetchone()[0])
