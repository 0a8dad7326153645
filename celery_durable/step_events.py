"""Steps in Flower and ``celery events``: what each try came to, as one of Celery's own monitoring events.

Best effort. Events leave in batches from a thread of their own, so no step waits for a broker; a broker that is
away for long, and a process that is killed, lose some. A replay tells nothing again.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from typing import Any

from celery import Celery, signals
from celery.events.event import get_exchange
from celery.utils.saferepr import saferepr
from celery.utils.time import utcoffset
from kombu import Producer
from kombu.exceptions import EncodeError

from .broker import PATIENCE, SHORT_TRY, connection_for_write
from .config import Config
from .engine.observer import Observer, StepReport
from .seal import HIDDEN
from .text import printable, qualname_of

logger = logging.getLogger("celery_durable")

#: What the worker's main process tells the pool process: it sends task events when this message goes to the pool.
WATCHED_PROPERTY = "durable_watched"
#: Events that are kept for a broker that is away; of more, the oldest are lost.
MOST_WAITING = 5000
MOST_IN_MESSAGE = 200
#: Characters; the first is Celery's own bound.
_LONGEST_REPR = 1024
_LONGEST_TRACEBACK = 10_000
#: Seconds: what collects a batch, what lies between two tries, and what the end of a process may wait.
_PAUSE = 0.25
_RETRY = 2.0
_AT_END = 1.0

#: Members, and the number from which on the text isn't known to be short.
_FEW, _LARGE = 10, 10**18

_TYPES = {"SUCCESS": "task-succeeded", "FAILURE": "task-failed", "RETRY": "task-retried"}

_Event = dict[str, Any]
#: What of an event shows values of the app's.
_VALUES = {"args", "kwargs", "result", "exception", "traceback"}


def is_watched(request: Any, config: Config) -> bool:
    """Tell whether the steps of this delivery are shown."""
    if isinstance(config.step_events, bool):
        return config.step_events
    return bool((request.properties or {}).get(WATCHED_PROPERTY))


def sends_task_events(dispatcher: Any) -> bool:
    """Tell whether a worker's event dispatcher sends what concerns tasks; remote control changes that at any time."""
    return bool(dispatcher and dispatcher.enabled and (not dispatcher.groups or "task" in dispatcher.groups))


def without_values(event: _Event) -> _Event:
    """Return a monitoring event as others than the app may see it."""
    return {name: HIDDEN if name in _VALUES else value for name, value in event.items()}


def event_of(report: StepReport, *, hidden: bool = False) -> _Event:
    """Return a monitoring event, but for what is added when it leaves; ``hidden``: without any value."""
    event = _event_of(report)
    if not hidden:
        return event
    told = {} if report.error is None else {"exception": f"{qualname_of(type(report.error))}({HIDDEN})"}
    return {**without_values(event), **told}


def _event_of(report: StepReport) -> _Event:
    event = {
        "type": _TYPES[report.state],
        "uuid": report.id,
        "name": report.name,
        "args": _repr(report.args),
        "kwargs": _repr(report.kwargs),
        "root_id": report.root_id or report.workflow_id,
        "parent_id": report.workflow_id,
        "retries": report.retries,
        "runtime": report.runtime,
        "hostname": report.worker,
        "received": report.started,
        "started": report.started,
        "timestamp": time.time(),
    }
    if report.error is None:
        return {**event, "result": _repr(report.value)}
    return {**event, "exception": _repr(report.error), "traceback": _traceback(report.error)}


class StepEvents(Observer):
    """Shows each executed step as a task, a child of its workflow's."""

    only_watched = True

    def __init__(self, app: Celery, hides_values: Callable[[], bool] = lambda: False) -> None:
        self._app = app
        self._hides_values = hides_values
        #: By process: a fork inherits its parent's, whose thread it hasn't got and whose connection it mustn't use.
        self._outboxes: dict[int, _Outbox] = {}
        # A pool process ends without Python's own clean-up.
        signals.worker_process_shutdown.connect(self._leave)
        signals.worker_shutdown.connect(self._leave)

    def step_ended(self, report: StepReport) -> None:
        """Let the step be shown soon, if somebody watches."""
        if not report.watched:
            return
        pid = os.getpid()
        outbox = self._outboxes.get(pid) or self._outboxes.setdefault(pid, _Outbox(self._app))
        outbox.add(event_of(report, hidden=self._hides_values()))

    def _leave(self, **kwargs: Any) -> None:
        outbox = self._outboxes.pop(os.getpid(), None)
        if outbox is not None:
            outbox.close(_AT_END)


class _Outbox:
    """The events of one process, and the thread that sends them: a green one where the pool is green."""

    def __init__(self, app: Celery) -> None:
        self._app = app
        self._waiting: deque[_Event] = deque(maxlen=MOST_WAITING)
        self._batch: list[_Event] = []
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._woken = threading.Event()
        self._closing = threading.Event()
        self._ended = threading.Event()
        self._producer: Any = None
        self._is_down = False
        self._lost = 0

    def add(self, event: _Event) -> None:
        """Take an event; waits for nothing."""
        if len(self._waiting) == MOST_WAITING:
            self._lost += 1
            if self._lost == 1:
                logger.warning("More than %d monitoring events of steps wait: the oldest are lost.", MOST_WAITING)
        self._waiting.append(event)
        self._woken.set()
        if self._thread is None:
            self._start()

    def close(self, seconds: float) -> None:
        """Send now what waits, and end; give up after so many seconds."""
        self._closing.set()
        self._woken.set()
        if not self._ended.wait(seconds) or self._waiting or self._batch:
            logger.warning("Some monitoring events of steps are lost: the broker didn't take them in time.")

    def _start(self) -> None:
        with self._lock:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="celery_durable events", daemon=True)
                thread.start()
                self._thread = thread

    def _run(self) -> None:
        while not self._closing.is_set():
            self._woken.wait()
            self._closing.wait(_PAUSE)
            self._woken.clear()
            if not self._send():
                self._closing.wait(_RETRY)
                self._woken.set()
        self._send()
        self._ended.set()
        self._disconnect()

    def _send(self) -> bool:
        """Send all that waits; False if the broker is away, for which the rest is kept."""
        try:
            while self._fill_batch():
                self._publish(self._batch)
                self._batch = []
        except Exception as error:  # noqa: BLE001 - every transport has its own errors; events are worth no more
            self._went_down(error)
            return False
        self._came_up()
        return True

    def _fill_batch(self) -> bool:
        while self._waiting and len(self._batch) < MOST_IN_MESSAGE:
            self._batch.append(self._waiting.popleft())
        return bool(self._batch)

    def _publish(self, batch: list[_Event]) -> None:
        """Send events as Celery's own dispatcher sends those that it has collected."""
        if self._producer is None:
            self._producer = self._new_producer()
        producer = self._producer
        producer.connection.ensure_connection(**SHORT_TRY, reraise_as_library_errors=False)
        try:
            producer.publish(
                [self._stamped(event) for event in batch],
                routing_key="task.multi",
                declare=[producer.exchange],
                headers={"hostname": batch[0]["hostname"]},
                delivery_mode=1,
                retry=True,
                retry_policy=dict(SHORT_TRY),
                timeout=PATIENCE,
            )
        except EncodeError:
            logger.exception("Some monitoring events of steps are lost: they can't be serialized.")

    def _new_producer(self) -> Any:
        conf = self._app.conf
        connection = connection_for_write(self._app)
        exchange = get_exchange(connection, name=conf.event_exchange)
        return Producer(connection, exchange, serializer=conf.event_serializer, auto_declare=False)

    def _stamped(self, event: _Event) -> _Event:
        return {**event, "clock": self._app.clock.forward(), "pid": os.getpid(), "utcoffset": utcoffset()}

    def _went_down(self, error: Exception) -> None:
        self._disconnect()
        if not self._is_down and not self._closing.is_set():
            self._is_down = True
            logger.warning(
                "The broker takes no monitoring events of steps (%r): up to %d are kept for it; the steps go on.",
                error, MOST_WAITING,
            )  # fmt: skip

    def _disconnect(self) -> None:
        producer, self._producer = self._producer, None
        try:
            if producer is not None:
                producer.connection.release()
        except Exception as error:  # noqa: BLE001 - it was broken already, and the next one is new
            logger.debug("A connection for monitoring events couldn't be closed (%r).", error)

    def _came_up(self) -> None:
        if self._is_down or self._lost:
            logger.warning("Monitoring events of steps are sent again; %d were lost.", self._lost)
        self._is_down, self._lost = False, 0


def _repr(value: Any) -> str:
    try:
        text = repr(value) if _is_short(value) else saferepr(value, _LONGEST_REPR)
    except Exception:  # noqa: BLE001 - a value that can't be shown must not break the step
        text = f"<{type(value).__qualname__}>"
    return printable(text, 2 * _LONGEST_REPR)


def _is_short(value: Any) -> bool:
    """Tell whether Python's own text of a value is short and safe: Celery's takes many times as long, for each step."""
    kind = type(value)
    if kind is dict:
        return not value
    return len(value) <= _FEW and all(map(_is_number, value)) if kind in (tuple, list) else _is_number(value)


def _is_number(value: Any) -> bool:
    kind = type(value)
    return kind in (float, bool, type(None)) or (kind is int and abs(value) < _LARGE)


def _traceback(error: Exception) -> str:
    try:
        text = "".join(traceback.format_exception(error))
    except Exception:  # noqa: BLE001 - the same
        text = _repr(error)
    return printable(text[-_LONGEST_TRACEBACK:], _LONGEST_TRACEBACK)
