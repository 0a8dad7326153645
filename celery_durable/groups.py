"""Celery's group of workflows and steps, awaited in a workflow."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from celery.result import GroupResult

from .engine.context import current_attempt, current_step
from .exceptions import ConfigurationError
from .late import late

if TYPE_CHECKING:
    from . import handle, together
else:
    handle, together = late("handle"), late("together")


class DurableGroupResult(GroupResult):
    """A group's result: in a workflow, ``get()`` is a durable call, as ``gather``."""

    def __init__(self, id: Any = None, results: Any = None, *args: Any, **kwargs: Any) -> None:
        _name_children(results)
        super().__init__(id, results, *args, **kwargs)

    def get(self, timeout: Any = None, propagate: bool = True, *args: Any, **kwargs: Any) -> Any:
        """Return the results in order, or raise the first error; in a workflow it waits without a worker.

        Raises ConfigurationError there for a group of plain tasks, which nothing could wake it for, and of chains or
        chords, whose ends a replay couldn't find again.
        """
        if self._is_durable():
            return together.gather(*self.results, return_exceptions=not propagate)
        return super().get(timeout, propagate, *args, **kwargs)

    def join(self, timeout: Any = None, propagate: bool = True, *args: Any, **kwargs: Any) -> Any:
        """As ``get``."""
        if self._is_durable():
            return self.get(timeout, propagate)
        return super().join(timeout, propagate, *args, **kwargs)

    def join_native(self, timeout: Any = None, propagate: bool = True, *args: Any, **kwargs: Any) -> Any:
        """As ``get``."""
        if self._is_durable():
            return self.get(timeout, propagate)
        return super().join_native(timeout, propagate, *args, **kwargs)

    def _is_durable(self) -> bool:
        if current_attempt() is None:
            return False
        if current_step() is not None:
            # If so, gather says what a step can't do.
            return any(isinstance(each, handle.WorkflowHandle) for each in self.results)
        if any(each.parent is not None for each in (self, *self.results)) or _has_group(self.results):
            raise ConfigurationError(
                "A workflow can await a group of workflows and steps, but no chain or chord in it or before it: start "
                "a workflow that calls them one after the other."
            )
        if not all(isinstance(each, handle.WorkflowHandle) for each in self.results):
            raise ConfigurationError(
                "A workflow can await a group of workflows and steps, but this one has a plain task, whose end would "
                "be waited for in the worker: put it into the group as durable.as_step(task).s(…)."
            )
        return True


def _has_group(results: Iterable[Any]) -> bool:
    return any(isinstance(each, GroupResult) for each in results)


def _name_children(results: Any) -> None:
    """Put handles of a workflow's children in place, under the ids that these were first started with.

    Celery makes new ids for a group each time, on a replay as well, and takes steps for the plain tasks that they are
    elsewhere. What isn't a list isn't started yet.
    """
    attempt = current_attempt()
    if attempt is None or not isinstance(results, list):
        return
    for place, result in enumerate(results):
        child = attempt.aliases.get(result.id)
        if child is None:
            continue
        if isinstance(result, handle.WorkflowHandle):
            result.id = child
        else:
            results[place] = handle.WorkflowHandle(child, app=result.app, backend=result.backend, parent=result.parent)
