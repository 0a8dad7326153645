"""Steps on their way to Celery's own receiver, over a real broker that is stopped and frozen on purpose."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery import Celery, signals
from celery.events.receiver import EventReceiver
from celery.events.state import State
from celery.exceptions import Retry
from kombu.serialization import register, unregister

import celery_durable as durable
from celery_durable import step_events
from celery_durable.step_events import MOST_IN_MESSAGE, MOST_WAITING, StepEvents
from celery_durable.testing.servers import EmbeddedBroker
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.workers import ROOT
from tests.unit.test_step_events import report

pytestmark = pytest.mark.oldest

#: In a pool process that was forked while its parent was sending, and which ends as billiard ends it.
FORKED = """
watcher.step_ended(report(id=f"{name}-parent"))
time.sleep(0.1)
if not (child := os.fork()):
    watcher.step_ended(report(id=f"{name}-child"))
    signals.worker_process_shutdown.send(sender=None, pid=os.getpid(), exitcode=0)
    os._exit(0)
os.waitpid(child, 0)
signals.worker_shutdown.send(sender=None)
"""
#: In a green pool: other greenlets must get their turns while the thread sends, and sleeps.
GREEN = """
turns = []
def turn():
    while not turns or time.monotonic() < turns[0] + 0.5:
        turns.append(time.monotonic())
        time.sleep(0.01)
thread = threading.Thread(target=turn)
thread.start()
watcher.step_ended(report(id=f"{name}-green"))
thread.join()
assert max(later - sooner for sooner, later in zip(turns, turns[1:])) < 0.2, "the hub was held up"
watcher.step_ended(report(id=f"{name}-last"))
signals.worker_shutdown.send(sender=None)
"""
PATCHES = {
    "gevent": "from gevent import monkey; monkey.patch_all()",
    "eventlet": "import eventlet; eventlet.monkey_patch()",
}


class Listener(threading.Thread):
    """What Flower and `celery events` have: a receiver, and the state that it fills."""

    def __init__(self, app: Celery) -> None:
        super().__init__(daemon=True)
        self.state = State(max_tasks_in_memory=2 * MOST_WAITING)
        #: Type and task of each event.
        self.heard: list[tuple[str, str]] = []
        #: How many events there were in each message.
        self.sizes: list[int] = []
        self.routing_keys: set[str] = set()
        self._app = app
        self._listening = threading.Event()

    def __enter__(self) -> Listener:
        self.start()
        assert self._listening.wait(20)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._receiver.should_stop = True
        self.join()

    def run(self) -> None:
        with self._app.connection_for_read() as connection:
            self._receiver = self._new_receiver(connection)
            self._receiver.capture(wakeup=False)

    def _new_receiver(self, connection: Any) -> EventReceiver:
        listener = self

        class Receiver(EventReceiver):
            def on_consume_ready(self, *args: Any, **kwargs: Any) -> None:
                listener._listening.set()

            def _receive(self, body: Any, message: Any, **kwargs: Any) -> None:
                listener.sizes.append(len(body) if isinstance(body, list) else 0)
                listener.routing_keys.add(message.delivery_info["routing_key"])
                super()._receive(body, message)

        return Receiver(connection, handlers={"*": self._hear}, app=self._app)

    def _hear(self, event: dict[str, Any]) -> None:
        self.heard.append((event["type"], event.get("uuid", "")))
        self.state.event(event)

    def task(self, task_id: str) -> Any:
        """Wait until a task is known."""
        return wait_until(lambda: self.state.tasks.get(task_id), message=f"the task {task_id} is seen")

    def ids(self, name: str) -> list[str]:
        """The tasks whose ids begin like this, in the order in which they came."""
        return [task_id for task_id in list(self.state.tasks.data) if task_id.startswith(name)]


def new_app(url: str, **conf: Any) -> Celery:
    app = Celery("shop", broker=url, set_as_current=False)
    app.conf.update(conf)
    return app


@contextmanager
def watching(app: Celery) -> Iterator[StepEvents]:
    """A watcher of steps that ends with the block."""
    watcher = StepEvents(app)
    yield watcher
    end_of_worker()


def end_of_worker() -> None:
    """Tell all watchers of this process."""
    signals.worker_shutdown.send(sender=None)


@pytest.fixture(scope="module")
def own_broker() -> Iterator[EmbeddedBroker]:
    """A broker that tests may freeze and stop."""
    with EmbeddedBroker() as server:
        yield server


@pytest.fixture(scope="module")
def app(own_broker: EmbeddedBroker) -> Celery:
    return new_app(own_broker.url)


@pytest.fixture(scope="module")
def listener(app: Celery) -> Iterator[Listener]:
    with Listener(app) as listener:
        yield listener


@pytest.fixture
def name() -> str:
    """What the ids of this test begin with."""
    return uuid.uuid4().hex


@contextmanager
def frozen(broker: EmbeddedBroker) -> Iterator[None]:
    """Let a broker accept connections and say nothing."""
    assert broker.pid
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(broker.pid, signal.SIGCONT)


@pytest.mark.matrix
def test_a_step_arrives_as_a_child_of_its_workflow(broker_url: str, name: str) -> None:
    """On the worker that ran it, and on no other; with the process, and a place in the cluster's order."""
    app = new_app(broker_url)
    with Listener(app) as listener, watching(app) as watcher:
        watcher.step_ended(report(id=f"{name}-1", workflow_id=f"{name}-w", root_id=f"{name}-r"))
        watcher.step_ended(report(id=f"{name}-2", workflow_id=f"{name}-w", root_id=f"{name}-1", args=("later",)))
        first, second = listener.task(f"{name}-1"), listener.task(f"{name}-2")
    assert (first.name, first.args, first.state) == ("shop.charge", "(7,)", "SUCCESS")
    assert (second.parent_id, second.root, second.args) == (f"{name}-w", first, "('later',)")
    assert second.clock > first.clock > 0
    assert second.pid == os.getpid()
    assert list(listener.state.workers) == ["w1@host"]
    assert listener.routing_keys == {"task.multi"}, "what Celery's own batches have"


def test_a_run_tells_each_try_once(database_url: str, broker_url: str) -> None:
    """Without `-E` nothing; where the setting says so a failed try, its retry's success, and a failure for good."""
    quiet, loud = (Inprocess(database_url, broker_url, step_events=setting) for setting in ("auto", True))
    try:
        with Listener(loud.app) as listener:
            for shop in (quiet, loud):
                workflow = declare(shop)
                handle = workflow.delay()
                assert shop.run(handle.id) == [2, "refused"]
            end_of_worker()
            wait_until(lambda: len(listener.heard) >= 3, message="three events come")
    finally:
        quiet.close()
        loud.close()
    (retried, first), (succeeded, second), (failed, third) = listener.heard
    assert (retried, succeeded, failed) == ("task-retried", "task-succeeded", "task-failed")
    assert first == second != third
    assert listener.task(third).name == "refuse"
    assert {task.parent_id for task in listener.state.tasks.values()} == {handle.id}


def test_the_last_step_before_a_hand_over_is_told(database_url: str, broker_url: str) -> None:
    """It is recorded, so no replay would tell it."""
    shop = Inprocess(database_url, broker_url, step_events=True)

    @shop.step(name="last")
    def last() -> None:
        shop.drain()

    @shop.workflow(name="handed-over")
    def handed_over() -> None:
        last()

    try:
        with Listener(shop.app) as listener:
            assert isinstance(shop.run(handed_over.delay().id), Retry)
            end_of_worker()
            wait_until(lambda: listener.heard, message="the step is told")
    finally:
        shop.close()
    assert [event for event, _ in listener.heard] == ["task-succeeded"]


def declare(shop: Inprocess) -> Any:
    """A workflow with a step that succeeds in its second try, and one that fails."""

    @shop.step(name="flaky", autoretry_for=(OSError,), max_retries=1, retry_backoff=0.01)
    def flaky() -> int:
        if durable.current.step.attempt == 1:
            raise OSError("once")
        return durable.current.step.attempt

    @shop.step(name="refuse")
    def refuse() -> None:
        raise ValueError("refused")

    @shop.workflow(name="both")
    def both() -> list[Any]:
        done = flaky()
        try:
            refuse()
        except ValueError as error:
            return [done, str(error)]

    return both


def test_events_leave_in_batches(app: Celery, listener: Listener, name: str) -> None:
    """A hundred steps are one or two messages, not a hundred."""
    with watching(app) as watcher:
        before = len(listener.sizes)
        for number in range(100):
            watcher.step_ended(report(id=f"{name}-{number}"))
        wait_until(lambda: len(listener.ids(name)) == 100, message="all are seen without the end of the process")
    assert sum(listener.sizes[before:]) == 100
    assert len(listener.sizes) - before <= 3


def test_a_broker_that_hangs_gets_them_later(
    app: Celery, listener: Listener, own_broker: EmbeddedBroker, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Of more than can be kept the oldest are lost, which is said once; the steps never wait."""
    with watching(app) as watcher:
        watcher.step_ended(report(id=f"{name}-connected"))
        listener.task(f"{name}-connected")
        with frozen(own_broker):
            began = time.monotonic()
            for number in range(MOST_WAITING + 1000):
                watcher.step_ended(report(id=f"{name}-{number}"))
            assert time.monotonic() - began < 3
        last = f"{name}-{MOST_WAITING + 999}"
        wait_until(lambda: listener.ids(name)[-1] == last, message="the newest is seen")
    kept = [int(task_id.rpartition("-")[2]) for task_id in listener.ids(name)[1:]]
    assert MOST_WAITING <= len(kept) <= MOST_WAITING + MOST_IN_MESSAGE
    assert kept[-MOST_WAITING:] == list(range(1000, MOST_WAITING + 1000))
    assert max(listener.sizes) == MOST_IN_MESSAGE
    assert caplog.text.count("the oldest are lost") == 1


def test_a_broker_that_was_restarted_gets_the_next_ones(
    name: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a new connection; that nothing could be sent is logged once, and that it can be again."""
    monkeypatch.setattr(step_events, "_RETRY", 0.1)
    with EmbeddedBroker() as broker, watching(new_app(broker.url)) as watcher, caplog.at_level(logging.INFO):
        with Listener(watcher._app) as listener:
            watcher.step_ended(report(id=f"{name}-before"))
            listener.task(f"{name}-before")
        broker.stop()
        watcher.step_ended(report(id=f"{name}-meanwhile"))
        wait_until(lambda: "takes no monitoring events" in caplog.text, message="it is tried in vain")
        broker.start()
        with Listener(watcher._app) as listener:
            watcher.step_ended(report(id=f"{name}-after"))
            listener.task(f"{name}-after")
    wait_until(lambda: "are sent again" in caplog.text, message="the end of the outage is logged")
    assert caplog.text.count("takes no monitoring events") == 1


def test_a_connection_that_was_lost_is_no_outage(
    app: Celery, listener: Listener, own_broker: EmbeddedBroker, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """As after a long pause, in which a firewall has forgotten it."""
    with watching(app) as watcher:
        watcher.step_ended(report(id=f"{name}-1"))
        listener.task(f"{name}-1")
        own_broker._ask("CLIENT KILL TYPE normal SKIPME yes")
        watcher.step_ended(report(id=f"{name}-2"))
        listener.task(f"{name}-2")
    assert not caplog.records


@pytest.fixture
def picky_serializer() -> Iterator[str]:
    """A serializer that doesn't take everything."""

    def encode(events: Any) -> str:
        if any(event["args"] == "('bad',)" for event in events):
            raise ValueError("bad")
        return json.dumps(events)

    register("picky", encode, json.loads, "application/x-picky", "utf-8")
    yield "picky"
    unregister("picky")


def test_what_can_not_be_serialized_is_dropped(
    own_broker: EmbeddedBroker, picky_serializer: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With the batch that it is in, once and for all: later ones come."""
    app = new_app(own_broker.url, event_serializer=picky_serializer)
    with Listener(app) as listener, watching(app) as watcher:
        watcher.step_ended(report(id=f"{name}-1", args=("bad",)))
        wait_until(lambda: "can't be serialized" in caplog.text, message="the batch is dropped")
        watcher.step_ended(report(id=f"{name}-2"))
        listener.task(f"{name}-2")
    assert listener.ids(name) == [f"{name}-2"]


def test_another_exchange_may_be_set(own_broker: EmbeddedBroker, name: str) -> None:
    """As Celery's own dispatcher has it."""
    other = new_app(own_broker.url, event_exchange="other")
    with Listener(other) as listener, watching(other) as watcher:
        watcher.step_ended(report(id=name))
        assert listener.task(name).state == "SUCCESS"


def test_a_fork_sends_its_own_and_a_process_its_last(listener: Listener, own_broker: EmbeddedBroker, name: str) -> None:
    """A pool process that ends at once loses nothing; what its parent had to send comes from the parent alone."""
    before = sum(listener.sizes)
    run(FORKED, own_broker.url, name)
    assert listener.task(f"{name}-child").pid != listener.task(f"{name}-parent").pid
    assert sum(listener.sizes) - before == 2


@pytest.mark.alone
@pytest.mark.parametrize("pool", PATCHES)
def test_a_green_pool_is_not_held_up(pool: str, listener: Listener, own_broker: EmbeddedBroker, name: str) -> None:
    """There the thread is a green one, which lets others run while it waits; the end sends the rest."""
    run(GREEN, own_broker.url, name, PATCHES[pool])
    listener.task(f"{name}-green")
    listener.task(f"{name}-last")


def run(code: str, url: str, name: str, before: str = "") -> None:
    """Run code in a Python of its own that has a watcher."""
    prepared = (
        f"{before}\nimport os, threading, time\nfrom celery import Celery, signals\n"
        "import celery_durable.app, kombu.transport.redis\n"  # as every worker has it before it forks
        "from celery_durable.step_events import StepEvents\nfrom tests.unit.test_step_events import report\n"
        f"name = {name!r}\nwatcher = StepEvents(Celery('shop', broker={url!r}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", prepared + code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
