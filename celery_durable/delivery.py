"""A workflow's message in a worker: claimed, run, settled, and told to Celery in Celery's own way."""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any
from uuid import UUID

from billiard import current_process
from celery import Task
from celery import states as celery_states
from celery.app.task import Context
from celery.backends.base import DisabledBackend
from celery.exceptions import Ignore, Reject, Retry, SoftTimeLimitExceeded
from celery.result import ResultBase
from celery.utils.time import maybe_iso8601, maybe_make_aware

from . import states
from .engine import runner
from .engine.context import WHILE_ALIVE, Attempt, boot_time
from .engine.observer import AttemptReport
from .engine.outcome import Completed, Failed, Leaving, Outcome, Retried, Stopped, Waiting
from .engine.runner import failed
from .envelope import HEADER, Envelope, check_id, send_stored
from .exceptions import CodecError, ConfigurationError, DurableError, WorkflowCancelledError, ends_process
from .installation import Installation
from .logs import about
from .publisher import birth_of, retries_of, start_by_message
from .request import NODE_PROPERTY, published_at
from .started import Started, shown_if_it_lasts
from .step_events import is_watched
from .store.rows import Claim, Fence, Look, StoredMessage, StoredOutcome

logger = logging.getLogger("celery_durable")

_PAUSE = 0.05
_MOST_LATE = 100
_warned: set[str] = set()
#: What Celery's tracer doesn't take for an outcome.
_CELERYS = (Ignore, Reject, Retry)


def deliver(installation: Installation, task: Task, body: Callable[[], Any], *, max_crashes: int) -> Any:
    """Run what a message asks for; return or raise what Celery's tracer shall make of it.

    Raises Ignore for a message that has nothing to say, a message-less Retry for a workflow that goes on later.
    """
    message = _Message(installation, task, max_crashes)
    with about(message.id, task.name) as subject:
        found = message.take()
        if isinstance(found, StoredOutcome):
            return message.deliver_stored(found)
        subject["attempt"] = found.fence.attempt
        return _run(message, found, body)


def _run(message: _Message, claim: Claim, body: Callable[[], Any]) -> Any:
    installation = message.installation
    attempt = Attempt.of(installation.engine, message.task.name, claim, message.claimed_at, **message.facts())
    report, tell = message.report(attempt, claim), installation.observers.tell
    tell("claimed", attempt.id, attempt.fence.attempt)
    tell("attempt_started", report)
    outcome = None
    try:
        with message.shown_as_started():
            outcome = runner.call_body(attempt, without_exit(body), lambda error: translated(attempt, error))
    except SoftTimeLimitExceeded:
        if outcome is None:
            raise
        message.end_started()  # it has only met that, when the function had ended
    try:
        settled = message.settle(attempt, outcome)
        tell("attempt_ended", report, settled.ending)
    except SoftTimeLimitExceeded:
        # The function has ended, and its limit with it; what was settled already is found so.
        settled = message.settle(attempt, outcome)
        tell("attempt_ended", report, settled.ending)
    return message.tell_celery(attempt, settled)


class _Message:
    """One delivery of a workflow's message to this process."""

    def __init__(self, installation: Installation, task: Task, max_crashes: int) -> None:
        self.installation = installation
        self.task = task
        self.request: Context = task.request
        self.id = check_id(self.request.id)
        self.max_crashes = max_crashes
        self.node = _node_of(self.request)
        self.workflows = installation.store.workflows
        self.retries = retries_of(self.request.retries)
        self.is_foreign = getattr(self.request, HEADER, None) is None
        #: The boot time before the claim was sent.
        self.claimed_at = 0.0
        self.started: Started | None = None

    def facts(self) -> dict[str, Any]:
        """Return what an attempt knows of the message and the process that have begun it."""
        return {
            "root_id": self.request.root_id or self.id,
            "worker": self.request.hostname or "",
            "watched": is_watched(self.request, self.installation.config),
            "killable": _is_pool_process(),
            "shape": self.task.durable_shape(self.request.args),
            "show_state": self.show_state,
            "end_started": self.end_started,
            "send": self.send,
        }

    def report(self, attempt: Attempt, claim: Claim) -> AttemptReport:
        """Return what is told of an attempt."""
        header = getattr(self.request, HEADER, None)
        published = published_at(header) if isinstance(header, dict) else None
        return AttemptReport(
            workflow_id=attempt.id,
            root_id=attempt.root_id,
            name=attempt.name,
            attempt=attempt.fence.attempt,
            worker=attempt.worker,
            lag=None if published is None else max((claim.now - published).total_seconds(), 0.0),
            crashes=claim.crashes,
        )

    def take(self) -> Claim | StoredOutcome:
        """Take the workflow, or an outcome that is still to be delivered; raise Ignore if there is neither."""
        self.installation.observers.tell("claiming", self.id)
        try:
            fence = Fence(self.id, 0, uuid.uuid4(), self.node)
            return self.claim(fence) if self.may_claim(fence) else self.outcome_or_ignore(self.look(fence))
        except Ignore:
            raise
        except Exception as error:
            # Not a failure of the workflow: it is enqueued still, and recovery sends another message.
            logger.exception("The workflow %s couldn't be claimed.", self.id)
            raise Ignore("the claim failed") from error

    def may_claim(self, fence: Fence) -> bool:
        """Our own message may; one of a producer that doesn't have us only if it starts the workflow by arriving."""
        if self.has_expired and self.end_expired(fence):
            return False
        return not self.is_foreign or self.bear()

    def claim(self, fence: Fence) -> Claim | StoredOutcome:
        give_up_at = time.monotonic() + self.installation.config.lease
        while True:
            self.claimed_at = boot_time()
            claim = self.workflows.claim(
                self.id, self.task.name, fence.token, self.node, retries=self.retries, patience=WHILE_ALIVE
            )
            if claim is not None:
                return claim
            look = self.look(fence)
            if not self.may_come(look) or time.monotonic() > give_up_at:
                return self.outcome_or_ignore(look)
            time.sleep(_PAUSE)

    def look(self, fence: Fence) -> Look:
        look = self.workflows.look(fence, patience=WHILE_ALIVE)
        if look is None:
            logger.warning(
                "A message of the workflow %s came, but there is no such row: it was rolled back or pruned, or its "
                "transaction is still open. Nothing is lost: whoever commits it sends another message.", self.id,
            )  # fmt: skip
            raise Ignore("no such workflow")
        return look

    def may_come(self, look: Look) -> bool:
        """Tell whether a claim that was refused may succeed: a heartbeat, or another attempt's end, is near."""
        mine = look.name == self.task.name and look.retries == self.retries
        return mine and look.state == states.ENQUEUED and not (look.late or look.draining)

    def outcome_or_ignore(self, look: Look) -> StoredOutcome:
        """Take over the delivery of an outcome; else this message has nothing to say: doubled, late, or misplaced."""
        if look.name != self.task.name:
            logger.error(
                "The id %s belongs to a workflow of the task %s: the message of %s is dropped.",
                self.id, look.name, self.task.name,
            )  # fmt: skip
        elif look.undelivered:
            return self.adopt()
        elif look.state == states.ENQUEUED and (look.draining or not look.beating):
            self.workflows.unsent([self.id], patience=WHILE_ALIVE)
        raise Ignore(f"the workflow is {look.state}")

    @property
    def has_expired(self) -> bool:
        """Celery's ``expires``, by this worker's clock, as Celery has it."""
        expires = maybe_iso8601(self.request.expires)
        return expires is not None and datetime.now(timezone.utc) > maybe_make_aware(expires, timezone.utc)

    def end_expired(self, fence: Fence) -> bool:
        """End a workflow that hasn't begun; False if it has, for then ``expires`` doesn't count any more."""
        error = WorkflowCancelledError("The workflow wasn't started before its `expires`.")
        verdict = self.installation.codec.verdict(error)
        if self.workflows.expired([self.id], verdict=verdict, patience=WHILE_ALIVE):
            return True
        if self.is_foreign and self.workflows.look(fence, patience=WHILE_ALIVE) is None:
            self.store_revoked()
            raise Ignore("the message has expired")
        return False

    def bear(self) -> bool:
        """Write the row that its producer couldn't; False if the id is taken."""
        serializer = self.task.serializer or self.task.app.conf.task_serializer
        codec = self.installation.codec
        envelope = Envelope.of_request(self.request, serializer, self.task.name).packed(codec)
        if codec.seal.is_set:
            envelope = envelope.without_values()
        ignored = bool(self.request.ignore_result)
        start = start_by_message(self.task, max_crashes=self.max_crashes, ignore_result=ignored)
        birth = birth_of(self.installation, envelope, self.id, start)
        return self.workflows.publish(birth, patience=WHILE_ALIVE).born

    def adopt(self) -> StoredOutcome:
        stored = self.workflows.adopt(self.id, self.task.name, self.node, patience=WHILE_ALIVE)
        if stored is None:
            raise Ignore("another process delivers the outcome")
        return stored

    def settle(self, attempt: Attempt, outcome: Outcome) -> Outcome:
        """Commit how the attempt ends. RETRY goes to the result backend first: a resume may be very fast."""
        if isinstance(outcome, Completed | Failed):
            return runner.finish(attempt, outcome, dispatched=not self.is_awaited)
        if isinstance(outcome, Waiting):
            self.warn_of_expiry(outcome.seconds)
            self.store_retry(outcome.reason)
            return runner.suspend(attempt, outcome)
        if isinstance(outcome, Leaving):
            self.store_retry("handed over: the worker shuts down")
            return runner.hand_over(attempt)
        if isinstance(outcome, Retried):
            self.store_retry(str(outcome.request))
            return runner.run_again(attempt, outcome, attempt.successor)
        return outcome

    def tell_celery(self, attempt: Attempt, outcome: Outcome) -> Any:
        """Return or raise what makes Celery's tracer do the right thing."""
        if isinstance(outcome, Completed):
            return outcome.value
        if isinstance(outcome, Failed):
            raise outcome.error
        if isinstance(outcome, Retried):
            self.keep_stored_state()
            raise outcome.request
        if isinstance(outcome, Waiting):
            self.keep_stored_state()
            raise _waiting(outcome.reason, _soonest(outcome.seconds, attempt.deadline_left))
        if isinstance(outcome, Leaving):
            self.keep_stored_state()
            raise _waiting("handed over: the worker shuts down", None)
        if isinstance(outcome, Stopped):
            self.store_revoked()
            self.release()
        raise Ignore("this attempt is void")

    def release(self) -> None:
        """End what has passed its deadline, if nobody has done so; whoever resumes this workflow may have it now."""
        error = WorkflowCancelledError("The workflow was cancelled: its workflow_timeout has passed.")
        verdict = self.installation.codec.verdict(error)
        if late := self.workflows.expire(verdict=verdict, limit=_MOST_LATE, patience=WHILE_ALIVE):
            republish_after = self.installation.config.republish_after
            self.send(self.installation.store.awaits.notify(late, republish_after, patience=WHILE_ALIVE))
        self.confirm()

    def deliver_stored(self, stored: StoredOutcome) -> Any:
        """Return an outcome of an earlier attempt through the tracer, as that attempt would have."""
        codec = self.installation.codec
        if stored.state == states.CANCELLED:
            self.store_revoked()
            self.confirm()
            raise Ignore("the workflow was cancelled")
        try:
            if stored.ok:
                return codec.decode(stored.payload, f"The result of workflow {self.id}")
            error = codec.decode_error(stored.payload)
        except CodecError as unread:
            logger.error("The outcome of the workflow %s is delivered when this worker has ended: %s", self.id, unread)
            raise Ignore("the outcome can't be read here") from unread
        raise _as_failure(error)

    def warn_of_expiry(self, seconds: float | None) -> None:
        """Warn once of a chord that will have forgotten this task when it goes on."""
        conf, name = self.task.app.conf, self.task.name
        expires = conf.get("result_chord_expires") or conf.result_expires
        expires = expires.total_seconds() if isinstance(expires, timedelta) else expires
        if not self.request.chord or not expires or name in _warned or (seconds is not None and seconds < expires):
            return
        _warned.add(name)
        logger.warning(
            "The workflow %s (%s) is a member of a chord and waits for longer than the result backend keeps its "
            "counters (%g s): its body may never run. Set result_chord_expires (Celery 5.7) or result_expires higher.",
            self.id, name, expires,
        )  # fmt: skip

    def confirm(self) -> None:
        self.workflows.confirm(self.node, [self.id], patience=WHILE_ALIVE)

    @property
    def is_awaited(self) -> bool:
        """Whether Celery has something to deliver when the workflow ends."""
        request = self.request
        canvas = request.callbacks or request.errbacks or request.chain or request.chord or request.group
        return bool(canvas) or self.has_result

    @property
    def has_result(self) -> bool:
        ignored = self.request.ignore_result if self.request.ignore_result is not None else self.task.ignore_result
        return not ignored and not isinstance(self.task.backend, DisabledBackend)

    def send(self, messages: Sequence[StoredMessage]) -> None:
        if messages and (refused := send_stored(self.task.app, messages)):
            self.workflows.unsent(refused, patience=WHILE_ALIVE)

    @contextmanager
    def shown_as_started(self) -> Iterator[None]:
        """Let the result backend have STARTED, if the block lasts and says nothing else of itself."""
        if not self.has_result:
            yield
            return
        with shown_if_it_lasts(self.store_started) as self.started:
            yield

    def store_started(self) -> None:
        facts = {"pid": os.getpid(), "hostname": self.request.hostname}
        self._store("STARTED", lambda backend: backend.store_result(
            self.id, facts, celery_states.STARTED, request=self.request
        ))  # fmt: skip

    def store_retry(self, reason: str) -> None:
        error = DurableError(reason)
        self._store("RETRY", lambda backend: backend.mark_as_retry(self.id, error, request=self.request))

    def store_revoked(self) -> None:
        self._store("REVOKED", lambda backend: backend.mark_as_revoked(self.id, "cancelled", request=self.request))

    def show_state(self, state: str | None, meta: Any) -> None:
        """Store what a running step says of itself by Celery's ``update_state``."""
        self.end_started()
        self._store(str(state), lambda backend: backend.store_result(self.id, meta, state, request=self.request))

    def end_started(self) -> None:
        """Let STARTED not be stored any more, over what somebody else says."""
        if self.started is not None:
            self.started.end()

    def keep_stored_state(self) -> None:
        """The state is stored already; Celery's tracer would store it again, perhaps over a later outcome."""
        self.request.ignore_result = True

    def _store(self, state: str, write: Callable[[Any], None]) -> None:
        if not self.has_result:
            return
        try:
            write(self.task.backend)
        except Exception as error:  # noqa: BLE001 - Postgres knows the state; the backend only shows it
            logger.warning("The result backend didn't take %s of workflow %s (%r).", state, self.id, error)


def _node_of(request: Context) -> UUID:
    node = (request.properties or {}).get(NODE_PROPERTY)
    if node is None:
        raise ConfigurationError(
            "This worker has no celery_durable node: call durable.install(app, …) in the module that the worker "
            "loads, before the worker starts."
        )
    return UUID(node)


def _is_pool_process() -> bool:
    """Tell whether this process may be killed without taking the whole worker along."""
    return bool(current_process()._identity)


def translated(attempt: Attempt, error: Exception) -> Outcome | None:
    """Take Celery's own retry for what it is; the rest of its control flow can't end a workflow."""
    if isinstance(error, Retry) and attempt.successor is not None:
        return Retried(error, attempt.successor_delay)
    return failed(attempt.engine, _as_failure(error)) if isinstance(error, _CELERYS) else None


def _as_failure(error: Exception) -> Exception:
    """Return an error that Celery's tracer takes for a failure: a workflow always ends with an outcome."""
    if not isinstance(error, _CELERYS):
        return error
    return DurableError(f"The workflow raised Celery's {type(error).__name__}, which would end it without an outcome.")


def _soonest(*seconds: float | None) -> float | None:
    return min((each for each in seconds if each is not None), default=None)


def _waiting(reason: str, seconds: float | None) -> Retry:
    return Retry(reason, exc=DurableError(reason), when=seconds)


def without_exit(body: Callable[[], Any]) -> Callable[[], Any]:
    """Make a failure of ``sys.exit()`` in a body; only the pool's own exit ends the process."""

    def call() -> Any:
        try:
            value = body()
            # As Celery's result backends have it: what was started may be returned.
            return value.as_tuple() if isinstance(value, ResultBase) else value
        except SystemExit as stop:
            if ends_process(stop):
                raise
            raise DurableError(f"The workflow called sys.exit({stop.code!r}).") from stop

    return call
