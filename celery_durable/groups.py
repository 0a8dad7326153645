"""Celery's group of workflows, awaited in a workflow."""

from __future__ import annotations

from typing import Any

from celery.result import GroupResult

from .engine.context import current_attempt
from .exceptions import ConfigurationError
from .gather import gather
from .handle import WorkflowHandle


class DurableGroupResult(GroupResult):
    """A group's result: in a workflow, ``get()`` of a group of workflows is a durable call, as ``gather``."""

    def __init__(self, id: Any = None, results: Any = None, *args: Any, **kwargs: Any) -> None:
        _name_children(results)
        super().__init__(id, results, *args, **kwargs)

    def get(self, timeout: Any = None, propagate: bool = True, *args: Any, **kwargs: Any) -> Any:
        """Return the results in order, or raise the first error; in a workflow it waits without a worker.

        Raises ConfigurationError there for a group of chains or chords: a replay couldn't find their ends again.
        """
        if self._is_durable():
            return gather(*self.results, return_exceptions=not propagate)
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
        if current_attempt() is None or not all(isinstance(each, WorkflowHandle) for each in self.results):
            return False
        if any(each.parent is not None for each in (self, *self.results)):
            raise ConfigurationError(
                "A workflow can await a group of workflows, but no chain or chord in it or before it: start a workflow "
                "that calls them one after the other."
            )
        return True


def _name_children(results: Any) -> None:
    """Give the handles of a workflow's children the ids that these were first started with.

    Celery makes new ids for a group each time, on a replay as well. What isn't a list isn't started yet.
    """
    attempt = current_attempt()
    if attempt is None or not isinstance(results, list):
        return
    for handle in results:
        if isinstance(handle, WorkflowHandle):
            handle.id = attempt.aliases.get(handle.id, handle.id)
