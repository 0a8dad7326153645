"""What workflows publish: the latest value of each key."""

from __future__ import annotations

from typing import Any

from ..serialization import Payload
from .checkpoints import ANY_SIZE
from .executing import Statement
from .messages import found_of, of_record
from .pool import Database
from .queries import Queries
from .rows import Fence, Found, Standing, StepRecord, StoredMessage


class Events:
    """Table ``event``."""

    def __init__(self, database: Database, schema: str) -> None:
        self._database = database
        self._sql = Queries("events.sql", schema)

    def set(
        self, fence: Fence, record: StepRecord, event: str, payload: Payload, then: Statement, *, patience: float
    ) -> tuple[Standing | None, list[StoredMessage]]:
        """Publish a value with the checkpoint of its workflow; None: the run isn't ours any more.

        ``then`` wakes those that await it, after the commit; their messages are returned, for the caller to send.
        """
        params = of_record(fence, record) | {
            "event": event, "body": payload.data, "content_type": payload.content_type,
        }  # fmt: skip
        rows, woken = self._database.run_then((self._sql["set"], params), then, patience=patience)
        return Standing(*rows[0]) if rows else None, [StoredMessage(*row) for row in woken]

    def get(self, workflow: str, event: str, *, patience: float) -> tuple[str, Payload | None] | None:
        """Return the state of a workflow and an event of it; None if there is no such workflow."""
        rows = self._run("get", patience, workflow=workflow, event=event)
        if not rows:
            return None
        state, value, content_type = rows[0]
        return state, None if value is None else Payload(value, content_type)

    def of_workflow(
        self, workflow: str, *, most: int | None = None, patience: float
    ) -> dict[str, tuple[Payload | None, int]]:
        """Return all events of a workflow with their sizes, without values larger than ``most``."""
        rows = self._run("of_workflow", patience, workflow=workflow, most=ANY_SIZE if most is None else most)
        return {
            key: (None if value is None else Payload(value, content_type), size)
            for key, value, size, content_type in rows
        }

    def receive(
        self, fence: Fence, record: StepRecord, target: str, event: str, timeout: float | None, *, patience: float
    ) -> tuple[Found, bool] | None:
        """Settle the wait for an event; ``record`` has the default. None: the run isn't ours any more.

        The second value says whether there is such a workflow.
        """
        rows = self._run("receive", patience, **of_record(fence, record), target=target, event=event, timeout=timeout)
        return (found_of(record, rows[0][:7]), rows[0][7]) if rows else None

    def _run(self, query: str, patience: float, **params: Any) -> list[tuple[Any, ...]]:
        return self._database.run(self._sql[query], params, patience=patience)
