"""The task bases and decorators: ``Workflow``, ``Step``, ``workflow``, ``step``, ``as_step``."""

from __future__ import annotations

import asyncio
import functools
import inspect
import warnings
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    Literal,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypeVar,
    cast,
    overload,
)

from celery import Task, _state, shared_task
from celery.exceptions import Retry
from celery.local import PromiseProxy, Proxy

from . import inline, registration
from .client import Result, WorkflowHandle
from .delivery import deliver
from .engine import loop
from .engine.context import Attempt, current_attempt, current_step, only_bodies_here, plain_step
from .engine.limits import soft_limit
from .engine.step import Body, StepSpec, call_step
from .exceptions import ConfigurationError, NotInWorkflow
from .inline import InlineBody
from .installation import Installation, installed_on
from .options import (
    STEP_OPTIONS,
    WORKFLOW_OPTIONS,
    callers_level,
    check_bypass,
    check_function,
    check_names,
    check_workflow_options,
    for_celery,
    given,
    retry_any_error,
    step_spec,
    task_options,
    unheeded,
    warn_if_never_retried,
    warn_of_near_misses,
)
from .publisher import Publication

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

if TYPE_CHECKING:
    from typing_extensions import TypeVar as TypeVarWithDefault

    #: What a call returns: R, or what is awaited for R.
    C = TypeVarWithDefault("C", default=R)
    Awaited: TypeAlias = Coroutine[Any, Any, R]

    class _Task(Task, Generic[P, R, C]):
        name: str
        request: Any  # Celery's Context, whose class attributes would tell a type checker that the id is None

        def retry(
            self,
            args: Any = None,
            kwargs: Any = None,
            exc: Exception | None = None,
            throw: bool = True,
            eta: datetime | None = None,
            countdown: float | None = None,
            max_retries: int | None = None,
            **options: Any,
        ) -> Retry: ...
else:
    C = TypeVar("C")

    class _Task(Task):
        """Subscripted by type checkers only."""

        abstract = True

        def __class_getitem__(cls, item):
            return cls

        def _get_request(self):
            # On the event loop, where functions take turns, no stack of a thread can know whose request it is.
            if self.request_stack.top is None and (request := inline.awaited_request(self)) is not None:
                return request
            return super()._get_request()

        request = property(_get_request)


class _DurableType(type):
    """Gives a durable task the app's own task class as a further base, and checks it when it is made.

    Celery makes the class of ``@app.task(base=durable.Workflow)`` with that one base, so that the app's own
    class (Django's ``delay_on_commit``, a tenant's headers) would be lost.
    """

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> _DurableType:
        app = namespace.get("app")
        if app is not None and not any(issubclass(base, app.Task) for base in bases):
            bases = (*bases, app.Task)
        cls = super().__new__(mcs, name, bases, namespace)
        if "run" in namespace:
            cast(Any, cls)._declare()
        return cls


class Workflow(_Task[P, R, C], metaclass=_DurableType):
    """Task base of a durable workflow: ``@app.task(base=durable.Workflow)``.

    Once ``delay()`` or ``apply_async()`` has returned, the workflow reaches an outcome, whatever dies, as long
    as Postgres keeps its data and a worker runs. Its steps that have completed never run again; the function
    itself is run from the top by each attempt and must be deterministic between its steps. The same ``task_id``
    starts at most one workflow.

    Further options, on the task or (the first) per call: ``workflow_timeout`` (seconds or timedelta from the
    first start to completion, then it is cancelled), ``max_recovery_attempts`` (crashes since the last completed
    step before it is given up as DEAD; default: the setting).

    Raises at the call: NotInstalled, SerializationError, PayloadTooLarge, WorkflowConflict, NotAllowedInStep,
    ValueError for an impossible ``task_id`` or delay (nothing was started then), and DatabaseUnavailable (try again
    with the same ``task_id``: if only the answer was lost, that is the same workflow).
    """

    abstract = True
    acks_late = False
    reject_on_worker_lost = False
    retry_on_worker_lost = False
    track_started = False
    Request = "celery_durable.request:DurableRequest"

    #: Seconds or timedelta; see above.
    workflow_timeout: Any = None
    max_recovery_attempts: int | None = None

    @classmethod
    def _declare(cls) -> None:
        check_bypass(cls, Workflow)
        warn_of_near_misses(cls, WORKFLOW_OPTIONS)
        cls._checked(cls.name, cls.run, {name: getattr(cls, name) for name in WORKFLOW_OPTIONS})

    @staticmethod
    def _checked(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        check_function(function, "workflow")
        check_workflow_options(options.get("workflow_timeout"), options.get("max_recovery_attempts"))

    if TYPE_CHECKING:

        def delay(self, *args: P.args, **kwargs: P.kwargs) -> WorkflowHandle[R]: ...

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> C:
        """Run the function: durably for a message in a worker, else as the plain function that it is."""
        body = functools.partial(super().__call__, *args, **kwargs)
        if not self._is_delivered():
            value = body()
            return cast(C, loop.run(value) if inspect.iscoroutine(value) and self._is_eager() else value)
        installation = installed_on(self.app)
        return cast(C, deliver(installation, self, lambda: self._to_its_end(body()), max_crashes=self._max_crashes()))

    def _is_eager(self) -> bool:
        return bool(self.request.is_eager) and current_attempt() is None

    def _to_its_end(self, value: Any) -> Any:
        """Run an async function on the event loop of this process."""
        attempt = current_attempt()
        if attempt is None or not inspect.iscoroutine(value):
            return value
        with inline.awaiting(self, self.request):
            return loop.run_function(attempt, value)

    def apply_async(
        self,
        args: Any = None,
        kwargs: Any = None,
        task_id: str | None = None,
        producer: Any = None,
        link: Any = None,
        link_error: Any = None,
        shadow: str | None = None,
        **options: Any,
    ) -> WorkflowHandle[R]:
        """Start a workflow, with Celery's options: the row is committed before this returns.

        ``countdown`` and ``eta`` are kept by the database, so they may be as long as you like. If the broker
        doesn't answer, the workflow is started by the recovery when it does.
        """
        send = functools.partial(super().apply_async, args, kwargs, link=link, link_error=link_error, shadow=shadow)
        if self.app.conf.task_always_eager:
            return cast("WorkflowHandle[R]", send(task_id=task_id, producer=producer, **options))
        publication = Publication(self, task_id, producer, options, max_crashes=self._max_crashes())
        result = send(task_id=publication.id, producer=publication.producer, **publication.options)
        publication.done()
        result.ignored = publication.ignore_result
        return cast("WorkflowHandle[R]", result)

    async def adelay(self, *args: P.args, **kwargs: P.kwargs) -> WorkflowHandle[R]:
        """Start a workflow as ``delay`` does, without blocking the event loop."""
        attempt = current_attempt()
        task_id = None
        if attempt is not None and current_step() is None:
            attempt.check_caller()
            task_id = attempt.child_id(self.name)
        return await off_the_loop(functools.partial(self.apply_async, args, kwargs, task_id=task_id))

    def AsyncResult(self, task_id: str, **kwargs: Any) -> WorkflowHandle[R]:  # noqa: N802 - Celery's name
        """Return the handle of a workflow of this task."""
        return WorkflowHandle(task_id, app=self.app, **{"backend": self.backend, "task_name": self.name, **kwargs})

    def _is_delivered(self) -> bool:
        request = self.request
        return bool(request.id) and not (request.called_directly or request.is_eager) and current_attempt() is None

    def _max_crashes(self) -> int:
        if self.max_recovery_attempts is not None:
            return self.max_recovery_attempts
        return installed_on(self.app).config.max_recovery_attempts


class Step(_Task[P, R, C], metaclass=_DurableType):
    """Task base of a step: ``@app.task(base=durable.Step)``.

    Called in a workflow it runs inline, and its outcome, value or error, is kept: once that is committed it
    never runs again, and every replay sees the same. A step that was running when its worker died runs again:
    ``durable.current.idempotency_key`` is what makes that harmless. Anywhere else it is a plain Celery task.

    Options, by Celery's names where Celery has one (``docs/steps.md`` has the table; durations in seconds or
    timedelta): ``name``, ``autoretry_for``, ``dont_autoretry_for``, ``retry_if``, ``max_retries``, ``retry_backoff``,
    ``retry_backoff_rate``, ``retry_backoff_max``, ``retry_jitter``, ``default_retry_delay``, ``retry_kwargs``,
    ``throws``, ``soft_time_limit``, ``time_limit``, ``cancellable``, ``atomic``, ``serializer``, ``compression``.
    """

    abstract = True
    durable_spec: StepSpec
    #: As they were declared.
    durable_options: Mapping[str, Any]
    _has_warned = False

    @classmethod
    def _declare(cls) -> None:
        check_bypass(cls, Step)
        warn_of_near_misses(cls, STEP_OPTIONS)
        options, name = for_celery(given(cls)), cls.name or f"{cls.__module__}.{cls.__qualname__}"
        cls.durable_spec, cls.durable_options = cls._checked(name, cls.run, options), options
        warn_if_never_retried(name, options, bound=not isinstance(vars(cls).get("run"), staticmethod))
        for option, value in options.items():
            setattr(cls, option, value)

    @staticmethod
    def _checked(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> StepSpec:
        check_function(function, "step")
        return step_spec(name, options, function)

    if TYPE_CHECKING:

        def delay(self, *args: P.args, **kwargs: P.kwargs) -> Result[R]: ...

    def apply_async(self, args: Any = None, kwargs: Any = None, *more: Any, **options: Any) -> Result[R]:
        """Send the step to a queue, where it is a plain Celery task; one with options that Celery doesn't know warns
        once. A workflow function sends it once, however many attempts there are.
        """
        if self._is_plain_start(options.get("task_id")):
            self._warn_of_unheeded_options()
        send = super().apply_async
        attempt = caller_of(self.name)
        if attempt is None:
            return cast("Result[R]", send(args, kwargs, *more, **options))
        task_id = sent_once(
            attempt, self.name, lambda id: send(args, kwargs, *more, **{"task_id": id, **options}), args, kwargs
        )
        return cast("Result[R]", self.AsyncResult(task_id))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> C:
        """Run the step: checkpointed in a workflow, else as the plain function that it is.

        An ``async def`` step is awaited; where nothing can await it, in a function that isn't async itself or run
        by a worker as a task, it is run to its end.
        """
        value = self.durable_step.call(args, kwargs)
        if inspect.iscoroutine(value) and self._is_delivered():
            with inline.awaiting(self, self.request):
                return cast(C, loop.run(value))
        return cast(C, value)

    def acall(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Return what an async workflow awaits to run the step without blocking the event loop."""
        return self.durable_step.acall(args, kwargs)

    @property
    def durable_step(self) -> Callables:
        """How it is called in a workflow, and elsewhere."""
        run = super().__call__
        return Callables(self.durable_spec, run, InlineBody(self, run, as_celery=False))

    def retry(self, *args: Any, **kwargs: Any) -> Any:
        """Retry the task as Celery does; inline the step is tried again."""
        return inline.retry(self, super().retry, *args, **kwargs)

    def replace(self, sig: Any) -> Any:
        """Replace the task as Celery does; a step can't be replaced."""
        return inline.replace(self, super().replace, sig)

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """Store a state as Celery does; in an inline step it is that of the workflow."""
        inline.update_state(self, super().update_state, *args, **kwargs)

    def push_request(self, *args: Any, **kwargs: Any) -> None:
        """Let a direct call see the inline request, too."""
        inline.push_request(self, super().push_request, *args, **kwargs)

    def _is_delivered(self) -> bool:
        request = self.request
        return bool(request.id) and not request.called_directly and current_attempt() is None

    def _is_plain_start(self, task_id: str | None) -> bool:
        if task_id is not None and task_id == self.request.id:
            return False  # Celery's own retry
        return current_attempt() is None or current_step() is not None

    def _warn_of_unheeded_options(self) -> None:
        lost = [] if self._has_warned else unheeded(self.durable_options)
        if lost:
            warnings.warn(
                f"The step {self.name} is sent as a plain Celery task, where {'; '.join(lost)}.",
                RuntimeWarning,
                stacklevel=callers_level(),
            )
        type(self)._has_warned = True


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
        """Send the task to its queue; only for a Celery task. A workflow sends it once, in all its attempts."""
        if not isinstance(self._target, Task):
            raise ConfigurationError(f"The step {self.name} is a plain function, which has no queue: call it.")
        attempt, task = caller_of(self.name), self._target
        if attempt is None:
            return task.apply_async(args, kwargs)
        task_id = sent_once(attempt, self.name, lambda id: task.apply_async(args, kwargs, task_id=id), args, kwargs)
        return task.AsyncResult(task_id)

    def s(self, *args: Any, **kwargs: Any) -> Any:
        """Return a signature, for ``gather``; that of a Celery task is one for Celery's canvas, too."""
        if not isinstance(self._target, Task):
            return StepSignature(self, args, kwargs)
        signature = self._target.s(*args, **kwargs)
        signature.durable_step = self.durable_step
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


@dataclass(frozen=True, slots=True)
class Callables:
    """A step's policies, and what they call: ``body`` in a workflow, plainly ``run`` elsewhere."""

    spec: StepSpec
    run: Body
    body: Body

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the step; an async one gives a coroutine to an async function."""
        attempt = caller_of(self.spec.name)
        if attempt is None:
            return self._call_plainly(args, kwargs)
        if self.spec.is_async and attempt.on_loop:
            return loop.acall_step(attempt, self.spec, self.body, args, kwargs)
        return call_step(attempt, self.spec, self.body, args, kwargs, loop.FROM_THREAD)

    def acall(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Coroutine[Any, Any, Any]:
        """Return what is awaited for the step's value; its key is settled now."""
        attempt = caller_of(self.spec.name)
        if attempt is None:
            plain = functools.partial(self._call_plainly, args, kwargs)
            return cast("Coroutine[Any, Any, Any]", plain()) if self.spec.is_async else off_the_loop(plain)
        if not attempt.on_loop:
            raise NotInWorkflow(f"Only an async workflow can await acall(): call the step {self.spec.name} itself.")
        return loop.acall_step(attempt, self.spec, self.body, args, kwargs)

    def _call_plainly(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call it as part of another step, where its own limit holds as well, or outside a workflow."""
        outer, spec = current_step(), self.spec
        if outer is None:
            with plain_step(spec.name):
                value = self.run(*args, **kwargs)
            return _in_plain_step(spec.name, value) if inspect.iscoroutine(value) else value
        if spec.soft_time_limit is None:
            return self.run(*args, **kwargs)
        limit, attempt = soft_limit(spec.soft_time_limit, f"The step {spec.name!r}"), current_attempt()
        if spec.is_async:
            return loop.awaited_within(limit, self.run(*args, **kwargs))
        try:
            with limit, outer.until(limit.deadline):
                return self.run(*args, **kwargs)
        finally:
            # The outer body may catch the error, and nobody else would hear of it.
            if limit.has_interrupted and attempt is not None:
                attempt.engine.observers.tell("step_interrupted", attempt.id, outer.key)


if TYPE_CHECKING:

    class _MakesWorkflow(Protocol):
        @overload
        def __call__(self, fun: Callable[P, Coroutine[Any, Any, R]], /) -> Workflow[P, R, Awaited[R]]: ...
        @overload
        def __call__(self, fun: Callable[P, R], /) -> Workflow[P, R]: ...

    class _MakesBoundWorkflow(Protocol):
        @overload
        def __call__(
            self, fun: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], /
        ) -> Workflow[P, R, Awaited[R]]: ...
        @overload
        def __call__(self, fun: Callable[Concatenate[Any, P], R], /) -> Workflow[P, R]: ...

    class _MakesStep(Protocol):
        @overload
        def __call__(self, fun: Callable[P, Coroutine[Any, Any, R]], /) -> Step[P, R, Awaited[R]]: ...
        @overload
        def __call__(self, fun: Callable[P, R], /) -> Step[P, R]: ...

    class _MakesBoundStep(Protocol):
        @overload
        def __call__(self, fun: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]], /) -> Step[P, R, Awaited[R]]: ...
        @overload
        def __call__(self, fun: Callable[Concatenate[Any, P], R], /) -> Step[P, R]: ...


async def _in_plain_step(name: str, coroutine: Coroutine[Any, Any, T]) -> T:
    with plain_step(name):
        return await coroutine


def sent_once(attempt: Attempt, name: str, send: Callable[[str], Any], args: Any, kwargs: Any) -> str:
    """Send a task from a workflow function, and return its id: a step whose own key is the id of the message."""

    def body(*args: Any, **kwargs: Any) -> str:
        step = current_step()
        assert step is not None
        return str(send(step.idempotency_key).id)

    sending = StepSpec(f"{name}.delay")
    return str(call_step(attempt, sending, body, tuple(args or ()), dict(kwargs or {})))


async def off_the_loop(blocking: Callable[[], T]) -> T:
    """Await something that blocks, in a thread."""
    return await asyncio.to_thread(blocking)


def caller_of(name: str) -> Attempt | None:
    """Return the attempt that a step called here belongs to; None makes it a plain call.

    Raises NotInWorkflow in a thread that a workflow body has made.
    """
    if current_step() is not None:
        return None
    attempt = current_attempt()
    if attempt is None and only_bodies_here() and inline.running_task() is None:
        raise NotInWorkflow(
            f"The step {name} was called in a thread that the workflow made itself, where it can't be kept: call "
            "steps in the workflow's own thread, and make threads inside a step."
        )
    return attempt


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


@overload
def workflow(fun: Callable[P, Coroutine[Any, Any, R]], /) -> Workflow[P, R, Awaited[R]]: ...
@overload
def workflow(fun: Callable[P, R], /) -> Workflow[P, R]: ...
@overload
def workflow(*, bind: Literal[True], **options: Any) -> _MakesBoundWorkflow: ...
@overload
def workflow(**options: Any) -> _MakesWorkflow: ...
def workflow(fun: Any = None, /, **options: Any) -> Any:
    """Declare a workflow: ``shared_task`` on the base ``Workflow``, fully typed."""
    return _shared(Workflow, fun, options)


@overload
def step(fun: Callable[P, Coroutine[Any, Any, R]], /) -> Step[P, R, Awaited[R]]: ...
@overload
def step(fun: Callable[P, R], /) -> Step[P, R]: ...
@overload
def step(*, bind: Literal[True], **options: Any) -> _MakesBoundStep: ...
@overload
def step(**options: Any) -> _MakesStep: ...
def step(fun: Any = None, /, **options: Any) -> Any:
    """Declare a step: ``shared_task`` on the base ``Step``, fully typed.

    ``max_retries=n`` alone means any Exception.
    """
    return _shared(Step, fun, retry_any_error(options))


_shared_names = registration.Names((Workflow, Step))


def _shared(kind: type[Workflow[Any, Any]] | type[Step[Any, Any]], fun: Any, options: dict[str, Any]) -> Any:
    def declare(fun: Any) -> Any:
        if not inspect.isroutine(fun):
            raise ConfigurationError(f"Only a function can be declared as a task, not {fun!r}: use durable.as_step(…).")
        # Whatever is wrong is said before Celery keeps the function, to register it on every app.
        name = options.get("name") or f"{fun.__module__}.{fun.__name__}"
        kind._checked(name, fun, options)
        _shared_names.take(name, fun, kind)
        return shared_task(**{"base": kind, **for_celery(options)})(fun)

    return declare if fun is None else declare(fun)


def check_serializers(installation: Installation) -> None:
    """Raise ConfigurationError for a registered step whose serializer or compression can't be used."""
    for task in installation.app.tasks.values():
        if isinstance(task, Step):
            spec = task.durable_spec
            try:
                installation.codec.using(spec.serializer, spec.compression)
            except ConfigurationError as error:
                raise ConfigurationError(f"The step {spec.name} can't keep its results: {error}") from error
