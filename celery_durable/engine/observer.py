"""The one seam to watch the engine: a hook at every arrow between workers and Postgres.

Monitoring, logs and the crash tests use it alike. A watcher that breaks is logged, never fatal. Hooks run in
the process in which the thing happens, some of them in the node thread: they must be quick and must not
make durable calls. ``HOOKS`` lists them in the order in which the life of a workflow passes them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..exceptions import SoftTimeLimitExceeded

if TYPE_CHECKING:
    from .waiting import StepCall

logger = logging.getLogger("celery_durable")


@dataclass(frozen=True, slots=True)
class AttemptReport:
    """An attempt, for those who show it."""

    workflow_id: str
    root_id: str
    #: Of the workflow's task.
    name: str
    #: Its number, from 1.
    attempt: int
    #: Host name of the node, ``w1@host``.
    worker: str
    #: Seconds from the publication of its message to the claim, by the database's clock; None: it doesn't say.
    lag: float | None
    #: Crashes since the last new checkpoint.
    crashes: int = 0


class StepReport(NamedTuple):
    """What a step's try has come to, for those who show it."""

    workflow_id: str
    #: Of the workflow's task.
    workflow_name: str
    root_id: str
    #: Host name of the node, ``w1@host``.
    worker: str
    #: The step's idempotency key: the same on every try and attempt.
    id: str
    name: str
    key: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    #: SUCCESS, FAILURE, or RETRY: this try has failed, and another one follows.
    state: str
    value: Any
    error: Exception | None
    #: Failed tries before this one.
    retries: int
    #: Seconds.
    runtime: float
    #: Wall-clock time, in seconds since the epoch, at which the try began.
    started: float
    #: Somebody watches Celery's monitoring events.
    watched: bool


class Observer:
    """Does nothing at every hook; override the ones of interest."""

    #: It does nothing where nobody watches Celery's monitoring events.
    only_watched = False

    def publishing(self, workflow_id: str, headers: MutableMapping[str, Any], forked_from: str | None) -> None:
        """Called before a new workflow's row is written. What is added to its message's headers is kept with it."""

    def published(self, workflow_id: str) -> None:
        """Called when the row is committed, before its message is sent."""

    def sent(self, workflow_id: str) -> None:
        """Called when the broker has the message."""

    def publish_ended(self, workflow_id: str, error: BaseException | None) -> None:
        """Called after each ``publishing``, in the same context; ``error`` is what the caller gets."""

    def claiming(self, workflow_id: str) -> None:
        """Called before a worker tries to take a workflow."""

    def claimed(self, workflow_id: str, attempt: int) -> None:
        """Called when an attempt has begun, before the workflow function runs."""

    def attempt_started(self, report: AttemptReport) -> None:
        """Called after ``claimed``, with all that is known of the attempt."""

    def step_replayed(self, workflow_id: str, key: str) -> None:
        """Called when a step is answered from its checkpoint."""

    def step_starting(self, workflow_id: str, key: str) -> None:
        """Called before each try of a step's body."""

    def body_starting(self, workflow_id: str, key: str, call: StepCall) -> None:
        """Called after ``step_starting``, in the context of the body: what is made current here is current in it."""

    def body_ended(self, workflow_id: str, key: str) -> None:
        """Called after each ``body_starting``, in the same context, whatever ended the body."""

    def step_returned(self, workflow_id: str, key: str) -> None:
        """Called when a body has ended for good, before its checkpoint is written."""

    def step_recorded(self, workflow_id: str, key: str) -> None:
        """Called when the checkpoint is committed."""

    def try_failed(self, workflow_id: str, key: str, error: Exception) -> None:
        """Called when a try has failed and another one follows, before that is written."""

    def try_recorded(self, workflow_id: str, key: str) -> None:
        """Called when the failed try is committed, before the wait."""

    def step_ended(self, report: StepReport) -> None:
        """Called when a step's try has ended and that is committed."""

    def step_interrupted(self, workflow_id: str, key: str) -> None:
        """Called in the body's thread when a limit or a cancellation has interrupted it, wherever it was."""

    def branch_ended(self, workflow_id: str, key: str) -> None:
        """Called in a thread of a ``gather`` or an ``acall`` when it is done with a step's body."""

    def body_awaited(self, workflow_id: str, key: str) -> None:
        """Called on the event loop when an async body has ended, interrupted or not."""

    def call_starting(self, workflow_id: str, key: str) -> None:
        """Called before a durable call other than a step: a wait, a message, an event, a child."""

    def call_registered(self, workflow_id: str, key: str) -> None:
        """Called when a wait has registered, before its last look."""

    def call_recorded(self, workflow_id: str, key: str) -> None:
        """Called when the outcome of such a call is committed, before anybody else is told."""

    def suspending(self, workflow_id: str, reason: str) -> None:
        """Called before a waiting workflow gives its worker slot back."""

    def suspended(self, workflow_id: str, reason: str) -> None:
        """Called when the suspension is committed."""

    def handing_over(self, workflow_id: str) -> None:
        """Called before a workflow is given back because its worker shuts down."""

    def handed_over(self, workflow_id: str) -> None:
        """Called when the hand-over is committed, before the message is sent."""

    def finishing(self, workflow_id: str, state: str) -> None:
        """Called when the workflow function has ended, before that is written."""

    def finished(self, workflow_id: str, state: str) -> None:
        """Called when the outcome is committed, before Celery delivers it."""

    def fenced(self, workflow_id: str) -> None:
        """Called when an attempt finds that another worker owns its workflow."""

    def attempt_ended(self, report: AttemptReport, ending: str) -> None:
        """Called when the end of an attempt is committed, whatever it is; not when its process dies.

        ``ending`` is a final state, "suspended", "handed over", "retried", or "fenced": another worker has it.
        """

    def confirmed(self, workflow_ids: list[str]) -> None:
        """Called when nothing remains to be done for these finished workflows."""

    def recovered(self, duty: str, workflow_ids: list[str]) -> None:
        """Called when a duty of the recovery has found work, after its commit."""


HOOKS = tuple(name for name, hook in vars(Observer).items() if not name.startswith("_") and callable(hook))


class Observers:
    """Passes each call on to all observers; ``observers.claimed(…)`` as on a single one."""

    def __init__(self) -> None:
        self._observers: list[Observer] = []
        self._hearing: dict[str, list[tuple[Observer, Callable[..., None]]]] = {}
        #: The hooks at which somebody does something, with and without watchers of Celery's events.
        self._heard: dict[bool, frozenset[str]] = {True: frozenset(), False: frozenset()}

    def add(self, observer: Observer) -> None:
        """Watch from now on."""
        self._observers = [*self._observers, observer]
        self._listen()

    def remove(self, observer: Observer) -> None:
        """Watch no longer."""
        self._observers = [each for each in self._observers if each is not observer]
        self._listen()

    def hear(self, hook: str, *, watched: bool) -> bool:
        """Tell whether an observer does something at this hook: what it is told may take time to make.

        ``watched``: somebody watches Celery's monitoring events.
        """
        return hook in self._heard[watched]

    def tell(self, hook: str, *facts: Any) -> None:
        """Call one hook of all observers that have it."""
        for observer, method in self._hearing.get(hook, ()):
            try:
                method(*facts)
            except SoftTimeLimitExceeded:
                raise  # Celery's limit of the whole task, which has only met a watcher
            except Exception:
                logger.exception("The observer %r failed in %s; the workflow isn't touched by that.", observer, hook)

    def _listen(self) -> None:
        """Look up who does something at which hook: there are many of both, and a step passes some on its way."""
        methods = {hook: [(each, getattr(each, hook)) for each in self._observers] for hook in HOOKS}
        self._hearing = {
            hook: [(each, method) for each, method in found if not _does_nothing(hook, method)]
            for hook, found in methods.items()
        }
        self._heard = {
            watched: frozenset(
                hook
                for hook, found in self._hearing.items()
                if any(watched or not each.only_watched for each, _ in found)
            )
            for watched in (True, False)
        }


def _does_nothing(hook: str, method: Any) -> bool:
    return getattr(method, "__func__", None) is vars(Observer)[hook]
