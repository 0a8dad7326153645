"""Workflows that are large: what they cost grows with what they use, and no faster."""

from __future__ import annotations

import logging
import resource
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
from celery.exceptions import Retry

import celery_durable as durable
from celery_durable.engine import context
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.inprocess import Inprocess
from tests.integration.attempts import order, status

pytestmark = [pytest.mark.slow, pytest.mark.alone]

MESSAGES = """
    INSERT INTO celery_durable.message (workflow, topic, idempotency_key, body, told)
    SELECT 'w1', '', n::text, n::text::bytea, true FROM generate_series(1, 1000000) AS n
"""
STEPS = """
    INSERT INTO celery_durable.checkpoint
        (workflow, key, seq, attempt, tries, ok, value, content_type, started_at, at)
    SELECT 'w1', CASE n WHEN 1 THEN 'work' ELSE 'work#' || n END, n, 0, 1, true, '1', 'application/json',
        clock_timestamp(), clock_timestamp()
    FROM generate_series(%s::integer, %s::integer) AS n
"""


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """One database for all of these tests."""
    return emptied_database_url


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    with closing(Inprocess(database_url, broker_url)) as shop:
        yield shop


def peak() -> float:
    """The most memory that this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def test_a_million_messages(shop: Inprocess, sql: Sql) -> None:
    """To one workflow: it takes the first ones, in their order, and neither it nor its worker grows with the rest."""
    order(shop, lambda: [durable.recv() for _ in range(100)])
    sql.execute(MESSAGES)
    sql.execute("ANALYZE celery_durable.message")
    before, began = peak(), time.monotonic()
    assert shop.run("w1") == list(range(1, 101))
    assert time.monotonic() - began < 10
    assert peak() - before < 16


def test_a_hundred_thousand_steps(shop: Inprocess, sql: Sql, caplog: pytest.LogCaptureFixture) -> None:
    """They are replayed in a time that is linear in their number, and a warning says what to do instead, once."""
    work = durable.as_step(int, name="work")

    def body(count: int) -> Any:
        for _ in range(count):
            work()
        return durable.recv()

    order(shop, body, 100_000)

    def replay(first: int, last: int) -> float:
        sql.execute(STEPS, first, last)
        sql.execute("UPDATE celery_durable.workflow SET state = 'ENQUEUED', publish_at = clock_timestamp()")
        sql.execute("ANALYZE celery_durable.checkpoint")
        began = time.monotonic()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(shop.app.tasks["order"], "run", lambda count: body(last))
            assert isinstance(shop.run("w1"), Retry)
        return time.monotonic() - began

    quarter, whole = replay(1, 25_000), replay(25_001, 100_000)
    assert whole < 4 * quarter * 2
    assert status(shop).state == "SUSPENDED"
    with caplog.at_level(logging.WARNING):
        fence: Any = type("Fence", (), {"id": "w1"})()
        attempt = context.Attempt(shop.installation.engine, "order", fence, {})
        for _ in range(2 * context.MANY_STEPS):
            attempt.reach(None)
    assert len([record for record in caplog.records if "replays all of them" in record.message]) == 1
