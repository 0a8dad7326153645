"""Which workflow, attempt and step each log record belongs to."""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from celery import signals
from celery.utils.log import get_multiprocessing_logger

from .engine.context import current_attempt, current_step

#: What a record is given, in the order of what is known first.
FIELDS = ("workflow_id", "workflow_name", "attempt", "step")
_subject: ContextVar[dict[str, Any] | None] = ContextVar("celery_durable_subject", default=None)


class WorkflowFilter(logging.Filter):
    """Gives every record ``workflow_id``, ``workflow_name``, ``attempt`` and ``step``, and lets all of them pass.

    ``step`` is the step's key, as ``list_workflow_steps`` has it. Each thread, greenlet and asyncio task of a workflow
    has its own; a thread that the code itself makes belongs to no workflow. What a record has by ``extra`` stays. What
    doesn't apply is ``outside``: ``"-"`` suits format strings, None suits JSON.

    It belongs on handlers: the filter of a logger doesn't see what the loggers below it pass on.
    """

    def __init__(self, name: str = "", *, outside: Any = "-") -> None:
        super().__init__(name)
        self._outside = outside

    def filter(self, record: logging.LogRecord) -> bool:
        """Add what is known; refuses no record."""
        known, here = vars(record), _here()
        named = known.get("workflow_id")
        if not _is_nothing(named) and str(named) != here.get("workflow_id"):
            here = {}  # it is about another workflow than the one whose code has logged it
        for field in FIELDS:
            if _is_nothing(known.get(field)):
                known[field] = here.get(field, self._outside)
        return True


def add_workflow(logger: Any, method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Add the same fields to an event of structlog, as far as they apply: this is one of its processors."""
    for field, value in _here().items():
        event.setdefault(field, value)
    return event


@contextmanager
def about(workflow_id: str, workflow_name: str) -> Iterator[dict[str, Any]]:
    """Let what is logged in the block belong to a workflow, inside its function and outside.

    Yields the fields, to which ``attempt`` may be added as soon as it is known.
    """
    subject: dict[str, Any] = {"workflow_id": workflow_id, "workflow_name": workflow_name}
    token = _subject.set(subject)
    try:
        yield subject
    finally:
        _subject.reset(token)


def watch_celery() -> None:
    """Put a filter on the handlers that Celery makes for its logs, so that its formats can name the fields."""
    signals.after_setup_logger.connect(_filter_workers, weak=False)
    signals.after_setup_task_logger.connect(_add_filter, weak=False)


def _filter_workers(logger: logging.Logger, **kwargs: Any) -> None:
    _add_filter(logger)
    # The pool tells of dead processes in the same format, by handlers of its own.
    pools = get_multiprocessing_logger()
    if pools is not None:
        _add_filter(pools)


def _add_filter(logger: logging.Logger, **kwargs: Any) -> None:
    for handler in logger.handlers:
        if not any(isinstance(each, WorkflowFilter) for each in handler.filters):
            handler.addFilter(WorkflowFilter())


def _is_nothing(value: Any) -> bool:
    """Tell whether a record lacks a field; the filter of another handler may have said so already, in its own way."""
    return value is None or (isinstance(value, str) and value == "-")


def _here() -> dict[str, Any]:
    attempt, step = current_attempt(), current_step()
    if attempt is None:
        return _subject.get() or {}
    here = {"workflow_id": attempt.id, "workflow_name": attempt.name, "attempt": attempt.fence.attempt}
    return here if step is None else {**here, "step": step.key}
