"""Waits for other workflows and for times: who awaits whom, and what comes of it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from ..serialization import Payload
from .executing import Statement
from .messages import found_of, of_record
from .pool import Database
from .queries import Queries
from .rows import Fence, Found, Standing, StepRecord, StoredMessage


@dataclass(frozen=True, slots=True)
class Settled:
    """What has become of the wait for another workflow."""

    key: str
    found: Found
    #: There is such a workflow.
    is_known: bool


class Awaits:
    """Table ``awaiting``, and the checkpoints of waits."""

    def __init__(self, database: Database, schema: str) -> None:
        self._database = database
        self._sql = Queries("awaits.sql", schema)

    def register(
        self, fence: Fence, targets: Sequence[str], waits: Sequence[str], event: str = "", *, patience: float
    ) -> None:
        """Have a run told when these workflows end (or publish an event); ``waits`` has the key of each one's wait."""
        self._run(
            "register", patience, id=fence.id, attempt=fence.attempt, token=fence.token, targets=list(targets),
            waits=list(waits), event=event,
        )  # fmt: skip

    def settle(
        self,
        fence: Fence,
        records: Sequence[StepRecord],
        targets: Sequence[str],
        timeout: float | None,
        fallback: Payload | None,
        *,
        patience: float,
    ) -> list[Settled] | None:
        """Settle waits for the ends of other workflows, those that can be; None: the run isn't ours any more.

        After ``timeout`` seconds from the first look, a wait ends with ``fallback`` as its error.
        """
        rows = self._run(
            "settle", patience, id=fence.id, attempt=fence.attempt, token=fence.token, timeout=timeout,
            keys=[record.key for record in records], seqs=[record.seq for record in records], targets=list(targets),
            argss=[record.args for record in records], fingerprints=[record.fingerprint for record in records],
            value=None if fallback is None else fallback.data,
            value_type=None if fallback is None else fallback.content_type,
        )  # fmt: skip
        by_key = {record.key: record for record in records}
        settled = []
        for state, draining, late, key, is_known, *outcome in rows:
            settled.append(Settled(key, found_of(by_key[key], (state, draining, late, *outcome)), is_known))
        return settled or None

    def sleep(
        self, fence: Fence, record: StepRecord, seconds: float | None, until: datetime | None, *, patience: float
    ) -> Found | None:
        """Fix when a sleep ends; None: the run isn't ours any more."""
        rows = self._run("sleep", patience, **of_record(fence, record), seconds=seconds, until=until)
        return Found(Standing(*rows[0][:3]), None, rows[0][3]) if rows else None

    def first(self, targets: Sequence[str], *, patience: float) -> tuple[str | None, list[str]]:
        """Return which of these workflows has ended first, if any has, and which of them there are."""
        ((first, known),) = self._run("first", patience, targets=list(targets))
        return first, known

    def forget(self, fence: Fence, wait: str, *, patience: float) -> None:
        """Note that a wait is over."""
        self._run("forget", patience, id=fence.id, wait=wait)

    def notify(self, targets: Collection[str], republish_after: float, *, patience: float) -> list[StoredMessage]:
        """Wake those that await these workflows; return what the caller now sends."""
        rows = self._database.run(*self.notifying(targets, republish_after), patience=patience)
        return [StoredMessage(*row) for row in rows]

    def notifying(self, targets: Collection[str], republish_after: float) -> Statement:
        """Return the statement of ``notify``, to follow another one."""
        return self._sql["notify"], {"targets": list(targets), "republish_after": republish_after}

    def come(self, *, limit: int, patience: float) -> list[str]:
        """Return workflows that are still awaited, although what is awaited has come."""
        return [row[0] for row in self._run("come", patience, limit=limit)]

    def _run(self, query: str, patience: float, **params: Any) -> list[tuple[Any, ...]]:
        return self._database.run(self._sql[query], params, patience=patience)
