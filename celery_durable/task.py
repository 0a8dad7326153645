"""The task bases and decorators: ``Workflow``, ``Step``, ``workflow``, ``step``, ``as_step``."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, Generic, Literal, ParamSpec, TypeVar, cast, overload

from celery import Task, _state, shared_task
from celery.app.task import Context

from .client import Result, WorkflowHandle
from .config import seconds
from .delivery import deliver
from .engine.context import Attempt, current_attempt, current_step, only_bodies_here
from .engine.step import StepSpec, call_step
from .exceptions import ConfigurationError, NotInWorkflow
from .installation import installed_on
from .options import check_bypass, check_count, given, retry_any_error, step_spec, warn_if_never_retried
from .publisher import Publication

P = ParamSpec("P")
R = TypeVar("R")

if TYPE_CHECKING:

    class _Task(Task, Generic[P, R]):
        name: str
        request: Any  # Celery's Context, whose class attributes would tell a type checker that the id is None

    class _Call(Generic[P, R]): ...
else:

    class _Task(Task):
        """Subscripted by type checkers only."""

        abstract = True

        def __class_getitem__(cls, item):
            return cls


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


class Workflow(_Task[P, R], metaclass=_DurableType):
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
        check_count(cls.max_recovery_attempts, "max_recovery_attempts")
        if cls.workflow_timeout is not None:
            seconds(cls.workflow_timeout, "workflow_timeout")

    if TYPE_CHECKING:

        def delay(self, *args: P.args, **kwargs: P.kwargs) -> WorkflowHandle[R]: ...

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the function: durably for a message in a worker, else as the plain function that it is."""
        body = functools.partial(super().__call__, *args, **kwargs)
        if not self._is_delivered():
            return cast(R, body())
        installation = installed_on(self.app)
        return cast(R, deliver(installation, self, body, max_crashes=self._max_crashes()))

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


class Step(_Task[P, R], metaclass=_DurableType):
    """Task base of a step: ``@app.task(base=durable.Step)``.

    Called in a workflow it runs inline, and its outcome, value or error, is kept: once that is committed it
    never runs again, and every replay sees the same. A step that was running when its worker died runs again:
    ``durable.current.idempotency_key`` is what makes that harmless. Anywhere else it is a plain Celery task.

    Options: Celery's for retries (``autoretry_for``, ``max_retries``, ``retry_backoff`` … all durations in
    seconds), ``retry_if`` (a predicate of the exception), ``retry_backoff_rate`` (factor, 2.0) and
    ``soft_time_limit`` (seconds or timedelta a try; raises StepTimeout in the body).
    """

    abstract = True
    durable_spec: StepSpec

    @classmethod
    def _declare(cls) -> None:
        check_bypass(cls, Step)
        options, name = given(cls), cls.name or f"{cls.__module__}.{cls.__qualname__}"
        warn_if_never_retried(name, options)
        cls.durable_spec = step_spec(name, options)
        limit = cls.durable_spec.soft_time_limit
        if limit is not None:
            cls.soft_time_limit = limit  # Celery wants seconds where it runs the step as a task

    if TYPE_CHECKING:

        def delay(self, *args: P.args, **kwargs: P.kwargs) -> Result[R]: ...

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the step: checkpointed in a workflow, else as the plain function that it is."""
        attempt = caller_of(self.name)
        if attempt is None:
            return cast(R, super().__call__(*args, **kwargs))
        body = functools.partial(self._call_inline, attempt, super().__call__)
        return cast(R, call_step(attempt, self.durable_spec, body, args, kwargs))

    def retry(self, *args: Any, exc: Exception | None = None, **kwargs: Any) -> Any:
        """In an inline step, fail this try; its policy decides about the next one."""
        if self.request.get("durable_inline"):
            raise (exc if exc is not None else self.MaxRetriesExceededError(f"The step {self.name} asked for a retry."))
        return super().retry(*args, exc=exc, **kwargs)

    def push_request(self, *args: Any, **kwargs: Any) -> None:
        """Let the body see the inline request, which older Celery hides behind an empty one."""
        inline = vars(self.request) if self.request.get("durable_inline") else {}
        super().push_request(*args, **{**inline, **kwargs})

    def _call_inline(self, attempt: Attempt, run: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call the body with a request of its own, so that a bound step sees itself and not its workflow."""
        step = current_step()
        assert step is not None
        context = Context(
            id=step.idempotency_key,
            parent_id=attempt.id,
            args=args,
            kwargs=kwargs,
            retries=step.attempt - 1,
            called_directly=False,
            durable_inline=True,
            hostname=(_state.get_current_task() or self).request.hostname,
        )
        _state._task_stack.push(self)
        self.request_stack.push(context)
        try:
            return run(*args, **kwargs)
        finally:
            self.request_stack.pop()
            _state._task_stack.pop()


class InlineStep(Generic[P, R]):
    """A callable, or an existing task, as a step; made by ``as_step``."""

    def __init__(self, target: Callable[P, R], spec: StepSpec) -> None:
        self._target = target
        self._spec = spec
        functools.update_wrapper(self, target, updated=())

    @property
    def name(self) -> str:
        """The name under which its outcome is kept."""
        return self._spec.name

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Run the step: checkpointed in a workflow, else as the plain call that it is."""
        attempt = caller_of(self.name)
        if attempt is None:
            return self._target(*args, **kwargs)
        return cast(R, call_step(attempt, self._spec, self._target, args, kwargs))

    def __repr__(self) -> str:
        return f"<step {self.name}>"

    def delay(self, *args: P.args, **kwargs: P.kwargs) -> Any:
        """Send the task to its queue; only for a Celery task."""
        return self._task().apply_async(args, kwargs)

    def s(self, *args: Any, **kwargs: Any) -> Any:
        """Return the task's signature; only for a Celery task."""
        return self._task().s(*args, **kwargs)

    def _task(self) -> Any:
        if not isinstance(self._target, Task):
            raise ConfigurationError(f"The step {self.name} is a plain function, which has no queue: call it.")
        return self._target


def caller_of(name: str) -> Attempt | None:
    """Return the attempt that a step called here belongs to; None makes it a plain call.

    Raises NotInWorkflow in a thread that a workflow body has made.
    """
    if current_step() is not None:
        return None
    attempt = current_attempt()
    if attempt is None and only_bodies_here() and _state.get_current_task() is None:
        raise NotInWorkflow(
            f"The step {name} was called in a thread that the workflow made itself, where it can't be kept: call "
            "steps in the workflow's own thread, and make threads inside a step."
        )
    return attempt


def as_step(target: Callable[P, R], *, name: str | None = None, **options: Any) -> InlineStep[P, R]:
    """Make a step of any callable, or of an existing Celery task that stays as it is.

    ``options`` are those of ``Step``. Of a task it takes over name and retry options, with Celery's own
    arithmetic. A lambda must be given a name. Nothing is registered. Raises ConfigurationError.
    """
    if not callable(target):
        raise ConfigurationError(f"A step must be callable, not {target!r}.")
    if isinstance(target, Task):
        task: Any = target
        # Touching run evaluates a lazy task, so that its class tells its options.
        merged = {**_options_of_task(task), **options}
        return InlineStep(target, step_spec(name or task.name, merged, celery_arithmetic=not options))
    return InlineStep(target, step_spec(name or name_of(target), retry_any_error(options)))


def name_of(target: Callable[..., Any]) -> str:
    """Return ``module.qualname`` of a callable, of what a partial wraps, or of an object's class."""
    while isinstance(target, functools.partial):
        target = target.func
    named: Any = target if hasattr(target, "__qualname__") else type(target)
    return f"{named.__module__}.{named.__qualname__}"


def _options_of_task(task: Task) -> dict[str, Any]:
    names = ("autoretry_for", "dont_autoretry_for", "max_retries", "retry_backoff", "retry_backoff_max",
             "retry_jitter", "default_retry_delay", "retry_kwargs", "throws")  # fmt: skip
    return {name: getattr(task, name) for name in names if hasattr(task, name)}


@overload
def workflow(fun: Callable[P, R], /) -> Workflow[P, R]: ...
@overload
def workflow(
    *, bind: Literal[True], **options: Any
) -> Callable[[Callable[Concatenate[Any, P], R]], Workflow[P, R]]: ...
@overload
def workflow(**options: Any) -> Callable[[Callable[P, R]], Workflow[P, R]]: ...
def workflow(fun: Any = None, /, **options: Any) -> Any:
    """Declare a workflow: ``shared_task`` on the base ``Workflow``, fully typed."""
    return _shared(Workflow, fun, options)


@overload
def step(fun: Callable[P, R], /) -> Step[P, R]: ...
@overload
def step(*, bind: Literal[True], **options: Any) -> Callable[[Callable[Concatenate[Any, P], R]], Step[P, R]]: ...
@overload
def step(**options: Any) -> Callable[[Callable[P, R]], Step[P, R]]: ...
def step(fun: Any = None, /, **options: Any) -> Any:
    """Declare a step: ``shared_task`` on the base ``Step``, fully typed.

    ``max_retries=n`` alone means any Exception.
    """
    return _shared(Step, fun, retry_any_error(options))


def _shared(base: type, fun: Any, options: dict[str, Any]) -> Any:
    declare = shared_task(**{"base": base, **options})
    if fun is None:
        return declare
    if not inspect.isroutine(fun):
        raise ConfigurationError(f"Only a function can be declared as a task, not {fun!r}: use durable.as_step(…).")
    return declare(fun)
