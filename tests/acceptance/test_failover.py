"""The database fails over to a streaming replica, and the same workers go on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from celery_durable.exceptions import WorkflowNotFound
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.ledger import Ledger
from tests.fixtures.mixed import assert_mixed, start_mixed
from tests.fixtures.replication import Pair
from tests.fixtures.site import Site, opened, shop_env
from tests.fixtures.workers import Workers

pytestmark = pytest.mark.crash


@pytest.fixture
def worker_env(pair: Pair, broker: Broker, ledger: Ledger) -> dict[str, str]:
    """What the shop reads from its environment."""
    return shop_env(pair.url, broker.url, broker.queue, ledger, suspend_after=0.1)


@pytest.fixture
def site(workers: Workers, ledger: Ledger, pair: Pair) -> Iterator[Site]:
    """The shop on both of them."""
    with opened(workers, ledger, pair.url) as site:
        yield site


def fail_over(site: Site, pair: Pair) -> None:
    """The primary crashes, the replica takes its place."""
    pair.primary.stop("immediate")
    pair.replica.start()
    pair.replica.promote()
    site.sql = Sql(pair.url)


def test_nothing_that_was_confirmed_is_lost(site: Site, pair: Pair) -> None:
    """With synchronous replication running workflows go on in the same processes; no completed step runs again."""
    pair.confirm_together()
    site.gates.close("b-0", "c-3")
    workers = site.start(2, concurrency=3)
    handles = start_mixed(site, "abcd")
    site.reaches("work", "b", 0)
    site.reaches("work", "c", 3)
    processes = [child.pid for worker in workers for child in worker.children()]
    fail_over(site, pair)
    site.gates.open("b-0", "c-3")
    for name, handle in handles.items():
        assert_mixed(site, name, handle)
        assert site.status(handle.id).crashes == 0
    assert site.finished(site.shop.quick.delay("after").id).result == "after"
    assert processes == [child.pid for worker in workers for child in worker.children()]


def test_a_replica_that_was_behind(site: Site, pair: Pair) -> None:
    """With asynchronous replication what is lost is done again, once; whoever ran it before stops at its next step."""
    site.gates.close("a-1", "b-1")
    handle = site.shop.order.delay("a")
    pair.catch_up()
    pair.replica.stop()
    worker = site.workers.start(concurrency=4)
    lost = site.shop.order.delay("b")
    for name in "ab":
        site.reaches("work", name, 1)
    fail_over(site, pair)
    site.reaches("work", "a", 1, times=2, timeout=30)
    site.gates.open("a-1", "b-1")
    status = site.finished(handle.id)
    assert (status.state, status.result, status.attempt) == ("SUCCESS", [0, 10, 20], 1)
    assert site.work_of("a") == [2, 2, 1]
    with pytest.raises(WorkflowNotFound):
        site.status(lost.id)
    wait_until(lambda: worker.log.count("Another worker has taken") == 2, message="both late runs have stopped")
    assert site.work_of("b") == [1, 1, 0]
