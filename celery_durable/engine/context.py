"""What runs here: the attempt and the step of the calling code."""

from __future__ import annotations

import logging
import math
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha1
from typing import TYPE_CHECKING, Any, NoReturn

from .. import states
from ..config import seconds
from ..exceptions import (
    Cancelled,
    ControlFlow,
    HandedOver,
    MaxRetriesExceededError,
    NondeterminismError,
    NotInWorkflow,
    OwnershipLost,
)
from ..store.rows import Checkpoint, Claim, Fence, Standing, StoredMessage
from .observer import Observers
from .retry import DEFAULT_RETRIES, TryAgain, check_reason

if TYPE_CHECKING:
    from ..serialization import Codec
    from ..shapes import Shape
    from ..store import StepRecord, Store

logger = logging.getLogger("celery_durable")

#: A statement of a run goes on trying for as long as its worker lives: the work is done, only Postgres is away.
WHILE_ALIVE = float("inf")
#: Rule 4 of the protocol: a body starts only if the run was seen to be well so recently.
LONGEST_BLIND = 1.0
#: Steps of one workflow at which a warning is worth its while.
MANY_STEPS = 10_000
#: Seconds that a body which looks whether it is cancelled waits for an answer.
LONGEST_ANSWER = 0.25

_KEYS = uuid.UUID("6b5ee3a7-0c1c-4f3e-9d0a-5f0f6c8de1f4").bytes


@dataclass(frozen=True, slots=True)
class Engine:
    """What all attempts of an app share."""

    store: Store
    codec: Codec
    observers: Observers
    lease: float
    suspend_after: float
    republish_after: float
    #: The longest that finished workflows are kept for, of those states that aren't kept for ever.
    retention: float
    nondeterminism: str
    #: In tests: what each replay would do again is an error, of which a worker only warns.
    strict: bool = False


@dataclass(slots=True)
class RunningStep:
    """One step whose body runs now."""

    name: str
    key: str
    idempotency_key: str
    #: Retries that the body may ask for itself; None for ever.
    asked_retries: int | None = DEFAULT_RETRIES
    #: Number of the try, from 1.
    attempt: int = 1
    #: When the try times out, on the monotonic clock.
    deadline: float | None = None
    #: The connection of an atomic step, in its transaction, and the session of an object-relational mapper on it.
    connection: Any = None
    session: Any = None
    #: What the caller of the step is handling, which is no error of the step.
    outside: BaseException | None = None

    def remaining(self) -> float | None:
        """Return the seconds until this try times out, or None if it has no limit."""
        return None if self.deadline is None else self.deadline - time.monotonic()

    @contextmanager
    def until(self, deadline: float | None) -> Iterator[None]:
        """Let an earlier deadline hold in the block."""
        outer = self.deadline
        self.deadline = min((each for each in (outer, deadline) if each is not None), default=None)
        try:
            yield
        finally:
            self.deadline = outer

    def retry(self, exc: Exception | None = None, countdown: float | timedelta | None = None) -> NoReturn:
        """End this try and ask for another one: ``raise durable.current.step.retry(countdown=30)``.

        ``countdown`` is in seconds or a timedelta (a ``Retry-After``, say); without it the step's own delay counts.
        As with Celery's ``self.retry``, the step's ``max_retries`` holds (3 if it has no retry options); when they
        are used up, ``exc``, the error being handled, or MaxRetriesExceededError is raised. The failed try is
        recorded, and a long delay gives the worker back.
        """
        delay = None if countdown is None else seconds(countdown, "countdown", zero=True)
        error = self.handled() if exc is None else check_reason(exc)
        if self.may_ask:
            raise TryAgain(error if isinstance(error, Exception) else None, delay)
        if error is None:
            error = MaxRetriesExceededError(f"The step {self.key!r} has used up its {self.attempt} tries.")
        raise error

    @property
    def may_ask(self) -> bool:
        """Whether the body may ask for another try."""
        return self.asked_retries is None or self.attempt <= self.asked_retries

    def handled(self) -> BaseException | None:
        """Return the error that the body is handling now."""
        error = sys.exc_info()[1]
        return None if error is self.outside else error


class PlainStep:
    """A step that was called as the plain function that it is: no limit, no other try."""

    attempt = 1
    deadline = None

    def __init__(self, name: str) -> None:
        self.name = name

    def remaining(self) -> None:
        """Return None: there is no limit."""

    def retry(self, exc: Exception | None = None, countdown: float | timedelta | None = None) -> NoReturn:
        """Raise ``exc``, or the error being handled: as Celery's ``self.retry`` in a task that is called directly."""
        raise exc or sys.exc_info()[1] or MaxRetriesExceededError(f"The step {self.name!r} asked for another try.")


@dataclass(slots=True)
class Branch:
    """A sequence of calls that is the same on every replay: the function itself, or one of its asyncio tasks."""

    #: Empty for the function; ``pack`` for its first task of the coroutine function ``pack``, ``pack:2/wrap`` for the
    #: first ``wrap`` of its second one.
    path: str = ""
    calls: dict[str, int] = field(default_factory=dict)
    tasks: dict[str, int] = field(default_factory=dict)

    def key_of(self, name: str) -> str:
        """Return the key of the next call of this name: ``charge``, ``charge#2``, … ``charge[pack]``."""
        self.calls[name] = count = self.calls.get(name, 0) + 1
        place = f"{name}[{self.path}]" if self.path else name
        return place if count == 1 else f"{place}#{count}"

    def fork(self, name: str) -> Branch:
        """Begin the branch of a new task. As with steps, those of other names may come and go in a deploy."""
        self.tasks[name] = count = self.tasks.get(name, 0) + 1
        place = name if count == 1 else f"{name}:{count}"
        return Branch(f"{self.path}/{place}" if self.path else place)


@dataclass(slots=True)
class Attempt:
    """One claim of a workflow, being run by one thread, or by the process's event loop."""

    engine: Engine
    name: str
    fence: Fence
    history: dict[str, Checkpoint]
    #: Crashes since the last new checkpoint.
    crashes: int = 0
    root_id: str = ""
    #: Host name of the node, as Celery has it.
    worker: str = ""
    #: Somebody watches Celery's monitoring events.
    watched: bool = False
    #: This is a pool process, which a hard time limit may kill.
    killable: bool = False
    #: What the function's result is rebuilt to; None: whatever the serializer gives.
    shape: Shape | None = None
    #: Sends the messages of workflows that this one has woken; what isn't sent is left to the recovery.
    send: Callable[[Sequence[StoredMessage]], None] = lambda messages: None
    #: Shows a state and its facts in Celery's result backend.
    show_state: Callable[[str | None, Any], None] = lambda state, meta: None
    #: Lets Celery's STARTED not come over a state that somebody stores.
    end_started: Callable[[], None] = lambda: None
    #: The first unsettled step after a crash writes its try before its body.
    after_crash: bool = False
    seq: int = 0
    #: The place of the last step that earlier attempts have begun, and of the last one that this attempt has reached.
    known_seq: int = 0
    reached_seq: int = 0
    #: The boot time before the claim was sent, and when its answer was there.
    claimed_at: float = 0.0
    loaded_at: float = 0.0
    #: Seconds from the claim until the workflow's deadline.
    deadline_in: float | None = None
    #: The ids under which a replay knows workflows whose own ids were made by chance.
    aliases: dict[str, str] = field(default_factory=dict)
    #: Which changes of the code this attempt takes, as far as it has asked.
    patches: dict[str, bool] = field(default_factory=dict)
    root: Branch = field(default_factory=Branch)
    #: What unwinds the function; once set, every durable call raises it again.
    unwinding: ControlFlow | None = None
    nondeterminism: NondeterminismError | None = None
    #: The message of Celery's own retry of this workflow, and the seconds until it runs.
    successor: StoredMessage | None = None
    successor_retries: int = 0
    successor_delay: float = 0.0
    #: When the statement was sent that last found the run well.
    last_look: float = 0.0
    #: When the workflow was made, as text, once a look has told it.
    born: str = ""
    #: The database's time at boot time zero: times of errors come from the one clock that all workers share.
    epoch: datetime | None = None
    thread: int = field(default_factory=threading.get_ident)
    #: The function is a coroutine, and the thread is that of the event loop.
    on_loop: bool = False
    #: The steps that run on the event loop.
    flights: Any = None
    #: Why the workflow is over, once ``is_over`` has seen it.
    over: ControlFlow | None = None
    asked_at: float = 0.0
    #: The workflow's.
    id: str = field(init=False)

    def __post_init__(self) -> None:
        self.id = self.fence.id

    @classmethod
    def of(cls, engine: Engine, name: str, claim: Claim, claimed_at: float, **facts: Any) -> Attempt:
        """Begin an attempt with what the claim returned; ``claimed_at`` is the boot time before it was sent."""
        attempt = cls(
            engine, name, claim.fence, claim.history, claim.crashes, deadline_in=claim.deadline_in,
            after_crash=claim.crashes > 0, epoch=claim.now - timedelta(seconds=boot_time()), **facts,
        )  # fmt: skip
        attempt.claimed_at, attempt.loaded_at = claimed_at, boot_time()
        attempt.confirm(claimed_at)
        attempt.seq = attempt.known_seq = max((step.seq for step in claim.history.values()), default=0)
        return attempt

    def key_of(self, name: str) -> str:
        """Return the key of the next call of this name in the calling branch."""
        return (_branch.get() or self.root).key_of(name)

    def take_suspicion(self) -> bool:
        """Tell whether the step that starts now may be the one that crashed; only the first one may."""
        suspicious, self.after_crash = self.after_crash, False
        return suspicious

    def now(self) -> datetime | None:
        """Return the database's time, by this machine's boot clock."""
        return None if self.epoch is None else self.epoch + timedelta(seconds=boot_time())

    def reach(self, saved: Checkpoint | None) -> int:
        """Return the place of a step: that of its first call, or the next one."""
        if saved is None:
            self.seq += 1
            if self.seq == MANY_STEPS:
                logger.warning(
                    "The workflow %s has made %d steps, and each attempt replays all of them: start a child workflow "
                    "for each part of the work.", self.id, MANY_STEPS,
                )  # fmt: skip
            return self.seq
        if saved.seq > self.reached_seq:
            self.reached_seq = saved.seq
        return saved.seq

    def idempotency_key(self, key: str) -> str:
        """Return what identifies a step's effect to the outside: the same on every attempt."""
        # As uuid.uuid5, of which each step has one, at a third of the cost.
        digits = sha1(_KEYS + f"{self.id}\x00{key}".encode(), usedforsecurity=False).hexdigest()
        variant = "89ab"[int(digits[16], 16) % 4]
        return f"{digits[:8]}-{digits[8:12]}-5{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:32]}"

    @property
    def is_replaying(self) -> bool:
        """Whether earlier attempts have come further than this one is now."""
        return self.reached_seq < self.known_seq

    @property
    def deadline_left(self) -> float | None:
        """Seconds until the workflow's deadline."""
        return None if self.deadline_in is None else max(self.deadline_in - (boot_time() - self.claimed_at), 0.0)

    def left_of(self, checkpoint: Checkpoint) -> float:
        """Return the seconds until the time of a checkpoint that the claim has loaded."""
        return max(checkpoint.due_in - (boot_time() - self.loaded_at), 0.0) if checkpoint.due_in else 0.0

    def check_going(self) -> None:
        """Raise what unwinds this attempt."""
        if self.unwinding is not None:
            raise self.unwinding
        if self.nondeterminism is not None:
            raise self.nondeterminism

    def check_caller(self) -> None:
        """Raise what unwinds this attempt, and NotInWorkflow in a thread that the user made."""
        if self.unwinding is not None or self.nondeterminism is not None:
            self.check_going()
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

    @property
    def is_stale(self) -> bool:
        """Whether the last look is too old to start a body."""
        return boot_time() - self.last_look > min(LONGEST_BLIND, self.engine.lease / 2)

    def look(self) -> None:
        """Read how the run stands; unwind if it isn't well."""
        now = boot_time()
        self.judge(self.standing(WHILE_ALIVE))
        self.confirm(now)

    def standing(self, patience: float) -> Standing | None:
        """Read how the run stands; None: it isn't ours any more."""
        look = self.engine.store.workflows.look(self.fence, patience=patience)
        if look is None or not look.mine:
            return None
        self.born = look.born
        return Standing(look.state, look.draining, look.late)

    def is_over(self) -> bool:
        """Tell whether the workflow was cancelled, ran out of time or was taken over.

        Asks at most once a second, and doesn't wait for a database that hangs: its answer counts when it comes.
        """
        if self.over is None and boot_time() - self.asked_at >= LONGEST_BLIND:
            # The next question is due a second after the answer, so a thread that waits for one is the only one.
            question = threading.Thread(target=self._ask, name="celery_durable question", daemon=True)
            self.asked_at = math.inf
            try:
                question.start()
            except BaseException:
                self.asked_at = boot_time()
                raise
            question.join(LONGEST_ANSWER)
        return self.over is not None

    def _ask(self) -> None:
        try:
            self.over = self.end_of(self.standing(0))
        except Exception as error:  # noqa: BLE001 - only a question: the step goes on, and is judged at its end
            # This thread isn't one of the workflow's.
            named = {"workflow_id": self.id}
            logger.warning("Whether the workflow %s is cancelled can't be seen now: %s", self.id, error, extra=named)
        finally:
            self.asked_at = boot_time()

    def save(self, records: Sequence[StepRecord]) -> bool:
        """Record outcomes the fast way, in one statement; False: nothing was written."""
        checkpoints = self.engine.store.checkpoints
        if len(records) == 1:
            return checkpoints.save(self.fence, records[0], patience=WHILE_ALIVE)
        return checkpoints.save_many(self.fence, records, patience=WHILE_ALIVE)

    def judge(self, standing: Standing | None) -> None:
        """Unwind if the run isn't well."""
        end = self.end_of(standing)
        if isinstance(end, OwnershipLost):
            self.engine.observers.tell("fenced", self.id)
        if end is None and standing is not None and standing.draining:
            end = HandedOver("The worker shuts down.")
        if end is not None:
            raise self.unwind(end)

    def end_of(self, standing: Standing | None) -> ControlFlow | None:
        """Return what ends a run that stands so, wherever it is; a hand-over waits for its step."""
        if standing is None or standing.state not in (states.RUNNING, states.CANCELLED, states.ENQUEUED):
            return OwnershipLost(f"Another worker has taken the workflow {self.id} over.")
        # Enqueued under this attempt's own token: it was cancelled and is resumed, as soon as this attempt lets go.
        if standing.state in (states.CANCELLED, states.ENQUEUED):
            return Cancelled(f"The workflow {self.id} was cancelled.")
        return Cancelled(f"The deadline of the workflow {self.id} has passed.") if standing.late else None


_attempt: ContextVar[Attempt | None] = ContextVar("celery_durable_attempt", default=None)
_branch: ContextVar[Branch | None] = ContextVar("celery_durable_branch", default=None)
_step: ContextVar[RunningStep | None] = ContextVar("celery_durable_step", default=None)
_plain_step: ContextVar[PlainStep | None] = ContextVar("celery_durable_plain_step", default=None)
_plain_function: ContextVar[bool] = ContextVar("celery_durable_plain_function", default=False)


#: The attempts of this process that run, and the bodies of their steps that do; both by what is alive meanwhile.
_attempts_here: set[object] = set()
_steps_here: set[object] = set()


#: Return the attempt that the calling code belongs to.
current_attempt = _attempt.get
#: Return the step that the calling code belongs to.
current_step = _step.get
#: Return the step that the calling code belongs to, if it is a plain call.
current_plain_step = _plain_step.get


@contextmanager
def plain_step(name: str) -> Iterator[None]:
    """Make a plain call of this step the current one."""
    token = _plain_step.set(PlainStep(name))
    try:
        yield
    finally:
        _plain_step.reset(token)


@contextmanager
def plain_function() -> Iterator[None]:
    """Let a workflow function be called directly, or in eager mode: without a database."""
    token = _plain_function.set(True)
    try:
        yield
    finally:
        _plain_function.reset(token)


def in_plain_function() -> bool:
    """Tell whether the calling code belongs to a workflow function that is called directly, or in eager mode."""
    return _plain_function.get() and _attempt.get() is None


def current_branch() -> Branch | None:
    """Return the branch that the calling code belongs to; None inside a step, whose tasks are its own affair."""
    return None if _step.get() is not None or _attempt.get() is None else _branch.get()


def enter_branch(branch: Branch) -> None:
    """Make this the branch of the current context."""
    _branch.set(branch)


def only_bodies_here() -> bool:
    """Tell whether workflow functions run in this process, and all of them outside their steps."""
    return bool(_attempts_here) and not _steps_here


@contextmanager
def running(attempt: Attempt) -> Iterator[None]:
    """Make this the current attempt."""
    token, branch, here = _attempt.set(attempt), _branch.set(attempt.root), object()
    _attempts_here.add(here)
    try:
        yield
    finally:
        _attempts_here.discard(here)
        _branch.reset(branch)
        _attempt.reset(token)


class running_step:  # noqa: N801 - a context manager as contextlib makes them, at half the cost
    """Make this the current step."""

    __slots__ = ("_step", "_token")

    def __init__(self, step: RunningStep) -> None:
        self._step = step

    def __enter__(self) -> None:
        self._step.outside = sys.exc_info()[1]
        self._token = _step.set(self._step)
        _steps_here.add(self)

    def __exit__(self, *error: object) -> None:
        _steps_here.discard(self)
        _step.reset(self._token)


def boot_time() -> float:
    """Return seconds on a clock that goes on while the machine is suspended, where there is one."""
    return time.clock_gettime(_CLOCK)


_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
