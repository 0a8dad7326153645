"""A workflow's Celery message: kept as it was first sent, and sent again faithfully.

What is kept is the final protocol message, after ``before_task_publish``: links, chains, chords, stamps and
tracing headers included. The body stays the bytes that it was, whatever its serializer.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from typing import Any

from celery import Celery
from kombu import Queue
from kombu.exceptions import SerializationError as KombuSerializationError
from kombu.serialization import dumps, loads, registry
from kombu.utils.json import dumps as json_dumps
from kombu.utils.json import loads as json_loads

from . import broker
from .broker import PATIENCE, SHORT_TRY
from .exceptions import CodecError, ConfigurationError, SerializationError
from .seal import HIDDEN
from .serialization import TYPED, Codec
from .shapes import advice_on
from .store.rows import StoredMessage
from .text import printable, summary

logger = logging.getLogger("celery_durable")

#: Marks our own messages: only messages without it may start a workflow by arriving.
HEADER = "durable"

#: Lets a worker's main process know when it may have to end a workflow that runs.
TIMEOUT_HEADER = "durable_timeout"

MAX_ID = 255

#: Added by brokers on the way, or recomputed for each sending.
_STALE_HEADERS = frozenset({HEADER, "redelivered", "compression"})
_STALE_HEADER_PREFIXES = ("x-death", "x-first-death", "x-last-death", "x-delivery-count", "x-acquired-count")
_STALE_PROPERTIES = frozenset(
    {
        *("delivery_mode", "delivery_tag", "delivery_info", "body_encoding", "content_type", "content_encoding"),
        *("argsrepr", "kwargsrepr"),  # Celery has them as headers, too.
    }
)


@dataclass(frozen=True, slots=True)
class Envelope:
    """One message, ready to be sent."""

    body: bytes
    content_type: str
    content_encoding: str
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]
    exchange: str
    routing_key: str
    #: The queue's name where it is known; its declaration goes with the message.
    queue: str | None = None
    compression: str | None = None
    declare: tuple[Queue, ...] = field(default=(), compare=False)

    @classmethod
    def of_publish(cls, body: Any, options: dict[str, Any], default_serializer: str) -> Envelope:
        """Take what Celery passes to ``Producer.publish``.

        Raises SerializationError if it can't be sent, ConfigurationError for Celery's first task protocol.
        """
        options = dict(options)
        headers, exchange = options.pop("headers") or {}, options.pop("exchange", "")
        if "id" not in headers:
            raise ConfigurationError("Workflows need Celery's second task protocol: leave task_protocol at 2.")
        routing_key, declare = options.pop("routing_key", "") or "", tuple(options.pop("declare", None) or ())
        serializer = options.pop("serializer", None) or default_serializer
        compression = options.pop("compression", None)
        for name in (
            "retry",
            "retry_policy",
            "delivery_mode",
            "timeout",
            "confirm_timeout",
            "mandatory",
            "immediate",
        ):
            options.pop(name, None)
        content_type, content_encoding, data = _encoded(body, serializer, str(headers.get("task")))
        exchange_name = getattr(exchange, "name", exchange) or ""
        return cls(
            body=data,
            content_type=content_type,
            content_encoding=content_encoding,
            headers=_fresh_headers(headers),
            properties={name: value for name, value in options.items() if name not in _STALE_PROPERTIES},
            exchange=exchange_name,
            routing_key=routing_key,
            queue=_queue_name(exchange_name, routing_key, declare),
            compression=compression,
            declare=declare,
        )

    @classmethod
    def of_request(cls, request: Any, serializer: str, task_name: str) -> Envelope:
        """Build from a message that a foreign producer had sent, as its worker sees it."""
        facts = vars(request)
        embed = {name: facts.get(name) for name in ("callbacks", "errbacks", "chain", "chord")}
        content_type, content_encoding, data = _encoded((request.args, request.kwargs, embed), serializer, task_name)
        delivery = dict(facts.get("delivery_info") or {})
        properties = dict(facts.get("properties") or {})
        headers = {name: facts[name] for name in _REQUEST_HEADERS if name in facts}
        headers.update(facts.get("headers") or {})
        return cls(
            body=data,
            content_type=content_type,
            content_encoding=content_encoding,
            headers=_fresh_headers({"lang": "py", **headers, "task": task_name, "eta": None, "expires": None}),
            properties={
                name: properties[name]
                for name in ("correlation_id", "reply_to", "priority")
                if properties.get(name) is not None
            },
            exchange=delivery.get("exchange") or "",
            routing_key=delivery.get("routing_key") or "",
            queue=_queue_name(delivery.get("exchange") or "", delivery.get("routing_key") or "", ()),
        )

    @classmethod
    def of_stored(cls, message: StoredMessage) -> Envelope:
        """Read back what ``to_text`` wrote; raise SerializationError if it can't have been that.

        An attempt that has begun once can't expire any more.
        """
        try:
            facts = json_loads(message.envelope)
            headers = dict(facts["headers"])
            properties = {name: value for name, value in facts["properties"].items() if name != "expiration"}
            places = {name: facts[name] for name in ("exchange", "routing_key", "queue", "compression")}
            # By such a task Celery's worker would be ended, and by such a place the connection to the broker.
            if not all(isinstance(name, str | None) for name in (headers.get("task"), *places.values())):
                raise TypeError("it has something else in the place of a name")
        except Exception as error:
            raise SerializationError(
                f"The message of the workflow {message.workflow_id} can't be read back ({summary(error)})."
            ) from error
        if message.attempt:
            headers["expires"] = None
        return cls(
            body=message.body,
            content_type=message.content_type,
            content_encoding=message.content_encoding,
            headers=headers,
            properties=properties,
            **places,
        )

    def packed(self, codec: Codec) -> Envelope:
        """Return it as it is stored and sent; with a payload codec its body is compressed and sealed here.

        Raises CodecError, and PayloadTooLarge for a body that may not be stored.
        """
        what = f"The message of the task {self.headers.get('task')}"
        if not codec.seal.is_set:
            codec.check_size(self.body, what)
            return self
        sealed = codec.seal_message(self.body, self.content_type, self.compression, what)
        return replace(
            self, body=sealed.data, content_type=str(sealed.content_type), content_encoding="binary", compression=None
        )

    def without_values(self) -> Envelope:
        """Return a copy whose headers don't show the arguments."""
        return self.changed(argsrepr=HIDDEN, kwargsrepr=HIDDEN)

    def to_text(self) -> str:
        """Return everything but the body, as JSON; raise SerializationError if a header can't be kept."""
        facts = {
            "headers": self.headers,
            "properties": self.properties,
            "exchange": self.exchange,
            "routing_key": self.routing_key,
            "queue": self.queue,
            "compression": self.compression,
        }
        try:
            return str(json_dumps(facts))
        except Exception as error:
            raise SerializationError(
                f"A header of the task {self.headers.get('task')} can't be kept as JSON ({error}): "
                "headers, stamps and links of a workflow must be plain data."
            ) from error

    def stored(self, workflow_id: str, attempt: int) -> StoredMessage:
        """Return this message as it is stored."""
        return StoredMessage(
            workflow_id, None, attempt, self.to_text(), self.body, self.content_type, self.content_encoding
        )

    def changed(self, **headers: Any) -> Envelope:
        """Return a copy with other values for these headers."""
        return replace(self, headers={**self.headers, **headers})

    def under(self, workflow_id: str, codec: Codec) -> Envelope:
        """Return a copy for another workflow, which is no member of this one's group or chord.

        Raises SerializationError if the body can't be read.
        """
        headers = {"id": workflow_id, "root_id": workflow_id, "parent_id": None, "group": None, "group_index": None}
        properties = {**self.properties, "correlation_id": workflow_id}
        what = f"The arguments of the task {self.headers.get('task')}"
        try:
            body, content_type, encoding = codec.open_message(self.body, self.content_type, self.content_encoding, what)
            args, kwargs, embed = loads(body, content_type, encoding, accept=codec.accept)
            chord = embed.get("chord")
        except CodecError:
            raise
        except Exception as error:
            raise SerializationError(f"{what} can't be read back ({summary(error)}).") from error
        copy = replace(self, properties=properties, headers={**self.headers, **headers})
        if not chord:
            return copy
        serializer = registry.type_to_name[str(content_type)]
        content_type, encoding, body = _encoded(
            (args, kwargs, {**embed, "chord": None}), serializer, str(self.headers.get("task"))
        )
        return replace(copy, body=body, content_type=content_type, content_encoding=encoding).packed(codec)

    def send(self, app: Celery, producer: Any, published_at: datetime | None) -> None:
        """Send, with one more try at once; raises what the broker says."""
        ours = {"queue": self.queue, "published": _stamp(published_at)}
        producer.connection.ensure_connection(**SHORT_TRY, reraise_as_library_errors=False)
        producer.publish(
            self.body,
            content_type=self.content_type,
            content_encoding=self.content_encoding,
            headers={**self.headers, HEADER: ours},
            exchange=self.exchange,
            routing_key=self.routing_key,
            compression=self.compression,
            declare=list(self.declare) or _declaration(app, self.queue),
            retry=True,
            retry_policy=dict(SHORT_TRY),
            timeout=PATIENCE,
            **self.properties,
        )


def check_id(workflow_id: Any, what: str = "task_id") -> str:
    """Raise ValueError for an id that can't be a workflow's."""
    if not isinstance(workflow_id, str) or not workflow_id:
        raise ValueError(f"A workflow's {what} must be a string that isn't empty, not {workflow_id!r}.")
    if len(workflow_id) > MAX_ID:
        raise ValueError(f"A workflow's {what} may have {MAX_ID} characters, this one has {len(workflow_id)}.")
    if printable(workflow_id) != workflow_id:
        raise ValueError(
            f"A workflow's {what} can't contain a NUL character or a lone surrogate: Postgres doesn't store them."
        )
    return workflow_id


def is_id(value: Any) -> bool:
    """Tell whether this can be a workflow's id; what comes from the broker can be anything."""
    try:
        check_id(value)
    except ValueError:
        return False
    return True


#: What the message is to blame for, and no broker: none of it is what a transport raises when its connection breaks.
_UNSENDABLE = (
    SerializationError, KombuSerializationError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError,
    RecursionError,
)  # fmt: skip
_REQUEST_HEADERS = (
    "id", "shadow", "group", "group_index", "retries", "timelimit", "root_id", "parent_id", "argsrepr", "kwargsrepr",
    "origin", "ignore_result", "replaced_task_nesting", "stamped_headers", "stamps",
)  # fmt: skip


def send_stored(app: Celery, messages: Sequence[StoredMessage]) -> list[str]:
    """Send stored messages by the process's pool; return the ids of those that the broker didn't take."""
    try:
        with broker.producer(app) as producer:
            return send_all(app, producer, messages)
    except Exception as error:  # noqa: BLE001 - every transport has its own errors; the rows are kept
        logger.warning("The broker can't be reached (%r); recovery tries again.", error)
        return [message.workflow_id for message in messages]


def send_all(app: Celery, producer: Any, messages: Sequence[StoredMessage]) -> list[str]:
    """Send stored messages in order; return the ids of those that the broker didn't take.

    One that can't be sent to any broker isn't among them: it must not stand before the others at each sweep.
    """
    for number, message in enumerate(messages):
        try:
            Envelope.of_stored(message).send(app, producer, message.published_at)
        except _UNSENDABLE as error:
            logger.error(
                "The message of the workflow %s can't be sent (%s): its row in the table input is spoilt, or the "
                "broker's library can't write what is in it. It is tried again, less and less often.",
                message.workflow_id, summary(error), extra={"workflow_id": message.workflow_id},
            )  # fmt: skip
        except Exception as error:  # noqa: BLE001 - every transport has its own errors; the rows are kept
            logger.warning("The broker took no message (%r); recovery tries again.", error)
            return [unsent.workflow_id for unsent in messages[number:]]
    return []


def _stamp(moment: datetime | None) -> str | None:
    """Return a time in the one form in which such texts sort as times do."""
    return None if moment is None else moment.astimezone(timezone.utc).isoformat(timespec="microseconds")


def _encoded(body: Any, serializer: str, task_name: str) -> tuple[str, str, bytes]:
    try:
        content_type, content_encoding, data = dumps(body, serializer=serializer)
        raw = data.encode() if isinstance(data, str) else data
        if TYPED in raw:
            loads(raw, content_type, content_encoding, accept={content_type})
    except Exception as error:
        raise SerializationError(
            f"The arguments of the task {task_name} can't be serialized as {serializer} ({error}): "
            f"pass plain data, such as a key instead of an object.{advice_on(body)} Nothing was enqueued."
        ) from error
    return content_type, content_encoding, raw


def _fresh_headers(headers: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value
        for name, value in headers.items()
        if name not in _STALE_HEADERS and not name.lower().startswith(_STALE_HEADER_PREFIXES)
    }


def _queue_name(exchange: str, routing_key: str, declare: tuple[Any, ...]) -> str | None:
    if not exchange:
        return routing_key or None
    return next((entity.name for entity in declare if isinstance(entity, Queue)), None)


def _declaration(app: Celery, queue: str | None) -> list[Queue]:
    if not queue:
        return []
    try:
        return [app.amqp.queues[queue]]
    except KeyError:
        # Neither configured here nor to be created: then it exists at the broker, or its worker makes it.
        return []
