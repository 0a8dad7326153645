"""Task options of steps and workflows, as Celery names them: read, checked, made into policies."""

from __future__ import annotations

import difflib
import functools
import inspect
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypedDict

from celery import Task
from celery.canvas import Signature

from .config import seconds
from .engine.retry import DEFAULT_RETRIES, RetryPolicy
from .exceptions import ConfigurationError
from .late import late
from .shapes import shape_of
from .text import printable

if TYPE_CHECKING:
    from .engine import step
    from .engine.step import StepSpec
    from .store import Place
else:
    step = late("engine.step")

MAX_NAME = 255
_COUNTED = re.compile(r"(#\d+|\])$")
_BACKOFF_OPTIONS = ("retry_backoff", "retry_backoff_max", "retry_backoff_rate", "retry_jitter")
_RETRY_OPTIONS = ("max_retries", *_BACKOFF_OPTIONS)


class StepOptions(TypedDict, total=False):
    """What a step may be declared with, by Celery's names where Celery has one; durations: seconds or timedelta."""

    #: Errors that are tried again. ``@step`` and ``as_step`` of a function that have ``max_retries`` alone: any
    #: ``Exception``.
    autoretry_for: tuple[type[BaseException], ...]
    #: Errors that aren't, whatever else says so.
    dont_autoretry_for: tuple[type[BaseException], ...]
    #: A function of the error: true tries again.
    retry_if: Callable[[BaseException], bool] | None
    #: Retries after the first run; ``None``: for ever. 3 where ``autoretry_for``, ``retry_if`` or ``retry_backoff`` is
    #: given.
    max_retries: int | None
    #: The first delay; ``True`` is 1.
    retry_backoff: bool | float | timedelta | None
    #: Each delay is so many times the last; 1.0 is a fixed interval.
    retry_backoff_rate: float
    #: The longest delay.
    retry_backoff_max: float | timedelta
    #: Anything between 0 and the delay, as Celery does it.
    retry_jitter: bool
    #: The delay without ``retry_backoff``.
    default_retry_delay: float | timedelta
    #: Celery's other place for ``max_retries`` and ``countdown``.
    retry_kwargs: Mapping[str, Any] | None
    #: Expected errors: logged without alarm.
    throws: tuple[type[BaseException], ...]
    #: Per try; raises ``StepTimeout`` in the body.
    soft_time_limit: float | timedelta | None
    #: Per try; ends the process.
    time_limit: float | timedelta | None
    #: Cancelling the workflow, or its deadline, interrupts the body.
    cancellable: bool
    #: Body and outcome are one transaction: ``True`` in the workflows' database, an alias of Django's, an engine or
    #: sessionmaker of SQLAlchemy's.
    atomic: bool | str | Any
    #: kombu's, for this step's results; ``None``: the setting ``durable_serializer``.
    serializer: str | None
    #: kombu's, for this step's results; ``None``: the app's ``task_compression``.
    compression: str | None


class WorkflowOptions(TypedDict, total=False):
    """What a workflow may be declared with besides Celery's own options."""

    #: From the first start to completion, waits included; then it is CANCELLED. Also for one call, by ``apply_async``.
    #: A child has its parent's if that ends earlier.
    workflow_timeout: float | timedelta | None
    #: Crashes since the last new checkpoint that are survived; one more, and it is DEAD. ``None``: the setting
    #: ``durable_max_recovery_attempts``.
    max_recovery_attempts: int | None
    #: The signature of what is started when it becomes CANCELLED or DEAD. Also for one call, by ``apply_async``.
    on_cancel: Signature | None


STEP_OPTIONS = tuple(StepOptions.__annotations__)
WORKFLOW_OPTIONS = tuple(WorkflowOptions.__annotations__)
#: What ``as_step`` takes over of a Celery task.
_OF_A_TASK = STEP_OPTIONS[: STEP_OPTIONS.index("throws") + 1]
#: Celery's own options, as its documentation lists them; those that are easily meant otherwise are left out.
_CELERYS = (
    "acks_late", "acks_on_failure", "acks_on_failure_or_timeout", "acks_on_timeout", "autoretry_for", "backend",
    "compression", "default_retry_delay", "dont_autoretry_for", "exchange_type", "expires", "ignore_result",
    "max_retries", "priority", "rate_limit", "reject_on_worker_lost", "resultrepr_maxsize", "retry_backoff",
    "retry_backoff_max", "retry_jitter", "retry_kwargs", "retry_on_worker_lost", "routing_key", "send_events",
    "serializer", "soft_time_limit", "store_eager_result", "store_errors_even_if_ignored", "throws", "time_limit",
    "track_started", "typing",
)  # fmt: skip
_DURATIONS = ("retry_backoff", "retry_backoff_max", "default_retry_delay", "soft_time_limit", "time_limit")
_CLASSES = ("autoretry_for", "dont_autoretry_for", "throws")
#: How alike a name must be to an option to be taken for it where any name is allowed.
_ALIKE = 0.8
_OF_RETRY = ("args", "kwargs", "exc", "throw", "eta", "countdown", "max_retries")
_LIBRARIES = {"celery", "kombu", "celery_durable"}


def given(cls: type, names: tuple[str, ...] = STEP_OPTIONS) -> dict[str, Any]:
    """Return the options that a task class or its bases declare, without Celery's own defaults.

    It must be asked before Celery binds the class: binding fills time limits from the app's configuration,
    and an app-wide limit of tasks isn't a limit of each step.
    """
    found: dict[str, Any] = {}
    for klass in cls.__mro__:
        if klass is Task or klass.__module__.startswith("celery."):
            continue
        for name in names:
            if name in vars(klass):
                found.setdefault(name, vars(klass)[name])
    return {name: value for name, value in found.items() if value is not None or name == "max_retries"}


def task_options(task: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a step that is an unmodified task.

    Celery itself retries it as it was declared, so its own options count only where ``options`` change them.
    """
    theirs = {name: getattr(task, name) for name in _OF_A_TASK if hasattr(task, name)}
    if "retry_jitter" in theirs:
        theirs["retry_jitter"] = bool(theirs["retry_jitter"])
    if options:
        return {**theirs, **options}
    return {name: theirs[name] for name in ("max_retries", "default_retry_delay", "throws") if name in theirs}


def step_spec(name: str, options: Mapping[str, Any], function: Callable[..., Any]) -> StepSpec:
    """Return a step's policies; raise ConfigurationError for a value that can't be meant."""
    check_name(name)
    spec = step.StepSpec(
        name=name,
        retry=_retry_policy(options),
        throws=_exceptions(options, "throws"),
        soft_time_limit=_limit(options, "soft_time_limit"),
        time_limit=_limit(options, "time_limit"),
        cancellable=_flag(options, "cancellable"),
        atomic=_atomic(options.get("atomic", False)),
        is_async=is_async(function),
        wraps_async=wraps_async(function),
        serializer=_name(options, "serializer"),
        compression=_name(options, "compression"),
        shape=shape_of(function),
    )
    if spec.atomic and spec.is_async:
        raise ConfigurationError(f"The step {name} can't be atomic and async: its transaction belongs to one thread.")
    if spec.soft_time_limit and spec.time_limit and spec.soft_time_limit >= spec.time_limit:
        raise ConfigurationError(
            f"soft_time_limit ({spec.soft_time_limit:g} s) must be shorter than time_limit ({spec.time_limit:g} s), "
            "else the process is killed before the step can be told."
        )
    return spec


def check_workflow_options(workflow_timeout: Any, max_recovery_attempts: Any, on_cancel: Any) -> None:
    """Raise ConfigurationError for an option of a workflow that can't be meant."""
    check_count(max_recovery_attempts, "max_recovery_attempts")
    if workflow_timeout is not None:
        seconds(workflow_timeout, "workflow_timeout")
    if on_cancel is not None and not isinstance(on_cancel, Signature):
        raise ConfigurationError(f"on_cancel must be a signature, such as refund.s(1), not {on_cancel!r:.100}.")


def check_names(options: Iterable[str]) -> None:
    """Raise ConfigurationError for a name that is no option of ``as_step``, with the nearest one."""
    for name in options:
        if name not in STEP_OPTIONS:
            nearest = difflib.get_close_matches(name.lower(), STEP_OPTIONS, n=1)
            hint = f" Did you mean {nearest[0]}?" if nearest else ""
            raise ConfigurationError(f"There is no step option {name}.{hint}")


def warn_of_near_misses(cls: type, ours: tuple[str, ...]) -> None:
    """Warn of what a task was declared with if it is nearly an option, of ours or of Celery: Celery takes any name.

    What the app's own task classes have as attributes is their affair, and so are methods.
    """
    known = {*ours, *_CELERYS}
    for name, value in vars(cls).items():
        if name in known or name.startswith("_") or any(name in vars(base) for base in cls.__mro__[1:]):
            continue
        if _is_method(value) and "_decorated" not in vars(cls):
            continue
        nearest = difflib.get_close_matches(name, known, n=1, cutoff=_ALIKE)
        if nearest and not (name.startswith(f"{nearest[0]}_") or name.endswith(f"_{nearest[0]}")):
            warnings.warn(
                f"The task {vars(cls).get('name') or cls.__qualname__} has the option {name}, which nobody reads: "
                f"did you mean {nearest[0]}?",
                stacklevel=callers_level(),
            )


def _is_method(value: Any) -> bool:
    return inspect.isroutine(value) or isinstance(value, staticmethod | classmethod | property)


def for_celery(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options as Celery can read them: seconds for a timedelta, a tuple for exception classes."""
    options = dict(options)
    for name in _DURATIONS:
        if isinstance(options.get(name), timedelta):
            options[name] = options[name].total_seconds()
    for name in _CLASSES:
        if isinstance(options.get(name), type | list | set):
            options[name] = _as_tuple(options[name])
    retry_kwargs = options.get("retry_kwargs")
    if isinstance(retry_kwargs, Mapping) and isinstance(retry_kwargs.get("countdown"), timedelta):
        options["retry_kwargs"] = {**retry_kwargs, "countdown": retry_kwargs["countdown"].total_seconds()}
    return options


def unheeded(options: Mapping[str, Any]) -> list[str]:
    """Say what becomes of a step's options where Celery runs the step as a plain task."""
    lost = []
    if options.get("retry_if") is not None:
        lost.append("retry_if is not asked, only autoretry_for counts")
    if options.get("retry_backoff_rate", 2) != 2:
        lost.append("retry_backoff_rate is 2")
    for name, least in (("retry_backoff", 1), ("retry_backoff_max", 0)):
        value = options.get(name)
        if isinstance(value, float) and value != int(value):
            lost.append(f"{name} is {max(int(value), least)} s")
    if options.get("cancellable"):
        lost.append("cancellable means nothing")
    if options.get("atomic"):
        lost.append("atomic means nothing, and durable.current.connection isn't there")
    return lost


def callers_level() -> int:
    """Return the ``stacklevel``, for who calls this, of the first code that is neither ours nor Celery's."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _LIBRARIES:
        level, frame = level + 1, frame.f_back
    return level


def is_async(function: Callable[..., Any]) -> bool:
    """Tell whether calling this returns a coroutine, whatever it wraps."""
    outermost = _outermost(function)
    return _is_coroutine_function(outermost) or _is_coroutine_function(_called(outermost))


def wraps_async(function: Callable[..., Any]) -> bool:
    """Tell whether this or anything that it wraps is async: then only a call shows whether it returns a coroutine."""
    return is_async(inspect.unwrap(_outermost(function), stop=is_async))


def check_function(function: Callable[..., Any], what: str) -> None:
    """Raise ConfigurationError for a generator, whose values nobody would take."""
    called = _called(_outermost(function))
    if inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
        raise ConfigurationError(f"A {what} can't be a generator, as {called.__qualname__} is: return a list.")


def unwrapped(function: Any) -> Any:
    """Return the function that a partial or a decorator has wrapped."""
    return inspect.unwrap(_outermost(function))


def _outermost(function: Any) -> Any:
    """Return what is called behind all that only passes a call on: partials and the caches of functools."""
    while isinstance(function, functools.partial | functools._lru_cache_wrapper):
        function = function.func if isinstance(function, functools.partial) else function.__wrapped__
    return function


def _called(function: Any) -> Any:
    """Return the function that a call comes to, of an object that is callable its method."""
    return function if inspect.isroutine(function) else type(function).__call__


def _is_coroutine_function(function: Any) -> bool:
    """Tell whether this is an ``async def``, or is marked as one, for which Python 3.12 has another marker."""
    if sys.version_info >= (3, 12):
        return inspect.iscoroutinefunction(function)
    if "asyncio" not in sys.modules:
        return inspect.iscoroutinefunction(function)  # and nobody can have that of asyncio
    import asyncio

    return asyncio.iscoroutinefunction(function)


def _limit(options: Mapping[str, Any], name: str) -> float | None:
    value = options.get(name)
    return None if value is None else seconds(value, name)


def _name(options: Mapping[str, Any], name: str) -> str | None:
    value = options.get(name)
    if value is not None and not isinstance(value, str):
        raise ConfigurationError(f"{name} must be one of kombu's names, such as 'json' or 'gzip', not {value!r}.")
    return value


def _flag(options: Mapping[str, Any], name: str, *, default: bool = False) -> bool:
    value = options.get(name, default)
    if not isinstance(value, bool):
        raise ConfigurationError(f"{name} must be True or False, not {value!r}.")
    return value


def _atomic(value: Any) -> bool | Place:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value:
        from .contrib.django.transactions import Alias

        return Alias(value)
    if "sqlalchemy" in sys.modules:
        from .contrib.sqlalchemy import place_of

        if (place := place_of(value)) is not None:
            return place
    raise ConfigurationError(
        "atomic must be True (the database of the workflows), an alias of Django's DATABASES, or an Engine or "
        f"sessionmaker of SQLAlchemy's, not {value!r:.100}."
    )


def check_name(name: str) -> None:
    """Raise ConfigurationError for a step's name that can't be stored, or that every lambda has."""
    if not name or "<lambda>" in name:
        raise ConfigurationError("A lambda as a step must be given a name: durable.as_step(function, name='fetch').")
    if _COUNTED.search(name):
        raise ConfigurationError(f"A step's name can't end like the key of a repeated call: {name[:80]!r}.")
    if printable(name, MAX_NAME) != name:
        raise ConfigurationError(
            f"A step's name has at most {MAX_NAME} characters, no NUL and no lone surrogates: {name[:80]!r}."
        )


def retry_any_error(options: dict[str, Any]) -> dict[str, Any]:
    """``max_retries`` alone, on a plain function, means any Exception."""
    if (
        options.get("max_retries") != 0
        and "max_retries" in options
        and not options.keys() & {"autoretry_for", "retry_if"}
    ):
        return {**options, "autoretry_for": (Exception,)}
    return options


def check_count(value: Any, what: str) -> int | None:
    """Return a whole number from 0, or None; raise ConfigurationError for anything else."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
        raise ConfigurationError(f"{what} must be a whole number from 0, or None, not {value!r}.")
    return value


def warn_if_never_retried(name: str, options: Mapping[str, Any], *, bound: bool = False) -> None:
    """Retry options that nothing can trigger are a mistake: Celery itself ignores them in silence.

    A bound task has ``self.retry``, for which ``max_retries`` is meant, too.
    """
    if options.get("max_retries", 1) == 0 or (bound and not options.keys() & set(_BACKOFF_OPTIONS)):
        return
    if not options.keys() & {"autoretry_for", "retry_if"} and options.keys() & set(_RETRY_OPTIONS):
        warnings.warn(
            f"The step {name} has retry options, but neither autoretry_for nor retry_if, so it is never retried: "
            "add autoretry_for=(Exception,).",
            stacklevel=callers_level(),
        )


def check_bypass(cls: type, ours: type) -> None:
    """Raise ConfigurationError if a base before ours replaces ``__call__`` and doesn't pass the call on."""
    for klass in cls.__mro__[: cls.__mro__.index(ours)]:
        call = vars(klass).get("__call__")
        code = getattr(call, "__code__", None)
        if call is not None and (code is None or "super" not in code.co_names):
            raise ConfigurationError(
                f"{klass.__module__}.{klass.__qualname__}.__call__ doesn't call super().__call__(…), so "
                f"{ours.__name__} would never see the call: let it do so, or put durable.{ours.__name__} first."
            )


def _retry_policy(options: Mapping[str, Any]) -> RetryPolicy:
    retry_kwargs = _retry_kwargs(options.get("retry_kwargs"))
    backoff = _backoff(options.get("retry_backoff"))
    delay = retry_kwargs.get("countdown", options.get("default_retry_delay", 180))
    wants_retries = any(options.get(name) for name in ("autoretry_for", "retry_if", "retry_backoff"))
    return RetryPolicy(
        max_retries=_max_retries({**options, **retry_kwargs}, DEFAULT_RETRIES if wants_retries else 0),
        autoretry_for=_exceptions(options, "autoretry_for"),
        dont_autoretry_for=_exceptions(options, "dont_autoretry_for"),
        retry_if=_predicate(options.get("retry_if")),
        retry_backoff=backoff,
        retry_backoff_rate=_rate(options.get("retry_backoff_rate", 2.0)),
        retry_backoff_max=seconds(options.get("retry_backoff_max", 600), "retry_backoff_max"),
        retry_jitter=_flag(options, "retry_jitter", default=True),
        default_retry_delay=seconds(delay, "default_retry_delay", zero=True),
        asked_retries=_max_retries({**options, **retry_kwargs}, DEFAULT_RETRIES),
    )


def _retry_kwargs(value: Any) -> Mapping[str, Any]:
    """Return what Celery's ``retry`` is called with. It takes any name, for the message: a slip is lost on it."""
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"retry_kwargs must be a mapping, such as {{'max_retries': 5}}, not {value!r:.100}.")
    for name in value:
        nearest = difflib.get_close_matches(str(name), _OF_RETRY, n=1, cutoff=_ALIKE)
        if nearest and name not in _OF_RETRY:
            raise ConfigurationError(f"There is no {name} in retry_kwargs: did you mean {nearest[0]}?")
    return value


def _max_retries(options: Mapping[str, Any], default: int) -> int | None:
    return check_count(options.get("max_retries", default), "max_retries")


def _backoff(value: Any) -> float | None:
    if value is None or value is False:
        return None
    return 1.0 if value is True else seconds(value, "retry_backoff")


def _rate(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 1:
        raise ConfigurationError(f"retry_backoff_rate must be a number from 1.0 (fixed interval), not {value!r}.")
    return float(value)


def _exceptions(options: Mapping[str, Any], name: str) -> tuple[type[BaseException], ...]:
    value = options.get(name) or ()
    classes = _as_tuple(value)
    for cls in classes:
        if not (isinstance(cls, type) and issubclass(cls, BaseException)):
            raise ConfigurationError(f"{name} must be a tuple of exception classes, not {value!r}.")
    return classes


def _as_tuple(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, list | tuple | set | frozenset) else (value,)


def _predicate(value: Any) -> Callable[[BaseException], bool] | None:
    if value is not None and (not callable(value) or is_async(value)):
        raise ConfigurationError(f"retry_if must be a function of the exception that isn't async, not {value!r}.")
    return value
