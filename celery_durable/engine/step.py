"""One step: answered from its checkpoint, or called under its policy and recorded."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from ..exceptions import (
    NondeterminismError,
    PayloadTooLarge,
    SerializationError,
    StepLost,
    Suspended,
)
from ..serialization import Payload, call_repr, fingerprint
from ..store import StepRecord
from ..store.rows import Checkpoint
from .context import WHILE_ALIVE, Attempt, RunningStep, boot_time, logger, running_step
from .limits import is_foreign_limit, soft_limit
from .retry import RetryPolicy, call_with_retries

Body = Callable[..., Any]

#: Failed tries whose errors are kept; ``tries`` counts all of them.
MOST_ERRORS = 20


@dataclass(frozen=True, slots=True)
class StepSpec:
    """A step as its author declared it."""

    name: str
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    #: Seconds a try.
    soft_time_limit: float | None = None


def call_step(attempt: Attempt, spec: StepSpec, body: Body, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return the step's value, or raise its error: alike on the first run and on every replay."""
    attempt.check_caller()
    call = _Call(attempt, spec, attempt.key_of(spec.name), args, kwargs)
    call.check_arguments()
    if call.is_settled:
        return call.replay()
    return call.run(body)


class _Call:
    """One call of a step in an attempt."""

    def __init__(
        self, attempt: Attempt, spec: StepSpec, key: str, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        saved = attempt.history.get(key)
        self.attempt = attempt
        self.spec = spec
        self.key = key
        self.args = args
        self.kwargs = kwargs
        self.saved = saved
        self.fingerprint = fingerprint(args, kwargs)
        self.seq = saved.seq if saved else attempt.next_seq()
        self.failed_tries = saved.tries if saved else 0
        self.errors = saved.errors if saved else None
        #: The current try is in the database already.
        self.written_ahead = False
        #: When the current try began.
        self.began = time.monotonic()
        self.step = RunningStep(spec.name, key, attempt.idempotency_key(key))

    @property
    def is_settled(self) -> bool:
        return self.saved is not None and self.saved.ok is not None

    def check_arguments(self) -> None:
        saved = self.saved
        if saved is None or saved.fingerprint is None or saved.fingerprint == self.fingerprint:
            return
        error = NondeterminismError(
            f"The step {self.key!r} of workflow {self.attempt.id} was first called with ({saved.args}), and is now "
            f"called with ({call_repr(self.args, self.kwargs)}): what a workflow passes to a step may only depend "
            "on its own arguments and on other steps."
        )
        if self.attempt.engine.nondeterminism == "warn":
            logger.warning("%s", error)
            return
        self.attempt.nondeterminism = error
        raise error

    def replay(self) -> Any:
        assert self.saved is not None
        self.attempt.engine.observers.tell("step_replayed", self.attempt.id, self.key)
        return self.answer(self.saved)

    def answer(self, checkpoint: Checkpoint, cause: BaseException | None = None) -> Any:
        """Return or raise what a checkpoint holds."""
        codec = self.attempt.engine.codec
        assert checkpoint.payload is not None
        if checkpoint.ok:
            return codec.decode(checkpoint.payload, f"The result of step {self.key!r}")
        error = codec.decode_error(checkpoint.payload)
        _add_note(error, f"Raised by step {self.key!r} of workflow {self.attempt.id}, try {checkpoint.tries}.")
        raise error from cause

    @property
    def is_lost(self) -> bool:
        """A step whose process died in the last of its tries has none left."""
        policy = self.spec.retry
        return bool(self.failed_tries and policy.max_retries) and not policy.allows(self.failed_tries)

    def run(self, body: Body) -> Any:
        if self.is_lost:
            return self.settle_error(
                StepLost(
                    f"The step {self.key!r} of workflow {self.attempt.id} used up its {self.failed_tries} tries: "
                    "its worker process died in the last of them."
                )
            )
        if self.saved is not None and self.saved.due_in:
            self.wait(self.saved.due_in)
        try:
            value = call_with_retries(
                self.spec.retry,
                partial(self.try_once, body),
                failed_tries=self.failed_tries,
                failed=self.record_try,
                wait=self.wait,
            )
        except Exception as error:
            if is_foreign_limit(error):
                raise
            return self.settle_error(error)
        return self.settle_value(value)

    def try_once(self, body: Body) -> Any:
        """Run the body once, within its limit."""
        self.attempt.check_caller()
        self.write_ahead_after_crash()
        self.attempt.look_if_stale()
        self.step.attempt = self.failed_tries + 1
        self.attempt.engine.observers.tell("step_starting", self.attempt.id, self.key)
        self.began = time.monotonic()
        with (
            running_step(self.step),
            soft_limit(self.spec.soft_time_limit, f"The step {self.key!r}") as deadline,
        ):
            self.step.deadline = deadline
            return body(*self.args, **self.kwargs)

    def write_ahead_after_crash(self) -> None:
        """The first body after a crash spends its try beforehand: it may have been the one that crashed."""
        if self.attempt.after_crash:
            self.attempt.after_crash = False
            self.save_try(self.failed_tries + 1, None)
            self.written_ahead = True

    def record_try(self, error: Exception, delay: float) -> None:
        """Keep a failed try, so that no crash gives it back."""
        self.failed_tries += 1
        self.errors = _with_error(self.errors, self.attempt.engine.codec.encode_error(error).data)
        self.attempt.engine.observers.tell("try_failed", self.attempt.id, self.key, error)
        logger.warning(
            "Step %s of workflow %s failed in try %d (%r), next in %.3g s.",
            self.key, self.attempt.id, self.failed_tries, error, delay,
        )  # fmt: skip
        self.save_try(self.failed_tries, delay)
        self.attempt.engine.observers.tell("try_recorded", self.attempt.id, self.key)

    def save_try(self, tries: int, delay: float | None) -> None:
        sent_at = boot_time()
        standing = self.attempt.engine.store.checkpoints.save_try(
            self.attempt.fence, self.record(tries), delay, patience=WHILE_ALIVE
        )
        self.written_ahead = True
        self.attempt.judge(standing)
        self.attempt.confirm(sent_at)

    def wait(self, seconds: float) -> None:
        """Pass the time until the next try: here if it is short, without a worker if it is long."""
        if seconds > self.attempt.engine.suspend_after:
            raise self.attempt.unwind(Suspended(f"retry of step {self.key}", seconds))
        time.sleep(seconds)

    def settle_value(self, value: Any) -> Any:
        codec = self.attempt.engine.codec
        try:
            payload = codec.encode(value, f"The result of step {self.key!r}")
        except (SerializationError, PayloadTooLarge) as error:
            # The effect has happened: running the body again wouldn't help, so the error is the outcome.
            return self.settle_error(error)
        return self.settle(True, payload, None)

    def settle_error(self, error: Exception) -> Any:
        return self.settle(False, self.attempt.engine.codec.encode_error(error), error)

    def settle(self, ok: bool, payload: Payload, cause: BaseException | None) -> Any:
        """Record the outcome, then answer from what was recorded."""
        attempt, observers = self.attempt, self.attempt.engine.observers
        observers.tell("step_returned", attempt.id, self.key)
        record = self.record(self.failed_tries + (not isinstance(cause, StepLost)), ok, payload)
        checkpoint = self.save(record)
        attempt.history[self.key] = checkpoint
        observers.tell("step_recorded", attempt.id, self.key)
        return self.answer(checkpoint, cause)

    def save(self, record: StepRecord) -> Checkpoint:
        """Write the outcome: in one round trip if all is well, else as the run stands."""
        attempt, checkpoints = self.attempt, self.attempt.engine.store.checkpoints
        assert record.payload is not None
        mine = Checkpoint(record.key, record.seq, record.tries, record.ok, record.payload, record.args)
        sent_at = boot_time()
        has_row = self.written_ahead or self.saved is not None
        if not has_row and checkpoints.save(attempt.fence, record, patience=WHILE_ALIVE):
            attempt.confirm(sent_at)
            return mine
        standing = checkpoints.save_slow(attempt.fence, record, patience=WHILE_ALIVE)
        attempt.judge(standing)
        attempt.confirm(sent_at)
        return (standing and standing.settled) or mine

    def record(self, tries: int, ok: bool | None = None, payload: Payload | None = None) -> StepRecord:
        return StepRecord(
            key=self.key,
            seq=self.seq,
            tries=tries,
            args=call_repr(self.args, self.kwargs),
            fingerprint=self.fingerprint,
            errors=self.errors,
            ok=ok,
            payload=payload,
            took=time.monotonic() - self.began,
        )


def _with_error(log: bytes | None, entry: bytes) -> bytes:
    """Return the errors of a step's tries, one JSON line each, with one more; of many, first and last are kept."""
    lines = (log or b"").splitlines()
    if len(lines) >= MOST_ERRORS:
        del lines[MOST_ERRORS // 2]
    return b"\n".join([*lines, entry])


def _add_note(error: BaseException, note: str) -> None:
    # BaseException.add_note is newer than the oldest Python we support; the attribute is what it sets.
    notes = [*getattr(error, "__notes__", []), note]
    error.__notes__ = notes  # type: ignore[attr-defined]
