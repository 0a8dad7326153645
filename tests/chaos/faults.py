"""The faults: each strikes once, heals what must be healed, and says whom it has hit."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import psutil

from celery_durable.testing.servers import EmbeddedBroker
from tests.chaos.ledger import now
from tests.chaos.stage import LEASE, QUEUE, Post, Stage

#: A worker that doesn't end by itself in so many seconds is killed.
PATIENCE = 20
#: Messages that are delivered once more, long after their time.
KEPT = 500

NOBODY: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Fault:
    """One strike, on the ledger's clock: from its begin until all is as before."""

    name: str
    begin: float
    end: float
    #: The processes that died, stood still, or were cut off for so long that they may be taken for dead.
    pids: frozenset[int] = NOBODY
    #: Whether connections to the database were lost or held up, which undoes a transaction that is open.
    breaks_transactions: bool = False

    def excuses(self, pid: int, begin: float, end: float, *, atomic: bool) -> bool:
        """Whether a body of this process, which began then, may have to run again at the end."""
        hit = pid in self.pids or (atomic and self.breaks_transactions)
        return hit and self.begin <= end and self.end >= begin


Strike = Callable[[Stage, random.Random], frozenset[int] | None]
"""Carries a fault out and heals it; the processes that it has hit, or None if there was nothing to strike."""


# Workers


def kill_worker(stage: Stage, dice: random.Random) -> frozenset[int] | None:
    """A machine goes."""
    post = stage.some_post(dice)
    if post is None or post.worker is None:
        return None
    pids = stage.pids(post)
    post.worker.kill()
    stage.let_go(post, vacant_for=dice.uniform(0, 2))
    return pids


def kill_pool_process(stage: Stage, dice: random.Random) -> frozenset[int] | None:
    """The kernel kills one process for its memory."""
    post = stage.some_post(dice, lambda post: post.pool == "prefork")
    if post is None or post.worker is None:
        return None
    try:
        children = post.worker.children()
        if not children:
            return None
        victim = dice.choice(children)
        _kill(victim)
        return frozenset([victim.pid])
    finally:
        stage.let_go(post)


def pause_worker(stage: Stage, dice: random.Random) -> frozenset[int] | None:
    """A machine is suspended for longer than a lease, and goes on."""
    post = stage.some_post(dice)
    if post is None or post.worker is None:
        return None
    pids = stage.pids(post)
    post.paused = True
    post.worker.pause()
    time.sleep(LEASE * dice.uniform(0.3, 2))
    post.worker.resume()
    post.paused = False
    stage.let_go(post)
    return pids


def stop_warm(stage: Stage, dice: random.Random) -> frozenset[int] | None:
    """A deploy: nothing that runs is hit."""
    return _stop(stage, dice, signal.SIGTERM, hits=False)


def stop_hard(stage: Stage, dice: random.Random) -> frozenset[int] | None:
    """A deploy that waits for a moment only (soft), or not at all (cold), as the worker was started for."""
    return _stop(stage, dice, signal.SIGQUIT, hits=True)


# Postgres, and the way to it


def restart_postgres(stage: Stage, dice: random.Random) -> frozenset[int] | None:
    """The database crashes, and is away for longer than a lease or not."""
    stage.postgres.stop("immediate")
    time.sleep(LEASE * dice.choice([0, 0.3, 1.5]))
    stage.postgres.start()
    return NOBODY


def kill_backends(stage: Stage, dice: random.Random) -> frozenset[int] | None:
    """An administrator ends sessions in the middle of what they do."""
    with stage.sql() as connection:
        for _ in range(dice.randint(1, 20)):
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE backend_type = 'client backend'"
                " AND pid <> pg_backend_pid() AND state <> 'idle'"
            )
            time.sleep(0.01)
    return NOBODY


def cut_connections(stage: Stage, dice: random.Random) -> frozenset[int] | None:
    """A connection goes at the worst instant of some statement, several times."""
    for _ in range(dice.randint(1, 5)):
        matching = dice.choice(["checkpoint", "UPDATE", "INSERT", "message", "node", ""])
        cut = stage.proxy.cut(matching, dice.choice(["before", "after", "during"]), nth=dice.randint(1, 10))
        cut.reached.wait(0.5)
    stage.proxy.reset()
    return NOBODY


def delay_answers(stage: Stage, dice: random.Random) -> frozenset[int] | None:
    """Statements, or their answers, are on their way for a while."""
    held = []
    for _ in range(dice.randint(1, 6)):
        matching = dice.choice(["checkpoint", "UPDATE", ""])
        held.append(stage.proxy.hold(matching, dice.choice(["before", "after"]), nth=dice.randint(1, 5)))
    time.sleep(dice.uniform(0.1, LEASE / 3))
    stage.proxy.reset()
    for hold in held:
        hold.release()
    return NOBODY


def drop_connections(stage: Stage, dice: random.Random) -> frozenset[int] | None:
    """A firewall forgets what it has allowed; new connections are refused for a while."""
    stage.proxy.disconnect()
    stage.proxy.refuse()
    time.sleep(dice.uniform(0, 1.5))
    stage.proxy.accept()
    return NOBODY


def half_open(stage: Stage, dice: random.Random) -> frozenset[int] | None:
    """Packets are lost in silence, for longer than a lease or not."""
    cut_off = [post for post in stage.posts if post.behind_proxy]
    before = _pids(stage, cut_off)
    seconds = LEASE * dice.uniform(0.2, 2)
    stage.proxy.blackhole(existing=True)
    time.sleep(seconds)
    stage.proxy.accept()
    # Whose heartbeats are late by less is never taken for dead.
    return before | _pids(stage, cut_off) if seconds > LEASE / 2 else NOBODY


# The broker


def lose_messages(stage: Stage, dice: random.Random) -> frozenset[int] | None:
    """Everything in the broker is gone."""
    if isinstance(stage.broker, EmbeddedBroker):
        stage.broker.flush()
    else:
        with stage.queue() as (channel, _):
            channel.queue_purge(QUEUE)
    return NOBODY


def restart_broker(stage: Stage, dice: random.Random) -> frozenset[int] | None:
    """The broker is away for a while; a Redis has lost everything."""
    stage.broker.stop()
    time.sleep(dice.uniform(0, 1.5))
    stage.broker.start()
    return NOBODY


class Repeater:
    """Delivers messages twice, out of order, and long after their time."""

    def __init__(self) -> None:
        self._kept: list[Any] = []

    def __call__(self, stage: Stage, dice: random.Random) -> frozenset[int] | None:
        with stage.queue() as (channel, producer):
            taken = [message for _ in range(50) if (message := channel.basic_get(QUEUE, no_ack=True)) is not None]
            late = dice.sample(self._kept, min(len(self._kept), 10))
            doubled = [*taken, *taken, *late]
            dice.shuffle(doubled)
            for message in doubled:
                _send_again(producer, message)
        self._kept = [*self._kept, *taken][-KEPT:]
        return NOBODY


def kill_beat(stage: Stage, dice: random.Random) -> frozenset[int] | None:
    """One of three beats dies."""
    beat = dice.choice(stage.beats)
    if beat is None or not beat.running:
        return None
    beat.kill()
    return NOBODY


def faults() -> dict[str, tuple[Strike, int]]:
    """All faults by their names, with their weights."""
    return {
        "worker killed": (kill_worker, 6),
        "pool process killed": (kill_pool_process, 8),
        "worker paused": (pause_worker, 4),
        "warm shutdown": (stop_warm, 3),
        "soft or cold shutdown": (stop_hard, 3),
        "Postgres crashed": (restart_postgres, 3),
        "backends terminated": (kill_backends, 4),
        "connections cut": (cut_connections, 6),
        "answers delayed": (delay_answers, 4),
        "connections dropped": (drop_connections, 4),
        "connections half open": (half_open, 4),
        "messages lost": (lose_messages, 5),
        "broker restarted": (restart_broker, 2),
        "messages doubled and mixed": (Repeater(), 8),
        "beat killed": (kill_beat, 2),
    }


BREAK_TRANSACTIONS = {
    "Postgres crashed", "backends terminated", "connections cut", "answers delayed", "connections dropped",
    "connections half open",
}  # fmt: skip


def strike(name: str, how: Strike, stage: Stage, dice: random.Random) -> Fault | None:
    """Carry one fault out."""
    begin = now()
    pids = how(stage, dice)
    return None if pids is None else Fault(name, begin, now(), pids, name in BREAK_TRANSACTIONS)


def _stop(stage: Stage, dice: random.Random, number: signal.Signals, *, hits: bool) -> frozenset[int] | None:
    post = stage.some_post(dice)
    if post is None or post.worker is None:
        return None
    pids = stage.pids(post)
    post.worker.send_signal(number)
    killed = not stage.ends(post.worker, PATIENCE)
    stage.let_go(post, vacant_for=dice.uniform(0, 1))
    return pids if hits or killed else NOBODY


def _pids(stage: Stage, posts: list[Post]) -> frozenset[int]:
    return frozenset[int]().union(*map(stage.pids, posts))


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):  # it was faster
        process.kill()


def _send_again(producer: Any, message: Any) -> None:
    kept = {name: message.properties.get(name) for name in ("correlation_id", "reply_to", "priority")}
    producer.publish(
        message.body,
        routing_key=QUEUE,
        exchange="",
        content_type=message.content_type,
        content_encoding=message.content_encoding,
        headers=message.headers,
        **{name: value for name, value in kept.items() if value is not None},
    )
