"""A workflow's message: kept as Celery made it, and made again from what was kept."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery import Celery
from kombu import Connection, Exchange, Queue
from kombu.serialization import loads

from celery_durable.envelope import HEADER, Envelope, check_id, is_id
from celery_durable.exceptions import SerializationError
from celery_durable.serialization import Codec
from celery_durable.store.rows import StoredMessage


class Producer:
    """Stands where Celery wants a producer, and keeps what it is given."""

    def __init__(self) -> None:
        self.connection = Connection("memory://")
        self.body: Any = None
        self.options: dict[str, Any] = {}

    def publish(self, body: Any, **options: Any) -> None:
        if not self.options:
            self.body, self.options = body, options


@pytest.fixture
def app() -> Celery:
    app = Celery("shop", set_as_current=False)
    exchange = Exchange("orders", "topic")
    app.conf.update(
        task_send_sent_event=False,
        task_queues=[
            Queue("celery"),
            Queue("slow", exchange, routing_key="slow.#", queue_arguments={"x-max-priority": 5}),
        ],
    )

    @app.task(name="charge", shared=False, ignore_result=True)
    def charge(*args: Any, **kwargs: Any) -> None: ...

    return app


def published(app: Celery, args: tuple[Any, ...] = (1,), **options: Any) -> Envelope:
    """The envelope of what Celery publishes for these options of apply_async."""
    producer = Producer()
    app.tasks["charge"].apply_async(args, {"currency": "EUR"}, producer=producer, **options)
    return Envelope.of_publish(producer.body, producer.options, app.conf.task_serializer)


def kept(envelope: Envelope, attempt: int = 0) -> Envelope:
    return Envelope.of_stored(envelope.stored("w1", attempt))


def body_of(envelope: Envelope) -> Any:
    return loads(envelope.body, envelope.content_type, envelope.content_encoding, accept={envelope.content_type})


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"priority": 3},
        {"queue": "slow", "routing_key": "slow.one"},
        {"headers": {"tenant": "acme", "traceparent": "00-1-2-01"}},
        {"serializer": "yaml"},
        {"compression": "zlib"},
        {"time_limit": 10, "soft_time_limit": 5, "shadow": "charge customer"},
        {"expires": 60},
        {"reply_to": "someone", "correlation_id": "c1"},
    ],
    ids=repr,
)
def test_a_message_is_kept_as_it_was(app: Celery, options: dict[str, Any]) -> None:
    """Body, headers, properties and route are those of the first sending."""
    envelope = published(app, **options)
    # Times in headers are compared as text, which is what goes over the wire.
    assert json.loads(kept(envelope).to_text()) == json.loads(
        replace(envelope, properties={k: v for k, v in envelope.properties.items() if k != "expiration"}).to_text()
    )
    assert kept(envelope).body == envelope.body
    assert body_of(kept(envelope))[:2] == [[1], {"currency": "EUR"}]


def test_links_chains_and_stamps_are_kept(app: Celery) -> None:
    """Whatever canvas the workflow is a part of."""
    charge = app.tasks["charge"]
    envelope = published(app, link=[charge.si(2)], link_error=[charge.si(3)], chain=[charge.si(4)])
    _, _, embed = body_of(kept(envelope))
    assert [embed["callbacks"][0]["args"], embed["errbacks"][0]["args"], embed["chain"][0]["args"]] == [[2], [3], [4]]


def test_what_hides_arguments_is_kept(app: Celery) -> None:
    """Celery shows in its events what the caller says that the arguments are, however often the message is sent."""
    envelope = published(app, args=("4111 1111",), argsrepr="('…',)", kwargsrepr="{}")
    assert kept(kept(envelope), attempt=3).headers["argsrepr"] == "('…',)"
    assert "4111" not in envelope.to_text()


def test_the_queue_is_known_by_name(app: Celery) -> None:
    """Recovery compares what was taken from each queue, however the message was routed."""
    assert published(app).queue == "celery"
    routed = published(app, queue="slow", routing_key="slow.one")
    assert (routed.exchange, routed.routing_key, routed.queue) == ("orders", "slow.one", "slow")


def test_what_brokers_add_is_not_kept(app: Celery) -> None:
    """A message that is sent again isn't a dead letter of its first self."""
    envelope = published(app, headers={"x-death": [{}], "X-Delivery-Count": 3, HEADER: {"queue": "q"}, "mine": 1})
    assert envelope.headers["mine"] == 1
    assert not {"x-death", "X-Delivery-Count", HEADER, "redelivered"} & set(envelope.headers)


def test_what_has_begun_does_not_expire(app: Celery) -> None:
    """`expires` is about the first start only."""
    envelope = published(app, expires=60)
    assert kept(envelope).headers["expires"] == envelope.headers["expires"]
    assert kept(envelope, attempt=1).headers["expires"] is None
    assert "expiration" not in kept(envelope).properties


class Unspeakable:
    """No serializer takes it."""

    def __reduce__(self) -> Any:
        raise TypeError("not me")


@pytest.mark.parametrize("serializer", ["json", "yaml", "pickle"])
def test_arguments_that_cannot_be_serialized_are_an_error(app: Celery, serializer: str) -> None:
    """It names the task and the serializer, and says that nothing was enqueued."""
    with pytest.raises(SerializationError, match=f"charge can't be serialized as {serializer}.*Nothing was enqueued"):
        published(app, args=(Unspeakable(),), serializer=serializer)


def test_arguments_that_could_not_be_read_back_are_an_error(app: Celery) -> None:
    """Of somebody's JSON kombu may take a part for a value of another type; no worker could ever read the message."""
    with pytest.raises(SerializationError, match=r"charge can't be serialized as json.*Nothing was enqueued"):
        published(app, args=({"__type__": "datetime", "__value__": "x"},), serializer="json")
    assert published(app, args=({"__type__": "datetime"},), serializer="json").body


def test_headers_that_cannot_be_kept_are_an_error(app: Celery) -> None:
    """Otherwise the workflow couldn't be sent again as it was."""
    with pytest.raises(SerializationError, match="charge can't be kept as JSON"):
        published(app, headers={"lock": object()}).to_text()


@pytest.mark.parametrize("text", ["a\x00b", "a\ud800b", "ü€😀"], ids=ascii)
def test_odd_strings_in_arguments_and_headers_are_kept(app: Celery, text: str) -> None:
    """What is stored is ASCII, so Postgres takes all of it."""
    envelope = published(app, args=(text,), headers={"note": text})
    assert kept(envelope).headers["note"] == text
    assert body_of(kept(envelope))[0] == [text]
    envelope.to_text().encode("ascii")
    assert "\x00" not in envelope.to_text()


def test_a_message_is_sent_with_our_header_and_declaration(app: Celery) -> None:
    """Workers tell ours from foreign ones by it, and know when it was published."""
    producer = Producer()
    moment = datetime(2025, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    message = published(app, queue="slow", routing_key="slow.one").stored("w1", 0)
    Envelope.of_stored(message).send(app, producer, moment)
    assert producer.options["headers"][HEADER] == {"queue": "slow", "published": "2025-01-01T10:00:00.000000+00:00"}
    assert producer.options["headers"]["task"] == "charge"
    assert [queue.name for queue in producer.options["declare"]] == ["slow"]
    assert producer.options["declare"][0].queue_arguments == {"x-max-priority": 5}


def test_a_stored_message_of_an_unknown_queue_declares_nothing(app: Celery) -> None:
    """A process that doesn't know a queue's arguments mustn't make it."""
    app.conf.task_create_missing_queues = False
    facts = {"headers": {}, "properties": {}, "exchange": "", "routing_key": "x", "queue": "x", "compression": None}
    message = StoredMessage("w1", None, 0, json.dumps(facts), b"[]", "application/json", "utf-8")
    producer = Producer()
    Envelope.of_stored(message).send(app, producer, None)
    assert producer.options["declare"] == []
    assert producer.options["routing_key"] == "x"


@pytest.mark.parametrize(
    ("spoilt", "body"),
    [
        ({}, b"[1]"),
        ({}, b"["),
        ({"headers": None}, b"[[], {}, {}]"),
        ({"headers": {"task": []}}, b"[[], {}, {}]"),
        ({"routing_key": []}, b"[[], {}, {}]"),
        ({"properties": 5}, b"[[], {}, {}]"),
    ],
)
def test_a_spoilt_message_cannot_be_forked(spoilt: dict[str, Any], body: bytes) -> None:
    """Whatever is wrong with it, the error is one of ours."""
    facts = {"headers": {}, "properties": {}, "exchange": "", "routing_key": "", "queue": "", "compression": None}
    message = StoredMessage("w1", None, 0, json.dumps({**facts, **spoilt}), body, "application/json", "utf-8")
    with pytest.raises(SerializationError, match="can't be read back"):
        Envelope.of_stored(message).under("w2", Codec.of("json", ["json"], 1000))


@pytest.mark.parametrize("value", ["", None, 5, "x" * 256, "a\x00b", "a\ud800"], ids=ascii)
def test_an_id_that_cannot_be_stored_is_refused(value: Any) -> None:
    """At the call, with a ValueError."""
    with pytest.raises(ValueError, match="task_id"):
        check_id(value)
    assert not is_id(value)


def test_an_id_may_have_255_characters() -> None:
    """Of any script."""
    assert check_id("ü" * 255) == "ü" * 255
    assert is_id("order-42")
