"""A living worker looks alive, however much there is to do and however long the broker takes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from celery_durable.testing.servers import EmbeddedBroker
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.ledger import Ledger
from tests.fixtures.site import FAST, Site, opened, shop_env
from tests.fixtures.workers import Workers

pytestmark = pytest.mark.slow

#: Seconds that a start may take while a broker accepts connections and then says nothing.
BOUND = 20.0
#: More than a sweep can send while a lease passes.
BACKLOG = 6000

BEATS = "SELECT min(seen) FROM celery_durable.node"


@pytest.fixture
def broker_of_its_own() -> Iterator[EmbeddedBroker]:
    """A broker for the test to stop, in both senses."""
    with EmbeddedBroker() as broker:
        yield broker


@pytest.fixture
def busy_site(broker_of_its_own: EmbeddedBroker, database_url: str, ledger: Ledger, tmp_path: Path) -> Iterator[Site]:
    """Two workers, one of which is in the middle of a step."""
    workers = Workers(shop_env(database_url, broker_of_its_own.url, "celery", ledger), tmp_path)
    with opened(workers, ledger, database_url) as site:
        site.gates.close("a-1")
        site.start(2)
        site.shop.order.apply_async(("a",), task_id="a")
        site.reaches("work", "a", 1)
        try:
            yield site
        finally:
            workers.kill_all()
            print(workers.logs())


def nobody_was_taken_for_dead(site: Site) -> None:
    site.gates.open("a-1")
    status = site.finished("a")
    assert (status.state, status.crashes) == ("SUCCESS", 0)
    assert site.work_of("a") == [1, 1, 1]


def beats_for_leases(site: Site, leases: int) -> None:
    """Wait until every node's heartbeat has moved on by so many leases; a silent one fails the test."""
    first = site.sql.value(BEATS)
    wait_until(
        lambda: (site.sql.value(BEATS) - first).total_seconds() > leases * FAST["lease"],
        timeout=(leases + 2) * FAST["lease"],
        message="all nodes go on beating",
    )


@contextmanager
def hanging(broker: EmbeddedBroker) -> Iterator[None]:
    assert broker.pid is not None
    os.kill(broker.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(broker.pid, signal.SIGCONT)


def test_a_broker_that_hangs(busy_site: Site, broker_of_its_own: EmbeddedBroker) -> None:
    """While it says nothing, starts return and nodes go on beating, also the one that has something to send."""
    with hanging(broker_of_its_own):
        began = time.monotonic()
        handle = busy_site.shop.quick.apply_async((1,), task_id="started-meanwhile")
        assert time.monotonic() - began < BOUND
        beats_for_leases(busy_site, 4)
    assert busy_site.finished(handle.id).result == 1
    nobody_was_taken_for_dead(busy_site)


def test_a_backlog(busy_site: Site) -> None:
    """While thousands of messages are to be sent again, the node that sends them goes on beating."""
    busy_site.sql.execute(
        "INSERT INTO celery_durable.workflow (id, name, queue, state, max_crashes, publish_at) SELECT 'lost-' || n,"
        " 'nobody.has.it', 'elsewhere', 'ENQUEUED', 10, clock_timestamp() FROM generate_series(1, %s) n",
        BACKLOG,
    )
    busy_site.sql.execute(
        "INSERT INTO celery_durable.input SELECT w.id, i.envelope, i.body, i.content_type, i.content_encoding"
        " FROM celery_durable.workflow w, celery_durable.input i WHERE w.id LIKE 'lost-%%' AND i.workflow = 'a'"
    )
    beats_for_leases(busy_site, 2)
    wait_until(
        lambda: not busy_site.sql.value("SELECT count(*) FROM celery_durable.workflow WHERE published_at IS NULL"
                                        " AND state = 'ENQUEUED'"),
        timeout=60,
        message="the whole backlog was sent",
    )  # fmt: skip
    nobody_was_taken_for_dead(busy_site)
