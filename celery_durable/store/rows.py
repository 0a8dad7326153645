"""What the store returns, and what it writes of a step, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from ..late import late

if TYPE_CHECKING:
    from .. import serialization
    from ..serialization import Payload
else:
    serialization = late("serialization")


@dataclass(frozen=True, slots=True)
class Fence:
    """What every write of an attempt carries."""

    id: str
    attempt: int
    token: UUID
    node: UUID


class Checkpoint(NamedTuple):
    """The kept outcome of a step, or of its tries so far (``ok`` None). A claim may load a hundred thousand."""

    key: str
    seq: int
    tries: int
    ok: bool | None = None
    payload: Payload | None = None
    args: str | None = None
    fingerprint: bytes | None = None
    errors: bytes | None = None
    #: Seconds until the next try is due, as of the claim.
    due_in: float = 0.0
    #: Its process was ended by the try's hard time limit.
    overran: bool = False
    #: The last of the tries was counted before it began, and hasn't ended.
    spent: bool = False
    #: The workflow that it has started, or awaited.
    child_id: str | None = None


class StepRecord(NamedTuple):
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


@dataclass(frozen=True, slots=True)
class Claim:
    """An attempt that this process owns, with all that earlier attempts completed."""

    fence: Fence
    crashes: int
    #: The database's time.
    now: datetime = field(compare=False)
    #: Seconds until the workflow's deadline.
    deadline_in: float | None = field(default=None, compare=False)
    history: dict[str, Checkpoint] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Standing:
    """How a run stands after a statement that wasn't allowed, or wanted, to write."""

    state: str
    draining: bool
    late: bool
    #: An outcome that was there already: our own, whose answer was lost.
    settled: Checkpoint | None = None


class Found(NamedTuple):
    """What has become of a wait: an outcome, or the seconds after which it has one at the latest."""

    standing: Standing
    checkpoint: Checkpoint | None = None
    due_in: float | None = None


@dataclass(frozen=True, slots=True)
class Wakers:
    """What wakes a suspended workflow before its time."""

    #: Messages of these topics.
    topics: frozenset[str] = frozenset()
    #: For the key of a wait that has registered, how many of the things that it awaits may be missing.
    waits: Mapping[str, int] = field(default_factory=dict)

    def __or__(self, other: Wakers) -> Wakers:
        return Wakers(self.topics | other.topics, {**self.waits, **other.waits})


class Published(NamedTuple):
    """What has become of the start of a workflow."""

    #: It is born by this statement.
    born: bool
    #: When its message may be sent; None: later, by the recovery.
    published_at: datetime | None = None
    #: The unfinished workflow that has its deduplication id.
    holder: str | None = None


class ChildStart(NamedTuple):
    """What has become of the start of a child."""

    standing: Standing
    #: The child; None: nothing was written.
    child_id: str | None
    #: The task that the id asked for belongs to, if there was such a workflow before.
    taken_by: str | None
    #: Not by an earlier statement, whose answer was lost.
    is_new: bool
    #: When its message may be sent, if it is born now.
    published_at: datetime | None


class Look(NamedTuple):
    """A workflow as one node sees it."""

    name: str
    state: str
    retries: int
    mine: bool
    #: The node's heartbeat is younger than its lease.
    beating: bool
    draining: bool
    late: bool
    undelivered: bool
    #: When the workflow was made, as text: an id may be used again.
    born: str


class StoredMessage(NamedTuple):
    """A workflow's message, to be sent (again)."""

    workflow_id: str
    published_at: datetime | None
    attempt: int
    envelope: str
    body: bytes
    content_type: str
    content_encoding: str


class StoredOutcome(NamedTuple):
    """What a finished workflow ended with."""

    state: str
    ok: bool
    payload: Payload


class WorkflowRow(NamedTuple):
    """One workflow with its message's body and its outcome."""

    id: str
    name: str
    state: str
    queue: str
    attempt: int
    crashes: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    wake_at: datetime | None
    deadline: datetime | None
    waiting_for: str | None
    parent_id: str | None
    root_id: str | None
    forked_from: str | None
    node: str | None
    dispatched: bool | None
    retries: int
    worker: str | None
    claimed_at: datetime | None
    error_text: str | None
    #: None: there is none, or it is larger than was asked for.
    body: bytes | None
    body_size: int | None
    content_type: str | None
    content_encoding: str | None
    ok: bool | None
    #: None: there is none, or it is larger than was asked for.
    payload: Payload | None
    payload_size: int | None

    @classmethod
    def of(cls, row: tuple[Any, ...]) -> WorkflowRow:
        """Build from the columns of ``by_id`` and ``matching``."""
        *facts, value, size, content_type = row
        return cls(*(*facts, _payload(value, content_type), size))


class StepRow(NamedTuple):
    """One step of a workflow as it stands."""

    key: str
    seq: int
    attempt: int
    tries: int
    ok: bool | None
    #: None: there is none, or it is larger than was asked for.
    payload: Payload | None
    payload_size: int | None
    args: str | None
    fingerprint: bytes | None
    errors: bytes | None
    child_id: str | None
    wake_at: datetime | None
    started_at: datetime
    at: datetime

    @classmethod
    def of(cls, row: tuple[Any, ...]) -> StepRow:
        """Build from the columns of ``of_workflow``."""
        key, seq, attempt, tries, ok, value, size, content_type, *rest = row
        return cls(key, seq, attempt, tries, ok, _payload(value, content_type), size, *rest)


class AttemptRow(NamedTuple):
    """An attempt that has ended."""

    attempt: int
    worker: str | None
    node: str | None
    began_at: datetime | None
    ended_at: datetime
    ending: str


class MessageRow(NamedTuple):
    """A message that was sent to a workflow."""

    seq: int
    topic: str
    idempotency_key: str
    #: None: it is larger than was asked for.
    payload: Payload | None
    payload_size: int
    sent_at: datetime
    taken_by: str | None


class NodeRow(NamedTuple):
    """A worker's main process."""

    id: str
    hostname: str
    pid: int
    started_at: datetime
    seen_at: datetime
    is_alive: bool
    draining: bool
    running: int


class SweepRow(NamedTuple):
    """The last sweep of one kind of sweeper."""

    sweeper: str
    worker: str | None
    at: datetime
    #: Seconds.
    age: float


class Standings(NamedTuple):
    """How all of it stands; ages are in seconds."""

    now: datetime
    orphans: int
    dead: int
    undelivered: int
    timer_lag: float | None
    claim_lag: float | None


class Beat(NamedTuple):
    """The database's answer to a heartbeat."""

    seen: datetime
    draining: bool
    elected: bool


def _payload(value: bytes | None, content_type: str | None) -> Payload | None:
    return None if value is None else serialization.Payload(value, content_type)
