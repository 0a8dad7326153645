"""Every broker with every result backend: a workflow runs, loses its worker, and its result arrives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import celery
import pytest

from tests.fixtures.brokers import Broker
from tests.fixtures.ledger import Ledger
from tests.fixtures.site import Site, shop_env

pytestmark = [pytest.mark.matrix, pytest.mark.crash]


@pytest.fixture
def result_backend(request: pytest.FixtureRequest, broker: Broker, tmp_path: Path) -> str:
    """URL of one kind of result backend; Redis is the broker where that is one."""
    kind = getattr(request, "param", "none")
    if kind == "redis":
        return broker.url if broker.url.startswith("redis") else str(request.getfixturevalue("embedded_broker").url)
    return {"none": "", "rpc": "rpc://", "database": f"db+sqlite:///{tmp_path / 'results.sqlite'}"}[kind]


@pytest.fixture
def celery_settings() -> dict[str, Any]:
    """Settings of Celery's own."""
    return {}


@pytest.fixture
def worker_env(
    database_url: str, broker: Broker, ledger: Ledger, result_backend: str, celery_settings: dict[str, Any]
) -> dict[str, str]:
    """The shop's environment with this test's servers."""
    env = shop_env(database_url, broker.url, broker.queue, ledger)
    return {**env, "RESULT_BACKEND": result_backend, "CELERY_SETTINGS": json.dumps(celery_settings)}


def assert_survives_a_kill(site: Site) -> None:
    """Its worker is killed in the second step; the caller gets the result all the same."""
    workers = site.start(2)
    site.gates.close("a-1")
    handle = site.shop.order.delay("a")
    site.reaches("work", "a", 1)
    site.owner(*workers).kill()
    site.gates.open("a-1")
    assert handle.get(timeout=20) == [0, 10, 20]
    assert site.work_of("a") == [1, 2, 1]


@pytest.mark.parametrize("result_backend", ["none", "redis", "rpc", "database"], indirect=True)
def test_a_result_arrives_after_a_kill(site: Site) -> None:
    """A caller who waits for the result gets it from the worker that went on."""
    assert_survives_a_kill(site)


@pytest.mark.skipif(celery.VERSION < (5, 5), reason="task_default_queue_type is new in Celery 5.5")
@pytest.mark.parametrize("celery_settings", [{"task_default_queue_type": "quorum"}])
def test_quorum_queues(site: Site, broker: Broker) -> None:
    """RabbitMQ's quorum queues carry workflows as its classic ones do."""
    if not broker.url.startswith(("amqp", "pyamqp")):
        pytest.skip("Only RabbitMQ has quorum queues.")
    assert site.shop.app.amqp.queues[broker.queue].queue_arguments["x-queue-type"] == "quorum"
    assert_survives_a_kill(site)
