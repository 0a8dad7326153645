"""Celery's group of workflows, awaited in a workflow."""

from __future__ import annotations

from typing import Any

from celery.result import GroupResult

from .engine.context import current_attempt
from .gather import gather
from .handle import WorkflowHandle


class DurableGroupResult(GroupResult):
    """A group's result: in a workflow, ``get()`` of a group of workflows is a durable call, as ``gather``."""

    def get(self, timeout: Any = None, propagate: bool = True, *args: Any, **kwargs: Any) -> Any:
        """Return the results in order, or raise the first error; in a workflow it waits without a worker."""
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
        return current_attempt() is not None and all(isinstance(each, WorkflowHandle) for each in self.results)
