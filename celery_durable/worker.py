"""Bootsteps: the node for as long as the pool runs, the drain at a shutdown, tasks that aren't known here."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any

from celery import bootsteps, signals

# A worker begins here: all that is loaded late elsewhere is loaded now. A body's first call imports nothing, so that no
# time limit ends in the midst of an import, and no pool process is forked while another thread holds the lock of one.
from . import (  # noqa: F401
    bulk,
    delivery,
    events,
    health,
    here,
    history,
    management,
    messages,
    patches,
    recovery,
    timers,
    together,
    values,
)
from .contrib.django import transactions  # noqa: F401 - brings nothing of Django
from .envelope import HEADER
from .installation import installed_on, registered
from .native import check_eventlet
from .node import Node
from .task import check_serializers

logger = logging.getLogger("celery_durable.worker")


class NodeStep(bootsteps.StartStopStep):
    """Runs the node from before the first message until the pool has stopped."""

    label = "durable node"
    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        self._installation = installed_on(worker.app)
        self._node: Node | None = None
        super().__init__(worker, **kwargs)

    def create(self, worker: Any) -> NodeStep:
        """Check everything that can be wrong before the worker takes a message."""
        check_eventlet()
        self._installation.engine  # noqa: B018 - builds the settings, the codec and the store
        check_serializers(self._installation)
        self._installation.running.share()  # the pool isn't forked yet
        return self

    def start(self, worker: Any) -> None:
        """Start the node, and hook it into the worker's shutdown."""
        node = self._node = Node(self._installation, worker.hostname)
        if not worker.pool.is_green:
            node.watch_pool(lambda: _pool_pids(worker), lambda: _notice_deaths(worker))
        node.start()
        self._installation.node = node
        _hear_commands()
        signals.worker_shutting_down.connect(self._shutting_down, weak=False)
        _before(worker, "wait_for_soft_shutdown", node.drain)
        # Celery stops this step before its pool has ended; the node is needed until then.
        _before(worker.blueprint, "on_stopped", self._stopped)

    def close(self, worker: Any) -> None:
        """The worker has begun to stop."""
        if self._node is not None:
            self._node.drain()

    def stop(self, worker: Any) -> None:
        """Nothing yet: the pool is still running."""

    terminate = stop

    def info(self, worker: Any) -> dict[str, Any]:
        """Show the node in ``celery inspect stats``."""
        return {"durable": {"node": str(self._node.id)}} if self._node is not None else {}

    def _shutting_down(self, how: str = "", **kwargs: Any) -> None:
        if self._node is not None:
            self._node.drain(cold=how.lower() == "cold")

    def _stopped(self) -> None:
        signals.worker_shutting_down.disconnect(self._shutting_down)
        node, self._node, self._installation.node = self._node, None, None
        if node is not None:
            node.stop()


class UnknownTaskStep(bootsteps.StartStopStep):
    """Leaves a workflow whose task isn't registered here to a worker that has it."""

    label = "durable unknown tasks"
    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        super().__init__(consumer, **kwargs)

    def start(self, consumer: Any) -> None:
        """Put ours around Celery's, which would mark the workflow as failed."""
        original_handler = consumer.on_unknown_task
        if getattr(original_handler, "durable", False):
            return

        def on_unknown_task(body: Any, message: Any, exc: Exception) -> None:
            headers = message.headers or {}
            if HEADER not in headers:
                original_handler(body, message, exc)
                return
            logger.warning(
                "The task %s of workflow %s isn't registered on this worker: the workflow waits for one that has it.",
                headers.get("task"), headers.get("id"), extra={"workflow_id": headers.get("id")},
            )  # fmt: skip
            message.ack_log_error(logger, consumer.connection_errors)
            node = installed_on(consumer.app).node
            if node is not None:
                node.leave_to_others(headers.get("id"))

        on_unknown_task.durable = True  # type: ignore[attr-defined]
        consumer.on_unknown_task = on_unknown_task


def _hear_commands() -> None:
    """Learn our own commands; let ``revoke`` cancel workflows in the database, too, before it ends a process."""
    # Imported by a worker only: it brings most of Celery's worker along.
    from celery.worker.control import Panel

    from . import control  # noqa: F401 - brings our own commands

    original_command = Panel.data["revoke"]
    if getattr(original_command, "durable", False):
        return

    @functools.wraps(original_command)
    def revoke(state: Any, task_id: Any = (), *args: Any, **kwargs: Any) -> Any:
        installation = registered(state.app)
        if installation is not None and installation.node is not None:
            installation.node.revoke([task_id] if isinstance(task_id, str) else list(task_id or ()))
        return original_command(state, task_id, *args, **kwargs)

    revoke.durable = True  # type: ignore[attr-defined]
    Panel.data["revoke"] = revoke


def _before(target: Any, name: str, action: Callable[[], None]) -> None:
    """Let a method of an object begin with ``action``; nothing, where this Celery hasn't got the method."""
    method = getattr(target, name, None)
    if method is None:
        return

    def call(*args: Any, **kwargs: Any) -> Any:
        action()
        return method(*args, **kwargs)

    setattr(target, name, call)


def _pool_pids(worker: Any) -> set[int]:
    """Return the pool's processes; a pool without processes has none."""
    processes = getattr(getattr(worker.pool, "_pool", None), "_pool", None) or []
    try:
        return {pid for process in list(processes) if isinstance(pid := getattr(process, "pid", None), int)}
    except RuntimeError:
        return set()  # the pool changes at this moment; the next turn sees it


def _notice_deaths(worker: Any) -> None:
    """Let Celery replace dead pool processes now rather than at its next maintenance."""
    maintain = getattr(getattr(worker.pool, "_pool", None), "maintain_pool", None)
    if worker.hub is not None and maintain is not None:
        worker.hub.call_soon(maintain)
