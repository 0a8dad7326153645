"""How a worker takes a workflow's message: sealed or not, whatever is in it; a step's under the limit of that step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery.exceptions import InvalidTaskError
from celery.worker.strategy import default
from kombu.serialization import loads

from .exceptions import CodecError
from .installation import registered
from .serialization import Codec
from .text import summary

logger = logging.getLogger("celery_durable.worker")

#: What Celery's own code raises for a message that has other things in it than it takes for granted. None of them is
#: what a transport raises when its connection breaks.
_MISSHAPEN = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)


def of_workflow(task: Any, app: Any, consumer: Any, **options: Any) -> Callable[..., Any]:
    """Return Celery's own strategy, for which no message is so misshapen that it ends the worker.

    Celery logs and rejects it then. The workflow that it may have named is still there, and sent again. One that was
    sealed, and can't be opened here, is left to other workers.
    """
    take, installation = default(task, app, consumer, **options), registered(app)

    def take_any(message: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            opened = message if installation is None else _opened(message, installation.codec)
            return take(opened, *args, **kwargs)
        except CodecError as error:
            logger.error("The workflow %s waits for a worker that can read it: %s", _id_in(message), error)
            message.ack_log_error(logger, consumer.connection_errors)
            if installation is not None and installation.node is not None:
                installation.node.leave_to_others(_id_in(message))
            return None
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


def _opened(message: Any, codec: Codec) -> Any:
    """Return a message as it was before it was sealed. The broker may get it back as it came."""
    given = (message.body, message.content_type, message.content_encoding)
    opened = codec.open_message(*given, f"The message of workflow {_id_in(message)}")
    return message if opened == given else _Opened(message, *opened)


def _id_in(message: Any) -> Any:
    return (message.headers or {}).get("id")


class _Opened:
    """A message with another body."""

    def __init__(self, message: Any, body: Any, content_type: str | None, content_encoding: str | None) -> None:
        self._message = message
        self.body, self.content_type, self.content_encoding = body, content_type, content_encoding
        self.payload = loads(body, content_type, content_encoding, accept=message.accept)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._message, name)


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
