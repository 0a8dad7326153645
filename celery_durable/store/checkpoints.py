"""The outcomes of steps: written under the fence, never changed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from psycopg import errors

from ..serialization import Payload
from .pool import Database
from .queries import Queries
from .rows import Checkpoint, Fence, Standing, StepRow


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What a checkpoint statement writes about one step."""

    key: str
    seq: int
    tries: int
    args: str | None
    fingerprint: bytes | None
    errors: bytes | None
    ok: bool | None = None
    payload: Payload | None = None
    #: Seconds that the last try took.
    took: float = 0.0


class Checkpoints:
    """Table ``checkpoint``."""

    def __init__(self, database: Database, schema: str) -> None:
        self._database = database
        self._sql = Queries("checkpoints.sql", schema)

    def save(self, fence: Fence, record: StepRecord, *, patience: float) -> bool:
        """Record an outcome in one round trip, if all is well with the run.

        False: it isn't, or an outcome is there already; nothing was written, ask ``save_slow``.
        """
        try:
            return self._database.count(self._sql["save"], _params(fence, record), patience=patience) == 1
        except errors.UniqueViolation:
            return False

    def save_slow(self, fence: Fence, record: StepRecord, *, patience: float) -> Standing | None:
        """Record an outcome if the token still matches, and tell how the run stands; None: it isn't ours."""
        return _standing(self._database.run(self._sql["save_slow"], _params(fence, record), patience=patience), record)

    def save_try(self, fence: Fence, record: StepRecord, delay: float | None, *, patience: float) -> Standing | None:
        """Record a try that failed, with the seconds until the next, or one that starts (no delay)."""
        params = _params(fence, record) | {"delay": delay}
        return _standing(self._database.run(self._sql["save_try"], params, patience=patience), record)

    def of_workflow(self, workflow_id: str, *, patience: float) -> list[StepRow]:
        """Return all steps of a workflow in the order of their first call."""
        rows = self._database.run(self._sql["of_workflow"], {"id": workflow_id}, patience=patience)
        return [StepRow.of(row) for row in rows]


def _params(fence: Fence, record: StepRecord) -> dict[str, Any]:
    payload = record.payload
    return {
        "id": fence.id,
        "attempt": fence.attempt,
        "token": fence.token,
        **{name: value for name, value in asdict(record).items() if name != "payload"},
        "value": None if payload is None else payload.data,
        "content_type": None if payload is None else payload.content_type,
    }


def _standing(rows: list[tuple[Any, ...]], record: StepRecord) -> Standing | None:
    if not rows:
        return None
    state, draining, late, ok, value, content_type = rows[0]
    settled = None
    if ok is not None:
        settled = Checkpoint(record.key, record.seq, record.tries, ok, Payload(value, content_type), record.args)
    return Standing(state, draining, late, settled)
