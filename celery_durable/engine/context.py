"""What runs here: the attempt and the step of the calling code."""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from .. import states
from ..exceptions import Cancelled, ControlFlow, HandedOver, NondeterminismError, NotInWorkflow, OwnershipLost
from ..serialization import Codec
from ..store import Store
from ..store.rows import Checkpoint, Claim, Fence, Standing, StoredMessage
from .observer import Observers

logger = logging.getLogger("celery_durable")

#: A statement of a run goes on trying for as long as its worker lives: the work is done, only Postgres is away.
WHILE_ALIVE = float("inf")
#: Rule 4 of the protocol: a body starts only if the run was seen to be well so recently.
LONGEST_BLIND = 1.0

_KEYS = uuid.UUID("6b5ee3a7-0c1c-4f3e-9d0a-5f0f6c8de1f4")


@dataclass(frozen=True, slots=True)
class Engine:
    """What all attempts of an app share."""

    store: Store
    codec: Codec
    observers: Observers
    lease: float
    suspend_after: float
    republish_after: float
    nondeterminism: str


@dataclass(slots=True)
class RunningStep:
    """One step whose body runs now."""

    name: str
    key: str
    idempotency_key: str
    #: Number of the try, from 1.
    attempt: int = 1
    #: When the try times out, on the monotonic clock.
    deadline: float | None = None

    def remaining(self) -> float | None:
        """Return the seconds until this try times out, or None if it has no limit."""
        return None if self.deadline is None else self.deadline - time.monotonic()


@dataclass(slots=True)
class Attempt:
    """One claim of a workflow, being run by this thread."""

    engine: Engine
    name: str
    fence: Fence
    history: dict[str, Checkpoint]
    signal: int
    #: The first unsettled step after a crash writes its try before its body.
    after_crash: bool = False
    calls: dict[str, int] = field(default_factory=dict)
    seq: int = 0
    #: What unwinds the function; once set, every durable call raises it again.
    unwinding: ControlFlow | None = None
    nondeterminism: NondeterminismError | None = None
    #: The message of Celery's own retry of this workflow, and the seconds until it runs.
    successor: StoredMessage | None = None
    successor_retries: int = 0
    successor_delay: float = 0.0
    #: When the statement was sent that last found the run well.
    last_look: float = 0.0
    thread: int = field(default_factory=threading.get_ident)

    @classmethod
    def of(cls, engine: Engine, name: str, claim: Claim, claimed_at: float) -> Attempt:
        """Begin an attempt with what the claim returned; ``claimed_at`` is the boot time before it was sent."""
        attempt = cls(engine, name, claim.fence, claim.history, claim.signal, after_crash=claim.crashes > 0)
        attempt.confirm(claimed_at)
        attempt.seq = max((step.seq for step in claim.history.values()), default=0)
        return attempt

    @property
    def id(self) -> str:
        """The workflow's id."""
        return self.fence.id

    def key_of(self, name: str) -> str:
        """Return the key of the next call of this name: ``charge``, ``charge#2``, …"""
        self.calls[name] = self.calls.get(name, 0) + 1
        return name if self.calls[name] == 1 else f"{name}#{self.calls[name]}"

    def next_seq(self) -> int:
        """Return the place of a step that runs for the first time."""
        self.seq += 1
        return self.seq

    def idempotency_key(self, key: str) -> str:
        """Return what identifies a step's effect to the outside: the same on every attempt."""
        return str(uuid.uuid5(_KEYS, f"{self.id}\x00{key}"))

    def child_id(self, name: str) -> str:
        """Return the id of the next child workflow of this task: the same on every replay."""
        return str(uuid.uuid5(_KEYS, f"{self.id}\x00child\x00{self.key_of(f'child of {name}')}"))

    def check_caller(self) -> None:
        """Raise what unwinds this attempt, and NotInWorkflow in a thread that the user made."""
        if self.unwinding is not None:
            raise self.unwinding
        if self.nondeterminism is not None:
            raise self.nondeterminism
        if threading.get_ident() != self.thread:
            raise NotInWorkflow(
                f"The workflow {self.id} made a durable call in a thread of its own, where the order of calls "
                "isn't the same on every replay: call steps in the workflow's thread, threads inside a step."
            )

    def unwind(self, reason: ControlFlow) -> ControlFlow:
        """Remember why this attempt ends, and return it to be raised."""
        self.unwinding = reason
        return reason

    def confirm(self, sent_at: float) -> None:
        """Note that a statement which was sent then has found the run well."""
        self.last_look = sent_at

    def look_if_stale(self) -> None:
        """Read how the run stands if the last look is too old to start a body; unwind if it isn't well."""
        now = boot_time()
        if now - self.last_look <= min(LONGEST_BLIND, self.engine.lease / 2):
            return
        look = self.engine.store.workflows.look(self.fence, patience=WHILE_ALIVE)
        if look is None or not look.mine:
            self.judge(None)
        else:
            self.judge(Standing(look.state, look.draining, look.late))
        self.confirm(now)

    def judge(self, standing: Standing | None) -> None:
        """Unwind if the run isn't well."""
        if standing is None or standing.state not in (states.RUNNING, states.CANCELLED):
            self.engine.observers.tell("fenced", self.id)
            raise self.unwind(OwnershipLost(f"Another worker has taken the workflow {self.id} over."))
        if standing.state == states.CANCELLED:
            raise self.unwind(Cancelled(f"The workflow {self.id} was cancelled."))
        if standing.late:
            raise self.unwind(Cancelled(f"The deadline of the workflow {self.id} has passed."))
        if standing.draining:
            raise self.unwind(HandedOver("The worker shuts down."))


_attempt: ContextVar[Attempt | None] = ContextVar("celery_durable_attempt", default=None)
_step: ContextVar[RunningStep | None] = ContextVar("celery_durable_step", default=None)


class _Here:
    """How many attempts of this process run, and how many of them are inside a step."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.attempts = 0
        self.steps = 0

    def count(self, *, attempts: int = 0, steps: int = 0) -> None:
        with self._lock:
            self.attempts += attempts
            self.steps += steps


_here = _Here()


def current_attempt() -> Attempt | None:
    """Return the attempt that the calling code belongs to."""
    return _attempt.get()


def current_step() -> RunningStep | None:
    """Return the step that the calling code belongs to."""
    return _step.get()


def only_bodies_here() -> bool:
    """Tell whether workflow functions run in this process, and all of them outside their steps."""
    return _here.attempts > 0 and _here.steps == 0


@contextmanager
def running(attempt: Attempt) -> Iterator[None]:
    """Make this the current attempt."""
    token = _attempt.set(attempt)
    _here.count(attempts=1)
    try:
        yield
    finally:
        _here.count(attempts=-1)
        _attempt.reset(token)


@contextmanager
def running_step(step: RunningStep) -> Iterator[None]:
    """Make this the current step."""
    token = _step.set(step)
    _here.count(steps=1)
    try:
        yield
    finally:
        _here.count(steps=-1)
        _step.reset(token)


def boot_time() -> float:
    """Return seconds on a clock that goes on while the machine is suspended, where there is one."""
    return time.clock_gettime(_CLOCK)


_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
