"""Statements with one mistake each: what the machine must be able to find."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from celery_durable.store import queries


@dataclass(frozen=True, slots=True)
class Mutation:
    """A statement of the store with a part of its text left out, or replaced."""

    name: str
    file: str
    query: str
    old: str
    new: str

    @contextmanager
    def made(self) -> Iterator[None]:
        """Whoever loads the statements meanwhile gets this one with its mistake."""
        named = queries._named

        def mutated(filename: str) -> list[tuple[str, str]]:
            return [
                (name, self._in(text) if (filename, name) == (self.file, self.query) else text)
                for name, text in named(filename)
            ]

        queries._named = mutated  # type: ignore[assignment]
        try:
            yield
        finally:
            queries._named = named

    def _in(self, text: str) -> str:
        assert text.count(self.old) == 1, f"{self.file}: {self.query} doesn't say {self.old!r} once any more"
        return text.replace(self.old, self.new)

    def __str__(self) -> str:
        return self.name


WORKFLOWS, CHECKPOINTS, MESSAGES, AWAITS = "workflows.sql", "checkpoints.sql", "messages.sql", "awaits.sql"
WITNESS = """EXISTS (SELECT FROM {schema}.node v WHERE v.unbroken < clock_timestamp() - v.lease
                    AND v.seen > clock_timestamp() - v.lease / 2)
        AND NOT EXISTS (SELECT FROM {schema}.checkpoint"""
OWNER_LIVES = """AND NOT EXISTS (SELECT FROM {schema}.node o WHERE o.id = w.node AND o.seen > clock_timestamp() - o.lease
                         AND (w.claimed_at < o.as_of AND w.id <> ALL (o.active)) IS NOT TRUE)"""
ARRIVED = """OR EXISTS (
        SELECT FROM unnest(%(topics)s::text[]) AS t (topic), {schema}.message m
        WHERE m.workflow = %(id)s AND m.topic = t.topic AND m.taken_by IS NULL)"""

MUTATIONS = [
    Mutation("claim with an old snapshot", WORKFLOWS, "claim", "AND w.attempt = (SELECT attempt FROM seen)", ""),
    Mutation("claim beside a living owner", WORKFLOWS, "claim", OWNER_LIVES, ""),
    Mutation("suspend without signal", WORKFLOWS, "suspend", "AND own.signal = seen.signal", ""),
    Mutation("suspend without a look at messages", WORKFLOWS, "suspend", ARRIVED, ""),
    Mutation("hand-over without a lock", WORKFLOWS, "hand_over", "ORDER BY id FOR UPDATE", "ORDER BY id"),
    Mutation("rescue without a witness", WORKFLOWS, "rescue", WITNESS, "NOT EXISTS (SELECT FROM {schema}.checkpoint"),
    Mutation("rescue by a list from before the claim", WORKFLOWS, "rescue", "OR w.claimed_at < n.as_of AND", "OR"),
    Mutation(
        "rescue that waits for checkpoints", WORKFLOWS, "rescue", "FOR UPDATE OF w SKIP LOCKED", "FOR UPDATE OF w"
    ),
    Mutation("redispatch while the owner delivers", WORKFLOWS, "redispatch", "w.claimed_at < n.as_of AND", "true OR"),
    Mutation("prune of undelivered ones", WORKFLOWS, "prune", ") AND w.dispatched\n", ")\n"),
    Mutation("confirm of another node's outcome", WORKFLOWS, "confirm", "AND node = %(node)s", ""),
    Mutation("step without its lock", CHECKPOINTS, "save", "FOR KEY SHARE OF w", ""),
    Mutation("step without its token", CHECKPOINTS, "save", "AND w.token = %(token)s", ""),
    Mutation("step after cancel", CHECKPOINTS, "save", "AND w.state = 'RUNNING'", ""),
    Mutation(
        "slow step without its fence",
        CHECKPOINTS,
        "save_slow",
        "WHERE w.id = %(id)s AND w.attempt = %(attempt)s AND w.token = %(token)s",
        "WHERE w.id = %(id)s",
    ),
    Mutation("send that tells nobody", MESSAGES, "send", "signal = w.signal + 1", "signal = w.signal"),
    Mutation(
        "message taken without its checkpoint", MESSAGES, "receive", "FROM oldest, saved WHERE", "FROM oldest WHERE"
    ),
    Mutation("message taken by two", MESSAGES, "receive", "FOR UPDATE OF m", ""),
    Mutation("wait that isn't told", AWAITS, "notify", "signal = w.signal + 1, awaits", "awaits"),
]
