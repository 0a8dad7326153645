"""The node: a native thread in a worker's main process that keeps its workflows alive.

It writes the heartbeat, confirms delivered outcomes, hands back what a dead pool process or a shutdown has
left, and, if it is the elected one, runs the recovery. Every statement of it gives up at once when the
database is away, and is made again at its next turn: nothing that it has to say is forgotten.
"""

from __future__ import annotations

import logging
import os
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from typing import Any

from .envelope import send_all
from .exceptions import DatabaseUnavailable, WorkflowCancelledError
from .installation import Installation
from .native import Bell, original
from .request import Registry
from .store import NodeFacts
from .store.rows import StoredMessage

logger = logging.getLogger("celery_durable.node")

#: The node thread doesn't wait for the database: other duties are due.
_NO_PATIENCE = 0.0
_AT_STOP = 5.0
_EXIT_WAIT = 2.0


class Node:
    """One incarnation of a running worker, and the thread that speaks for it."""

    def __init__(self, installation: Installation, hostname: str) -> None:
        config = installation.config
        self.id = uuid.uuid4()
        self._installation = installation
        self._config = config
        self._facts = NodeFacts(self.id, hostname, os.getpid(), config.lease)
        self._store = installation.store_of_one_thread()
        self._recovery = installation.recovery(self._send, store=self._store, patience=_NO_PATIENCE)
        lock = original("_thread", "allocate_lock")
        self._registry = Registry(lock())
        self._bell = Bell()
        self._ended = lock()
        self._outbox = _Outbox(lock())
        self._pool_pids: Callable[[], set[int]] = set
        self._notice_deaths: Callable[[], None] = lambda: None
        self._as_of: datetime | None = None
        self._elected = False
        self._draining = False
        self._stopping = False
        self._connection: Any = None
        self._beat_due = self._sweep_due = time.monotonic()

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
        self._registry.remove(request, delivered=False)
        if not self._registry.runs_twice(request.id):
            self._outbox.lost.add(request.id)
            self._bell.ring()

    def hand_over(self, request: Any) -> None:
        """A cold shutdown has killed a request."""
        self._registry.remove(request, delivered=False)
        self._outbox.killed[request.id] = request.worker_pid
        self._bell.ring()

    def expired(self, workflow_id: str) -> None:
        """Celery has discarded a workflow that wasn't started in time."""
        self._outbox.expired.add(workflow_id)
        self._bell.ring()

    def wake_in(self, seconds: float) -> None:
        """A workflow of this worker waits for so long."""
        self._sweep_by(seconds)
        self._bell.ring()

    # What the worker tells.

    def watch_pool(self, pids: Callable[[], set[int]], notice_deaths: Callable[[], None]) -> None:
        """Watch the processes of a pool, and tell it at once when one has died."""
        self._pool_pids = pids
        self._notice_deaths = notice_deaths

    def drain(self) -> None:
        """The worker shuts down: its runs hand over at their next statement. Safe in a signal handler."""
        self._draining = True
        self._beat_due = 0.0
        self._bell.ring()

    def start(self) -> None:
        """Register in the database, then go on in a thread of its own."""
        try:
            self._beat()
        except DatabaseUnavailable as error:
            logger.error("%s The worker goes on trying.", error)
        self._ended.acquire()
        original("_thread", "start_new_thread")(self._run, ())

    def stop(self) -> None:
        """Do what is still to be done, sign off, and end the thread; waits some seconds at most."""
        self._stopping = True
        self._bell.ring()
        if not self._ended.acquire(timeout=_AT_STOP):
            logger.warning("The node thread didn't end in time; its workflows are found by the recovery.")

    # The thread.

    def _run(self) -> None:
        try:
            while not self._stopping:
                self._turn()
            self._leave()
        except BaseException:
            logger.exception("The node thread has ended by an error; its workflows are rescued after a lease.")
        finally:
            self._ended.release()

    def _turn(self) -> None:
        self._bell.watch(self._pool_pids())
        died = self._bell.wait(min(self._beat_due, self._sweep_due) - time.monotonic())
        if died:
            self._found_dead(died)
        self._try(self._flush)
        if time.monotonic() >= self._beat_due:
            self._beat_due = time.monotonic() + self._config.heartbeat_interval
            self._try(self._beat)
        if time.monotonic() >= self._sweep_due:
            self._sweep_due = time.monotonic() + self._config.recovery_interval
            self._try(self._sweep)

    def _try(self, duty: Callable[[], None]) -> None:
        try:
            duty()
        except DatabaseUnavailable as error:
            logger.warning("%s", error)
            self._retry_soon()
        except Exception:
            logger.exception("A duty of the node thread failed; it is done again at its next turn.")
            self._retry_soon()

    def _retry_soon(self) -> None:
        self._beat_due = min(self._beat_due, time.monotonic() + min(1.0, self._config.heartbeat_interval))

    def _found_dead(self, pids: list[int]) -> None:
        """Celery may need seconds to notice: tell its pool, and give back what the process had."""
        self._notice_deaths()
        for pid in pids:
            for request in self._registry.of_process(pid):
                self.lost(request)

    def _flush(self) -> None:
        """Say what waits to be said."""
        self._confirm()
        if expired := self._outbox.take(self._outbox.expired):
            self._keep(self._outbox.expired, expired, lambda: self._discard(expired))
        if lost := self._outbox.take(self._outbox.lost):
            self._keep(self._outbox.lost, lost, lambda: self._rescue(lost))
        if killed := self._outbox.take_killed():
            self._outbox_hand_over(killed)

    def _keep(self, box: set[str], ids: set[str], action: Callable[[], None]) -> None:
        try:
            action()
        except BaseException:
            box |= ids
            raise

    def _confirm(self) -> None:
        delivered = self._registry.delivered()
        if delivered:
            self._store.workflows.confirm(self.id, delivered, patience=_NO_PATIENCE)
            self._registry.confirmed(delivered)
            self._installation.observers.tell("confirmed", sorted(delivered))

    def _discard(self, ids: set[str]) -> None:
        verdict = self._installation.codec.encode_error(
            WorkflowCancelledError("The workflow wasn't started before its `expires`.")
        )
        self._store.workflows.expired(ids, verdict=verdict, patience=_NO_PATIENCE)

    def _rescue(self, ids: set[str]) -> None:
        self._recovery.rescue(self.id, ids)
        self._recovery.republish()

    def _outbox_hand_over(self, killed: dict[str, int | None]) -> None:
        try:
            for pid in set(killed.values()):
                _wait_for_exit(pid)
            self._store.workflows.hand_over(self.id, killed, patience=_NO_PATIENCE)
            self._recovery.republish()
        except BaseException:
            self._outbox.killed.update(killed)
            raise

    def _beat(self) -> None:
        active, accepted = self._registry.snapshot()
        beat = self._store.nodes.beat(
            self._facts,
            active=active,
            accepted=accepted,
            as_of=self._as_of,
            draining=self._draining,
            patience=_NO_PATIENCE,
        )
        self._as_of = beat.seen
        if beat.elected and not self._elected:
            self._sweep_due = 0.0
        self._elected = beat.elected

    def _sweep(self) -> None:
        if not self._elected:
            return
        self._recovery.sweep()
        self._store.nodes.forget(patience=_NO_PATIENCE)
        due = self._recovery.next_due()
        if due is not None and due > 0:
            self._sweep_by(due)

    def _sweep_by(self, seconds: float) -> None:
        self._sweep_due = min(self._sweep_due, time.monotonic() + max(seconds, 0.0))

    def _send(self, messages: list[StoredMessage]) -> list[str]:
        """Send through a connection of this thread; a green pool's can't be used here."""
        app = self._installation.app
        try:
            if self._connection is None:
                self._connection = app.connection_for_write()
            self._connection.ensure_connection(max_retries=1, interval_start=0, interval_step=0)
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

    def _leave(self) -> None:
        self._try(self._flush)
        self._try(lambda: self._store.nodes.leave(self.id, patience=_NO_PATIENCE))
        self._disconnect()
        self._store.close()
        self._bell.close()


class _Outbox:
    """What the node thread has still to tell the database."""

    def __init__(self, lock: Any) -> None:
        self._lock = lock
        self.lost: set[str] = set()
        self.expired: set[str] = set()
        self.killed: dict[str, int | None] = {}

    def take(self, box: set[str]) -> set[str]:
        with self._lock:
            taken = set(box)
            box -= taken
            return taken

    def take_killed(self) -> dict[str, int | None]:
        with self._lock:
            taken, self.killed = self.killed, {}
            return taken


def _wait_for_exit(pid: int | None) -> None:
    """A killed process may run on for a moment: its body mustn't overlap with the next attempt's."""
    if not pid or pid == os.getpid():
        return
    give_up_at = time.monotonic() + _EXIT_WAIT
    while time.monotonic() < give_up_at:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        if _is_zombie(pid):
            return
        original("time", "sleep")(0.01)


def _is_zombie(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return False
