"""Lists and counts: each filter, pages by key, and plans that read no more with a long past."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta, timezone
from typing import Any

import psycopg
import pytest

import celery_durable as durable
from celery_durable import Omitted, states
from celery_durable.store.lists import Filters
from celery_durable.store.migrate import migrate
from celery_durable.store.queries import Queries
from tests.fixtures.fix_postgres import Sql, _new_database
from tests.fixtures.inprocess import Inprocess
from tests.integration.test_plans import nodes_of

pytestmark = pytest.mark.matrix

AGES = """
UPDATE celery_durable.workflow
SET created_at = '2026-01-01T00:00Z'::timestamptz + substr(id, 2)::integer * '1 h'::interval
"""
INPUTS = """
INSERT INTO celery_durable.input SELECT id, '{}', '[]', 'application/json', 'utf-8' FROM celery_durable.workflow
"""
MANY = 100_000
MIDDLE = datetime(2026, 1, 1, tzinfo=timezone.utc) + timedelta(seconds=MANY / 2)


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    with closing(Inprocess(database_url, broker_url)) as shop:
        yield shop


@pytest.fixture
def past(shop: Inprocess, sql: Sql) -> Inprocess:
    """w0 to w5, an hour apart: two of another task, one that failed, one that runs, one child."""

    @shop.workflow(name="shop.order")
    def order(number: int) -> int:
        if number == 2:
            raise ValueError("card declined: 100% & more_")
        return number

    @shop.workflow(name="shop.refund")
    def refund(number: int) -> str:
        return "x" * number

    for number in range(4):
        order.apply_async([number], task_id=f"w{number}")
    for number in (4, 5):
        refund.apply_async([number * 100], task_id=f"w{number}", queue="slow", parent_id="w0", root_id="w0")
    for number in (0, 1, 2, 4):
        shop.run(f"w{number}")
    sql.execute(AGES)
    return shop


def ids(shop: Inprocess, **filters: Any) -> list[str]:
    return [each.id for each in durable.list_workflows(app=shop.app, **filters)]


def hour(number: int) -> datetime:
    return datetime(2026, 1, 1, number, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("filters", "found"),
    [
        ({}, "543210"),
        ({"limit": 2}, "54"),
        ({"limit": 0}, ""),
        ({"state": "SUCCESS"}, "410"),
        ({"state": ["ENQUEUED", "FAILURE"]}, "532"),
        ({"state": []}, ""),
        ({"name": "shop.refund"}, "54"),
        ({"name": "shop.nothing"}, ""),
        ({"id": "w3"}, "3"),
        ({"id": "w"}, ""),
        ({"queue": "slow"}, "54"),
        ({"parent_id": "w0"}, "54"),
        ({"root_id": "w0"}, "540"),
        ({"error": "CARD"}, "2"),
        ({"error": "100% & more_"}, "2"),
        ({"error": "100_"}, ""),
        ({"created_after": hour(4)}, "54"),
        ({"created_before": hour(1)}, "0"),
        ({"created_after": hour(1), "created_before": hour(3)}, "21"),
        ({"search": "w3"}, "3"),
        ({"search": "Refund"}, "54"),
        ({"search": "declined"}, "2"),
        ({"search": "shop", "limit": 3}, "543"),
        ({"search": "nothing"}, ""),
        ({"search": "shop", "state": "ENQUEUED"}, "53"),
        ({"search": "declined", "name": "shop.refund"}, ""),
        ({"name": "shop.order", "queue": "celery", "state": "SUCCESS"}, "10"),
    ],
)
def test_filters(past: Inprocess, filters: dict[str, Any], found: str) -> None:
    """All hold together, the newest comes first; what they are is taken literally."""
    assert ids(past, **filters) == [f"w{number}" for number in found]
    if "limit" not in filters and "search" not in filters:
        counts = durable.count_workflows(app=past.app, **filters)
        assert sum(counts.values()) == len(found)
        assert set(counts) == set(filters["state"] if isinstance(filters.get("state"), list) else counts)


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"name": "\x00"}, "name must be text"),
        ({"error": 5}, "error must be text"),
        ({"search": "\ud800"}, "search must be text"),
        ({"created_after": "yesterday"}, "created_after must be a datetime"),
        ({"created_before": datetime(2026, 1, 1)}, "time zone"),
        ({"after": (datetime(2026, 1, 1), "w1")}, "time zone"),
        ({"after": (datetime.now(timezone.utc), "\x00")}, "The id of after"),
        ({"limit": -1}, "limit must be a whole number"),
        ({"max_payload": True}, "max_payload must be a whole number"),
        ({"state": "LOST"}, "There is no state"),
    ],
)
def test_bad_filters(shop: Inprocess, filters: dict[str, Any], message: str) -> None:
    """A visitor's nonsense is a ValueError, not one of the database."""
    with pytest.raises(ValueError, match=message):
        durable.list_workflows(app=shop.app, **filters)


@pytest.mark.parametrize("filters", [{}, {"search": "shop"}, {"name": "shop.order"}])
def test_pages(past: Inprocess, sql: Sql, filters: dict[str, Any]) -> None:
    """Each workflow is on one page, also of those that were made at the same time and though one comes between."""
    sql.execute("UPDATE celery_durable.workflow SET created_at = '2026-01-01T00:00Z'")
    everything, seen = ids(past, **filters), []
    page = durable.list_workflows(app=past.app, limit=2, **filters)
    while page:
        seen += [each.id for each in page]
        past.app.tasks["shop.order"].apply_async([1], task_id=f"new-{len(seen)}")
        page = durable.list_workflows(app=past.app, limit=2, after=page[-1], **filters)
    assert seen == everything
    at = datetime(2026, 1, 1, tzinfo=timezone.utc)
    assert ids(past, after=(at, everything[0]), **filters) == everything[1:]


def test_counts_go_no_further_than_wanted(past: Inprocess) -> None:
    """Each state is there, the empty ones too."""
    counts = durable.count_workflows(app=past.app)
    assert counts == {
        "ENQUEUED": 2, "RUNNING": 0, "SUSPENDED": 0, "SUCCESS": 3, "FAILURE": 1, "CANCELLED": 0, "DEAD": 0,
    }  # fmt: skip
    assert durable.count_workflows(app=past.app, most=2)["SUCCESS"] == 2


def test_names(past: Inprocess) -> None:
    """Of the tasks that have workflows, each once."""
    assert durable.list_workflow_names(app=past.app) == ["shop.order", "shop.refund"]


def test_large_values_stay_in_the_database(past: Inprocess) -> None:
    """What stands for one says how large it is; small ones are there."""
    small, large = (durable.get_workflow_status(each, max_payload=100, app=past.app) for each in ("w0", "w4"))
    assert (small.args, small.result) == ((0,), 0)
    assert isinstance(large.result, Omitted)
    assert large.result.size > 400
    assert repr(large.result) == f"<{large.result.size:,} bytes, not loaded>"
    nothing = durable.list_workflows(id="w0", max_payload=0, app=past.app)[0]
    assert isinstance(nothing.args, Omitted)
    assert isinstance(nothing.kwargs, Omitted)
    assert isinstance(nothing.result, Omitted)
    (failed,) = durable.list_workflows(id="w2", max_payload=0, app=past.app)
    assert failed.error is None
    assert failed.error_text == "ValueError: card declined: 100% & more_"
    assert failed.worker == "worker@test"


def test_a_resumed_workflow_has_no_error_any_more(past: Inprocess) -> None:
    """Nor is it found by the old one."""
    durable.resume_workflow("w2", app=past.app)
    assert durable.get_workflow_status("w2", app=past.app).error_text is None
    assert ids(past, error="card") == []


def test_steering_by_filters_takes_the_new_ones(past: Inprocess) -> None:
    """As list_workflows finds them."""
    assert durable.cancel_workflows(created_after=hour(5), app=past.app) == ["w5"]
    assert [handle.id for handle in durable.resume_workflows(error="card", app=past.app)] == ["w2"]


@pytest.fixture(scope="module")
def full(postgres_server: str) -> Iterator[Sql]:
    """A hundred thousand finished workflows; what is rare among them is long ago."""
    with _new_database(postgres_server, "template0") as url:
        migrate(url)
        sql = Sql(url)
        sql.execute(
            """
            INSERT INTO celery_durable.workflow
                (id, name, queue, state, max_crashes, created_at, finished_at, dispatched, root_id, error)
            SELECT 'w' || n, CASE WHEN n < 100 THEN 'rare' ELSE 'order' END, 'celery',
                CASE WHEN n < 100 THEN 'DEAD' WHEN n %% 10 = 0 THEN 'FAILURE' ELSE 'SUCCESS' END, 3,
                '2026-01-01T00:00Z'::timestamptz + n * '1 s'::interval, clock_timestamp(), true, 'w' || n,
                CASE WHEN n < 100 OR n %% 10 = 0 THEN 'ValueError: ' || n END
            FROM generate_series(1, %s) AS n
            """,
            MANY,
        )
        sql.execute(INPUTS)
        sql.execute("INSERT INTO celery_durable.output SELECT id, true, '1' FROM celery_durable.workflow")
        sql.execute("VACUUM ANALYZE")
        yield sql
        sql.close()


class Explained:
    """Stands where statements are sent to, and asks for their plans."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.read_rows = 0

    def plan(self, name: str, params: dict[str, Any]) -> None:
        text = Queries("lists.sql", "celery_durable")[name].text
        with psycopg.connect(self.url) as connection:
            row = connection.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) {text}".encode(), params).fetchone()
        assert row is not None
        for node in nodes_of(row[0][0]["Plan"]):
            if "Scan" in node["Node Type"] and "Relation Name" in node:
                removed = sum(node.get(each, 0) for each in ("Rows Removed by Filter", "Rows Removed by Index Recheck"))
                assert node["Node Type"] != "Seq Scan", f"{name} reads all of {node['Relation Name']}"
                self.read_rows += (node["Actual Rows"] + removed) * node["Actual Loops"]


PAGE: dict[str, Any] = {
    **dict.fromkeys((*Filters.__slots__, "after_at", "after_id")), "ended": False, "limit": 50, "most": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"after_at": MIDDLE, "after_id": "w5"},
        {"states": ["SUCCESS"], "ended": True},
        {"states": ["DEAD"], "ended": True},
        {"states": ["DEAD", "FAILURE"], "ended": True},
        {"states": ["RUNNING"]},
        {"names": ["rare"]},
        {"names": ["order"]},
        {"names": ["order"], "states": ["FAILURE"], "ended": True},
        {"names": ["rare"], "states": ["FAILURE"], "ended": True},
        {"names": ["order"], "states": ["DEAD"], "ended": True},
        {"id": "w777"},
        {"root_id": "w777"},
        {"parent_id": "w777"},
        {"forked_from": "w777"},
        {"error": "ValueError"},
        {"created_before": MIDDLE},
    ],
    ids=str,
)
def test_a_page_reads_no_more_than_its_rows(full: Sql, filters: dict[str, Any]) -> None:
    """Whatever is asked for, an index leads to it in the right order."""
    explained = Explained(full.connection.info.dsn)
    explained.plan("matching", PAGE | filters)
    assert explained.read_rows <= 1500


@pytest.mark.parametrize("state", ["DEAD", "FAILURE", "RUNNING", "ENQUEUED", "SUSPENDED", "SUCCESS"])
def test_counts_read_no_more_than_they_count(full: Sql, state: str) -> None:
    """With a hundred thousand workflows as with ten million."""
    explained = Explained(full.connection.info.dsn)
    ended = state in states.FINAL
    explained.plan("count", {**dict.fromkeys(Filters.__slots__), "state": state, "ended": ended, "most": 1000})
    assert explained.read_rows <= 1500


@pytest.mark.parametrize(("name", "state"), [("order", "DEAD"), ("order", "CANCELLED"), ("rare", "FAILURE")])
def test_counts_of_what_a_task_has_none_of_read_nothing(full: Sql, name: str, state: str) -> None:
    """Though there are many of that task, or of that state."""
    explained = Explained(full.connection.info.dsn)
    filters = {**dict.fromkeys(Filters.__slots__), "names": [name]}
    explained.plan("count", {**filters, "state": state, "ended": True, "most": 1000})
    assert explained.read_rows == 0


def test_names_are_read_by_jumps(full: Sql) -> None:
    """Two names cost a few rows."""
    explained = Explained(full.connection.info.dsn)
    explained.plan("names", {})
    assert explained.read_rows <= 10
