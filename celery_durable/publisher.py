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
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from celery import Celery
from celery.backends.base import DisabledBackend
from celery.backends.rpc import RPCBackend
from celery.result import task_join_will_block
from celery.utils import uuid as new_id
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu.common import maybe_declare

from .broker import SHORT_TRY
from .broker import producer as broker_producer
from .client import CALLER_PATIENCE
from .config import LONGEST, seconds
from .engine.context import current_attempt, current_step
from .envelope import Envelope, check_id, is_id
from .exceptions import DatabaseUnavailable, NotAllowedInStep, WorkflowConflict
from .installation import Installation, installed_on
from .store import Birth
from .text import printable

logger = logging.getLogger("celery_durable")


@dataclass(frozen=True, slots=True)
class Start:
    """How a workflow is to be started; durations are in seconds."""

    max_crashes: int
    ignore_result: bool
    #: Until it may start; None: now.
    delay: float | None = None
    timeout: float | None = None


class RowFirst:
    """What ``apply_async`` gets for a producer."""

    def __init__(self, installation: Installation, start: Start, producer: Any = None) -> None:
        self._installation = installation
        self._start = start
        self._producer = producer
        self.connection = _Unconnected()
        self._published = False

    def __bool__(self) -> bool:
        # Celery takes a producer that is false for none at all.
        return True

    def publish(self, body: Any, **options: Any) -> None:
        """Write the row, then send. A later call is Celery's own task-sent event, which is only passed on."""
        if self._published:
            self._pass_on(body, options)
            return
        envelope = self._envelope(body, options)
        workflow_id = str(envelope.headers["id"])
        observers = self._installation.observers
        observers.tell("publishing", workflow_id)
        birth = self._birth(workflow_id, envelope)
        ours, published_at = self._write(birth)
        self._published = True
        observers.tell("published", workflow_id)
        if ours and self._start.delay is None:
            self._send(workflow_id, envelope, published_at)

    def revive(self, connection: Any) -> None:
        """Nothing: Celery does this before it tries a publish again."""

    def _envelope(self, body: Any, options: dict[str, Any]) -> Envelope:
        app = self._installation.app
        envelope = Envelope.of_publish(body, options, app.conf.task_serializer)
        self._installation.codec.check_size(envelope.body, f"The message of the task {envelope.headers.get('task')}")
        return envelope.changed(ignore_result=self._start.ignore_result)

    def _birth(self, workflow_id: str, envelope: Envelope) -> Birth:
        return birth_of(self._installation, envelope, workflow_id, self._start)

    def _write(self, birth: Birth) -> tuple[bool, datetime | None]:
        """Write the row; tell whether its message is ours to send.

        After a lost answer the row that is found there is most likely our own: one message too many is harmless,
        none at all would cost the workflow ``republish_after``.
        """
        publish = self._installation.store.workflows.publish
        answer_lost = False
        try:
            born, published_at = publish(birth, patience=0)
        except DatabaseUnavailable:
            answer_lost = True
            born, published_at = publish(birth, patience=CALLER_PATIENCE)
        if not born:
            self._check_name(birth)
        return born or answer_lost, published_at

    def _check_name(self, birth: Birth) -> None:
        taken_by = self._installation.store.workflows.name_of(birth.id, patience=CALLER_PATIENCE)
        if taken_by is not None and taken_by != birth.name:
            raise WorkflowConflict(
                f"The id {birth.id!r} is taken by a workflow of the task {taken_by}, so {birth.name} can't have it: "
                "choose another task_id."
            )

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
                workflow_id, error,
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
            envelope = Envelope.of_publish(body, options, self._installation.app.conf.task_serializer)
            self.envelope = envelope.changed(ignore_result=self._ignore_result)


class Publication:
    """One ``apply_async`` of a workflow: which id, which producer, and the options that are left to Celery."""

    def __init__(
        self, task: Any, task_id: str | None, producer: Any, options: dict[str, Any], *, max_crashes: int
    ) -> None:
        if current_step() is not None:
            raise NotAllowedInStep(
                f"A step can't start the workflow {task.name}: start it from the workflow, between steps."
            )
        self.task = task
        self.max_crashes = max_crashes
        self.attempt = current_attempt()
        self.options = dict(options)
        wanted = self.options.pop("ignore_result", None)
        self.ignore_result = bool(task.ignore_result if wanted is None else wanted)
        # With a result to come, Celery would ask the result backend before the row is written, and a dead
        # backend would fail the start; the producer asks it afterwards, and puts the header right.
        self.options["ignore_result"] = True
        self.delay = seconds_until(task.app, self.options.pop("countdown", None), self.options.pop("eta", None))
        producer = producer or self.options.pop("publisher", None)
        self.options.pop("connection", None)
        self.id = self._own_id() if task_id is None else check_id(task_id)
        if self.attempt is not None and not self._is_retry:
            # Celery looks for the parent on the thread's stack, where an async function isn't.
            self.options = {"parent_id": self.attempt.id, "root_id": self.attempt.root_id, **self.options}
        self.producer: Any = self._captured() if self._is_retry else self._row_first(producer)

    @property
    def _is_retry(self) -> bool:
        """Celery's retry of the running workflow publishes under the workflow's own id."""
        return self.attempt is not None and self.id == self.attempt.id

    def _own_id(self) -> str:
        if self.attempt is None:
            return str(new_id())
        self.attempt.check_caller()
        return self.attempt.child_id(self.task.name)

    def _row_first(self, producer: Any) -> RowFirst:
        timeout = self.options.pop("workflow_timeout", self.task.workflow_timeout)
        start = Start(
            max_crashes=self.max_crashes,
            ignore_result=self.ignore_result,
            delay=self.delay,
            timeout=None if timeout is None else seconds(timeout, "workflow_timeout"),
        )
        return RowFirst(installed_on(self.task.app), start, producer)

    def _captured(self) -> Captured:
        return Captured(installed_on(self.task.app), self.ignore_result)

    def done(self) -> None:
        """Leave the message of a retry to the attempt, which commits it when it ends."""
        if self.attempt is not None and self._is_retry and self.producer.envelope is not None:
            self.attempt.successor = self.producer.envelope.stored(self.id, self.attempt.fence.attempt)
            self.attempt.successor_retries = retries_of(self.producer.envelope.headers.get("retries"))
            self.attempt.successor_delay = self.delay or 0.0


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
        retries=retries_of(headers.get("retries")),
        parent_id=_id_or_none(headers.get("parent_id")),
        root_id=_id_or_none(headers.get("root_id")),
    )


def retries_of(value: Any) -> int:
    """Return Celery's number of retries from a header; what isn't one counts as none."""
    return value if isinstance(value, int) and 0 <= value < 2**31 else 0


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
