"""``as_step``: any callable, or an existing task, as a step."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, cast, overload

from celery import Task, _state
from celery.local import PromiseProxy, Proxy

from . import inline
from .callables import Callables, caller_of
from .engine.step import StepSpec
from .exceptions import ConfigurationError
from .inline import InlineBody
from .options import check_function, check_names, retry_any_error, step_spec, task_options, warn_if_never_retried
from .publisher import start_step
from .task import C, P, R, Step, Workflow

if TYPE_CHECKING:
    from .task import Awaited


@overload
def as_step(target: Step[P, R, C], *, name: str | None = None, **options: Any) -> InlineStep[P, R, C]: ...
@overload
def as_step(
    target: Callable[P, Coroutine[Any, Any, R]], *, name: str | None = None, **options: Any
) -> InlineStep[P, R, Awaited[R]]: ...
@overload
def as_step(target: Callable[P, R], *, name: str | None = None, **options: Any) -> InlineStep[P, R]: ...
def as_step(target: Callable[..., Any], *, name: str | None = None, **options: Any) -> InlineStep[..., Any]:
    """Make a step of any callable, or of an existing Celery task that stays as it is.

    ``options`` are those of ``Step``. A lambda must be given a name. Nothing is registered. Of a task it takes over
    name and retry options: without ``options`` Celery's own ``autoretry_for`` decides, with Celery's own arithmetic;
    with any, they and the task's make a policy of ours. Raises ConfigurationError.

    A task that Celery hasn't made yet, because its app isn't finalized, stays so: what is wrong with it is raised at
    the first call.
    """
    if not callable(target):
        raise ConfigurationError(f"A step must be callable, not {target!r}.")
    check_names(options)
    return InlineStep(target, name, options)


class InlineStep(Generic[P, R, C]):
    """A callable, or an existing task, as a step; made by ``as_step``."""

    def __init__(self, target: Callable[P, C], name: str | None, options: dict[str, Any]) -> None:
        self._target = target
        self._given = (name, options)
        if not _is_pending(target):
            self.durable_step  # noqa: B018 - what is wrong is said now
            functools.update_wrapper(self, target, updated=())

    @functools.cached_property
    def durable_step(self) -> Callables:
        """How it is called in a workflow, and elsewhere."""
        return _callables_of(self._target, *self._given)

    @property
    def durable_spec(self) -> StepSpec:
        """Its policies."""
        return self.durable_step.spec

    @property
    def name(self) -> str:
        """The name under which its outcome is kept."""
        return self.durable_spec.name

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> C:
        """Run the step: checkpointed in a workflow, else as the plain call that it is."""
        return cast(C, self.durable_step.call(args, kwargs))

    def acall(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Return what an async workflow awaits to run the step without blocking the event loop."""
        return self.durable_step.acall(args, kwargs)

    def __repr__(self) -> str:
        return f"<step {self.name}>"

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Send the task to its queue; only for a Celery task. A workflow starts it there durably, as a child."""
        return self._sent(args, kwargs, {})

    def _sent(self, args: Any, kwargs: Any, options: dict[str, Any]) -> Any:
        if not isinstance(self._target, Task):
            raise ConfigurationError(f"The step {self.name} is a plain function, which has no queue: call it.")
        if caller_of(self.name) is None:
            return self._target.apply_async(args, kwargs, **options)
        if self._given[1]:
            raise ConfigurationError(
                f"The options of as_step({self.name}, …) hold where it is called: for other workers, declare the task "
                "with base=durable.Step and these options."
            )
        return start_step(self._target, args, kwargs, **options)

    def s(self, *args: Any, **kwargs: Any) -> Any:
        """Return a signature, for ``gather``; that of a Celery task is one for Celery's canvas, too."""
        if not isinstance(self._target, Task):
            return StepSignature(self, args, kwargs)
        signature = self._target.s(*args, **kwargs)
        signature._type = _TaskAsStep(self, self._target)
        return signature

    def si(self, *args: Any, **kwargs: Any) -> Any:
        """Return a signature that takes nothing over from the task before it in a chain."""
        signature = self.s(*args, **kwargs)
        return signature.set(immutable=True) if isinstance(self._target, Task) else signature


@dataclass(frozen=True, slots=True)
class StepSignature:
    """A call of a step that isn't a task, to be made by ``gather``."""

    step: InlineStep[Any, Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def durable_step(self) -> Callables:
        """How the step is called."""
        return self.step.durable_step


class _TaskAsStep:
    """What a signature has for its task: in a workflow it starts a child, wherever Celery's canvas has copied it to."""

    def __init__(self, step: InlineStep[Any, Any, Any], task: Any) -> None:
        self._step = step
        self._task = task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._step(*args, **kwargs)

    @property
    def durable_step(self) -> Callables:
        """How the step is called."""
        return self._step.durable_step

    def apply_async(self, args: Any = None, kwargs: Any = None, **options: Any) -> Any:
        """Send the task to its queue, or start it as a child."""
        return self._step._sent(args, kwargs, options)


def _is_pending(target: Any) -> bool:
    """Tell whether this stands for a task that looking at it would make, and would read the configuration for."""
    if type(target) is PromiseProxy:
        return not target.__evaluated__()
    current = _state._tls.current_app or _state.default_app
    return type(target) is Proxy and not (current is not None and current.finalized)


def _callables_of(target: Any, name: str | None, options: dict[str, Any]) -> Callables:
    if isinstance(target, Workflow):
        raise ConfigurationError(f"{target.name} is a workflow, which can't be a step: start it with delay().")
    if isinstance(target, InlineStep):
        inner_name, inner_options = target._given
        return _callables_of(target._target, name or inner_name, {**inner_options, **options})
    if isinstance(target, Task):
        return _callables_of_task(target, name or target.name, options)
    check_function(target, "step")
    return Callables(step_spec(name or name_of(target), retry_any_error(options), target), target, target)


def _callables_of_task(task: Any, name: str, options: dict[str, Any]) -> Callables:
    if not getattr(task, "autoretry_for", ()) and not getattr(task, "retry_if", None):
        warn_if_never_retried(name, options, bound=inspect.ismethod(task.run))
    if isinstance(task, Step):
        return replace(task.durable_step, spec=step_spec(name, {**task.durable_options, **options}, task.run))
    check_function(task.run, "step")
    spec = step_spec(name, task_options(task, options), task.run)
    inline.adopt(task)
    return Callables(spec, task, InlineBody(task, task, as_celery=not options))


def name_of(target: Callable[..., Any]) -> str:
    """Return ``module.qualname`` of a callable, of what a partial wraps, or of an object's class."""
    while isinstance(target, functools.partial):
        target = target.func
    named: Any = target if hasattr(target, "__qualname__") else type(target)
    # A method of a built-in class is in no module itself.
    owner = getattr(named, "__objclass__", None) or type(getattr(named, "__self__", None))
    return f"{getattr(named, '__module__', None) or owner.__module__}.{named.__qualname__}"
