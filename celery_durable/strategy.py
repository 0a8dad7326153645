"""How a worker takes a workflow's message: whatever is in it; and a step's under the rate limit of that step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery.exceptions import InvalidTaskError
from celery.worker.strategy import default

from .text import summary

#: What Celery's own code raises for a message that has other things in it than it takes for granted. None of them is
#: what a transport raises when its connection breaks.
_MISSHAPEN = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


def of_workflow(task: Any, app: Any, consumer: Any, **options: Any) -> Callable[..., Any]:
    """Return Celery's own strategy, for which no message is so misshapen that it ends the worker.

    Celery logs and rejects it then. The workflow that it may have named is still there, and sent again.
    """
    take = default(task, app, consumer, **options)

    def take_any(message: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return take(message, *args, **kwargs)
        except _MISSHAPEN as error:
            raise InvalidTaskError(f"The message of {task.name} isn't one of Celery's ({summary(error)}).") from error

    return take_any


def of_step(task: Any, app: Any, consumer: Any, **options: Any) -> Callable[..., Any]:
    """Return the same; where Celery asks for the task's bucket, it gets that of the message's step."""
    buckets = _Buckets(consumer)
    take = of_workflow(task, app, _Consumer(consumer, buckets), **options)

    def take_step(message: Any, *args: Any, **kwargs: Any) -> Any:
        buckets.step = str((message.headers or {}).get("shadow"))
        return take(message, *args, **kwargs)

    return take_step


class _Buckets:
    """The rate limits of a consumer, asked for the step whose message is being taken."""

    def __init__(self, consumer: Any) -> None:
        self._consumer = consumer
        self.step = ""

    def __getitem__(self, name: str) -> Any:
        return self._consumer.task_buckets.get(self.step)


class _Consumer:
    """A consumer with other buckets."""

    def __init__(self, consumer: Any, buckets: _Buckets) -> None:
        self._consumer = consumer
        self.task_buckets = buckets

    def __getattr__(self, name: str) -> Any:
        return getattr(self._consumer, name)
