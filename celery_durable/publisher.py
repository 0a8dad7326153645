"""The row-first producer: Celery hands it the final message, it writes the row, then sends.

It stands in for kombu's Producer in ``apply_async``, because there the message is complete (after
``before_task_publish``, tracing headers included) and an error reaches the caller; in a Celery signal it
wouldn't, and a database that is down would publish a message without a row.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from celery import Celery
from celery.backends.base import DisabledBackend
from celery.backends.rpc import RPCBackend
from celery.canvas import Signature, maybe_signature
from celery.result import task_join_will_block
from celery.utils import uuid as new_id
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu.common import maybe_declare

from .broker import SHORT_TRY
from .broker import producer as broker_producer
from .client import CALLER_PATIENCE
from .config import LONGEST, seconds
from .engine.context import WHILE_ALIVE, current_attempt
from .engine.step import Call
from .engine.wait import record_of
from .envelope import TIMEOUT_HEADER, Envelope, check_id, is_id
from .exceptions import ConfigurationError, DatabaseUnavailable, WorkflowConflict
from .installation import STEP_TASK, Installation, installed_on
from .outboxes import Box
from .outboxes import current as current_box
from .seal import HIDDEN
from .store import Birth
from .store.rows import Checkpoint, Published
from .text import printable

logger = logging.getLogger("celery_durable")

#: What Celery's options say of where a task runs, and how its message is written.
_PLACES = ("queue", "exchange", "routing_key", "priority", "expires", "serializer", "compression")


@dataclass(frozen=True, slots=True)
class Start:
    """How a workflow is to be started; durations are in seconds."""

    max_crashes: int
    ignore_result: bool
    #: Until it may start; None: now.
    delay: float | None = None
    timeout: float | None = None
    deduplication_id: str | None = None
    on_cancel: Birth | None = None


class RowFirst:
    """What ``apply_async`` gets for a producer."""

    def __init__(self, installation: Installation, start: Start, producer: Any = None) -> None:
        self._installation = installation
        self._start = start
        self._producer = producer
        self.connection = _Unconnected()
        #: The workflow that was started, or that had been already.
        self.started: str | None = None

    def __bool__(self) -> bool:
        # Celery takes a producer that is false for none at all.
        return True

    def publish(self, body: Any, **options: Any) -> None:
        """Write the row, then send. A later call is Celery's own task-sent event, which is only passed on."""
        if self.started is not None:
            self._pass_on(body, options)
            return
        envelope = self._envelope(body, options)
        with announced(self._installation, envelope) as workflow_id:
            published = self._write(birth_of(self._installation, envelope, workflow_id, self._start))
            self.started = published.holder or workflow_id
            self._installation.observers.tell("published", workflow_id)
            if published.born and published.published_at is not None:
                self._send(workflow_id, envelope, published.published_at)

    def revive(self, connection: Any) -> None:
        """Nothing: Celery does this before it tries a publish again."""

    def _envelope(self, body: Any, options: dict[str, Any]) -> Envelope:
        app = self._installation.app
        envelope = Envelope.of_publish(body, options, app.conf.task_serializer).packed(self._installation.codec)
        ours = {} if self._start.timeout is None else {TIMEOUT_HEADER: self._start.timeout}
        return envelope.changed(ignore_result=self._start.ignore_result, **ours)

    def _write(self, birth: Birth) -> Published:
        """Write the row; tell whether its message is ours to send.

        After a lost answer the row that is found there is most likely our own.
        """
        publish = self._installation.store.workflows.publish
        try:
            return self._checked(birth, publish(birth, patience=0))
        except DatabaseUnavailable:
            return _as_ours(birth, self._checked(birth, publish(birth, patience=CALLER_PATIENCE)))

    def _checked(self, birth: Birth, published: Published) -> Published:
        """Raise WorkflowConflict if the id belongs to another task."""
        if not published.born and published.holder is None:
            names = self._installation.store.workflows.names_of([birth.id], patience=CALLER_PATIENCE)
            check_taken(birth, names.get(birth.id))
        return published

    def _send(self, workflow_id: str, envelope: Envelope, published_at: datetime | None) -> None:
        """Wake a worker. The row is safe: if the broker doesn't answer, recovery sends the message later."""
        app = self._installation.app
        try:
            with broker_producer(app, self._producer) as producer:
                self._expect_result(producer, workflow_id)
                envelope.send(app, producer, published_at)
        except Exception as error:  # noqa: BLE001 - every transport and backend has its own errors
            logger.warning(
                "The workflow %s is stored, but its message couldn't be sent (%r); recovery sends it.",
                workflow_id, error, extra={"workflow_id": workflow_id},
            )  # fmt: skip
            self._installation.store.workflows.unsent([workflow_id], patience=CALLER_PATIENCE)
        else:
            self._installation.observers.tell("sent", workflow_id)

    def _expect_result(self, producer: Any, workflow_id: str) -> None:
        """Let the result backend prepare, which Celery does before it publishes and we after the row.

        Redis' preparation is only a subscription, which ``get()`` makes again; a dead Redis would hold the
        caller for many seconds here.
        """
        backend = self._installation.app.backend
        if self._start.ignore_result or isinstance(backend, DisabledBackend) or _is_redis(backend):
            return
        producer.connection.ensure_connection(**SHORT_TRY)
        if isinstance(backend, RPCBackend):
            # As its own on_task_call, which would hold the caller for as long as a broker that went is away.
            if not task_join_will_block():
                maybe_declare(backend.binding(producer.channel), retry=True, **SHORT_TRY)
            return
        backend.on_task_call(producer, workflow_id)

    def _pass_on(self, body: Any, options: dict[str, Any]) -> None:
        try:
            with broker_producer(self._installation.app, self._producer) as producer:
                producer.publish(body, **{**options, "retry": False})
        except Exception as error:  # noqa: BLE001 - a monitoring event is no reason to fail a start
            logger.debug("The task-sent event of a workflow couldn't be sent (%r).", error)


class OfChild(RowFirst):
    """The producer of a workflow that starts another one: the child's rows and the parent's checkpoint are one."""

    def __init__(self, installation: Installation, start: Start, producer: Any, call: Call) -> None:
        super().__init__(installation, start, producer)
        self._call = call

    def _envelope(self, body: Any, options: dict[str, Any]) -> Envelope:
        envelope = super()._envelope
        return self._call.or_later(lambda: envelope(body, options))

    def _write(self, birth: Birth) -> Published:
        call, attempt = self._call, self._call.attempt
        attempt.check_going()
        record = record_of(call, call.encode(birth.id))
        attempt.engine.observers.tell("call_starting", attempt.id, call.key)
        child = self._installation.store.workflows.bear(attempt.fence, record, birth, patience=WHILE_ALIVE)
        attempt.judge(None if child is None else child.standing)
        assert child is not None
        check_taken(birth, child.taken_by)
        attempt.engine.observers.tell("call_recorded", attempt.id, call.key)
        attempt.history[call.key] = Checkpoint(call.key, call.seq, 1, True, record.payload, child_id=child.child_id)
        if child.child_id != birth.id:
            return Published(born=False, holder=child.child_id)
        published = Published(child.published_at is not None, child.published_at)
        return published if child.is_new and child.taken_by is None else _as_ours(birth, published)


class InOutbox(RowFirst):
    """The producer of the caller's own transaction: the sweep sends when that is committed."""

    def __init__(self, installation: Installation, start: Start, box: Box) -> None:
        super().__init__(installation, replace(start, delay=start.delay or 0.0))
        self._box = box

    def _write(self, birth: Birth) -> Published:
        published, taken_by = self._box.publish(birth)
        check_taken(birth, taken_by)
        return published


class Unpublished(RowFirst):
    """A producer that keeps what would be written: for many starts at once, or for a later one."""

    birth: Birth
    envelope: Envelope

    def publish(self, body: Any, **options: Any) -> None:
        """Keep the first message; what follows is a monitoring event."""
        if self.started is None:
            self.envelope = self._envelope(body, options)
            with announced(self._installation, self.envelope) as self.started:
                self.birth = birth_of(self._installation, self.envelope, self.started, self._start)


class Captured:
    """A producer that keeps the message: Celery's retry of a whole workflow, which its attempt commits."""

    def __init__(self, installation: Installation, ignore_result: bool) -> None:
        self._installation = installation
        self._ignore_result = ignore_result
        self.connection = _Unconnected()
        self.envelope: Envelope | None = None

    def __bool__(self) -> bool:
        return True

    def publish(self, body: Any, **options: Any) -> None:
        """Keep the first message; what follows is a monitoring event."""
        if self.envelope is None:
            installation = self._installation
            envelope = Envelope.of_publish(body, options, installation.app.conf.task_serializer)
            self.envelope = envelope.changed(ignore_result=self._ignore_result).packed(installation.codec)


class Publication:
    """One ``apply_async`` of a workflow: which id, which producer, and the options that are left to Celery."""

    def __init__(
        self,
        task: Any,
        task_id: str | None,
        producer: Any,
        options: dict[str, Any],
        *,
        max_crashes: int,
        call: Call | None = None,
    ) -> None:
        self.task = task
        self.installation = installed_on(task.app)
        self.attempt = current_attempt()
        self.options = dict(options)
        wanted = self.options.pop("ignore_result", None)
        self.ignore_result = bool(task.ignore_result if wanted is None else wanted)
        # With a result to come, Celery would ask the result backend before the row is written, and a dead
        # backend would fail the start; the producer asks it afterwards, and puts the header right.
        self.options["ignore_result"] = True
        if self.installation.codec.seal.is_set:
            # In the message's headers, and in Celery's event of its sending.
            self.options = {"argsrepr": HIDDEN, "kwargsrepr": HIDDEN, **self.options}
        start = self._start(max_crashes) if call is None else call.or_later(lambda: self._start(max_crashes))
        self.delay = start.delay
        producer = producer or self.options.pop("publisher", None)
        self.options.pop("connection", None)
        self.id = self._id(task_id, call)
        self.is_retry = self.attempt is not None and self.id == self.attempt.id
        if self.attempt is not None and not self.is_retry:
            # Celery looks for the parent on the thread's stack, where an async function isn't.
            self.options = {"parent_id": self.attempt.id, "root_id": self.attempt.root_id, **self.options}
        self.producer = self._producer(start, producer, call)

    def _start(self, max_crashes: int) -> Start:
        timeout = self.options.pop("workflow_timeout", self.task.workflow_timeout)
        on_cancel = self.options.pop("on_cancel", self.task.on_cancel)
        deduplication_id = self.options.pop("deduplication_id", None)
        return Start(
            max_crashes=max_crashes,
            ignore_result=self.ignore_result,
            delay=seconds_until(self.task.app, self.options.pop("countdown", None), self.options.pop("eta", None)),
            timeout=timeout_of(timeout),
            deduplication_id=None if deduplication_id is None else check_id(deduplication_id, "deduplication_id"),
            on_cancel=_compensation(self.task, on_cancel),
        )

    def _id(self, task_id: str | None, call: Call | None) -> str:
        if task_id is not None:
            return check_id(task_id)
        return str(new_id()) if call is None else call.idempotency_key

    def _producer(self, start: Start, producer: Any, call: Call | None) -> Any:
        if isinstance(producer, Unpublishing):
            return producer.of(self.installation, start)
        if self.is_retry:
            return Captured(self.installation, self.ignore_result)
        if call is not None:
            return OfChild(self.installation, start, producer, call)
        box = current_box(self.installation)
        return RowFirst(self.installation, start, producer) if box is None else InOutbox(self.installation, start, box)

    def done(self) -> str:
        """Return the id of what was started; leave the message of a retry to the attempt, which commits it."""
        if self.attempt is not None and self.is_retry:
            if self.producer.envelope is not None:
                self.attempt.successor = self.producer.envelope.stored(self.id, self.attempt.fence.attempt)
                self.attempt.successor_retries = retries_of(self.producer.envelope.headers.get("retries"))
                self.attempt.successor_delay = self.delay or 0.0
            return self.id
        started = self.producer.started or self.id
        if self.attempt is not None:
            self.attempt.aliases[self.id] = started
        return str(started)


class Unpublishing:
    """Given for a producer to ``apply_async``: keeps what would be written."""

    kept: Unpublished

    def of(self, installation: Installation, start: Start) -> Unpublished:
        """Return the producer."""
        self.kept = Unpublished(installation, start)
        return self.kept


@contextmanager
def announced(installation: Installation, envelope: Envelope, forked_from: str | None = None) -> Iterator[str]:
    """Give the id of a workflow that is born in the block; observers may add to the headers of its message before."""
    tell, workflow_id = installation.observers.tell, str(envelope.headers["id"])
    raised: BaseException | None = None
    try:
        tell("publishing", workflow_id, envelope.headers, forked_from)
        yield workflow_id
    except BaseException as error:
        raised = error
        raise
    finally:
        tell("publish_ended", workflow_id, raised)


def start_by_message(task: Any, *, max_crashes: int, ignore_result: bool) -> Start:
    """Return how a task is started by the message of a producer that doesn't have us: as it was declared."""
    return Start(
        max_crashes=max_crashes,
        ignore_result=ignore_result,
        timeout=timeout_of(task.workflow_timeout),
        on_cancel=_compensation(task, task.on_cancel),
    )


def timeout_of(workflow_timeout: Any) -> float | None:
    """Return a ``workflow_timeout`` in seconds."""
    return None if workflow_timeout is None else seconds(workflow_timeout, "workflow_timeout")


def _compensation(task: Any, on_cancel: Any) -> Birth | None:
    if on_cancel is None:
        return None
    # In the options of a cloned signature it is a plain dict.
    signature = maybe_signature(on_cancel, app=task.app) if isinstance(on_cancel, dict) else on_cancel
    return unpublished(signature).birth


def unpublished(signature: Any) -> Unpublished:
    """Return what starting a workflow by this signature would write, with a new id of its own.

    Raises ConfigurationError for anything that isn't the signature of one task.
    """
    if not isinstance(signature, Signature) or signature.subtask_type is not None:
        raise ConfigurationError(
            f"on_cancel and enqueue_many take signatures such as refund.s(1), not {signature!r:.100}."
        )
    keeping, copy = Unpublishing(), signature.clone()
    if getattr(copy.type, "is_durable_workflow", False):
        copy.apply_async(producer=keeping)
    else:
        start_step(copy.type, copy.args, copy.kwargs, producer=keeping, **copy.options)
    return keeping.kept


def start_as_child(signature: Any) -> Any:
    """Start a workflow by its signature, or one that is nothing but a step or task."""
    copy = signature.clone()
    if getattr(copy.type, "is_durable_workflow", False):
        return copy.apply_async()
    return start_step(copy.type, copy.args, copy.kwargs, **copy.options)


def start_step(task: Any, args: Any, kwargs: Any, **options: Any) -> Any:
    """Start a workflow that is nothing but this step, or task, where that has its place: its queue, its priority."""
    places = {name: value for name in _PLACES if (value := getattr(task, name, None)) is not None}
    call = (task.name, list(args or ()), dict(kwargs or {}))
    ours = {"route_name": task.name, "shadow": task.name}
    return task.app.tasks[STEP_TASK].apply_async(call, **{**places, **ours, **options})


def _as_ours(birth: Birth, published: Published) -> Published:
    """Take a row that is there already for our own, whose answer was lost: one message too many is harmless."""
    is_new = published.born or published.holder is not None
    moment = None if birth.delay is not None else datetime.now(timezone.utc)
    return published if is_new else Published(born=True, published_at=moment)


def check_taken(birth: Birth, taken_by: str | None) -> None:
    """Raise WorkflowConflict if the id belongs to another task."""
    if taken_by is not None and taken_by != birth.name:
        raise WorkflowConflict(
            f"The id {birth.id!r} is taken by a workflow of the task {taken_by}, so {birth.name} can't have it: "
            "choose another task_id."
        )


def _is_redis(backend: Any) -> bool:
    """Return whether a result backend is Celery's for Redis, which can't be imported without the library redis."""
    return isinstance(backend, getattr(sys.modules.get("celery.backends.redis"), "RedisBackend", ()))


def birth_of(installation: Installation, envelope: Envelope, workflow_id: str, start: Start) -> Birth:
    """Return the rows of a new workflow."""
    headers = envelope.headers
    queue = envelope.queue or envelope.routing_key or installation.app.conf.task_default_queue
    return Birth(
        id=workflow_id,
        name=str(headers["task"]),
        queue=printable(queue),
        envelope=envelope.to_text(),
        body=envelope.body,
        content_type=envelope.content_type,
        content_encoding=envelope.content_encoding,
        max_crashes=start.max_crashes,
        republish_after=installation.config.republish_after,
        delay=start.delay,
        timeout=start.timeout,
        deduplication_id=start.deduplication_id,
        on_cancel=start.on_cancel,
        retries=retries_of(headers.get("retries")),
        parent_id=_id_or_none(headers.get("parent_id")),
        root_id=_id_or_none(headers.get("root_id")),
    )


def retries_of(value: Any) -> int:
    """Return Celery's number of retries from a header; what isn't one counts as none."""
    return value if type(value) is int and 0 <= value < 2**31 else 0


def _id_or_none(value: Any) -> str | None:
    return value if is_id(value) else None


def seconds_until(app: Celery, countdown: Any, eta: Any) -> float | None:
    """Return Celery's ``countdown`` or ``eta`` as seconds from now, None for a start at once.

    The database waits for it, not the broker: no visibility timeout, and no worker that holds the message.
    """
    if countdown is None and eta is None:
        return None
    if countdown is None:
        due = maybe_make_aware(maybe_iso8601(eta), app.timezone)
        countdown = (due - app.now()).total_seconds()
    if not math.isfinite(countdown) or countdown > LONGEST:
        raise ValueError(f"A workflow can't start in {countdown!r} s: the longest delay is {LONGEST:g} s (100 years).")
    return max(float(countdown), 0.0) or None


class _Unconnected:
    """The connection of a producer that has none: Celery only asks it to translate errors."""

    #: When its tracer publishes what follows a task, Celery 5.7 asks what to try again besides OperationalError.
    recoverable_connection_errors: tuple[type[Exception], ...] = ()

    @contextmanager
    def _reraise_as_library_errors(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        with nullcontext():
            yield
