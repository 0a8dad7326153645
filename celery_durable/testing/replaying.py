"""Strict replay: new code against a recorded history, without a database, a body or an effect."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, NoReturn

from celery import _state
from celery.app.task import Context

from .. import states
from ..delivery import translated, without_exit
from ..engine import runner
from ..engine.context import Attempt, Engine, boot_time
from ..engine.observer import Observers
from ..engine.outcome import Completed, Failed, Outcome
from ..exceptions import ConfigurationError, NondeterminismError, Suspended
from ..installation import Installation, installed_on
from ..serialization import Payload
from ..store.rows import Checkpoint, Claim, Fence
from ..task import Workflow
from .bench import as_in_worker
from .history import History, Kept, arguments_of
from .runs import AtEveryHook, first_of, signature_of

_PATCH = "durable.patched "
#: Hooks after which a body would run, or something be written.
_BEYOND = ("step_starting", "step_returned", "try_failed", "call_starting")


def replay(history: History, workflow: Any) -> None:
    """Run a workflow's function against what was recorded; nothing else is executed, and no database is asked.

    Strict: it returns if the function asks for the same steps, with the same arguments, and ends alike. A history of a
    workflow that hadn't ended is replayed to where that was; so is one that was cancelled or given up. Code that
    ``durable.patched`` keeps from older workflows isn't taken, and what a new ``patched`` adds at the end is allowed.
    The workflow may have another name by now.

    Raises NondeterminismError, which says what was recorded and what is done now; ConfigurationError if this is no
    workflow; SerializationError if values in the history can't be read; NotInstalled.
    """
    if not isinstance(history, History):
        raise ConfigurationError(
            f"replay() takes a history first, not {history!r:.100}: History.load(path), or history_of(id)."
        )
    _Replay(history, first_of(signature_of(workflow)).type).run()


class _Recorded(dict[str, Checkpoint]):
    """A history that notes what it is asked for."""

    def __init__(self, steps: dict[str, Checkpoint], nothing: Payload) -> None:
        super().__init__(steps)
        self.asked: set[str] = set()
        self.last: str | None = None
        #: The patches that are taken although the recorded run didn't know them.
        self.taken: list[str] = []
        self._nothing = nothing

    def get(self, key: str, default: Any = None) -> Any:
        """Return a step; a patch that comes after all that is recorded is taken, as in production."""
        self.asked.add(key)
        self.last = key
        if key not in self and key.startswith(_PATCH):
            self.taken.append(key)
            self[key] = Checkpoint(key, 0, 1, True, self._nothing)
        return super().get(key, default)


@dataclass
class _Stop(AtEveryHook):
    """Stops the function where it would do what isn't recorded."""

    attempt: Any = None
    key: str | None = None
    _refused: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def passed(self, hook: str, *facts: Any) -> None:
        """Stop before a body, a wait or anything that is written."""
        if hook in _BEYOND:
            self.stop(facts[1])

    def stop(self, key: str | None = None) -> NoReturn:
        """Unwind the function."""
        if self.key is None:
            self.key = key or self.attempt.history.last
        raise self.attempt.unwind(Suspended("the end of the history"))


class _NoStore:
    """Stands where the store is: a replay has no statements to make."""

    def __init__(self, stop: _Stop) -> None:
        self._stop = stop

    def __getattr__(self, name: str) -> Any:
        return _NoTable(self._stop)


class _NoTable:
    """One table of that; to name a statement of it is to make one."""

    def __init__(self, stop: _Stop) -> None:
        self._stop = stop

    def __getattr__(self, name: str) -> NoReturn:
        self._stop.stop()


class _Replay:
    """One replay of a history."""

    def __init__(self, history: History, task: Workflow[Any, Any]) -> None:
        self.history = history
        self.task = task
        self.installation: Installation = installed_on(task.app)
        self.args, self.kwargs = arguments_of(self.installation, history)
        codec = self.installation.codec
        self.steps = _Recorded({step.key: step.checkpoint for step in history}, codec.encode(None, "A patch"))
        self.stopped = _Stop()
        self.engine = self._engine()
        self.attempt = self._attempt()

    def run(self) -> None:
        """Replay; raise NondeterminismError."""
        with _instead(self.installation, self.engine), as_in_worker(), self._as_task():
            outcome = self._outcome()
        if self.attempt.nondeterminism is not None:
            raise self.attempt.nondeterminism
        if self.history.state in (states.SUCCESS, states.FAILURE):
            self._check_end(outcome)
        elif self._has_ended(outcome):
            self._check_all_asked()
        else:
            self._check_branch_asked()

    def _outcome(self) -> Outcome:
        def body() -> Any:
            return self.task.to_its_end(super(Workflow, self.task).__call__(*self.args, **self.kwargs))

        return runner.call_body(self.attempt, without_exit(body), lambda error: translated(self.attempt, error))

    def _check_end(self, outcome: Outcome) -> None:
        if self.steps.taken:
            return self._check_all_asked()
        if not self._has_ended(outcome):
            left = self._unasked()
            then = f"next was {left[0]}" if left else f"it had ended: {self._recorded_outcome()}"
            raise self._error(f"{then}", f"it goes on: {self._stopped_at()}")
        self._check_all_asked()
        assert isinstance(outcome, Completed | Failed)
        if not self._is_same(outcome):
            raise self._error(self._recorded_outcome(), self._outcome_text(outcome))
        return None

    def _check_all_asked(self) -> None:
        left = self._unasked()
        if left:
            raise self._error(f"next was {left[0]}", "the function ends without asking for it")

    def _check_branch_asked(self) -> None:
        """Where one branch stops, others may have more recorded."""
        branch = _branch_of(self.stopped.key or "")
        left = [step for step in self._unasked() if _branch_of(step.key) == branch]
        if left and self.stopped.key is not None:
            raise self._error(f"next was {left[0]}", f"it asks for {self._stopped_at()}")

    def _unasked(self) -> list[_Shown]:
        return [
            _Shown(step.key, step.args) for step in self.history
            if step.kept is not None and step.key not in self.steps.asked and not step.key.startswith(_PATCH)
        ]  # fmt: skip

    def _has_ended(self, outcome: Outcome) -> bool:
        return isinstance(outcome, Completed | Failed)

    def _is_same(self, outcome: Completed | Failed) -> bool:
        kept = self.history.outcome
        assert kept is not None
        if kept.ok != isinstance(outcome, Completed):
            return False
        if isinstance(outcome, Failed):
            recorded = kept.error
            return type(recorded) is type(outcome.error) and _said(recorded) == _said(self._rebuilt(outcome.error))
        codec, what = self.installation.codec, f"The result of workflow {self.history.id}"
        return bool(codec.decode(kept.payload, what) == codec.decode(outcome.payload, what))

    def _rebuilt(self, error: Exception) -> Exception:
        return self.installation.codec.rebuilt(error)

    def _recorded_outcome(self) -> str:
        kept = self.history.outcome
        assert kept is not None
        return f"it returned {kept.value!r:.500}" if kept.ok else f"it raised {kept.error!r:.500}"

    def _outcome_text(self, outcome: Completed | Failed) -> str:
        if isinstance(outcome, Completed):
            return f"it returns {Kept.of(outcome.payload, ok=True).value!r:.500}"
        return f"it raises {outcome.error!r:.500}"

    def _stopped_at(self) -> str:
        return f"a new call, {self.stopped.key!r}" if self.stopped.key else "a new call"

    def _error(self, recorded: str, now: str) -> NondeterminismError:
        code = "this code" if self.task.name == self.history.name else self.task.name
        return NondeterminismError(
            f"The workflow {self.history.id} ({self.history.name}) can't be replayed by {code}. "
            f"Recorded: {recorded}. Now: {now}. Let running workflows keep the old code by durable.patched()."
        )

    def _engine(self) -> Engine:
        """Return an engine that asks nothing of a database, not even where it is."""
        config, observers = self.installation.config, Observers()
        observers.add(self.stopped)
        return Engine(
            store=_NoStore(self.stopped), codec=self.installation.codec, observers=observers,  # type: ignore[arg-type]
            lease=config.lease, suspend_after=0.0, republish_after=config.republish_after, retention=0.0,
            nondeterminism="error", strict=True,
        )  # fmt: skip

    def _attempt(self) -> Attempt:
        fence = Fence(self.history.id, 1, uuid.uuid4(), uuid.uuid4())
        claim = Claim(fence, 0, datetime.now(timezone.utc), None, self.steps)
        attempt = Attempt.of(
            self.engine, self.history.name, claim, boot_time(), root_id=self.history.root_id or self.history.id,
            worker="replay@tests", shape=self.task.durable_shape(self.args),
        )  # fmt: skip
        attempt.confirm(float("inf"))  # never looks again how it stands
        attempt.asked_at = float("inf")
        self.stopped.attempt = attempt
        return attempt

    @contextmanager
    def _as_task(self) -> Iterator[None]:
        """Let the function see the request that it had."""
        request = Context(
            id=self.history.id, root_id=self.history.root_id or self.history.id, parent_id=self.history.parent_id,
            args=list(self.args), kwargs=self.kwargs, retries=self.history.retries, called_directly=False,
            is_eager=False, hostname="replay@tests", ignore_result=True, headers={}, delivery_info={},
        )  # fmt: skip
        _state._task_stack.push(self.task)
        self.task.request_stack.push(request)
        try:
            yield
        finally:
            self.task.request_stack.pop()
            _state._task_stack.pop()


@dataclass(frozen=True)
class _Shown:
    key: str
    args: str | None

    def __str__(self) -> str:
        return f"{self.key!r}, called with ({self.args or ''})"


@contextmanager
def _instead(installation: Installation, engine: Engine) -> Iterator[None]:
    """Let this be the engine of an app for the block."""
    parts = vars(installation)
    usual = parts.get("engine")
    parts["engine"] = engine
    try:
        yield
    finally:
        if usual is None:
            del parts["engine"]
        else:
            parts["engine"] = usual


def _branch_of(key: str) -> str:
    return key.partition("[")[2].partition("]")[0]


def _said(error: Exception | None) -> str:
    return str(error)
