"""Several sides of one race: each has a connection of its own, and speaks the store's real statements over it."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from celery_durable.serialization import Payload
from celery_durable.store import Birth, NodeFacts, StepRecord
from celery_durable.store.awaits import Awaits
from celery_durable.store.checkpoints import Checkpoints
from celery_durable.store.executing import Session
from celery_durable.store.messages import Letter, Messages
from celery_durable.store.nodes import Nodes
from celery_durable.store.pool import Database
from celery_durable.store.rows import Claim, Fence, StoredMessage, Wakers
from celery_durable.store.workflows import Workflows
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until

T = TypeVar("T")

NAME = "race"
LEASE = 15.0
VERDICT = Payload(b"{}")


class Party:
    """One side. Outside `transaction` each statement commits, as in a worker."""

    def __init__(self, url: str) -> None:
        self.connection = Session.connect(url, autocommit=True)
        database = Database(_Lent(self.connection), lambda: url, lambda connection: None)
        self.workflows = Workflows(database, "celery_durable")
        self.checkpoints = Checkpoints(database, "celery_durable")
        self.nodes = Nodes(database, "celery_durable")
        self.awaits = Awaits(database, "celery_durable")
        self.messages = Messages(database, "celery_durable")
        self.node = uuid.uuid4()

    def beat(self) -> None:
        """Say that this side's node lives, and runs nothing that it would list."""
        facts = NodeFacts(self.node, "host", 1, LEASE)
        self.nodes.beat(facts, active=(), accepted={}, as_of=None, draining=False, patience=0)

    def drain(self, node: uuid.UUID) -> None:
        """Let a node drain, as its heartbeat does when the worker shuts down."""
        self.connection.execute("UPDATE celery_durable.node SET draining = true WHERE id = %s", [node])

    def publish(self, workflow_id: str, name: str = NAME) -> bool:
        """Write a new workflow."""
        birth = Birth(workflow_id, name, "celery", "{}", b"[[], {}, {}]", "application/json", "utf-8", 10, 60.0)
        return self.workflows.publish(birth, patience=0).born

    def claim(self, workflow_id: str, token: uuid.UUID | None = None) -> Claim | None:
        """Try to take a workflow."""
        return self.workflows.claim(workflow_id, NAME, token or uuid.uuid4(), self.node, retries=0, patience=0)

    def save(self, fence: Fence, value: bytes = b"1", key: str = "one") -> bool:
        """Record a step in the fast way."""
        return self.checkpoints.save(fence, outcome(key, value), patience=0)

    def save_slow(self, fence: Fence, value: bytes = b"1", key: str = "one") -> Any:
        """Record a step in the slow way, which tells how the run stands."""
        return self.checkpoints.save_slow(fence, outcome(key, value), patience=0)

    def save_try(self, fence: Fence, tries: int, key: str = "one") -> Any:
        """Record a failed try."""
        return self.checkpoints.save_try(fence, StepRecord(key, 1, tries, None, None, None), 5.0, patience=0)

    def sleep(self, fence: Fence, seconds: float) -> Any:
        """Fix when a sleep ends."""
        return self.awaits.sleep(fence, outcome("sleep", b"null"), seconds, None, patience=0)

    def receive(self, fence: Fence, timeout: float | None = None) -> Any:
        """Take the oldest message, if there is one."""
        return self.messages.receive(fence, outcome("recv", b"null"), "", timeout, patience=0)

    def send(self, workflow_id: str, body: bytes, key: str = "") -> bool:
        """Send a message, and wake who waits for it."""
        letter = Letter(workflow_id, "", key or uuid.uuid4().hex, Payload(body))
        return self.messages.send(letter, 60, patience=0)[0]

    def bear(self, fence: Fence, child_id: str, deduplication_id: str | None = None) -> Any:
        """Start a child."""
        birth = Birth(
            child_id, NAME, "celery", "{}", b"[[], {}, {}]", "application/json", "utf-8", 10, 60.0, parent_id=fence.id,
            deduplication_id=deduplication_id,
        )  # fmt: skip
        return self.workflows.bear(fence, outcome("child", b"null"), birth, patience=0)

    def listen(self, fence: Fence) -> Any:
        """End the attempt with a wait for a message."""
        wakers = Wakers(topics=frozenset({""}))
        return self.workflows.suspend(fence, "message", None, wakers, republish_after=60, patience=0)

    def finish(self, fence: Fence) -> Any:
        """End the attempt with a result."""
        then = self.awaits.notifying([fence.id], 60)
        return self.workflows.finish(fence, "SUCCESS", Payload(b"2"), then, error=None, dispatched=True, patience=0)[0]

    def suspend(self, fence: Fence) -> Any:
        """End the attempt with a wait."""
        return self.workflows.suspend(fence, "a reason", 60.0, Wakers(), republish_after=60, patience=0)[0]

    def release(self, fence: Fence) -> Any:
        """End the attempt by a hand-over."""
        return self.workflows.release(fence, 60.0, patience=0)

    def again(self, fence: Fence) -> Any:
        """End the attempt by Celery's own retry."""
        message = StoredMessage(fence.id, None, fence.attempt, "{}", b"", "application/json", "utf-8")
        return self.workflows.again(fence, message, 1, 60.0, patience=0)

    def hand_over(self, fence: Fence) -> Any:
        """End the attempt as a cold shutdown does."""
        return self.workflows.hand_over(fence.node, [fence.id], patience=0)

    def rescue(self, fence: Fence) -> Any:
        """End the attempt because its process has died."""
        return self.sweep(fence.node, [fence.id])

    def sweep(self, node: uuid.UUID | None = None, lost: list[str] | None = None) -> list[tuple[str, str]]:
        """Rescue orphans."""
        return self.workflows.rescue(
            node, lost or [], lease=LEASE, verdict=VERDICT, error="WorkflowDead: no", limit=100, patience=0
        )

    def expire(self) -> list[str]:
        """Cancel what is past its deadline."""
        return self.workflows.expire(verdict=VERDICT, limit=100, patience=0)

    @contextmanager
    def transaction(self, *, commit: bool = True) -> Iterator[None]:
        """Keep what this side does uncommitted until the end of the block."""
        with self.connection.transaction(force_rollback=not commit):
            yield

    def waits(self, sql: Sql) -> bool:
        """Whether this side waits for a lock right now."""
        query = "SELECT wait_event_type = 'Lock' FROM pg_stat_activity WHERE pid = %s"
        return bool(sql.value(query, self.connection.info.backend_pid))


class Race:
    """The sides of one race, and an observer."""

    def __init__(self, url: str, sql: Sql) -> None:
        self.url = url
        self.sql = sql
        self.id = uuid.uuid4().hex
        self._threads = ThreadPoolExecutor()
        self._parties: list[Party] = []
        self.a, self.b, self.c = self.party(), self.party(), self.party()
        self.a.publish(self.id)

    def party(self) -> Party:
        """One more side, with a living node."""
        party = Party(self.url)
        party.beat()
        self._parties.append(party)
        return party

    def claimed(self) -> Fence:
        """Let `a` take the workflow."""
        claim = self.a.claim(self.id)
        assert claim is not None
        return claim.fence

    def blocked(self, party: Party, action: Callable[[], T]) -> Future[T]:
        """Begin an action of a side, and return when it waits for a lock."""
        future = self._threads.submit(action)
        wait_until(lambda: future.done() or party.waits(self.sql), message="the statement waits for a lock")
        assert not future.done(), f"it didn't wait: {future.result()}"
        return future

    def row(self) -> Any:
        """The workflow as everybody sees it."""
        return self.sql.one("SELECT * FROM celery_durable.workflow WHERE id = %s", self.id)

    def outcomes(self) -> dict[str, bytes]:
        """The settled steps as everybody sees them."""
        query = "SELECT key, value FROM celery_durable.checkpoint WHERE workflow = %s AND ok IS NOT NULL"
        return dict(self.sql.all(query, self.id))

    def cancel(self, party: Party) -> None:
        """Cancel as the protocol's rule 15 has it: a plain UPDATE that leaves node and token."""
        party.connection.execute(
            "UPDATE celery_durable.workflow SET state = 'CANCELLED', finished_at = clock_timestamp(), "
            "dispatched = false WHERE id = %s",
            [self.id],
        )

    def close(self) -> None:
        """Close all connections."""
        self._threads.shutdown()
        for party in self._parties:
            party.connection.close()


class _Lent:
    """A source of connections that has one, and leaves its transaction to the test."""

    def __init__(self, connection: Session) -> None:
        self._connection = connection

    @contextmanager
    def lease(self) -> Iterator[Session]:
        yield self._connection

    def close(self) -> None:
        """The test closes it."""


def outcome(key: str, value: bytes) -> StepRecord:
    """A completed step."""
    return StepRecord(key, 1, 1, None, None, None, ok=True, payload=Payload(value))
