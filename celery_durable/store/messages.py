"""What is sent to workflows: each message is taken once, with the checkpoint that has it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..serialization import Payload
from .checkpoints import ANY_SIZE
from .outgoing import Outgoing
from .pool import Database
from .queries import Queries
from .rows import Checkpoint, Fence, Found, MessageRow, Standing, StepRecord, StoredMessage


@dataclass(frozen=True, slots=True)
class Letter:
    """A message on its way to a workflow."""

    workflow: str
    #: Empty: none.
    topic: str
    idempotency_key: str
    payload: Payload


@dataclass(frozen=True, slots=True)
class Posted:
    """What has become of a message that a workflow sends."""

    #: How the sender stands.
    standing: Standing
    #: The state of the other workflow; None: there is none.
    state: str | None
    #: The message is kept, with the sender's checkpoint.
    kept: bool


class Messages:
    """Table ``message``."""

    def __init__(self, database: Database, schema: str) -> None:
        self._database = database
        self._sql = Queries("messages.sql", schema)

    def send(self, letter: Letter, republish_after: float, *, patience: float) -> tuple[bool, StoredMessage | None]:
        """Write a message, and wake its workflow; False if that doesn't exist or has finished.

        A woken workflow's own Celery message is returned, which the caller now sends.
        """
        rows = self._run("send", patience, **_of_letter(letter), republish_after=republish_after)
        if not rows:
            return False, None
        return True, None if rows[0][0] is None else StoredMessage(*rows[0])

    def send_as_step(self, fence: Fence, record: StepRecord, letter: Letter, *, patience: float) -> Posted | None:
        """Write a message with the checkpoint of its sender; None: the sender isn't ours any more."""
        rows = self._run("send_as_step", patience, **of_record(fence, record), **_of_letter(letter))
        return Posted(Standing(*rows[0][:3]), rows[0][3], rows[0][4]) if rows else None

    def put_in(self, out: Outgoing, letter: Letter) -> bool:
        """Write a message in a transaction of the caller's own; False if its workflow can't be had."""
        return bool(out.run(self._sql["put"], _of_letter(letter)))

    def tell(
        self, workflow: str | None, republish_after: float, *, limit: int, patience: float
    ) -> tuple[int, list[StoredMessage]]:
        """Wake the workflows of messages that nobody has told of: those of one workflow, or the oldest.

        Returns how many messages that were, and the Celery messages to be sent.
        """
        rows = self._run("tell", patience, workflow=workflow, republish_after=republish_after, limit=limit)
        return rows[0][0], [StoredMessage(*row[1:]) for row in rows if row[1] is not None]

    def receive(
        self,
        fence: Fence,
        record: StepRecord,
        topic: str,
        timeout: float | None,
        *,
        patience: float,
    ) -> Found | None:
        """Take the oldest message of a topic; ``record`` has the default. None: the run isn't ours any more."""
        params = {**of_record(fence, record), "topic": topic, "timeout": timeout}
        while True:
            rows = self._run("receive", patience, **params)
            if not rows:
                return None
            if not (rows[0][-1] and rows[0][4] is None):
                return found_of(record, rows[0][:7])

    def of_workflow(self, workflow: str, *, limit: int, most: int | None = None, patience: float) -> list[MessageRow]:
        """Return the first messages of a workflow, without those larger than ``most``."""
        most = ANY_SIZE if most is None else most
        rows = self._run("of_workflow", patience, workflow=workflow, limit=limit, most=most)
        return [
            MessageRow(seq, topic, key, None if body is None else Payload(body, content_type), size, sent_at, taken_by)
            for seq, topic, key, body, size, content_type, sent_at, taken_by in rows
        ]

    def _run(self, query: str, patience: float, **params: Any) -> list[tuple[Any, ...]]:
        return self._database.run(self._sql[query], params, patience=patience)


def of_record(fence: Fence, record: StepRecord) -> dict[str, Any]:
    """Return what a statement that makes a checkpoint in passing needs of it."""
    payload = record.payload
    return {
        "id": fence.id,
        "attempt": fence.attempt,
        "token": fence.token,
        "key": record.key,
        "seq": record.seq,
        "args": record.args,
        "fingerprint": record.fingerprint,
        "value": None if payload is None else payload.data,
        "value_type": None if payload is None else payload.content_type,
    }


def found_of(record: StepRecord, row: tuple[Any, ...]) -> Found:
    """Return what a statement says of a wait: standing, seconds left, outcome."""
    state, draining, late, due_in, ok, value, content_type = row
    checkpoint = None
    if ok is not None:
        checkpoint = Checkpoint(record.key, record.seq, 1, ok, Payload(value, content_type), record.args)
    return Found(Standing(state, draining, late), checkpoint, due_in)


def _of_letter(letter: Letter) -> dict[str, Any]:
    return {
        "workflow": letter.workflow,
        "topic": letter.topic,
        "idempotency_key": letter.idempotency_key,
        "body": letter.payload.data,
        "content_type": letter.payload.content_type,
    }
