"""Async functions and gathered steps in real workers of every pool."""

from __future__ import annotations

from typing import Any

import pytest

from tests.acceptance.test_pools import POOLS
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.site import Site

pytestmark = pytest.mark.crash

ASYNC = [[0, 10], [20, 30], 40, "StepTimeout", True]
GATHERED = [0, 10, 20, 30, "StepTimeout"]


@pytest.mark.parametrize("pool", POOLS)
def test_a_pool_runs_async_functions_and_gathers(site: Site, pool: str) -> None:
    """Side by side; a warm shutdown lets the steps that run end, and another worker goes on after them."""
    options: dict[str, Any] = {"pool": pool, "env": POOLS[pool]}
    worker = site.workers.start(**options)
    shop = site.shop
    orders = [shop.async_order.delay("o1"), shop.gathered_order.delay("o2"), shop.async_order.delay("o3")]
    assert [site.finished(order.id).result for order in orders] == [ASYNC, GATHERED, ASYNC]
    assert [site.work_of(name, 5) for name in ("o1", "o3")] == [[1] * 5] * 2
    shop.runs_a_loop.delay("o4")
    site.reaches("loop", "o4")
    site.gates.close("a-1", "a-4", "g-1", "g-3")
    handles = [shop.async_order.delay("a")]
    site.reaches("work", "a", 1)
    site.reaches("work", "a", 4)
    if pool != "solo":
        handles.append(shop.gathered_order.delay("g"))
        site.reaches("work", "g", 1)
        site.reaches("work", "g", 3)
    site.start(1, **options)
    worker.stop("warm")
    wait_until(lambda: site.sql.value("SELECT count(*) FROM celery_durable.node WHERE draining"), message="it drains")
    site.gates.open("a-1", "a-4", "g-1", "g-3")
    found = [site.finished(handle.id) for handle in handles]
    assert [(status.result, status.attempt, status.crashes) for status in found] == [
        (result, 2, 0) for result in (ASYNC, GATHERED)[: len(handles)]
    ]
    assert site.work_of("a", 5) == [1] * 5
    assert site.work_of("g", 4) == [int(pool != "solo")] * 4
    assert worker.wait_exit() == 0
