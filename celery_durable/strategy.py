"""How a worker takes a step that was sent to it: under the rate limit of that step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery.worker.strategy import default


def of_step(task: Any, app: Any, consumer: Any, **options: Any) -> Callable[..., Any]:
    """Return Celery's own strategy; where it asks for the task's bucket, it gets that of the message's step."""
    buckets = _Buckets(consumer)
    take = default(task, app, _Consumer(consumer, buckets), **options)

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
