"""Runs of workflows in a test: started, gone on with, with some steps done already, given messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from celery import Celery
from celery.canvas import Signature

import celery_durable as durable

from .. import states
from ..client import CALLER_PATIENCE, WorkflowStatus, get_workflow_status
from ..engine.observer import HOOKS, Observer
from ..engine.step import StepSpec
from ..exceptions import ConfigurationError, DurableError, WorkflowNotFound
from ..history import step_name
from ..installation import Installation, find, installed_on
from ..messages import send
from .bench import Bench, bench_of
from .history import History, history_in


class Run(NamedTuple):
    """What has become of a workflow by now: ``outcome, history = durable_run(checkout, 42)``."""

    outcome: WorkflowStatus
    history: History

    @property
    def id(self) -> str:
        """The workflow's id."""
        return self.outcome.id

    @property
    def state(self) -> str:
        """SUCCESS, FAILURE, CANCELLED, DEAD, or SUSPENDED while it waits."""
        return self.outcome.state

    @property
    def result(self) -> Any:
        """What it returned."""
        return self.outcome.result

    @property
    def error(self) -> Exception | None:
        """What it ended with."""
        return self.outcome.error

    def get(self) -> Any:
        """Return the result or raise the error, as a handle's ``get``; raise DurableError while there is neither."""
        if self.state not in states.FINAL:
            raise DurableError(
                f"The workflow {self.id} is {self.state} and has no result yet: it waits for "
                f"{self.outcome.waiting_for or 'its turn'}."
            )
        if self.error is not None:
            raise self.error
        return self.result


@dataclass(frozen=True)
class WithStepsDone:
    """A workflow some of whose steps have their outcome beforehand."""

    workflow: Any
    done: Mapping[str, Any]


def with_steps_done(workflow: Any, done: Mapping[str, Any]) -> WithStepsDone:
    """Return what ``durable_run`` takes in place of a workflow: these steps have their outcome already.

    ``done`` has a value for each key, or an exception instance with which the step has failed; the other steps run.
    The keys are those of ``durable.list_workflow_steps``; of a declared step the last part of its name will do
    (``charge``, ``charge#2``), and one in the workflow's own module is meant first. A key that the workflow doesn't ask
    for until its end is an AssertionError then.

    Raises ConfigurationError for what isn't a workflow.
    """
    if isinstance(workflow, WithStepsDone):
        return WithStepsDone(workflow.workflow, {**workflow.done, **done})
    signature_of(workflow)
    return WithStepsDone(workflow, dict(done))


def deliver(id: Any, message: Any, topic: str | None = None, app: Celery | None = None) -> Run | None:
    """Send a message to a workflow, as ``durable.send``, and let what ``durable_run`` has started go on with it.

    Returns its run by then; None where the test has no ``durable_run``, and workers do the work. ``id`` may be a run or
    a handle, too.

    Raises WorkflowNotFound, WorkflowFinished, SerializationError, NotInstalled, DatabaseUnavailable.
    """
    workflow_id, installation = id_of(id), find(app)
    send(workflow_id, message, topic, app=installation.app)
    bench = bench_of(installation)
    return None if bench is None else go_on(bench, workflow_id)


def start(bench: Bench, workflow: Any, args: Any, kwargs: Any) -> list[str]:
    """Start a workflow, and return its id; of a chain those of all its workflows, the last one first."""
    done = workflow.done if isinstance(workflow, WithStepsDone) else {}
    signature = signature_of(workflow.workflow if isinstance(workflow, WithStepsDone) else workflow)
    first = first_of(signature)
    if installed_on(first.type.app) is not bench.installation:
        raise ConfigurationError(
            f"The workflow {first.task} belongs to the app {first.type.app.main!r}, and the test's app is "
            f"{bench.app.main!r}: name the app by the ini option durable_app = package.module:app, or declare the "
            "workflow on the fixture durable_app or with @durable.workflow."
        )
    keys = {_full_key(bench.app, first.task, key): value for key, value in done.items()}
    handle = signature.clone(args, kwargs).apply_async()
    ids = [handle.id]
    while (handle := handle.parent) is not None:
        ids.append(handle.id)
    for key, value in keys.items():
        _answer(bench, ids[-1], key, value)
    if keys:
        bench.watched[ids[-1]] = _Asked(bench.installation, ids[-1], keys)
    return ids


def go_on(bench: Bench, *ids: str) -> Run:
    """Run a workflow, and all that it needs, as far as it can go; return how it stands then.

    Of several ids the first counts that belongs to a workflow by then: the end of a chain, or where that has broken.
    """
    bench.settle(ids[0])
    known = bench.installation.store.workflows.names_of(ids, patience=CALLER_PATIENCE)
    workflow_id = next((each for each in ids if each in known), ids[0])
    run = Run(get_workflow_status(workflow_id, app=bench.app), history_in(bench.installation, workflow_id))
    if run.state in states.FINAL and (asked := bench.watched.pop(workflow_id, None)) is not None:
        asked.leave()
        asked.check()
    return run


def signature_of(workflow: Any) -> Any:
    """Return a signature of the workflow that is meant; raise ConfigurationError if it is none."""
    signature = workflow
    if not isinstance(workflow, Signature):
        if not getattr(workflow, "is_durable_workflow", False) or isinstance(workflow, type):
            raise ConfigurationError(
                f"{_shown(workflow)} isn't a workflow: pass a task that was declared with base=durable.Workflow or "
                "@durable.workflow, or a signature of one."
            )
        signature = workflow.s()
    if not getattr(first_of(signature).type, "is_durable_workflow", False):
        raise ConfigurationError(
            f"{_shown(workflow)} isn't the signature of a workflow, or a chain that begins with one."
        )
    return signature


def first_of(signature: Any) -> Any:
    """Return the first signature of a chain, or the one itself."""
    return signature.tasks[0] if signature.subtask_type == "chain" else signature


@contextmanager
def observed(installation: Installation, observer: Observer) -> Iterator[None]:
    """Let somebody watch the attempts of an app for the block."""
    installation.observers.add(observer)
    try:
        yield
    finally:
        installation.observers.remove(observer)


class AtEveryHook(Observer):
    """Calls ``passed`` at every hook."""

    def __init__(self) -> None:
        for hook in HOOKS:
            setattr(self, hook, partial(self.passed, hook))

    def passed(self, hook: str, *facts: Any) -> None:
        """Hear of a hook."""
        raise NotImplementedError


class _Asked(AtEveryHook):
    """Notes which steps a workflow asks for, among them those that were done beforehand."""

    def __init__(self, installation: Installation, workflow_id: str, done: Mapping[str, Any]) -> None:
        super().__init__()
        self._installation = installation
        self._id = workflow_id
        self._done = done
        self._keys: dict[str, None] = {}
        installation.observers.add(self)

    def passed(self, hook: str, *facts: Any) -> None:
        """Note the key of a step or call."""
        if hook in ("step_replayed", "step_starting", "call_starting") and facts[0] == self._id:
            self._keys[facts[1]] = None

    def leave(self) -> None:
        """Hear of no more."""
        self._installation.observers.remove(self)

    def check(self) -> None:
        """Raise AssertionError for a key that nobody has asked for."""
        for key in self._done:
            if key not in self._keys:
                nearest = difflib.get_close_matches(key, self._keys, n=1, cutoff=0.0)
                hint = f" The nearest that it did ask for is {nearest[0]!r}." if nearest else " It asked for none."
                raise AssertionError(
                    f"The step {key!r} was done beforehand, and the workflow {self._id} never asked for it.{hint}"
                )


def _answer(bench: Bench, workflow_id: str, key: str, value: Any) -> None:
    codec, spec = bench.installation.codec, _spec_of(bench.app, key)
    if isinstance(value, BaseException):
        bench.kit.answer(workflow_id, key, codec.encode_error(value), ok=False)
        return
    own = codec if spec is None else codec.using(spec.serializer, spec.compression)
    payload = own.encode(value, f"The value of step {key!r}", None if spec is None else spec.shape)
    bench.kit.answer(workflow_id, key, payload, ok=True)


def _full_key(app: Celery, workflow: str, key: str) -> str:
    """Return a key with the whole name of its step, if one is declared that ends so, and first in the same module."""
    if not isinstance(key, str) or not key:
        raise ConfigurationError(f"The key of a step is a text such as 'charge' or 'charge#2', not {key!r}.")
    name = step_name(key)
    near = f"{workflow.rpartition('.')[0]}.{name}"
    found = sorted(step for step in _steps(app) if name in (step, step.rpartition(".")[2]))
    if name in found or not found:
        return key
    if near in found:
        found = [near]
    if len(found) > 1:
        raise ConfigurationError(f"The step {name!r} may be {' or '.join(found)}: write the whole name.")
    return found[0] + key.removeprefix(name)


def _spec_of(app: Celery, key: str) -> StepSpec | None:
    return _steps(app).get(step_name(key))


def _steps(app: Celery) -> dict[str, StepSpec]:
    return {name: task.durable_spec for name, task in app.tasks.items() if isinstance(task, durable.Step)}


def id_of(what: Any) -> str:
    found = what if isinstance(what, str) else getattr(what, "id", None)
    if not isinstance(found, str):
        raise WorkflowNotFound(f"{_shown(what)} is no id of a workflow: pass the id, a run or a handle.")
    return found


def _shown(what: Any) -> str:
    name = getattr(what, "name", None)
    return f"The task {name}" if isinstance(name, str) and hasattr(what, "apply_async") else f"{what!r:.100}"
