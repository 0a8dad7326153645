"""Everything that the chaos happens to: servers, a proxy, workers of several pools, beats."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import kombu
import psutil
import psycopg

from celery_durable.testing.servers import EmbeddedBroker, EmbeddedPostgres
from tests.chaos.ledger import now
from tests.fixtures.proxy import PostgresProxy
from tests.fixtures.rabbit import RabbitNode
from tests.fixtures.workers import CeleryProcess, Worker, Workers

APP = "tests.chaos.app:app"
QUEUE = "chaos"
LEASE = 3.0
SWEEP = 0.5
#: What two busy cores may add to the bounds of the protocol, in seconds.
SLACK = 3.0
SETTINGS: dict[str, Any] = {
    "heartbeat_interval": 0.5,
    "lease": LEASE,
    "recovery_interval": SWEEP,
    "republish_after": 2,
    "suspend_after": 0.3,
    "max_recovery_attempts": 1_000,
    "step_events": False,
}
SKEW = Path(__file__).with_name("skew.c")

#: Tables of the app's own, by which effects in the database are counted.
TABLES = """
CREATE TABLE effect (workflow text, key text, nonce text);
CREATE TABLE purchase (workflow text);
"""


@dataclass
class Post:
    """A place for one worker, which is filled again whenever it dies."""

    name: str
    pool: str
    concurrency: int
    behind_proxy: bool = False
    skewed: bool = False
    worker: Worker | None = None
    started: int = 0
    vacant_until: float = 0.0
    held: bool = False
    paused: bool = False

    @property
    def is_up(self) -> bool:
        """Whether its worker runs and has said that it is ready."""
        return self.worker is not None and self.worker.running and f"{self.worker.hostname} ready." in self.worker.log


@dataclass
class Stage:
    """What there is, and the small verbs by which it is shaken."""

    home: Path
    dice: random.Random
    postgres: EmbeddedPostgres
    broker: EmbeddedBroker | RabbitNode
    proxy: PostgresProxy
    workers: Workers
    posts: list[Post]
    beats: list[CeleryProcess | None]
    #: What moves a worker's clock; None where there is no C compiler.
    skew: Path | None
    lock: threading.RLock = field(default_factory=threading.RLock)
    closing: bool = False
    complaints: list[str] = field(default_factory=list)

    @property
    def ledger(self) -> Path:
        """Where bodies leave their marks."""
        return self.home / "ledger"

    @property
    def is_redis(self) -> bool:
        """Whether the broker is a Redis, which is the result backend, too."""
        return isinstance(self.broker, EmbeddedBroker)

    def tend(self) -> None:
        """Fill vacant posts, and start beats that have died."""
        with self.lock:
            if self.closing:
                return
            for post in self.posts:
                if not post.held and (post.worker is None or not post.worker.running) and now() >= post.vacant_until:
                    self._fill(post)
            for number, beat in enumerate(self.beats):
                if beat is None or not beat.running:
                    self.beats[number] = self.workers.beat(APP, wait=False)

    def all_up(self) -> bool:
        """Whether every worker is at work."""
        self.tend()
        return all(post.is_up and not post.paused for post in self.posts)

    def some_post(self, dice: random.Random, fits: Callable[[Post], bool] = lambda post: True) -> Post | None:
        """A post whose worker is at work, and that no other fault has hold of."""
        with self.lock:
            ready = [post for post in self.posts if post.is_up and not post.paused and not post.held and fits(post)]
            chosen = dice.choice(ready) if ready else None
            if chosen is not None:
                chosen.held = True
            return chosen

    def let_go(self, post: Post, vacant_for: float = 0.0) -> None:
        """A fault is done with a post."""
        with self.lock:
            post.vacant_until = now() + vacant_for
            post.held = False

    @staticmethod
    def pids(post: Post) -> frozenset[int]:
        """The processes of a post's worker."""
        if post.worker is None:
            return frozenset()
        return frozenset([post.worker.pid, *(child.pid for child in post.worker.children())])

    @contextmanager
    def sql(self) -> Iterator[psycopg.Connection[Any]]:
        """A connection of our own, straight to the database."""
        with psycopg.connect(self.postgres.url, autocommit=True, connect_timeout=10) as connection:
            yield connection

    @contextmanager
    def queue(self) -> Iterator[Any]:
        """The broker's queue, as a channel and a producer."""
        options = {"socket_timeout": 5, "socket_connect_timeout": 5} if self.is_redis else {}
        with kombu.Connection(self.broker.url, connect_timeout=5, transport_options=options) as connection:
            yield connection.default_channel, connection.Producer(auto_declare=False)

    def ends(self, worker: Worker, seconds: float) -> bool:
        """Wait until a worker has ended by itself; else kill it, with its stacks in its log.

        That is a complaint; with RabbitMQ only if it hangs in our code. There Celery's handler of a cold shutdown may
        wait for a lock of py-amqp's, which the code that it has interrupted holds, and green workers were seen to hang
        after the broker was restarted.
        """
        if _has_ended(worker, seconds):
            return True
        told = len(worker.log)
        for process in (*worker.children(), psutil.Process(worker.pid)):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGABRT)
        _has_ended(worker, 2)
        worker.kill()
        lines = hangs_in(worker.log[told:])
        if self.is_redis or lines:
            self.complaints.append(f"{worker.hostname} didn't end in {seconds:g} s after it was told to: {lines[:3]}")
        return False

    def close(self) -> None:
        """Let nobody be replaced any more."""
        with self.lock:
            self.closing = True

    def _fill(self, post: Post) -> None:
        post.started += 1
        env = {"PYTHONFAULTHANDLER": "1"}
        if post.behind_proxy:
            env["DATABASE_URL"] = self.proxy.url
        if post.skewed and self.skew is not None:
            env |= {"LD_PRELOAD": str(self.skew), "SKEW": str(self.dice.randint(-3600, 3600))}
        post.worker = self.workers.start(
            APP, post.pool, post.concurrency, hostname=f"{post.name}{post.started}@chaos", env=env, wait=False,
            args=("--without-gossip",), soft_shutdown=self.dice.choice([0, 1.5]),
        )  # fmt: skip


@contextmanager
def stage(home: Path, seed: int, broker: str) -> Iterator[Stage]:
    """Start it all, and leave nothing behind but the files in `home`."""
    dice = random.Random(seed)
    messages = EmbeddedBroker() if broker == "redis" else RabbitNode(home / "rabbit")
    with EmbeddedPostgres() as postgres, messages, PostgresProxy(postgres.url) as proxy:
        os.environ |= {
            "DATABASE_URL": postgres.url,
            "BROKER_URL": messages.url,
            "RESULT_BACKEND": messages.url if broker == "redis" else "",
            "DURABLE_SETTINGS": json.dumps(SETTINGS),
            "LEDGER": str(home / "ledger"),
        }
        workers = Workers({}, home)
        made = Stage(home, dice, postgres, messages, proxy, workers, _posts(), [None, None, None], _skew(home))
        with made.sql() as connection:
            connection.execute(TABLES)
        try:
            yield made
        finally:
            made.close()
            workers.kill_all()


def _posts() -> list[Post]:
    return [
        Post("prefork", "prefork", 2),
        Post("far", "prefork", 2, behind_proxy=True, skewed=True),
        Post("threads", "threads", 4, behind_proxy=True),
        Post("green", "gevent", 8),
    ]


def hangs_in(stacks: str) -> list[str]:
    """The lines of stacks that are in celery_durable, but for its threads that only wait for their next turn."""
    lines = [line.strip() for line in stacks.splitlines()]
    return [line for line in lines if "/celery_durable/" in line and "/celery_durable/native.py" not in line]


def _has_ended(worker: Worker, seconds: float) -> bool:
    give_up_at = now() + seconds
    while worker.running:
        if now() > give_up_at:
            return False
        time.sleep(0.05)
    return True


def _skew(home: Path) -> Path | None:
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    library = home / "skew.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, SKEW, "-ldl"], check=True)
    return library
