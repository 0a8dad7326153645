"""Statements with one mistake each: what the machine must be able to find."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from celery_durable.store import queries
from tests.protocol.model import CHILD, PARENT, Focus


@dataclass(frozen=True, slots=True)
class Mutation:
    """A statement of the store with a part of its text left out, or replaced."""

    name: str
    file: str
    query: str
    old: str
    new: str
    #: What has to happen more often, so that few examples are enough.
    focus: Focus
    #: It is found in seconds, and looked for in every run of the tests.
    is_quick: bool = False

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


WORKFLOWS, CHECKPOINTS, MESSAGES = "workflows.sql", "checkpoints.sql", "messages.sql"
WITNESS = """EXISTS (SELECT FROM {schema}.node v WHERE v.unbroken < clock_timestamp() - v.lease
                    AND v.seen > clock_timestamp() - v.lease / 2)
        AND NOT EXISTS (SELECT FROM {schema}.checkpoint"""
ARRIVED = """OR EXISTS (
        SELECT FROM unnest(%(topics)s::text[]) AS t (topic), {schema}.message m
        WHERE m.workflow = %(id)s AND m.topic = t.topic AND m.taken_by IS NULL)"""

#: Nobody interferes but who has to.
QUIET = {"cancel": 0.0, "end_worker": 0.0, "fail_over": 0.0, "conflict": 0.0, "claim_in_vain": 0.0, "put": 0.0}
ORPHANS = QUIET | {"lose_process": 5.0, "report_lost": 10.0, "rescue_orphans": 3.0, "send": 0.3}
ARRIVALS = QUIET | {"lose_process": 0.0, "pass_time": 0.2, "beat": 0.2, "sweep": 0.2, "publish": 0.2}
STEPS, RECEIVES = ("step", "step", "step"), ("recv", "recv", "recv")
WAITERS = {PARENT: RECEIVES, CHILD: RECEIVES}

MUTATIONS = [
    Mutation(
        "claim beside a living owner", WORKFLOWS, "claim", "AND w.node IS NULL AND w.attempt", "AND w.attempt",
        Focus(QUIET | {"cancel": 8.0, "resume": 3.0, "lose_process": 0.2}),
        is_quick=True,
    ),
    Mutation(
        "suspend without signal", WORKFLOWS, "suspend", "AND own.signal = seen.signal", "",
        Focus(ARRIVALS | {"advance": 0.3, "send": 1.5, "end_transaction": 2.0}, "open", WAITERS),
    ),
    Mutation(
        "suspend without a look at messages", WORKFLOWS, "suspend", ARRIVED, "",
        Focus(ARRIVALS | {"send": 3.0}, programs=WAITERS),
        is_quick=True,
    ),
    Mutation(
        "hand-over without a lock", WORKFLOWS, "hand_over", "ORDER BY id FOR UPDATE", "ORDER BY id",
        Focus(QUIET | {"end_worker": 10.0}, "open"),
    ),
    Mutation(
        "rescue without a witness", WORKFLOWS, "rescue", WITNESS, "NOT EXISTS (SELECT FROM {schema}.checkpoint",
        Focus(QUIET | {"pass_time": 5.0, "rescue_orphans": 5.0}),
        is_quick=True,
    ),
    Mutation(
        "rescue by a list from before the claim", WORKFLOWS, "rescue", "OR w.claimed_at < n.as_of AND", "OR",
        Focus(QUIET | {"rescue_orphans": 3.0}),
        is_quick=True,
    ),
    Mutation(
        "rescue that waits for checkpoints", WORKFLOWS, "rescue", "FOR UPDATE OF w SKIP LOCKED", "FOR UPDATE OF w",
        Focus(ORPHANS, "open"),
    ),
    Mutation(
        "redispatch while the owner delivers", WORKFLOWS, "redispatch", "w.claimed_at < n.as_of AND", "true OR",
        Focus(QUIET | {"cancel": 3.0, "sweep": 3.0}),
        is_quick=True,
    ),
    Mutation(
        "prune of undelivered ones", WORKFLOWS, "prune", ") AND w.dispatched\n", ")\n",
        Focus(QUIET | {"cancel": 3.0, "resume": 0.2, "confirm": 0.2, "pass_time": 5.0, "sweep": 4.0}, "well"),
        is_quick=True,
    ),
    Mutation(
        "step without its lock", CHECKPOINTS, "save", "FOR KEY SHARE OF w", "",
        Focus(ORPHANS, "open", {PARENT: STEPS, CHILD: STEPS}),
    ),
    Mutation(
        "step without its token", CHECKPOINTS, "save", "AND w.token = %(token)s", "",
        Focus(QUIET | {"fail_over": 30.0, "lose_process": 0.2, "claim": 3.0}, "well", {PARENT: STEPS, CHILD: STEPS}),
        is_quick=True,
    ),
    Mutation(
        "slow step without its fence", CHECKPOINTS, "save_slow",
        "WHERE w.id = %(id)s AND w.attempt = %(attempt)s AND w.token = %(token)s\n", "WHERE w.id = %(id)s\n",
        Focus(
            QUIET | {"advance": 0.3, "checkpoint_slow": 1.0, "pass_time": 8.0, "rescue_orphans": 6.0, "beat": 0.2,
                     "lose_process": 0.0, "send": 0.0, "sweep": 0.0},
            "well", {PARENT: STEPS, CHILD: STEPS},
        ),
        is_quick=True,
    ),
    Mutation(
        "send that tells nobody", MESSAGES, "send", "signal = w.signal + 1", "signal = w.signal",
        Focus(ARRIVALS | {"advance": 0.3, "send": 1.5, "end_transaction": 2.0}, "open", WAITERS),
    ),
    Mutation(
        "message taken without its checkpoint", MESSAGES, "receive", "FROM oldest, saved WHERE", "FROM oldest WHERE",
        Focus(ARRIVALS | {"send": 6.0, "cut": 5.0, "repeat": 2.0}, "open", WAITERS),
    ),
]  # fmt: skip
