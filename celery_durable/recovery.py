"""The duties that bring every workflow to an end, whatever has died.

Each duty is one set-based statement that skips what others have locked, in batches, and publishes only what
it has committed. All of them are safe in any number of copies at once: the beat task and the elected node
thread may both run them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from uuid import UUID

from . import states
from .engine.context import Engine
from .exceptions import DatabaseUnavailable, WorkflowCancelledError, WorkflowDead
from .serialization import Payload
from .store import Store
from .store.rows import StoredMessage

logger = logging.getLogger("celery_durable.recovery")

#: What a sweep does, in this order; each is a method of Recovery.
DUTIES = ("rescue", "expire", "cancel", "tell", "notify", "wake", "redispatch", "republish", "prune")
BATCH = 100
#: What one sweep does of one duty; the rest is left to the next sweep, so that no duty waits behind another.
MOST_BATCHES = 10

#: Sends messages and returns the ids of those that the broker didn't take.
Send = Callable[[list[StoredMessage]], Collection[str]]


@dataclass(frozen=True)
class Recovery:
    """The duties, with a store and a way to send.

    ``kept``: for how many seconds workflows stay after their end, by final state; None: for ever. ``patience``: seconds
    to wait for the database.
    """

    engine: Engine
    store: Store
    send: Send
    kept: Mapping[str, float | None]
    patience: float
    #: Who sweeps, of which kind and on which node.
    sweeper: str = "command"
    node: UUID | None = None

    def sweep(self) -> dict[str, int]:
        """Do all duties once; return how many workflows each has found.

        A duty that fails is logged and left to the next sweep: nothing that it had begun is half done.
        """
        found: dict[str, int] = {}
        for name in DUTIES:
            try:
                found[name] = getattr(self, name)()
            except DatabaseUnavailable as error:
                logger.warning("The recovery duty %r failed; the next sweep does it. %s", name, error)
            except Exception:
                logger.exception("The recovery duty %r failed; the next sweep does it.", name)
        self._note(found)
        return found

    def _note(self, found: dict[str, int]) -> None:
        try:
            self.store.nodes.swept(self.sweeper, self.node, found, patience=self.patience)
        except DatabaseUnavailable as error:
            logger.warning("It isn't noted that a sweep has ended, only `durable health` asks for that. %s", error)

    def is_behind(self, found: dict[str, int]) -> bool:
        """Tell from what a sweep has found whether the next one is due at once."""
        return any(count >= MOST_BATCHES * BATCH for count in found.values())

    def rescue(self, node: UUID | None = None, lost: Collection[str] = ()) -> int:
        """Enqueue orphans again. ``lost`` names workflows whose process has died on ``node``."""
        return self._all("rescue", self._rescued(node, lost))

    def expire(self) -> int:
        """Cancel what is past its deadline."""
        return self._all("expire", self._batches(self._expired))

    def cancel(self) -> int:
        """Cancel what committed transactions of callers have asked for."""
        return self._all("cancel", self._batches(self._asked_to_cancel))

    def tell(self) -> int:
        """Wake those that have messages which nobody has told them of."""
        return self._all("tell", self._told())

    def notify(self) -> int:
        """Wake those that await what has come, if nobody has told them."""
        return self._all("notify", self._batches(self._come))

    def wake(self) -> int:
        """Enqueue what has waited long enough."""
        return self._all("wake", self._batches(lambda: self.store.workflows.wake(limit=BATCH, patience=self.patience)))

    def republish(self) -> int:
        """Send what hasn't been sent, or has most likely been lost."""
        return self._all("republish", self._sent(self._to_republish))

    def redispatch(self) -> int:
        """Let outcomes be delivered whose owner died before Celery had done so."""
        return self._all("redispatch", self._sent(self._to_redispatch))

    def prune(self) -> int:
        """Delete what finished longer ago than the retention."""
        return self._all("prune", self._batches(self._pruned))

    def old(self, most: int) -> int:
        """Return how many workflows ``prune`` would find, counted up to ``most``."""
        return self.store.workflows.count_old(kept=self.kept, most=most, patience=self.patience)

    def next_due(self) -> float | None:
        """Return the seconds until the next timer is due."""
        return self.store.workflows.next_due(patience=self.patience)

    def _rescued(self, node: UUID | None, lost: Collection[str]) -> Iterator[list[str]]:
        error = WorkflowDead(
            "The workflow was given up: its worker died more often than max_recovery_attempts allows "
            "since its last completed step."
        )
        for _ in range(MOST_BATCHES):
            rows = self.store.workflows.rescue(
                node,
                lost,
                lease=self.engine.lease,
                verdict=self._verdict(error),
                error=self.engine.codec.headline(error),
                limit=BATCH,
                patience=self.patience,
            )
            for workflow_id, state in rows:
                named = {"workflow_id": workflow_id}
                if state == states.DEAD:
                    logger.error(
                        "The workflow %s is DEAD: too many crashes without a completed step.", workflow_id, extra=named
                    )
                else:
                    logger.warning("The workflow %s lost its worker and is enqueued again.", workflow_id, extra=named)
            yield [workflow_id for workflow_id, _ in rows]
            if len(rows) < BATCH:
                return

    def _expired(self) -> list[str]:
        verdict = self._verdict(WorkflowCancelledError("The workflow was cancelled: its workflow_timeout has passed."))
        return self.store.workflows.expire(verdict=verdict, limit=BATCH, patience=self.patience)

    def _asked_to_cancel(self) -> list[str]:
        workflows = self.store.workflows
        verdict = self._verdict(WorkflowCancelledError("The workflow was cancelled."))
        asked = workflows.asked_to_cancel(limit=BATCH, patience=self.patience)
        ids = sorted({workflow_id for _, workflow_id, _ in asked})
        if ids:
            workflows.cancel(ids, verdict=verdict, patience=self.patience)
            parents = [workflow_id for _, workflow_id, children in asked if children]
            while parents and (family := workflows.family(parents, patience=self.patience)):
                workflows.cancel(family, verdict=verdict, patience=self.patience)
            workflows.forget_cancellations([request for request, _, _ in asked], patience=self.patience)
        return ids

    def _come(self) -> list[str]:
        targets = self.store.awaits.come(limit=BATCH, patience=self.patience)
        if targets:
            self._send_now(self.store.awaits.notify(targets, self.engine.republish_after, patience=self.patience))
        return targets

    def _told(self) -> Iterator[list[str]]:
        for _ in range(MOST_BATCHES):
            number, woken = self.store.messages.tell(
                None, self.engine.republish_after, limit=BATCH, patience=self.patience
            )
            self._send_now(woken)
            yield [message.workflow_id for message in woken]
            if number < BATCH:
                return

    def _send_now(self, messages: list[StoredMessage]) -> None:
        if messages and (refused := self.send(messages)):
            self.store.workflows.unsent(refused, patience=self.patience)

    def _pruned(self) -> list[str]:
        return self.store.workflows.prune(kept=self.kept, limit=BATCH, patience=self.patience)

    def _to_republish(self) -> list[StoredMessage]:
        return self.store.workflows.republish(
            republish_after=self.engine.republish_after, limit=BATCH, patience=self.patience
        )

    def _to_redispatch(self) -> list[StoredMessage]:
        return self.store.workflows.redispatch(
            republish_after=self.engine.republish_after,
            lease=self.engine.lease,
            limit=BATCH,
            patience=self.patience,
        )

    def _sent(self, take: Callable[[], list[StoredMessage]]) -> Iterator[list[str]]:
        """Take messages and send them, until a batch isn't full or the broker takes no more."""
        for _ in range(MOST_BATCHES):
            messages = take()
            refused = self.send(messages) if messages else ()
            if refused:
                self.store.workflows.unsent(refused, patience=self.patience)
            yield [message.workflow_id for message in messages if message.workflow_id not in set(refused)]
            if len(messages) < BATCH or refused:
                return

    def _batches(self, take: Callable[[], list[str]]) -> Iterator[list[str]]:
        for _ in range(MOST_BATCHES):
            ids = take()
            yield ids
            if len(ids) < BATCH:
                return

    def _all(self, duty: str, batches: Iterator[list[str]]) -> int:
        count = 0
        for ids in batches:
            if ids:
                self.engine.observers.tell("recovered", duty, ids)
            count += len(ids)
        return count

    def _verdict(self, error: Exception) -> Payload:
        return self.engine.codec.verdict(error)
