"""Whatever a broker delivers and a row says: the worker stays up, nothing of it is executed, others aren't held up.

``HOSTILE_SEED`` chooses other messages, ``HOSTILE_MESSAGES`` how many of the mutated ones there are.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import zlib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.brokers import Broker
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.site import FAST, Site
from tests.fixtures.workers import Worker

SEED = int(os.environ.get("HOSTILE_SEED", "6"))
MESSAGES = int(os.environ.get("HOSTILE_MESSAGES", "400"))

DEEP = 100_000
#: What nobody expects in the place of a header, a property or an argument.
ODD: list[Any] = [
    None, True, 0, -1, 2**63, 10**400, float("nan"), "", "x", "\x00", "\ud800", "é'\";--%s{}", "y" * 5000,
    "9999-99-99T99:99:99", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-23:59", "os:system", [], [None], ["a"] * 3,
    {}, {"queue": {}, "published": []}, {"queue": "\x00", "published": "infinity"}, [[[[]]]],
]  # fmt: skip
HEADERS = (
    "id", "root_id", "parent_id", "group", "group_index", "retries", "timelimit", "argsrepr", "kwargsrepr", "origin",
    "eta", "expires", "ignore_result", "shadow", "stamped_headers", "stamps", "replaced_task_nesting", "lang",
    "durable", "durable_timeout", "compression", "properties", "delivery_info", "hostname", "reply_to", "callbacks",
    "errbacks", "chain", "chord", "args", "kwargs", "headers", "x-death", "foreign", "called_directly",
)  # fmt: skip
PROPERTIES = ("correlation_id", "reply_to", "priority", "expiration", "durable_node", "durable_watched")
EMBEDDED = ("callbacks", "errbacks", "chain", "chord")


class Canary:
    """What makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


class Message:
    """A message as the transport has it; at first that of an honest producer without us."""

    def __init__(self, task: str, task_id: str, queue: str, *, ours: bool = False) -> None:
        self.headers: Any = {
            "lang": "py", "task": task, "id": task_id, "root_id": task_id, "parent_id": None, "group": None,
            "retries": 0, "timelimit": [None, None], "eta": None, "expires": None, "argsrepr": "()", "kwargsrepr": "{}",
            "origin": "nobody", "ignore_result": False,
        }  # fmt: skip
        if ours:
            self.headers["durable"] = {"queue": queue, "published": "2026-01-01T00:00:00.000000+00:00"}
        self.properties: dict[str, Any] = {"correlation_id": task_id}
        self.body: bytes | str = json.dumps([[1], {}, dict.fromkeys(EMBEDDED)])
        self.content_type: str | None = "application/json"
        self.content_encoding: str | None = "utf-8"


class Thrower:
    """Publishes past Celery, and past all of its checks."""

    def __init__(self, site: Site, canary: Path) -> None:
        self.site = site
        self.queue = site.workers.env["CELERY_DURABLE_TEST_QUEUE"]
        self.canary = canary
        self.random = random.Random(SEED)
        self.count = 0

    def message(self) -> Message:
        """A message that may be spoilt, by turns a foreign one and one that says that it is ours."""
        self.count += 1
        return Message(self.site.shop.quick.name, f"hostile-{self.count}", self.queue, ours=self.count % 2 == 0)

    def throw(self, messages: Iterator[Message]) -> int:
        """Put messages on the queue of the worker, in the transport's own form; how many of them it takes."""
        thrown = 0
        with self.site.shop.app.connection_for_write() as connection, closing(connection.channel()) as channel:
            for each in messages:
                try:
                    prepared = channel.prepare_message(
                        each.body, content_type=each.content_type, content_encoding=each.content_encoding,
                        headers=each.headers, properties=each.properties,
                    )  # fmt: skip
                    channel.basic_publish(prepared, exchange="", routing_key=self.queue)
                except (TypeError, ValueError):
                    continue  # not even this client can write it
                thrown += 1
        return thrown

    def odd_bodies(self) -> Iterator[Message]:
        """Bodies that can't be read, or aren't what Celery takes for granted."""
        for body, content_type, encoding in bodies(self.canary):
            for _ in range(2):
                message = self.message()
                message.body, message.content_type, message.content_encoding = body, content_type, encoding
                yield message

    def odd_headers(self) -> Iterator[Message]:
        """Each header and property with each odd value."""
        for name in HEADERS:
            # More than a worker takes at once: those that stay with it for ever would stop it.
            for value in ODD * (12 if name == "shadow" else 1):
                message = self.message()
                message.headers[name] = value
                yield message
        for name in PROPERTIES:
            for value in ODD:
                message = self.message()
                message.properties[name] = value
                yield message

    def mutants(self, number: int) -> Iterator[Message]:
        """Messages of which several things are odd at once, and ids come twice."""
        for _ in range(number):
            message = self.message()
            for name in self.random.sample(HEADERS, self.random.randint(0, 4)):
                message.headers[name] = self.random.choice(ODD)
            for name in self.random.sample(PROPERTIES, self.random.randint(0, 2)):
                message.properties[name] = self.random.choice(ODD)
            if self.random.random() < 0.2:
                message.headers["id"] = f"hostile-{self.random.randint(1, self.count)}"
            if self.random.random() < 0.2:
                del message.headers[self.random.choice(sorted(set(message.headers) - {"task"}))]
            if self.random.random() < 0.2:
                message.body = self.garbled(message.body)
            yield message

    def garbled(self, body: bytes | str) -> bytes:
        """The bytes of a body, some of them changed."""
        raw = bytearray(body.encode() if isinstance(body, str) else body)
        for _ in range(self.random.randint(1, 4)):
            raw[self.random.randrange(len(raw))] = self.random.randrange(256)
        return bytes(raw)


def bodies(canary: Path) -> Iterator[tuple[bytes | str, str | None, str | None]]:
    """Bodies, with the content type and the encoding that they claim to have."""
    evil = pickle.dumps([[Canary(canary)], {}, {}])
    for content_type in ("application/x-python-serialize", "application/data", "application/json", "", None):
        yield evil, content_type, "binary"
    yield f"!!python/object/apply:os.mkdir ['{canary}']", "application/x-yaml", "utf-8"
    yield zlib.compress(bytes(10_000_000)), "application/json", "utf-8"
    for text in (
        "[" * DEEP,
        "[" * DEEP + "]" * DEEP,
        "9" * DEEP,
        "[[1e999],{},{}]",
        "[[NaN],{},{}]",
        '"\\ud800"',
        "{}",
    ):
        yield text, "application/json", "utf-8"
    for data in ([], [[]], [[], {}], [[], {}, {}, {}], [1, 2, 3], [[], [], []], [{}, {}, None], {"args": 5}, 7, None):
        yield json.dumps(data), "application/json", "utf-8"
    for value in ODD:
        for place in EMBEDDED:
            yield json.dumps([[1], {}, {place: value}]), "application/json", "utf-8"
        yield json.dumps([[value], {"value": value}, {}]), "application/json", "utf-8"
    for content_type, encoding in (("text/plain", "utf-8"), ("application/json", "nope"), ("\x00", "utf-7")):
        yield "[[1],{},{}]", content_type, encoding


def check_unharmed(site: Site, worker: Worker, canary: Path) -> None:
    """Whatever was sent before this, others are served by the same node, and nothing else has happened."""
    shop = site.shop
    handles = [shop.order.delay("afterwards"), shop.quick.delay(1)]
    plain = shop.note.delay("afterwards")
    patience = 30 + MESSAGES / 20
    assert [site.finished(handle.id, patience).result for handle in handles] == [[0, 10, 20], 1]
    assert plain.get(timeout=20) == []
    seen = site.sql.value("SELECT max(seen) FROM celery_durable.node")
    wait_until(lambda: site.sql.value("SELECT max(seen) FROM celery_durable.node") > seen, message="a heartbeat comes")
    wait_until(lambda: all(site.status(each.id).dispatched for each in handles), message="the node confirms")
    assert worker.running
    for line in ("Unrecoverable error", "WorkerLostError", "exited prematurely"):
        assert line not in worker.log
    assert not canary.exists()


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """A directory that only what is executed would make."""
    return tmp_path / "canary"


@pytest.mark.parametrize("kind", ["bodies", "headers", "mutants"])
def test_hostile_messages(site: Site, canary: Path, kind: str) -> None:
    """Hundreds of messages that no Celery has written do no more harm than a line in the log."""
    worker, thrower = site.workers.start(args=("--events",)), Thrower(site, canary)
    messages = {"bodies": thrower.odd_bodies(), "headers": thrower.odd_headers(), "mutants": thrower.mutants(MESSAGES)}
    assert thrower.throw(messages[kind]) > 100
    check_unharmed(site, worker, canary)


ENVELOPES = (
    "", "x", "[]", "{}", "7", '"x"', "[" * 5000, '{"headers": 5, "properties": {}}', "\\", '{"__type__": "uuid"}',
)  # fmt: skip
#: Parts of an envelope, with what is wrong in it.
PARTS: dict[str, list[Any]] = {
    "headers": [None, [], {}, {"id": 5, "task": []}, {"task": "nobody.has.it", "id": "x"}],
    "properties": [None, [], {"timeout": 1}, {"priority": "x"}, {"retry": "x"}, {"declare": 5}, {"body": 1}],
    "exchange": [5, [], "nowhere"],
    "routing_key": [None, 5, [], {}, "\x01"],
    "queue": [[], {}, 5],
    "compression": [5, "nope", "pickle", []],
}
INPUTS = {
    "body": [b"", b"\xff", b"[]", b"[1, 2]", b"[1, 2, 3]", b"[[], {}, 5]", b"[" * DEEP, b"null"],
    "content_type": ["", "x", "application/x-python-serialize", "application/data", "application/x-yaml"],
    "content_encoding": ["", "nope", "binary", "utf-7", "rot13"],
}


def test_rows_that_were_spoilt_before_they_are_sent(site: Site, canary: Path, broker: Broker) -> None:
    """A message in the database that nobody can send, or read, holds no other one up: not in the sweep either."""
    for spoil in (*({"envelope": each} for each in ENVELOPES), *parts_of(site), *inputs(canary)):
        handle = site.shop.quick.delay("spoilt")
        ((column, value),) = spoil.items()
        site.sql.execute(f"UPDATE celery_durable.input SET {column} = %s WHERE workflow = %s", value, handle.id)
    good = [site.shop.order.delay(f"good-{number}") for number in range(3)]
    # Each sweep has the spoilt ones before the good ones.
    site.sql.execute("UPDATE celery_durable.workflow SET published_at = NULL, publish_at = created_at - interval '1 h'")
    broker.flush()
    worker = site.workers.start()
    assert [site.finished(handle.id).result for handle in good] == [[0, 10, 20]] * 3
    wait_until(lambda: "can't be sent" in worker.log, message="the log tells of those that can't be sent")
    check_unharmed(site, worker, canary)
    assert "recovery duty" not in worker.log


def parts_of(site: Site) -> Iterator[dict[str, Any]]:
    """Envelopes of which one part isn't what it should be, or isn't there."""
    handle = site.shop.quick.delay("an example")
    facts = json.loads(site.sql.value("SELECT envelope FROM celery_durable.input WHERE workflow = %s", handle.id))
    for name, values in PARTS.items():
        yield {"envelope": json.dumps({key: value for key, value in facts.items() if key != name})}
        for value in values:
            yield {"envelope": json.dumps({**facts, name: value})}


def inputs(canary: Path) -> Iterator[dict[str, Any]]:
    """Other columns of the table of messages."""
    yield {"body": pickle.dumps([[Canary(canary)], {}, {}])}
    for column, values in INPUTS.items():
        for value in values:
            yield {column: value}


#: What is done to the rows of workflows that wait; each for one of them.
SPOILERS = (
    "UPDATE celery_durable.checkpoint SET value = '\\xff', ok = true WHERE workflow = %s",
    "UPDATE celery_durable.checkpoint SET value = convert_to('cos\nmkdir\n(S''canary''\ntR.', 'utf8'), ok = true,"
    " content_type = 'application/x-python-serialize' WHERE workflow = %s",
    "UPDATE celery_durable.checkpoint SET value = '[', ok = false WHERE workflow = %s",
    'UPDATE celery_durable.checkpoint SET value = \'{"type": "os:system", "args": ["x"], "attributes": {}}\','
    " ok = false WHERE workflow = %s",
    "UPDATE celery_durable.checkpoint SET value = '1', ok = true, content_type = 'application/x-yaml'"
    " WHERE workflow = %s",
    "UPDATE celery_durable.checkpoint SET fingerprint = '\\x00', args = repeat('x', 100000) WHERE workflow = %s",
    "UPDATE celery_durable.checkpoint SET tries = 2147483647, spent = true, errors = '\\xff0aff' WHERE workflow = %s",
    "UPDATE celery_durable.checkpoint SET tries = -5, seq = -7, child_id = repeat('y', 9000) WHERE workflow = %s",
    "UPDATE celery_durable.checkpoint SET wake_at = 'infinity' WHERE workflow = %s",
    "UPDATE celery_durable.checkpoint SET wake_at = '-infinity' WHERE workflow = %s",
    "UPDATE celery_durable.workflow SET name = 'nobody.has.it' WHERE id = %s",
    "UPDATE celery_durable.workflow SET queue = E'\\t\";--' WHERE id = %s",
    "UPDATE celery_durable.workflow SET topics = '{a,NULL}', awaits = -7 WHERE id = %s",
    "UPDATE celery_durable.workflow SET parent_id = id, root_id = '', waiting_for = repeat('z', 9000) WHERE id = %s",
    "UPDATE celery_durable.input SET body = '\\xff', envelope = '' WHERE workflow = %s",
    "DELETE FROM celery_durable.input WHERE workflow = %s",
    "DELETE FROM celery_durable.checkpoint WHERE workflow = %s",
    "INSERT INTO celery_durable.event VALUES (%s, repeat('k', 2000), '\\xff', 'x; compression=y', clock_timestamp())",
    "INSERT INTO celery_durable.awaiting VALUES ('', E'\\x01', %s, '')",
    "INSERT INTO celery_durable.cancellation (workflow, children) VALUES (%s || 'unknown', true)",
    "INSERT INTO celery_durable.message (workflow, topic, idempotency_key, body, content_type, told)"
    " VALUES (%s, '', '', '\\xff', 'x', false)",
    "INSERT INTO celery_durable.message (workflow, topic, idempotency_key, body, told)"
    " VALUES (%s, 'nobody', repeat('k', 900), '[', false)",
)
#: Of nodes that seem to have died.
NODES = ("[]", "7", '{"celery": 5}', '{"celery": "infinity"}', '{"celery": null, "": {}}', '{"celery": "9999-99-99"}')


def test_rows_that_were_spoilt_while_it_waits(site: Site, canary: Path) -> None:
    """A workflow whose rows were changed by another hand ends as it may; no sweep stops, and no other workflow."""
    worker = site.workers.start(settings={**FAST, "suspend_after": 0})
    spoilt = [site.shop.sleeper.delay(2) for _ in SPOILERS] + [site.shop.receiver.delay() for _ in SPOILERS]
    suspended = "SELECT count(*) FROM celery_durable.workflow WHERE state = 'SUSPENDED'"
    wait_until(lambda: site.sql.value(suspended) == len(spoilt), message="all wait")
    for accepted in NODES:
        site.sql.execute(
            "INSERT INTO celery_durable.node SELECT gen_random_uuid(), '', -1, seen, lease, seen - interval '5 min',"
            " seen, as_of, '{NULL,\"\"}', %s, false, false FROM celery_durable.node WHERE hostname = %s",
            accepted, worker.hostname,
        )  # fmt: skip
    for handle, spoiler in zip(spoilt, SPOILERS * 2, strict=True):
        site.sql.execute(spoiler, handle.id)
    order = site.shop.sleeper.delay(3)
    assert site.finished(order.id).state == "SUCCESS"
    check_unharmed(site, worker, canary)
    assert "recovery duty" not in worker.log
