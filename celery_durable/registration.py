"""What an app refuses when a task is registered, and what it warns of when one is sent.

Celery keeps the first of two tasks of one name in silence, and knows nothing of replays.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any

from celery import Celery, Task

from .engine.context import current_attempt, current_step
from .exceptions import ConfigurationError, NondeterminismError, NotAllowedInStep
from .options import callers_level, for_celery, unwrapped

Kinds = tuple[type[Task], ...]

#: Sent by Celery itself beside the tasks of a chord.
_CELERYS = frozenset({"celery.chord_unlock"})

_warned: set[str] = set()


def watch(app: Celery, kinds: Kinds) -> None:
    """Let an app look after tasks of these kinds, ours; to be called once.

    From then on it raises ConfigurationError where a second one of a name is declared from other code, lets Celery
    read options that are durations or collections as ours may be, warns of messages that a workflow would send again,
    and refuses those by which a step would start a workflow. What Celery brings in from other apps of the process,
    whose tasks it shares, is left alone.
    """
    names = Names(kinds)

    def task(original: Callable[..., Any], *args: Any, **options: Any) -> Any:
        if not _is_ours(options.get("base"), kinds):
            return original(*args, **options)
        # Another app that declares one of this name shall not get ours.
        options.setdefault("shared", False)
        if args:
            names.take(_name_of(app, args[0], options), args[0], options["base"])
            return original(*args, **options)
        declare = original(**options)

        def declared(fun: Any) -> Any:
            names.take(_name_of(app, fun, options), fun, options["base"])
            return declare(fun)

        return declared

    def register(original: Callable[..., Any], fun: Any, name: Any = None, base: Any = None, **options: Any) -> Any:
        return original(fun, name=name, base=base, **(for_celery(options) if _is_ours(base, kinds) else options))

    def register_task(original: Callable[..., Any], task: Any, **options: Any) -> Any:
        cls: Any = task if isinstance(task, type) else type(task)
        if issubclass(cls, kinds):
            names.take(task.name or app.gen_task_name(cls.__name__, cls.__module__), cls.run, cls)
        return original(task, **options)

    def send_task(original: Callable[..., Any], name: str, *args: Any, **options: Any) -> Any:
        if options.get("task_type") is None:
            _forbid_in_step(app, name)
        _warn_if_replayed(app, name, options.get("task_type"), kinds)
        return original(name, *args, **options)

    _put_around(app, "task", task)
    _put_around(app, "_task_from_fun", register)
    _put_around(app, "register_task", register_task)
    _put_around(app, "send_task", send_task)


class Names:
    """The names that tasks were declared under, and by which functions."""

    def __init__(self, kinds: Kinds) -> None:
        self._kinds = kinds
        self._declared: dict[str, _Declared] = {}

    def take(self, name: str, function: Any, base: type) -> None:
        """Note a name; raise ConfigurationError if other code, or a task of another kind, has it."""
        new = _Declared(function, next(kind for kind in self._kinds if issubclass(base, kind)))
        earlier = self._declared.setdefault(name, new)
        if not new.is_the_same_as(earlier):
            raise ConfigurationError(
                f"Two tasks can't have the name {name}: {earlier} has it already, and {new} would never be called. "
                "Give one of them another name=…."
            )
        self._declared[name] = new


class _Declared:
    """A function that was declared as a task."""

    def __init__(self, function: Any, kind: type) -> None:
        self.kind = kind
        self.function: Any = unwrapped(function)
        self.code = getattr(self.function, "__code__", None)
        self.place = tuple(str(getattr(self.function, name, "")) for name in ("__module__", "__qualname__"))
        # A module that is loaded again gets a new one.
        self.load = getattr(self.function, "__globals__", {}).get("__spec__")

    def is_the_same_as(self, other: _Declared) -> bool:
        """Tell whether both are one function, made several times, or loaded again, maybe after an edit."""
        if self.kind is not other.kind:
            return False
        if self.function is other.function or (self.code is not None and self.code == other.code):
            return True
        return self.place == other.place and (self.load is None or self.load is not other.load)

    def __str__(self) -> str:
        name = ".".join(self.place)
        if self.code is None:
            return name
        return f"{name} ({os.path.basename(self.code.co_filename)}, line {self.code.co_firstlineno})"


def _name_of(app: Celery, fun: Any, options: dict[str, Any]) -> str:
    return str(options.get("name") or app.gen_task_name(fun.__name__, fun.__module__))


def _is_ours(base: Any, kinds: Kinds) -> bool:
    return isinstance(base, type) and issubclass(base, kinds)


def _put_around(app: Celery, name: str, wrapper: Callable[..., Any]) -> None:
    method = getattr(app, name)
    earlier = vars(app).get(name)

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        # Others put something around it, too, often on the class and after us.
        return wrapper(earlier or functools.partial(getattr(type(app), name), app), *args, **kwargs)

    setattr(app, name, call)


def _forbid_in_step(app: Celery, name: str) -> None:
    """Raise NotAllowedInStep for a workflow that a step starts by its name: each try would start another one."""
    if current_step() is not None and getattr(app._tasks.get(name), "is_durable_workflow", False):
        raise NotAllowedInStep(f"A step can't start the workflow {name}: do that in the workflow, between steps.")


def _warn_if_replayed(app: Celery, name: str, task: Any, kinds: Kinds) -> None:
    """Warn, once per task, of a plain task that a workflow function sends."""
    attempt = current_attempt()
    if attempt is None or current_step() is not None or isinstance(task, kinds):
        return
    if name in _CELERYS or (name in _warned and not attempt.engine.strict):
        return
    short = name.rpartition(".")[2]
    line = f"{short}.delay(…)" if isinstance(app._tasks.get(name), kinds) else f"durable.as_step({short}).delay(…)"
    text = f"The workflow {attempt.name} sends the task {name}, and each replay will send it again: write {line}."
    if attempt.engine.strict and attempt.engine.nondeterminism == "error":
        attempt.nondeterminism = NondeterminismError(text)
        raise attempt.nondeterminism
    warnings.warn(text, RuntimeWarning, stacklevel=callers_level())
    _warned.add(name)
