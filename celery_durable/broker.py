"""Connections to the broker that don't wait for ever.

Postgres is the truth and a message only wakes somebody up, so a start must not hang because a broker accepts
connections and then says nothing. Celery's own connections wait, as its users have configured them.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import Celery
from kombu import Connection, pools

#: Seconds that a broker has for each answer.
PATIENCE = 4.0
#: One more try at once, for a pooled connection that had gone stale.
SHORT_TRY = {"max_retries": 1, "interval_start": 0, "interval_step": 0, "interval_max": 0}

_BOUNDS: dict[str, dict[str, Any]] = {
    "redis": {"socket_timeout": PATIENCE, "socket_connect_timeout": PATIENCE},
    "amqp": {"read_timeout": PATIENCE, "write_timeout": PATIENCE},
}


def connection_for_write(app: Celery) -> Connection:
    """Return a connection of the app's, with bounds where the user has set none."""
    plain = app.connection_for_write()
    bounds = _BOUNDS.get(plain.transport.driver_type, {})
    options = {**bounds, **(app.conf.broker_transport_options or {})}
    return app.connection_for_write(transport_options=options, connect_timeout=app.conf.broker_connection_timeout)


@contextmanager
def producer(app: Celery, given: Any = None) -> Iterator[Any]:
    """Lend ``given``, or a producer of the process's pool; never waits long for the broker to answer."""
    if given is not None:
        yield given
        return
    with _pool(app).acquire(block=True, timeout=PATIENCE) as pooled:
        yield pooled


def _pool(app: Celery) -> Any:
    """Return this process's pool; Celery, too, makes a new one after a fork."""
    process, pool = _pools.get(app, (None, None))
    if process != os.getpid():
        # Not kombu's own group of pools: after a plain fork that hands out the parent's sockets.
        limit = app.conf.broker_pool_limit
        pool = pools.ProducerPool(connection_for_write(app).Pool(limit=limit), limit=limit)
        _pools[app] = os.getpid(), pool
    return pool


def forget(app: Celery) -> None:
    """Let the next message of an app go where its settings say by then."""
    _pools.pop(app, None)


_pools: weakref.WeakKeyDictionary[Celery, tuple[int, Any]] = weakref.WeakKeyDictionary()
