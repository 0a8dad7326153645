"""A durable task's request in the worker's main process.

Keeps the registry of what is in execution, sees lost pool processes, and gives a workflow back instead of
failing it. Nothing here waits for the database: the node thread does that.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from functools import wraps
from typing import Any, Protocol

from billiard.einfo import ExceptionWithTraceback
from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery.exceptions import Ignore, InvalidTaskError, Reject, Retry
from celery.worker.request import Request
from celery.worker.state import task_ready

from .config import LONGEST, seconds
from .envelope import HEADER, TIMEOUT_HEADER, is_id
from .installation import registered
from .step_events import WATCHED_PROPERTY, sends_task_events, without_values
from .text import printable

NODE_PROPERTY = "durable_node"
#: What a message says of its queue isn't trusted: a heartbeat stays small.
MOST_QUEUES = 1000
#: How Celery tells that a process has ended, or has been ended, in the middle of a task.
_KILLED = (WorkerLostError, Terminated, TimeLimitExceeded, SystemExit, KeyboardInterrupt)


class NodeLike(Protocol):
    """What a request tells the node of its worker; none of it waits."""

    id: Any

    def started(self, request: Any) -> None: ...
    def ended(self, request: Any, *, delivered: bool) -> None: ...
    def accepted(self, queue: str, published: str) -> None: ...
    def lost(self, request: Any) -> None: ...
    def hand_over(self, request: Any) -> None: ...
    def wake_in(self, seconds: float) -> None: ...


class DurableRequest(Request):
    """Tells the node when a durable task starts and ends here, and how."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Celery derives a class for each task, whose methods replace ours: put ours around them."""
        super().__init_subclass__(**kwargs)
        for name, around in (("execute_using_pool", _starting), ("on_success", _succeeding)):
            if name in vars(cls):
                setattr(cls, name, around(vars(cls)[name]))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _check_name(self.name)
        _check_limits(self.time_limits)
        if self.node is not None:
            self.tell_process(NODE_PROPERTY, str(self.node.id))

    def tell_process(self, name: str, value: Any) -> None:
        """Let the pool process know something that only the worker's main process knows."""
        self._request_dict["properties"] = {**(self._request_dict.get("properties") or {}), name: value}

    @property
    def node(self) -> NodeLike | None:
        """The node of this worker, if it has one."""
        installation = registered(self._app)
        found: NodeLike | None = installation.node if installation is not None else None
        return found

    @property
    def durable(self) -> dict[str, Any]:
        """Our own header, empty in a foreign message."""
        header = self._request_dict.get(HEADER)
        return header if isinstance(header, dict) else {}

    def send_event(self, type: str, **fields: Any) -> None:
        """Tell monitors of this request; of values only where there is no payload codec."""
        super().send_event(type, **(without_values(fields) if self._hides_values else fields))

    def info(self, safe: bool = False) -> dict[str, Any]:
        """Return what ``celery inspect`` shows of this request: with a payload codec, without the arguments."""
        shown: dict[str, Any] = super().info(safe=safe or self._hides_values)
        return shown

    @property
    def _hides_values(self) -> bool:
        installation = registered(self._app)
        return installation is not None and installation.codec.seal.is_set

    def revoked(self) -> bool:
        """Only what this request itself was told counts: a resumed workflow has an id that Celery may remember
        as revoked, and whether ``expires`` still matters is seen at the claim.
        """
        return bool(self._already_revoked)

    def on_accepted(self, pid: Any, time_accepted: Any) -> None:
        """A pool process has taken the message."""
        super().on_accepted(pid, time_accepted)
        if self.node is None:
            return
        if (published := published_at(self.durable)) is not None:
            stamp = published.isoformat(timespec="microseconds")
            self.node.accepted(printable(str(self.durable.get("queue"))), stamp)
        timeout = self._request_dict.get(TIMEOUT_HEADER) if self.durable else self._declared_timeout()
        if isinstance(timeout, int | float) and 0 < timeout < LONGEST:
            self.node.wake_in(timeout)

    def _declared_timeout(self) -> float | None:
        """A foreign message starts a workflow as its task was declared."""
        timeout = self.task.workflow_timeout
        return None if timeout is None else seconds(timeout, "workflow_timeout")

    def on_failure(self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False) -> None:
        """The attempt has ended otherwise than by returning; a lost process isn't a failure of the workflow."""
        error = exc_info.exception
        if isinstance(error, ExceptionWithTraceback):
            error = error.exc
        if self._is_lost(error):
            self._give_back(error)
            return
        try:
            super().on_failure(exc_info, send_failed_event=send_failed_event, return_ok=return_ok)
        finally:
            # Only a failure that the process itself has reported, and Celery could store, has been delivered.
            reported = return_ok and not getattr(exc_info, "internal", False) and not isinstance(error, _KILLED)
            self._ended(delivered=reported and not isinstance(error, Retry | Ignore | Reject))
            if isinstance(error, Retry) and isinstance(error.when, int | float) and self.node is not None:
                self.node.wake_in(float(error.when))

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """Celery's hard limit kills the process: that is a crash of this attempt."""
        if soft:
            super().on_timeout(soft, timeout)
        else:
            self._give_back(TimeoutError(f"hard time limit ({timeout} s)"))

    def _announce_cancelled(self, *args: Any, **kwargs: Any) -> None:
        """A cold shutdown: the workflow goes on elsewhere."""
        task_ready(self)
        self._already_cancelled = True
        self.send_event("task-retried", exception="handed over: the worker shuts down", traceback="")
        if self.node is not None:
            self.node.hand_over(self)

    def _is_lost(self, error: BaseException) -> bool:
        if self._already_cancelled or self._already_revoked:
            return False
        return isinstance(error, _KILLED)

    def _give_back(self, reason: BaseException) -> None:
        task_ready(self)
        if self.task.acks_late:
            self.acknowledge()
        self.send_event("task-retried", exception=repr(reason), traceback="")
        if self.node is not None:
            self.node.lost(self)

    def _ended(self, *, delivered: bool) -> None:
        if self.node is not None:
            self.node.ended(self, delivered=delivered)


def published_at(header: dict[str, Any]) -> datetime | None:
    """Return when a message was published, by the database's clock; what isn't a time is left out."""
    try:
        return datetime.fromisoformat(str(header.get("published"))).astimezone(timezone.utc)
    except (ValueError, OverflowError):
        return None


def _check_name(name: Any) -> None:
    """Raise InvalidTaskError for a name that Celery can't count by, for then it would never acknowledge the message."""
    if not isinstance(name, str):
        raise InvalidTaskError(f"The message's task, or shadow, isn't a name, but {printable(repr(name), 100)}.")


def _check_limits(limits: Any) -> None:
    """Raise InvalidTaskError for limits at which Celery would stumble only when the pool takes the message."""
    is_pair = isinstance(limits, list | tuple) and len(limits) == 2
    if not is_pair or not all(each is None or _is_limit(each) for each in limits):
        raise InvalidTaskError(f"The message's time limits aren't two numbers, but {printable(repr(limits), 100)}.")


def _is_limit(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < LONGEST


def _starting(execute: Callable[..., Any]) -> Callable[..., Any]:
    """Register a request before the pool can have it."""

    @wraps(execute)
    def execute_using_pool(self: DurableRequest, pool: Any, **kwargs: Any) -> Any:
        if self.node is not None:
            self.node.started(self)
        self.tell_process(WATCHED_PROPERTY, self.task.send_events and sends_task_events(self._eventer))
        try:
            return execute(self, pool, **kwargs)
        except BaseException:
            self._ended(delivered=False)
            raise

    return execute_using_pool


def _succeeding(succeed: Callable[..., Any]) -> Callable[..., Any]:
    """Note that Celery's tracer has done its part. A failure comes this way too, and on to on_failure."""

    @wraps(succeed)
    def on_success(self: DurableRequest, failed__retval__runtime: Any, **kwargs: Any) -> None:
        succeed(self, failed__retval__runtime, **kwargs)
        if not failed__retval__runtime[0]:
            self._ended(delivered=True)

    return on_success


class Registry:
    """The requests in execution on this node, and the outcomes that it has still to confirm.

    ``lock`` must be a lock of the operating system, not one of a green pool: the node thread is a native one.
    """

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        # Weak: a request that Celery drops without a word, as on a lost connection, must not stay for ever.
        self._requests: weakref.WeakSet[Any] = weakref.WeakSet()
        self._delivered: set[str] = set()
        self._held: set[str] = set()
        self._accepted: dict[str, str] = {}

    def add(self, request: Any) -> None:
        """A request goes to the pool."""
        if not is_id(request.id):
            return  # it can't be claimed, and must not spoil the heartbeat
        with self._lock:
            self._requests.add(request)

    def remove(self, request: Any, *, delivered: bool, hold: bool = False) -> bool:
        """A request has left the pool; ``delivered``: its outcome is to be confirmed.

        ``hold``: it counts as active until ``let_go``, because the database is yet to be told how it ended. Else
        another node would find that nobody lists it, and take a hand-over for a crash.

        False: it had left before, for Celery may tell of one death twice.
        """
        with self._lock:
            if delivered and is_id(request.id):
                self._delivered.add(request.id)
            if request not in self._requests:
                return False
            self._requests.discard(request)
            if hold:
                self._held.add(request.id)
                # If it had claimed the workflow, the row tells of it, and no longer of what was delivered before.
                self._delivered.discard(request.id)
            return True

    def let_go(self, ids: Iterable[str]) -> None:
        """The database knows how these have ended here."""
        with self._lock:
            self._held.difference_update(ids)

    def accepted(self, queue: str, published: str) -> None:
        """Note the newest message that was taken from a queue."""
        with self._lock:
            known = queue in self._accepted or len(self._accepted) < MOST_QUEUES
            if known and published > self._accepted.get(queue, ""):
                self._accepted[queue] = published

    def snapshot(self) -> tuple[set[str], dict[str, str]]:
        """Return what is active, with what the database is yet to be told of, and what was accepted."""
        with self._lock:
            active = {request.id for request in self._requests} | self._delivered | self._held
            return active, dict(self._accepted)

    def delivered(self) -> set[str]:
        """Return the outcomes to confirm; they count as active until ``confirmed``.

        One whose workflow runs here again waits: where nothing awaits an outcome, the row was free at once, and the
        next attempt may have it. If that is cancelled, its end isn't delivered as long as its body runs.
        """
        with self._lock:
            return self._delivered - {request.id for request in self._requests}

    def confirmed(self, ids: set[str]) -> None:
        """Forget outcomes that were confirmed."""
        with self._lock:
            self._delivered -= ids

    def runs(self, workflow_id: str) -> bool:
        """Tell whether a request of this workflow is in execution here."""
        with self._lock:
            return any(request.id == workflow_id for request in self._requests)

    def requests(self) -> list[Any]:
        """Return those that a process of the pool has accepted, in that order."""
        with self._lock:
            accepted = [request for request in self._requests if request.time_start is not None]
        return sorted(accepted, key=lambda request: request.time_start)

    def of_process(self, pid: int) -> list[Any]:
        """Return the requests that a pool process has."""
        with self._lock:
            return [request for request in self._requests if request.worker_pid == pid]
