"""A payload codec with real workers and a real broker: what goes over it, and keys that are replaced meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import redis

import celery_durable as durable
from tests.fixtures.brokers import Broker
from tests.fixtures.codecs import Encrypted, new_key
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.ledger import Ledger
from tests.fixtures.readings import readings
from tests.fixtures.site import FAST, Site, shop_env
from tests.fixtures.workers import Worker

SECRET = "hush-7f3Kq9-zebra-of-the-north"
OLD, NEW = new_key().decode(), new_key().decode()
CODEC = "tests.fixtures.codecs:from_environment"


@pytest.fixture
def encrypted() -> bool:
    """Whether the shop has a payload codec."""
    return True


@pytest.fixture
def worker_env(
    database_url: str, broker: Broker, ledger: Ledger, encrypted: bool, monkeypatch: pytest.MonkeyPatch
) -> dict[str, str]:
    """The shop without a result backend, which would have results in the clear; here it has both keys."""
    monkeypatch.setattr("tests.fixtures.codecs.from_environment", Encrypted(OLD, NEW))
    codec = {"payload_codec": CODEC} if encrypted else {}
    env = shop_env(database_url, broker.url, broker.queue, ledger, step_events=True, **codec)
    return {**env, "RESULT_BACKEND": "", "PAYLOAD_KEYS": OLD}


class Sniffer:
    """All that a Redis is told, by whomever."""

    def __init__(self, url: str) -> None:
        self.client = redis.Redis.from_url(url, socket_timeout=None)
        self.heard: list[bytes] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear everything while the block runs."""
        with self.client.monitor() as monitor:
            thread = threading.Thread(target=self._listen, args=(monitor,), daemon=True)
            thread.start()
            yield
            self.client.echo("the end")
            thread.join(20)
            assert not thread.is_alive()

    def _listen(self, monitor: Any) -> None:
        for command in monitor.listen():
            line = command["command"].encode()
            if line.upper() == b"ECHO THE END":
                return
            self.heard.append(line)

    def said(self, text: str) -> bool:
        """Whether a text went over it: as it is, or in base64, or compressed."""
        return any(text.encode() in each for line in set(self.heard) for each in readings(line, depth=3))


def with_keys(site: Site, *keys: str, **options: Any) -> Worker:
    """A worker that encrypts with the first key."""
    worker: Worker = site.workers.start(env={"PAYLOAD_KEYS": " ".join(keys)}, **options)
    return worker


@pytest.mark.parametrize("encrypted", [True, False], ids=["encrypted", "in the clear"])
def test_what_goes_over_the_broker(site: Site, broker: Broker, encrypted: bool) -> None:
    """Messages, monitoring events of workflows and steps, and what `celery inspect` is told; all of it is there."""
    if not broker.url.startswith("redis"):
        pytest.skip("only a Redis can be asked for all that it is told")
    sniffer, shop = Sniffer(broker.url), site.shop
    shop.app.conf.task_send_sent_event = True
    with sniffer.listening():
        worker = site.workers.start(args=("--events",))
        assert site.finished(shop.echoes.delay("a", SECRET).id).result == SECRET
        assert site.finished(shop.flaky_order.delay(SECRET, 1).id).result == 2
        assert site.finished(shop.refused.delay(SECRET).id).state == "FAILURE"
        receiver = shop.receiver.delay()
        durable.send(receiver.id, SECRET, app=shop.app)
        assert site.finished(receiver.id).result[0] == SECRET
        site.gates.close("b-0")
        running = shop.order.delay("b", 1)
        site.reaches("work", "b", 0)
        active = shop.app.control.inspect(timeout=5, limit=1).active()
        site.gates.open("b-0")
        site.finished(running.id)
        worker.stop()
        worker.wait_exit()
    assert sniffer.said("task-succeeded")
    assert sniffer.said("tests.fixtures.apps.shop.echo")
    assert sniffer.said(SECRET) is not encrypted
    ((shown,),) = active.values()
    assert shown["args"] == ("<encoded>" if encrypted else ["b", 1])


@pytest.mark.parametrize("pool", ["prefork", "threads", "solo"])
def test_a_key_is_replaced_under_running_workflows(site: Site, pool: str) -> None:
    """One that waits and one whose worker dies go on under the new key, and what they did under the old one counts."""
    site.gates.close("a-1")
    waiting, working = site.shop.receiver.delay("hint"), site.shop.order.delay("a", 3)
    old = with_keys(site, OLD, NEW, pool=pool, concurrency=1)
    site.reaches("work", "a", 1)
    wait_until(lambda: site.status(waiting.id).state == "SUSPENDED", message="the other one waits")
    old.kill()
    site.gates.open("a-1")
    with_keys(site, NEW, OLD, pool=pool, concurrency=1)
    assert site.finished(working.id).result == [0, 10, 20]
    assert site.work_of("a") == [1, 2, 1]
    durable.send(waiting.id, SECRET, topic="hint", app=site.shop.app)
    assert site.finished(waiting.id).result[0] == SECRET


@pytest.mark.parametrize("keys", [None, (new_key().decode(),)], ids=["no codec", "another key"])
def test_a_worker_that_cannot_read_a_workflow(site: Site, keys: tuple[str, ...] | None) -> None:
    """It says so, runs what it can read, and leaves the rest to others: nothing fails."""
    settings = {"settings": FAST} if keys is None else {}
    wrong = with_keys(site, *(keys or [OLD]), concurrency=1, **settings)
    started = site.shop.quick.delay(SECRET)
    told = f"The workflow {started.id} waits for a worker that can read it"
    wait_until(lambda: told in wrong.log, message="it is told")
    assert "durable_payload_codec" in wrong.log
    assert site.status(started.id).state == "ENQUEUED"
    with_keys(site, OLD, concurrency=1)
    assert site.finished(started.id).result == SECRET
    assert site.ledger.count("quick") == 1
    assert wrong.running
    assert SECRET not in wrong.log


def test_a_workflow_that_waited_is_not_failed_by_a_wrong_key(site: Site) -> None:
    """A worker that can read its message, but not its steps, waits for another one; nothing runs twice."""
    site.gates.close("a-1")
    started = site.shop.order.delay("a", 2)
    new = with_keys(site, NEW, OLD, concurrency=1)
    site.reaches("work", "a", 1)
    new.kill()
    site.gates.open("a-1")
    half = with_keys(site, OLD, concurrency=1)
    wait_until(lambda: "waits for a payload codec" in half.log, message="it can't read the first step")
    assert site.status(started.id).state in ("SUSPENDED", "ENQUEUED", "RUNNING")
    half.stop()
    half.wait_exit()
    with_keys(site, NEW, OLD, concurrency=1)
    assert site.finished(started.id).result == [0, 10]
    assert site.work_of("a", 2) == [1, 2]
