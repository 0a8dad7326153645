"""The task bases and decorators: ``Workflow``, ``Step``, ``workflow``, ``step``."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import datetime
from types import CoroutineType
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Generic,
    Literal,
    NoReturn,
    ParamSpec,
    Protocol,
    TypeAlias,
    TypeVar,
    cast,
    overload,
)

from celery import Task, shared_task
from celery.exceptions import Retry

from . import inline, registration
from .engine.context import current_attempt, current_step, plain_function
from .exceptions import ConfigurationError
from .inline import InlineBody
from .installation import Installation, installed_on
from .late import late
from .options import (
    STEP_OPTIONS,
    WORKFLOW_OPTIONS,
    callers_level,
    check_bypass,
    check_function,
    check_workflow_options,
    for_celery,
    given,
    retry_any_error,
    step_spec,
    unheeded,
    warn_if_never_retried,
    warn_of_near_misses,
)
from .shapes import Shape, shape_of

if TYPE_CHECKING:
    from . import callables, calls, delivery, handle, publisher
    from .callables import Callables
    from .engine import loop
    from .engine.step import Call, StepSpec
    from .handle import Result, WorkflowHandle
else:
    callables, calls, delivery = late("callables"), late("calls"), late("delivery")
    handle, loop, publisher = late("handle"), late("engine.loop"), late("publisher")

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

    Further options, on the task or (but for the last) per call: ``workflow_timeout`` (seconds or timedelta from the
    first start to completion, then it is cancelled), ``on_cancel`` (the signature of a task that is started when the
    workflow becomes CANCELLED or DEAD), ``max_recovery_attempts`` (crashes since the last completed step before it is
    given up as DEAD; default: the setting).

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
    Strategy = "celery_durable.strategy:of_workflow"

    #: Seconds or timedelta; see above.
    workflow_timeout: Any = None
    max_recovery_attempts: int | None = None
    on_cancel: Any = None
    is_durable_workflow = True
    _shape: Shape | None = None

    @classmethod
    def _declare(cls) -> None:
        check_bypass(cls, Workflow)
        warn_of_near_misses(cls, WORKFLOW_OPTIONS)
        cls._checked(cls.name, cls.run, {name: getattr(cls, name) for name in WORKFLOW_OPTIONS})
        cls._shape = shape_of(cls.run)

    @staticmethod
    def _checked(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
        check_function(function, "workflow")
        check_workflow_options(**{name: options.get(name) for name in WORKFLOW_OPTIONS})

    if TYPE_CHECKING:

        def delay(self, *args: P.args, **kwargs: P.kwargs) -> WorkflowHandle[R]: ...

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> C:
        """Run the function: durably for a message in a worker, else as the plain function that it is.

        As a plain function it has no database: sleeps take no time, and waiting for others raises NotInWorkflow.
        """
        body = functools.partial(super().__call__, *args, **kwargs)
        return cast(C, self._deliver(body) if self._is_delivered() else self._plainly(body))

    def _deliver(self, body: Callable[[], Any]) -> Any:
        installation, max_crashes = installed_on(self.app), self._max_crashes()
        return delivery.deliver(installation, self, lambda: self.to_its_end(body()), max_crashes=max_crashes)

    def _plainly(self, body: Callable[[], Any]) -> Any:
        with plain_function():
            value = body()
            if not inspect.iscoroutine(value):
                return value
            return loop.run(value) if self._is_eager() else _as_plain_function(value)

    def _is_eager(self) -> bool:
        return bool(self.request.is_eager) and current_attempt() is None

    def to_its_end(self, value: Any) -> Any:
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

        Further options: ``workflow_timeout``; ``deduplication_id``: while a workflow of this task with the same one
        hasn't finished, nothing is started, and its handle is returned; ``on_cancel``: the signature of a task that is
        started when the workflow becomes CANCELLED or DEAD.

        In a workflow this starts a child, which ends no later than its parent's deadline; a replay finds it again.
        """
        if self.app.conf.task_always_eager:
            send = functools.partial(super().apply_async, args, kwargs, link=link, link_error=link_error, shadow=shadow)
            return cast("WorkflowHandle[R]", send(task_id=task_id, producer=producer, **options))
        calls.forbid_in_step(f"start the workflow {self.name}")
        calls.forbid_in_plain_function(f"start the workflow {self.name}")
        call = self._child_call(args, kwargs, task_id, producer)
        options = {**options, "link": link, "link_error": link_error, "shadow": shadow, "producer": producer}
        return self._started(args, kwargs, task_id, call, options)

    def adelay(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, WorkflowHandle[R]]:
        """Return what is awaited to start a workflow as ``delay`` does, without blocking the event loop."""
        calls.forbid_in_step(f"start the workflow {self.name}")
        calls.forbid_in_plain_function(f"start the workflow {self.name}")
        call = self._child_call(args, kwargs, None, None)
        return _carried(callables.in_outbox(functools.partial(self._started, args, kwargs, None, call, {})))

    def astart(self, signature: Any) -> Coroutine[Any, Any, WorkflowHandle[R]]:
        """Return what is awaited to start a workflow by its signature, without blocking the event loop."""
        options = dict(signature.options)
        call = self._child_call(signature.args, signature.kwargs, options.get("task_id"), None)
        task_id = options.pop("task_id", None)
        start = functools.partial(self._started, signature.args, signature.kwargs, task_id, call, options)
        return _carried(callables.in_outbox(start))

    def _child_call(self, args: Any, kwargs: Any, task_id: str | None, producer: Any) -> Call | None:
        """Settle the key of a start that a workflow makes; None for any other, and for Celery's own retry."""
        attempt = current_attempt()
        if attempt is None or task_id == attempt.id or isinstance(producer, publisher.Unpublishing):
            return None
        attempt.check_caller()
        if installed_on(self.app).engine is not attempt.engine:
            raise ConfigurationError(
                f"The workflow {self.name} is another app's, whose database isn't this workflow's: it can only be "
                "started outside of workflows. Let a step send a plain task that starts it."
            )
        args, kwargs = tuple(args or ()), dict(kwargs or {})
        return handle.start_of(attempt, self._label(args), args, kwargs)

    def _label(self, args: tuple[Any, ...]) -> str:
        return self.name

    def _started(
        self, args: Any, kwargs: Any, task_id: str | None, call: Call | None, options: dict[str, Any]
    ) -> WorkflowHandle[R]:
        if call is not None and call.is_settled:
            return self._handle(self._found_again(call, task_id), args)
        producer, max_crashes = options.pop("producer", None), self._max_crashes()
        publication = publisher.Publication(self, task_id, producer, options, max_crashes=max_crashes, call=call)
        super().apply_async(args, kwargs, task_id=publication.id, producer=publication.producer, **publication.options)
        started = self._handle(publication.done(), args)
        started.ignored = publication.ignore_result
        return started

    def _found_again(self, call: Call, task_id: str | None) -> str:
        """Return the id of a child that an earlier attempt has started."""
        call.replay()
        assert call.saved is not None
        child = str(call.saved.child_id)
        if task_id is not None:
            call.attempt.aliases[task_id] = child
        return child

    def AsyncResult(self, task_id: str, **kwargs: Any) -> WorkflowHandle[R]:  # noqa: N802 - Celery's name
        """Return the handle of a workflow of this task."""
        found: WorkflowHandle[R] = handle.WorkflowHandle(
            task_id, app=self.app, **{"backend": self.backend, "task_name": self.name, **kwargs}
        )
        found.durable_shape = self.durable_shape(None)
        return found

    def _handle(self, task_id: str, args: Any) -> WorkflowHandle[R]:
        found = self.AsyncResult(task_id)
        found.durable_shape = self.durable_shape(args)
        return found

    def durable_shape(self, args: Sequence[Any] | None) -> Shape | None:
        """Return what the results of a workflow with these arguments are rebuilt to."""
        return self._shape

    def replace(self, sig: Any) -> Any:
        """Raise ConfigurationError: a workflow can't be replaced."""
        raise ConfigurationError(
            f"The workflow {self.name} can't be replaced by another task: start that as a child, "
            "`return other.delay(…).get()`."
        )

    def map(self, it: Any) -> Any:
        """Raise ConfigurationError: ``map`` would call the workflow as a plain function."""
        self._refuse("map", f"durable.enqueue_many([{self.name}.s(item) for item in items])")

    def starmap(self, it: Any) -> Any:
        """Raise ConfigurationError: ``starmap`` would call the workflow as a plain function."""
        self._refuse("starmap", f"durable.enqueue_many([{self.name}.s(*item) for item in items])")

    def chunks(self, it: Any, n: int) -> Any:
        """Raise ConfigurationError: ``chunks`` would call the workflow as a plain function."""
        self._refuse("chunks", f"durable.enqueue_many([{self.name}.s(*item) for item in items])")

    def update_state(self, *args: Any, **kwargs: Any) -> None:
        """Store a state as Celery does; STARTED doesn't come over it."""
        inline.update_state(self, super().update_state, *args, **kwargs)

    def _refuse(self, what: str, instead: str) -> NoReturn:
        raise ConfigurationError(
            f"{what}() would call the workflow {self.name} inside another task, as a plain function that nobody makes "
            f"durable: write {instead}."
        )

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
        once. A workflow starts it there durably, as a child: with all its options, once in all its attempts.
        """
        if callables.caller_of(self.name) is not None:
            return cast("Result[R]", publisher.start_step(self, args, kwargs, **_named(more), **options))
        if self._is_plain_start(options.get("task_id")):
            self._warn_of_unheeded_options()
        return cast("Result[R]", super().apply_async(args, kwargs, *more, **options))

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> C:
        """Run the step: checkpointed in a workflow, else as the plain function that it is.

        An ``async def`` step is awaited; where nothing can await it, in a workflow or a step that isn't async itself
        or run by a worker as a task, it is run to its end.
        """
        value = self.durable_step.call(args, kwargs)
        if isinstance(value, CoroutineType) and self._is_delivered():
            with inline.awaiting(self, self.request):
                return cast(C, loop.run(value))
        return cast(C, value)

    def acall(self, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Return what an async workflow awaits to run the step without blocking the event loop."""
        return self.durable_step.acall(args, kwargs)

    @functools.cached_property
    def durable_step(self) -> Callables:
        """How it is called in a workflow, and elsewhere."""
        run = super().__call__
        return callables.Callables(self.durable_spec, run, InlineBody(self, run, as_celery=False))

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


def _named(positional: tuple[Any, ...]) -> dict[str, Any]:
    """Return the further arguments of Celery's ``apply_async`` by their names."""
    return dict(zip(("task_id", "producer", "link", "link_error", "shadow"), positional, strict=False))


def _carried(coroutine: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
    """Let an async workflow not give its worker back meanwhile."""
    attempt = current_attempt()
    return coroutine if attempt is None or not attempt.on_loop else attempt.flights.carry(coroutine)


async def _as_plain_function(coroutine: Coroutine[Any, Any, T]) -> T:
    with plain_function():
        return await coroutine


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
