"""One step: answered from its checkpoint, or called under its policy and recorded."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from types import CoroutineType
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from .. import states
from ..exceptions import (
    CodecError,
    ControlFlow,
    DurableError,
    NondeterminismError,
    PayloadTooLarge,
    SerializationError,
    StepLost,
    StepTimeout,
    Suspended,
    ends_process,
)
from ..serialization import Codec, Payload, fingerprint, is_kept_exactly
from ..shapes import Shape
from ..store.rows import Checkpoint, Standing, StepRecord
from ..text import call_repr
from .atomic import call_atomically
from .context import WHILE_ALIVE, Attempt, RunningStep, boot_time, logger, running_step
from .limits import UNLIMITED, Limit, hard_limit, is_foreign_limit, soft_limit
from .observer import StepReport
from .retry import Ended, RetryPolicy, TryAgain, asked_in, tried_again
from .waiting import IN_THREAD, Waiting, complete
from .watch import watching

if TYPE_CHECKING:
    from ..store import Place

T = TypeVar("T")
Body = Callable[..., Any]

_ATTRIBUTES = vars(BaseException)["__dict__"]
_WELL = Standing(states.RUNNING, draining=False, late=False)

#: Failed tries whose errors are kept; ``tries`` counts all of them.
MOST_ERRORS = 20


@dataclass(frozen=True, slots=True)
class StepSpec:
    """A step as its author declared it; durations are in seconds."""

    name: str
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    #: Expected errors: logged without alarm.
    throws: tuple[type[BaseException], ...] = ()
    #: Per try.
    soft_time_limit: float | None = None
    time_limit: float | None = None
    #: Cancellation interrupts the body.
    cancellable: bool = False
    #: Body and checkpoint are one transaction: in our database, or in one that the app reaches in its own way.
    atomic: bool | Place = False
    #: The body is an ``async def``.
    is_async: bool = False
    #: It is, or wraps one: what it returns may have to be awaited.
    wraps_async: bool = False
    serializer: str | None = None
    compression: str | None = None
    #: What its result is rebuilt to; None: whatever the serializer gives.
    shape: Shape | None = None
    #: Something may interrupt a body.
    is_limited: bool = field(init=False)

    def __post_init__(self) -> None:
        limited = self.cancellable or self.soft_time_limit is not None or self.time_limit is not None
        object.__setattr__(self, "is_limited", limited)


def call_step(
    attempt: Attempt,
    spec: StepSpec,
    body: Body,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    waiting: Waiting = IN_THREAD,
) -> Any:
    """Return the step's value, or raise its error: alike on the first run and on every replay."""
    call = Call(attempt, spec, args, kwargs)
    answer = call.replay() if call.is_settled else complete(call.run(body, waiting))
    return answer.get()


class Answer(NamedTuple):
    """What a step gives to its workflow."""

    value: Any = None
    error: Exception | None = None
    #: The live error, of which ``error`` is what a replay will see.
    cause: BaseException | None = None

    def get(self) -> Any:
        """Return the value, or raise the error."""
        if self.error is not None:
            raise self.error from self.cause
        return self.value


class Call:
    """One call of a step in an attempt; made in the order of the calls, run in any."""

    failed_tries = 0
    errors: bytes | None = None
    #: Seconds until the next try is due.
    due_in = 0.0
    #: The last try's process was killed by its time limit.
    overran = False
    #: The try that runs was counted before it began.
    is_spent = False
    #: How the run stood at the last statement that has told it.
    standing = _WELL
    #: There is a row of this step already.
    has_row = False
    waiting: Waiting = IN_THREAD
    #: When the current try began, on the monotonic clock.
    began = 0.0
    #: An earlier attempt has its outcome.
    is_settled: bool
    #: What the body sees of itself, from ``run`` on.
    step: RunningStep
    _note: tuple[str | None, bytes] | None = None

    def __init__(self, attempt: Attempt, spec: StepSpec, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        attempt.check_caller()
        self.attempt = attempt
        self.spec = spec
        self.key = attempt.key_of(spec.name)
        self.args = args
        self.kwargs = kwargs
        self.saved = saved = attempt.history.get(self.key)
        self.codec: Codec = attempt.engine.codec.using(spec.serializer, spec.compression)
        #: Made now: a body may change its arguments.
        self.fingerprint = fingerprint(args, kwargs)
        self.check_arguments()
        self.seq = attempt.reach(saved)
        self.is_settled = saved is not None and saved.ok is not None
        if saved is not None and not self.is_settled:
            self.go_on_from(saved)

    def __str__(self) -> str:
        return f"The step {self.key!r} of workflow {self.attempt.id}"

    def go_on_from(self, saved: Checkpoint) -> None:
        """Take over the tries of earlier attempts."""
        self.has_row, self.failed_tries, self.errors = True, saved.tries, saved.errors
        self.due_in, self.overran = saved.due_in, saved.overran

    @property
    def idempotency_key(self) -> str:
        """What identifies the effect of this call to the outside: the same on every try and attempt."""
        return self.attempt.idempotency_key(self.key)

    @property
    def note(self) -> tuple[str | None, bytes]:
        """What is kept of the arguments, as they are when this is first asked for."""
        if self._note is None:
            text = call_repr(self.args, self.kwargs)
            self._note = self.or_later(lambda: self.codec.note(text, self.fingerprint))
        return self._note

    def check_arguments(self) -> None:
        """Raise NondeterminismError if an earlier attempt has called this step otherwise."""
        saved = self.saved
        if saved is None or saved.fingerprint is None or saved.fingerprint == self.fingerprint:
            return
        args, digest = self.or_later(lambda: self.codec.read_note(saved.args, saved.fingerprint))
        if digest == self.fingerprint:
            return
        error = NondeterminismError(
            f"{self} was first called with ({args}), and is now called with "
            f"({call_repr(self.args, self.kwargs)}): what a workflow passes to a step may only depend on its own "
            "arguments and on other steps."
        )
        if self.attempt.engine.nondeterminism == "warn":
            logger.warning("%s", error)
            return
        self.attempt.nondeterminism = error
        raise error

    def or_later(self, code: Callable[[], T]) -> T:
        """Return what this encodes or decodes; where the payload codec can't, the workflow waits until one can.

        That is the state of a process, or of a server of keys. It must not be the outcome of a step.
        """
        try:
            return code()
        except CodecError as error:
            raise self.later(error) from error

    def later(self, error: CodecError) -> ControlFlow:
        """Return what lets the workflow wait for another payload codec."""
        logger.error("The workflow %s waits for a payload codec that can go on with it: %s", self.attempt.id, error)
        wait = Suspended(f"payload codec for {self.key}", self.attempt.engine.republish_after)
        return self.attempt.unwind(wait)

    def replay(self) -> Answer:
        """Answer from the checkpoint of an earlier attempt."""
        assert self.saved is not None
        self.attempt.engine.observers.tell("step_replayed", self.attempt.id, self.key)
        return self.answer(self.saved)

    def answer(self, checkpoint: Checkpoint, cause: BaseException | None = None) -> Answer:
        """Return what a checkpoint holds."""
        assert checkpoint.payload is not None
        payload = checkpoint.payload
        if checkpoint.ok:
            try:
                return Answer(self.decode(payload))
            except CodecError as sealed:
                raise self.later(sealed) from sealed
            except SerializationError as unreadable:
                return Answer(error=unreadable, cause=unreadable.__cause__)
        error = self.or_later(lambda: self.codec.decode_error(payload))
        _add_note(error, f"Raised by step {self.key!r} of workflow {self.attempt.id}, try {checkpoint.tries}.")
        return Answer(error=error, cause=cause)

    # The run of a step that isn't settled.

    async def run(self, body: Body, waiting: Waiting) -> Answer:
        """Run the step to its outcome."""
        self.note  # noqa: B018 - made now: the body may change its arguments
        self.waiting, spec = waiting, self.spec
        self.step = RunningStep(spec.name, self.key, self.idempotency_key, asked_retries=spec.retry.asked_retries)
        if self.is_lost:
            return await self.settle(Ended(error=self.loss()))
        if self.due_in:
            await self.wait(self.due_in)
        failed_tries, ended = self.failed_tries, await self.try_once(body)
        if ended.error is not None:
            ended = await tried_again(
                spec.retry,
                ended,
                partial(self.try_once, body),
                failed_tries=failed_tries,
                failed=self.record_try,
                wait=self.wait,
            )
        if ended.error is not None and is_foreign_limit(ended.error):
            raise ended.error
        return await self.settle(ended)

    @property
    def is_lost(self) -> bool:
        """A step whose process died in the last of its tries has none left."""
        saved, retries = self.saved, self.spec.retry.max_retries or 0
        return saved is not None and saved.spent and 0 < retries < saved.tries

    def loss(self) -> StepLost:
        """Return the error of a step that is lost."""
        return StepLost(f"{self} used up its {self.failed_tries} tries: its worker process died in the last of them.")

    async def try_once(self, body: Body) -> Ended:
        """Call the body once."""
        attempt = self.attempt
        attempt.check_going()
        if self.overran:
            return self.overrun()
        if attempt.after_crash or self.spec.time_limit is not None:
            await self.write_ahead()
        if attempt.is_stale:
            await self.waiting.run(attempt.look)
        self.step.attempt = self.failed_tries + 1
        tell = attempt.engine.observers.tell
        tell("step_starting", attempt.id, self.key)
        self.began = time.monotonic()
        try:
            tell("body_starting", attempt.id, self.key, self)
            return await self.waiting.call(self, body)
        finally:
            tell("body_ended", attempt.id, self.key)

    def overrun(self) -> Ended:
        """Return how the try ended that an earlier attempt was killed in."""
        self.overran = False
        return Ended(error=StepTimeout(f"{self} ran longer than its time_limit: its worker process was killed."))

    async def write_ahead(self) -> None:
        """Write a row before the body where a death of the process must leave a trace.

        The first body after a crash spends its try beforehand: it may have been the one that crashed. A try with a
        hard limit leaves its deadline, by which the next claim knows what has killed it.
        """
        self.is_spent = self.attempt.take_suspicion()
        if self.is_spent or self.hard_limit is not None:
            await self.save_try(None)
            self.attempt.judge(self.standing)

    @property
    def hard_limit(self) -> float | None:
        """Seconds after which the process is killed; where it can't be, the limit is a soft one."""
        return self.spec.time_limit if self.attempt.killable else None

    @property
    def soft_limit(self) -> float | None:
        """Seconds after which the body is interrupted."""
        soft, hard = self.spec.soft_time_limit, self.spec.time_limit
        if hard is None or self.attempt.killable:
            return soft
        return hard if soft is None else min(soft, hard)

    @property
    def limit(self) -> Limit:
        """The soft limit of one try."""
        if not self.spec.is_limited:
            return UNLIMITED
        option = "soft_time_limit" if self.soft_limit == self.spec.soft_time_limit else "time_limit"
        return soft_limit(self.soft_limit, self, option=option, interruptible=self.spec.cancellable)

    def call_body(self, body: Body) -> Ended:
        """Call a body in this thread, within its limits."""
        is_free, limit, interrupted = not self.spec.is_limited, self.limit, False
        try:
            with running_step(self.step):
                return Ended(body(*self.args, **self.kwargs) if is_free else self.call_within(limit, body))
        except TryAgain as again:
            # Celery's own autoretry, which an unmodified task has, doesn't know whose limit it was.
            interrupted = again.error is not None and is_foreign_limit(again.error)
            return Ended(error=again.error if again.error is not None and is_foreign_limit(again.error) else again)
        except ControlFlow as reason:
            interrupted = True
            raise self.attempt.unwind(reason) from None
        except Exception as error:  # noqa: BLE001 - whatever it raises is how the try ended
            interrupted = is_foreign_limit(error)
            return Ended(error=error)
        except BaseException as error:  # noqa: BLE001 - what isn't the body's is raised again
            return self.ended_by(error)
        finally:
            if interrupted or limit.has_interrupted:
                self.attempt.engine.observers.tell("step_interrupted", self.attempt.id, self.key)

    def call_within(self, limit: Limit, body: Body) -> Any:
        """Return what a body returns that something may interrupt."""
        watch = watching(self.attempt, limit) if self.spec.cancellable else nullcontext()
        with hard_limit(self.hard_limit), watch, limit:
            self.step.deadline = limit.deadline
            return body(*self.args, **self.kwargs)

    def ended_by(self, error: BaseException) -> Ended:
        """Return how a try ended by what is no Exception; what ends the process is raised."""
        again = asked_in(error)
        if again is not None:
            return Ended(error=again)
        if ends_process(error):
            raise error
        return Ended(error=self.codec.rebuilt(error))

    def call_here(self, body: Body) -> Ended:
        """Call a body in this thread, in a transaction if it is to be atomic."""
        return call_atomically(self, body) if self.spec.atomic else self.call_body(body)

    # What is written.

    async def record_try(self, ended: Ended, delay: float) -> None:
        """Keep a failed try, so that no crash gives it back."""
        attempt, error = self.attempt, _error_of(ended)
        self.failed_tries += 1
        self.errors = _with_error(self.errors, self.codec.encode_error(error, attempt.now(), self.took).data)
        attempt.engine.observers.tell("try_failed", attempt.id, self.key, error)
        logger.log(
            logging.INFO if isinstance(error, self.spec.throws) else logging.WARNING,
            "Step %s of workflow %s failed in try %d (%r), next in %.3g s.",
            self.key, attempt.id, self.failed_tries, error, delay, extra={"step": self.key},
        )  # fmt: skip
        await self.save_try(delay)
        attempt.engine.observers.tell("try_recorded", attempt.id, self.key)
        self.report("RETRY", error=error, retries=self.failed_tries - 1)
        attempt.judge(self.standing)

    async def save_try(self, delay: float | None) -> None:
        """Write a try that failed, with the delay until the next, or one that is about to begin."""
        sent_at = boot_time()
        self.heed(await self.waiting.run(partial(self.write_try, delay)))
        self.attempt.confirm(sent_at)

    def write_try(self, delay: float | None) -> Standing | None:
        """Make the statement of ``save_try``."""
        self.has_row, begins = True, delay is None
        spent, kill_in = (self.is_spent, self.hard_limit) if begins else (False, None)
        record = self.record_of(Checkpoint(self.key, self.seq, self.failed_tries + spent))
        return self.attempt.engine.store.checkpoints.save_try(
            self.attempt.fence, record, delay, spent=spent, kill_in=kill_in, patience=WHILE_ALIVE
        )

    async def wait(self, seconds: float) -> None:
        """Pass the time until the next try: here if it is short, without a worker if it is long."""
        if seconds > self.attempt.engine.suspend_after:
            await self.waiting.park(self.attempt, f"retry of step {self.key}", seconds)
        else:
            await self.waiting.pause(self.attempt, seconds)

    async def settle(self, ended: Ended) -> Answer:
        """Record the outcome, then answer with what was recorded."""
        attempt, tell = self.attempt, self.attempt.engine.observers.tell
        tell("step_returned", attempt.id, self.key)
        outcome = _Outcome(ended.checkpoint) if ended.checkpoint else await self.keep(ended)
        attempt.history[self.key] = outcome.checkpoint
        tell("step_recorded", attempt.id, self.key)
        answer = outcome.answer or self.answer(outcome.checkpoint, outcome.cause)
        # The live error has the traceback, which the rebuilt one hasn't.
        error = answer.error if answer.error is None or outcome.cause is None else outcome.cause
        self.report("SUCCESS" if error is None else "FAILURE", answer.value, error, self.failed_tries)
        if self.standing is not _WELL:
            attempt.judge(self.standing)
        return answer

    async def keep(self, ended: Ended) -> _Outcome:
        """Write how the last try ended. A value that there is no memory for is an error: its effect has happened."""
        try:
            return await self.save(self.outcome_of(ended))
        except MemoryError as error:
            return await self.save(self.failure(error))

    def outcome_of(self, ended: Ended) -> _Outcome:
        """Return what is stored of a last try. A value that can't be is an error: its effect has happened."""
        if ended.error is not None:
            return self.failure(_error_of(ended))
        try:
            # With the transaction of an atomic step its effects are rolled back.
            payload = (self.encode if self.spec.atomic else self.encode_result)(ended.value)
            return _Outcome(self.checkpoint(payload, ok=True), Answer(self.read_back(ended.value, payload)))
        except (SerializationError, PayloadTooLarge) as error:
            return self.failure(error)

    def failure(self, error: Exception) -> _Outcome:
        """Return what is stored of an error."""
        payload = self.codec.encode_error(error, self.attempt.now(), self.took)
        return _Outcome(self.checkpoint(payload, ok=False, spent=not isinstance(error, StepLost)), cause=error)

    async def save(self, mine: _Outcome) -> _Outcome:
        """Write the outcome: in one round trip if all is well, else as the run stands."""
        attempt, record, sent_at = self.attempt, self.record_of(mine.checkpoint), boot_time()
        if not self.has_row and await self.waiting.save(attempt, record):
            attempt.confirm(sent_at)
            return mine
        save_slow = attempt.engine.store.checkpoints.save_slow
        standing = await self.waiting.run(partial(save_slow, attempt.fence, record, patience=WHILE_ALIVE))
        settled = self.heed(standing).settled
        attempt.confirm(sent_at)
        return mine if settled is None else _Outcome(settled, cause=mine.cause)

    def heed(self, standing: Standing | None) -> Standing:
        """Keep how the run stands for when what was written has been told; unwind now if nothing was."""
        if standing is None:
            self.attempt.judge(None)
        assert standing is not None
        self.standing = standing
        return standing

    def encode(self, value: Any) -> Payload:
        """Return a value as it is stored, before anything has happened; raises SerializationError, PayloadTooLarge."""
        return self.or_later(lambda: self.encode_result(value))

    def encode_result(self, value: Any) -> Payload:
        """Return a value as it is stored; raises SerializationError and PayloadTooLarge."""
        if isinstance(value, CoroutineType):
            value.close()
            raise SerializationError(
                f"{self} returned a coroutine, which nobody awaits: declare the step itself with async def."
            )
        return self.codec.encode(value, f"The result of step {self.key!r}", self.spec.shape)

    def read_back(self, value: Any, payload: Payload) -> Any:
        """Return what a replay will get for a value; raises SerializationError."""
        return value if is_kept_exactly(value, payload, self.codec.serializer) else self.decode(payload)

    def decode(self, payload: Payload) -> Any:
        """Return the value that is stored; raises SerializationError."""
        return self.codec.decode(payload, f"The result of step {self.key!r}", self.spec.shape)

    def checkpoint(self, payload: Payload, *, ok: bool, spent: bool = True) -> Checkpoint:
        """Return the outcome as a replay will find it."""
        return Checkpoint(self.key, self.seq, self.failed_tries + spent, ok, payload)

    def record_of(self, checkpoint: Checkpoint) -> StepRecord:
        """Return what is written of an outcome, or of a try."""
        args, digest = self.note
        return StepRecord(
            key=self.key,
            seq=self.seq,
            tries=checkpoint.tries,
            args=args,
            fingerprint=digest,
            errors=self.errors,
            ok=checkpoint.ok,
            payload=checkpoint.payload,
            took=self.took,
        )

    @property
    def took(self) -> float:
        """Seconds since the try began."""
        return time.monotonic() - self.began

    def report(self, state: str, value: Any = None, error: Exception | None = None, retries: int = 0) -> None:
        """Tell those who show steps what a try has come to."""
        attempt = self.attempt
        if not attempt.engine.observers.hear("step_ended", watched=attempt.watched):
            return
        runtime = self.took
        attempt.engine.observers.tell("step_ended", StepReport(
            workflow_id=attempt.id, workflow_name=attempt.name, root_id=attempt.root_id, worker=attempt.worker,
            id=self.idempotency_key, name=self.spec.name, key=self.key, args=self.args, kwargs=self.kwargs,
            state=state, value=value, error=error, retries=retries, runtime=runtime, started=time.time() - runtime,
            watched=attempt.watched,
        ))  # fmt: skip


class _Outcome(NamedTuple):
    """What is recorded of a step, and what it answers if that is known already."""

    checkpoint: Checkpoint
    answer: Answer | None = None
    cause: Exception | None = None

    @property
    def ok(self) -> bool:
        return bool(self.checkpoint.ok)


def _error_of(ended: Ended) -> Exception:
    """Return why a try failed; a body that asks for another one may give no reason."""
    error = ended.error.error if isinstance(ended.error, TryAgain) else ended.error
    return DurableError("The step asked for another try.") if error is None else error


def _with_error(log: bytes | None, entry: bytes) -> bytes:
    """Return the errors of a step's tries, one JSON line each, with one more; of many, first and last are kept."""
    lines = (log or b"").splitlines()
    if len(lines) >= MOST_ERRORS:
        del lines[MOST_ERRORS // 2]
    return b"\n".join([*lines, entry])


def _add_note(error: BaseException, note: str) -> None:
    # BaseException.add_note is newer than the oldest Python we support; the attribute is what it sets. It goes past
    # __getattr__ and __setattr__, which may need what only a constructor makes, as urllib's HTTPError does.
    attributes = _ATTRIBUTES.__get__(error)
    attributes["__notes__"] = [*attributes.get("__notes__", ()), note]
