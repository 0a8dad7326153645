"""The node: what a worker's main process does for its workflows, in native threads of its own.

One thread is the heartbeat. The other, here, confirms delivered outcomes, hands back what a dead pool process or
a shutdown has left, and, if this node is the elected one, runs the recovery. A statement of either gives up at
once when the database is away, and is made again at the next turn: nothing that the node has to say is forgotten.
"""

from __future__ import annotations

import math
import os
import random
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from .broker import connection_for_write
from .envelope import is_id, send_all
from .exceptions import DatabaseUnavailable, SchemaVersionError, WorkflowCancelledError
from .heartbeat import Heartbeat
from .installation import Installation
from .native import Loop, logger, original
from .request import Registry
from .store import NodeFacts
from .store.rows import StoredMessage

#: The node doesn't wait for the database: other duties are due.
_NO_PATIENCE = 0.0
_AT_STOP = 5.0
_EXIT_WAIT = 2.0
_LONGEST_TURN = 60.0
#: Seconds until a message is sent again whose task this worker hasn't got, and how many of them are in a second: if
#: nobody has the task, they go round and round.
_LEFT_FOR = 3.0
_MOST_LEFT = 100

_Pids = dict[str, int | None]


class Node(Loop):
    """One incarnation of a running worker."""

    def __init__(self, installation: Installation, hostname: str) -> None:
        super().__init__("node", speaks=True)
        config = installation.config
        lock = original("_thread", "allocate_lock")
        self.id = uuid.uuid4()
        self._installation = installation
        self._config = config
        self._registry = Registry(lock())
        self._heartbeat = Heartbeat(
            installation.store_of_one_thread(),
            NodeFacts(self.id, hostname, os.getpid(), config.lease),
            self._registry,
            config.heartbeat_interval,
            when_elected=self._begin_to_sweep,
            able=self._is_able,
        )
        self._store = installation.store_of_one_thread()
        self._recovery = installation.recovery(
            self._send, sweeper="node", node=self.id, store=self._store, patience=_NO_PATIENCE
        )
        self._listener = installation.listener()
        self._lost, self._killed, self._revoked = _Box(lock()), _Box(lock()), _Box(lock())
        self._left, self._pace = _Box(lock()), Pace(_LEFT_FOR, _MOST_LEFT)
        self._cancelled: deque[Any] = deque()
        self._pool_pids: Callable[[], set[int]] | None = None
        self._notice_deaths: Callable[[], None] = lambda: None
        self._connection: Any = None
        self._building = self._store.build()
        self._sweep_due = time.monotonic()
        self._timer_due = math.inf
        self._turned_at = time.monotonic()
        self._cold = False

    # What requests tell; called in the worker's main thread, or in threads of its pool.

    def started(self, request: Any) -> None:
        """A request goes to the pool."""
        self._registry.add(request)

    def ended(self, request: Any, *, delivered: bool) -> None:
        """A request has left the pool."""
        self._registry.remove(request, delivered=delivered)

    def accepted(self, queue: str, published: str) -> None:
        """A message was taken from a queue."""
        self._registry.accepted(queue, published)

    def lost(self, request: Any) -> None:
        """The process of a request has died."""
        if not self._registry.remove(request, delivered=False, hold=True):
            return
        if self._registry.runs(request.id):
            self._registry.let_go([request.id])  # it has another process here by now
            return
        # A cold shutdown kills its processes: what they had is handed over, and no crash is counted.
        box = self._killed if self._cold else self._lost
        box.add(request.id, self._process_of(request))
        self.bell.ring()

    def hand_over(self, request: Any) -> None:
        """A cold shutdown has killed a request. Takes no lock: Celery calls this in a signal handler."""
        self._cancelled.append(request)
        self.bell.ring()

    def revoke(self, ids: Iterable[str]) -> None:
        """Celery was told to revoke these; what isn't a workflow is no affair of the database."""
        for workflow_id in filter(is_id, ids):
            self._revoked.add(workflow_id, None)
        self.bell.ring()

    def leave_to_others(self, workflow_id: Any) -> None:
        """This worker has taken a message that it can't read, or whose task it hasn't got."""
        if is_id(workflow_id):
            self._left.add(workflow_id, None)
            self.bell.ring()

    def wake_in(self, seconds: float) -> None:
        """A workflow of this worker waits for so long."""
        self._timer_due = min(self._timer_due, time.monotonic() + seconds)
        self.bell.ring()

    # What the worker asks and tells.

    def requests(self) -> list[Any]:
        """Return the requests that are in execution here, the one that has run longest first."""
        return self._registry.requests()

    def watch_pool(self, pids: Callable[[], set[int]], notice_deaths: Callable[[], None]) -> None:
        """Watch the pool's processes, and tell it at once when one has died. A green pool has none."""
        self._pool_pids = pids
        self._notice_deaths = notice_deaths

    def drain(self, *, cold: bool = False) -> None:
        """The worker shuts down: its runs hand over at their next statement. Safe in a signal handler.

        ``cold``: the worker kills its pool.
        """
        self._cold = self._cold or cold
        self._heartbeat.drain()

    def start(self) -> None:
        """Register in the database, then go on in threads."""
        self._heartbeat.start()
        super().start()

    def stop(self, seconds: float = _AT_STOP) -> None:
        """Do what is still to be done, and sign off; waits some seconds at most."""
        super().stop(seconds)
        self._heartbeat.stop(seconds)

    # The thread.

    def turn(self) -> float:
        """Say what is to be said, and sweep if that is due."""
        began = self._turned_at = time.monotonic()
        self.bell.watch(self._pool_pids() if self._pool_pids is not None else set())
        said = self._flush()
        self.attempt(self._listen)
        self.attempt(self._hear)
        if began >= self._timer_due:
            self._timer_due = math.inf
            self.attempt(self._wake)
        if began >= self._sweep_due:
            self._sweep_due = began + self._config.recovery_interval
            self.attempt(self._sweep)
        self.attempt(self._build)
        next_flush = began + (self._config.heartbeat_interval if said and self._building is None else self.RETRY)
        return min(self._sweep_due, self._timer_due, next_flush)

    def died(self, pids: list[int]) -> None:
        """Celery may need seconds to notice: tell its pool, and give back what the process had."""
        self._notice_deaths()
        for pid in pids:
            for request in self._registry.of_process(pid):
                self.lost(request)

    def leave(self) -> None:
        """Say what is left to be said."""
        self._flush()
        self._disconnect()
        if self._building is not None:
            self._building.close()
        self._listener.close()
        self._store.close()

    def _flush(self) -> bool:
        """Say what waits to be said; True if all of it could be."""
        sayings = self._cancel, self._confirm, self._rescue, self._hand_over, self._leave_to_others
        return all([self.attempt(saying) for saying in sayings])

    def _confirm(self) -> None:
        delivered = self._registry.delivered()
        if delivered:
            self._store.workflows.confirm(self.id, delivered, patience=_NO_PATIENCE)
            self._registry.confirmed(delivered)
            self._installation.observers.tell("confirmed", sorted(delivered))

    def _process_of(self, request: Any) -> int | None:
        """The process that has a request; what a green pool calls so is the number of a greenlet."""
        return None if self._pool_pids is None else request.worker_pid

    def _rescue(self) -> None:
        with self._lost.taken() as lost:
            _wait_for_exit(lost.values())
            # Another node may have been faster, and the workflow may run here again by now.
            gone = [workflow_id for workflow_id in lost if not self._registry.runs(workflow_id)]
            if gone:
                self._recovery.rescue(self.id, gone)
                self._recovery.republish()
            self._registry.let_go(lost)

    def _hand_over(self) -> None:
        while self._cancelled:
            request = self._cancelled.popleft()
            self._registry.remove(request, delivered=False, hold=True)
            if is_id(request.id):
                self._killed.add(request.id, self._process_of(request))
        with self._killed.taken() as killed:
            if killed:
                _wait_for_exit(killed.values())
                self._store.workflows.hand_over(self.id, killed, patience=_NO_PATIENCE)
                self._registry.let_go(killed)
                self._recovery.republish()

    def _leave_to_others(self) -> None:
        with self._left.taken() as left:
            if left:
                delays = {workflow_id: self._pace.next() for workflow_id in left}
                self._store.workflows.leave_to_others(delays, patience=_NO_PATIENCE)
                self.wake_in(min(delays.values()))

    def _cancel(self) -> None:
        with self._revoked.taken() as revoked:
            if revoked:
                verdict = self._installation.codec.verdict(WorkflowCancelledError("The workflow was revoked."))
                ids = self._store.workflows.cancel(revoked, verdict=verdict, patience=_NO_PATIENCE)
                if ids:
                    self._recovery.notify()
                    self._recovery.republish()

    def _wake(self) -> None:
        self._recovery.expire()
        self._recovery.wake()
        self._recovery.republish()
        due = self._recovery.next_due()
        if due is not None and due < self._config.recovery_interval:
            self.wake_in(max(due, 0.0))

    def _listen(self) -> None:
        """Hear of commits in outboxes while this node sweeps; without that, the next sweep finds them."""
        if self._config.pgbouncer or not self._heartbeat.elected:
            self.bell.listen(None)
            return
        try:
            self.bell.listen(self._listener.fileno())
        except DatabaseUnavailable:
            self.bell.listen(None)
            raise

    def _hear(self) -> None:
        if self._listener.heard():
            self._recovery.cancel()
            self._recovery.notify()
            self._recovery.tell()
            self._recovery.republish()

    def _is_able(self) -> bool:
        """Tell whether this thread turns: one that hangs must not be the one that sweeps."""
        return time.monotonic() - self._turned_at < max(self._config.lease, _LONGEST_TURN)

    def _begin_to_sweep(self) -> None:
        self._sweep_due = 0.0
        self.bell.ring()

    def _sweep(self) -> None:
        if not self._heartbeat.elected:
            return
        found = self._recovery.sweep()
        self._store.nodes.forget(patience=_NO_PATIENCE)
        due = self._recovery.next_due()
        if self._recovery.is_behind(found):
            self._sweep_due = 0.0
        elif due is not None and due > 0:
            self._sweep_due = min(self._sweep_due, time.monotonic() + due)

    def _build(self) -> None:
        """Go on with the indexes that a new release has: the first worker that has it builds them while it works.

        Not before the first heartbeat: by then what they are built on is there, however long a transaction held it up.
        """
        if self._building is None or not self._heartbeat.began:
            return
        try:
            next(self._building)
        except StopIteration:
            self._building = None
        except SchemaVersionError as error:
            logger.warning("%s Until then lists are slower.", error)
            self._building = None
        except DatabaseUnavailable:
            self._building = self._store.build()
            raise

    def _send(self, messages: list[StoredMessage]) -> list[str]:
        """Send through a connection of this thread; a green pool's can't be used here."""
        app = self._installation.app
        try:
            if self._connection is None:
                self._connection = connection_for_write(app)
            refused = send_all(app, app.amqp.Producer(self._connection, auto_declare=False), messages)
        except Exception as error:  # noqa: BLE001 - every transport has its own errors; the rows are kept
            logger.warning("The broker can't be reached (%r); recovery tries again.", error)
            refused = [message.workflow_id for message in messages]
        if refused:
            self._disconnect()
        return refused

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release()


class Pace:
    """Spreads what is to be done again: some seconds later, and so much at most in each second."""

    def __init__(self, seconds: float, most: int) -> None:
        self._seconds = seconds
        self._most = most
        self._due = -math.inf
        self._room = 0

    def next(self) -> float:
        """Return the seconds until it is the next one's turn."""
        now = time.monotonic()
        if self._due < now + self._seconds:
            # Not always the same distance: the same worker might be the next to ask the broker each time.
            jitter = random.random()  # noqa: S311 - keeps no secret
            self._due, self._room = now + self._seconds + jitter, self._most
        elif not self._room:
            self._due, self._room = self._due + 1.0, self._most
        self._room -= 1
        return self._due - now


class _Box:
    """Workflows that the node thread has to tell the database of, with the processes that had them."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self._pids: _Pids = {}

    def add(self, workflow_id: str, pid: int | None) -> None:
        with self._lock:
            self._pids[workflow_id] = pid

    @contextmanager
    def taken(self) -> Iterator[_Pids]:
        """Give what is in the box; if the block fails, it is there again."""
        with self._lock:
            taken, self._pids = self._pids, {}
        try:
            yield taken
        except BaseException:
            with self._lock:
                self._pids = {**taken, **self._pids}
            raise


def _wait_for_exit(pids: Iterable[int | None]) -> None:
    """A killed process may run on for a moment: its body mustn't overlap with the next attempt's."""
    give_up_at = time.monotonic() + _EXIT_WAIT
    for pid in {pid for pid in pids if pid} - {os.getpid()}:
        while _is_alive(pid) and time.monotonic() < give_up_at:
            original("time", "sleep")(0.01)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False
