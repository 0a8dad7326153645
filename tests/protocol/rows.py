"""What stands in the database at one moment, and what the protocol allows at that moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import psycopg
from psycopg.rows import namedtuple_row

#: All times are seconds since the epoch.
_TIMES = ("claimed_at", "deadline", "wake_at", "publish_at", "published_at", "finished_at")
_QUERIES = (
    "SELECT id, name, state, attempt, token, node, crashes, max_crashes, signal, awaits, topics, dispatched, parent_id,"
    " publishes, created_at, xmin::text AS changed_by,"
    + ", ".join(f" extract(epoch FROM {time})::float8 AS {time}" for time in _TIMES)
    + " FROM celery_durable.workflow ORDER BY id",
    "SELECT workflow, key, attempt, tries, ok, value, spent, overran, extract(epoch FROM at)::float8 AS at,"
    " extract(epoch FROM kill_at)::float8 AS kill_at FROM celery_durable.checkpoint",
    "SELECT workflow, seq, topic, idempotency_key, body, taken_by, told FROM celery_durable.message ORDER BY seq",
    "SELECT target, waiter, wait FROM celery_durable.awaiting",
    "SELECT id, draining, active, extract(epoch FROM lease)::float8 AS lease, extract(epoch FROM seen)::float8 AS seen,"
    " extract(epoch FROM unbroken)::float8 AS unbroken, extract(epoch FROM as_of)::float8 AS as_of"
    " FROM celery_durable.node",
    "SELECT extract(epoch FROM clock_timestamp())::float8 AS now",
)


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows that one session sees."""

    workflows: dict[str, Any]
    checkpoints: dict[tuple[str, str], Any]
    messages: dict[int, Any]
    awaiting: list[Any]
    nodes: dict[Any, Any]
    now: float

    @classmethod
    def seen_by(cls, connection: psycopg.Connection[Any]) -> Rows:
        """Read them in one round trip."""
        with connection.pipeline():
            answers = [connection.cursor(row_factory=namedtuple_row).execute(query) for query in _QUERIES]
        workflows, checkpoints, messages, awaiting, nodes, clock = (answer.fetchall() for answer in answers)
        return cls(
            {row.id: row for row in workflows},
            {(row.workflow, row.key): row for row in checkpoints},
            {row.seq: row for row in messages},
            awaiting,
            {row.id: row for row in nodes},
            clock[0].now,
        )

    def outcomes(self, workflow: str) -> dict[str, Any]:
        """The settled checkpoints of a workflow."""
        return {key: row for (owner, key), row in self.checkpoints.items() if owner == workflow and row.ok is not None}

    # What follows is written from the rules, not from the statements.

    def is_silent(self, node: Any) -> bool:
        """Rule 8: nothing was heard of the node for a lease."""
        row = self.nodes.get(node)
        return row is None or row.seen < self.now - row.lease

    def is_unlisted(self, workflow: str) -> bool:
        """Rule 8: its node says that it hasn't got it, in a list that would have it."""
        row = self.workflows[workflow]
        node = self.nodes.get(row.node)
        return node is not None and row.claimed_at < node.as_of and workflow not in node.active

    def has_witness(self) -> bool:
        """Rule 9: somebody has been heard without a gap for a lease."""
        return any(
            row.unbroken < self.now - row.lease and row.seen > self.now - row.lease / 2 for row in self.nodes.values()
        )

    def may_be_rescued(self, workflow: str, lease: float, node: Any, lost: tuple[str, ...]) -> bool:
        """Rules 8 and 9: an orphan, as far as anybody can tell."""
        row = self.workflows.get(workflow)
        if row is None or row.state != "RUNNING":
            return False
        if (row.node == node and workflow in lost) or self.is_unlisted(workflow):
            return True
        young = any(
            owner == workflow and step.attempt == row.attempt and step.at > self.now - lease
            for (owner, _), step in self.checkpoints.items()
        )
        return self.is_silent(row.node) and row.claimed_at < self.now - lease and not young and self.has_witness()

    def may_be_redispatched(self, workflow: str, lease: float) -> bool:
        """Rule 17: an outcome whose owner doesn't deliver it any more."""
        row = self.workflows.get(workflow)
        if row is None or row.dispatched is not False:
            return False
        if row.node is None or self.is_unlisted(workflow):
            return True
        if self.is_silent(row.node):
            return self.has_witness() and row.finished_at < self.now - lease
        return row.finished_at < self.now - 10 * lease

    def may_be_pruned(self, workflow: str, retention: float) -> bool:
        """Rule 22: nobody has anything to do with it any more."""
        row = self.workflows.get(workflow)
        if row is None or row.finished_at is None or not row.dispatched or row.node is not None:
            return False
        parent = self.workflows.get(row.parent_id)
        waiters = [self.workflows.get(wait.waiter) for wait in self.awaiting if wait.target == workflow]
        is_wanted = any(other is not None and other.finished_at is None for other in [parent, *waiters])
        return row.finished_at < self.now - retention and not is_wanted

    def is_forgotten(self, workflow: str) -> str | None:
        """Invariant 7: why nothing would ever wake this suspended workflow, if that is so."""
        row = self.workflows[workflow]
        if row.state != "SUSPENDED":
            return None
        if row.topics and any(
            message.workflow == workflow and message.topic in row.topics and message.taken_by is None and message.told
            for message in self.messages.values()
        ):
            return "a message that it waits for is there, and everybody believes that it knows"
        if row.awaits is not None and row.awaits > sum(wait.waiter == workflow for wait in self.awaiting):
            return "it awaits more ends than anybody will tell it of"
        if row.wake_at is None and row.awaits is None and not row.topics:
            return "it waits for nothing"
        return None
