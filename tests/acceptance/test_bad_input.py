"""What can't be right gets a clear error as early as it can be seen, and nothing is lost."""

from __future__ import annotations

import json
import threading
import time
from datetime import datetime, timedelta, timezone
from typing import Any

import psutil
import pytest
from celery import Celery

from celery_durable.exceptions import ConfigurationError, DurableError, PayloadTooLarge, SerializationError
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.site import FAST, Site, load_shop
from tests.fixtures.workers import Worker


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    return str(request.node.name)


def workflows(site: Site) -> int:
    """How many workflows there are."""
    return int(site.sql.value("SELECT count(*) FROM celery_durable.workflow"))


def test_a_task_that_this_worker_has_not(site: Site) -> None:
    """The workflow is kept, with a warning, and runs as soon as a worker has its task."""
    other = load_extended(site)
    worker = site.workers.start()
    handle = other.extended.delay("a")
    wait_until(lambda: "isn't registered on this worker" in worker.log, message="the worker warns")
    assert site.status(handle.id).state == "ENQUEUED"
    worker.kill()
    site.workers.start(env={"SHOP_EXTENSION": "1"})
    assert site.finished(handle.id).result == "extended a"


def test_a_worker_without_the_task_beside_one_with_it(site: Site) -> None:
    """Both take its messages; those that the one leaves to the other come again in seconds, however often."""
    settings = {**FAST, "republish_after": 600}
    other = load_extended(site, DURABLE_SETTINGS=json.dumps(settings))
    without = site.workers.start(settings=settings)
    handles = [other.extended.delay(str(number)) for number in range(10)]
    wait_until(lambda: left_by(without) >= 10, message="all have come to the worker that hasn't the task")
    site.workers.start(settings=settings, env={"SHOP_EXTENSION": "1"})
    # Each comes again three to four seconds later, to one of the two: that all ten come to the wrong one twenty times
    # is once in a hundred thousand runs.
    states = "SELECT count(*) FROM celery_durable.workflow WHERE state = 'SUCCESS'"
    wait_until(lambda: site.sql.value(states) == 10, 20 * 4, lambda: f"ten are done:\n{site.workers.logs()}")
    assert sorted(site.status(each.id).result for each in handles) == [f"extended {number}" for number in range(10)]


def test_nobody_has_the_task(site: Site) -> None:
    """Its messages go round, but not faster than each in three seconds."""
    other = load_extended(site)
    without = site.workers.start()
    began = time.monotonic()
    for number in range(10):
        other.extended.delay(str(number))
    wait_until(lambda: left_by(without) >= 30, message="each has come three times")
    assert time.monotonic() - began > 2 * 3


def left_by(worker: Worker) -> int:
    """How many messages a worker has left to others."""
    return worker.log.count("isn't registered on this worker")


def load_extended(site: Site, **env: str) -> Any:
    """The shop of a producer that has one task more."""
    return load_shop({**site.workers.env, "SHOP_EXTENSION": "1", **env})


def test_a_garbage_body(standing_site: Site, name: str) -> None:
    """A message that nobody can read doesn't stop the worker, nor the workflow that it names."""
    site = standing_site
    queue = site.workers.env["CELERY_DURABLE_TEST_QUEUE"]
    handle = site.shop.order.apply_async((name,), countdown=1)
    with site.shop.app.connection_for_write() as connection, connection.Producer() as producer:
        for headers in ({}, {"id": handle.id, "task": site.shop.order.name, "durable": {"queue": queue}}):
            producer.publish(
                b"\x80garbage", routing_key=queue, headers=headers,
                content_type="application/json", content_encoding="utf-8",
            )  # fmt: skip
    assert site.finished(handle.id).result == [0, 10, 20]
    assert site.finished(site.shop.quick.delay(1).id).result == 1


@pytest.mark.parametrize("task_id", ["x" * 256, "", "a\x00b", 7], ids=["long", "empty", "NUL", "number"])
def test_an_impossible_id(standing_site: Site, task_id: Any) -> None:
    """An id that can't be stored is refused at the call."""
    before = workflows(standing_site)
    with pytest.raises(ValueError, match="task_id"):
        standing_site.shop.order.apply_async(("a",), task_id=task_id)
    assert workflows(standing_site) == before


def test_the_longest_id(standing_site: Site) -> None:
    """An id of 255 characters works."""
    handle = standing_site.shop.quick.apply_async((1,), task_id="x" * 255)
    assert standing_site.finished(handle.id).result == 1


def test_arguments_that_cannot_be_serialized(standing_site: Site) -> None:
    """The caller gets the error, and nothing is enqueued."""
    before = workflows(standing_site)
    with pytest.raises(SerializationError, match="Nothing was enqueued"):
        standing_site.shop.order.delay(threading.Lock())
    assert workflows(standing_site) == before


def test_arguments_over_the_limit(standing_site: Site) -> None:
    """So it is with arguments that are too large; the error names size and setting."""
    before = workflows(standing_site)
    with pytest.raises(PayloadTooLarge, match="durable_max_payload"):
        standing_site.shop.order.delay("x" * 100_001)
    assert workflows(standing_site) == before


def test_a_result_that_cannot_be_serialized(standing_site: Site) -> None:
    """The workflow fails with the reason; its body doesn't run again."""
    status = standing_site.finished(standing_site.shop.returns_a_lock.delay().id)
    assert status.state == "FAILURE"
    assert isinstance(status.error, SerializationError)
    assert standing_site.ledger.count("returns_a_lock") == 1


def test_a_step_value_over_the_limit(standing_site: Site) -> None:
    """The step's effect has happened, so the error is its outcome: the body doesn't run again."""
    status = standing_site.finished(standing_site.shop.big_order.delay(100_001).id)
    assert status.state == "FAILURE"
    assert isinstance(status.error, PayloadTooLarge)
    assert standing_site.ledger.count("big", 100_001) == 1


@pytest.mark.crash
def test_a_stored_value_that_cannot_be_decoded(site: Site) -> None:
    """A workflow whose checkpoint was spoilt fails with the reason, and its worker goes on."""
    site.gates.close("a-1")
    handle = site.shop.order.delay("a")
    site.workers.start()
    site.reaches("work", "a", 1)
    site.sql.execute("UPDATE celery_durable.checkpoint SET value = '\\xff' WHERE key LIKE %s", "%work")
    psutil.Process(site.ledger.lines()[-1].pid).kill()
    site.gates.open("a-1")
    status = site.finished(handle.id)
    assert status.state == "FAILURE"
    assert isinstance(status.error, SerializationError)
    assert "work" in str(status.error)
    assert site.finished(site.shop.quick.delay(1).id).result == 1


def test_a_stored_message_that_cannot_be_decoded(site: Site) -> None:
    """A workflow whose arguments were spoilt doesn't hurt its worker, and its status can be read."""
    handle = site.shop.quick.apply_async((1,), countdown=0.5)
    site.sql.execute("UPDATE celery_durable.input SET body = '\\xff'")
    worker = site.workers.start()
    wait_until(lambda: "decode" in worker.log, message="the message has come")
    assert site.finished(site.shop.quick.delay(2).id).result == 2
    assert site.status(handle.id).args is None


@pytest.mark.parametrize("value", ["a\x00b", {"\x00": ["\x00"]}], ids=["text", "nested"])
def test_nul_characters(standing_site: Site, name: str, value: Any) -> None:
    """Postgres' text has no NUL, but arguments, step values and results may have one."""
    status = standing_site.finished(standing_site.shop.echoes.delay(name, value).id)
    assert status.args == (name, value)
    assert status.result == value
    failed = standing_site.finished(standing_site.shop.fails_with.delay("a\x00b").id)
    assert failed.error.args == (402,)
    assert failed.error.reason == "a\x00b"


def test_a_durable_call_in_a_thread_of_the_workflow(standing_site: Site, name: str) -> None:
    """A step that is called in a thread of the workflow's own is refused there, and doesn't run."""
    status = standing_site.finished(standing_site.shop.threaded.delay(name).id)
    assert status.result == "NotInWorkflow"
    assert standing_site.ledger.count("work", name) == 0


@pytest.mark.parametrize("code", [0, 1, "bye"])
def test_sys_exit(standing_site: Site, code: Any) -> None:
    """`sys.exit()` in a body is a failure of the workflow, not the end of its worker."""
    before = standing_site.ledger.count("leaves")
    status = standing_site.finished(standing_site.shop.leaves.delay(code).id)
    assert status.state == "FAILURE"
    assert isinstance(status.error, DurableError)
    assert f"sys.exit({code!r})" in str(status.error)
    assert status.crashes == 0
    assert standing_site.ledger.count("leaves") == before + 1


@pytest.mark.parametrize("how", ["Ignore", "Reject", "Retry"])
def test_celerys_control_flow_in_a_body(standing_site: Site, how: str) -> None:
    """Celery's Ignore, Reject and a bare Retry would end a workflow without an outcome: it fails, once."""
    handle = standing_site.shop.gives_up.delay(how)
    with pytest.raises(DurableError, match=how):
        handle.get(timeout=20)
    wait_until(lambda: standing_site.status(handle.id).dispatched, message="the failure was delivered for good")
    assert standing_site.status(handle.id).state == "FAILURE"
    assert standing_site.ledger.count("gives_up", how) == 1


def test_ids_that_no_workflow_can_have(standing_site: Site) -> None:
    """Foreign messages with such ids fail alone: the worker, its heartbeat and other workflows go on."""
    app = standing_site.shop.app
    for odd in ("a\x00b", "x" * 300):
        app.send_task(standing_site.shop.quick.name, (1,), task_id=odd)
    past = datetime.now(timezone.utc) - timedelta(seconds=60)
    app.send_task(standing_site.shop.quick.name, (1,), task_id="c\x00d", expires=past)
    handle = standing_site.shop.quick.delay("afterwards")
    assert standing_site.finished(handle.id).result == "afterwards"
    wait_until(lambda: standing_site.status(handle.id).dispatched, message="the node still confirms")


def test_headers_that_no_workflow_can_keep(standing_site: Site) -> None:
    """A foreign message with an id that is a number, or a parent of 9,000 characters, holds no worker up."""
    shop, quick = standing_site.shop.app, standing_site.shop.quick
    with Celery("elsewhere", broker=shop.conf.broker_url, set_as_current=False) as elsewhere:
        elsewhere.conf.task_default_queue = shop.conf.task_default_queue
        elsewhere.send_task(quick.name, ("numbered",), task_id=5)
        adopted = elsewhere.send_task(quick.name, ("adopted",), parent_id="p" * 9000, root_id="r" * 9000)
    assert standing_site.finished(quick.delay("afterwards").id).result == "afterwards"
    rows = "SELECT count(*) FROM celery_durable.workflow WHERE id = %s"
    wait_until(lambda: standing_site.sql.value(rows, adopted.id), message="the message has borne its workflow")
    assert standing_site.finished(adopted.id).result == "adopted"
    assert standing_site.status(adopted.id).parent_id is None
    assert standing_site.sql.value(rows, "5") == 0


@pytest.mark.parametrize("options", [{"countdown": 1e300}, {"countdown": float("nan")}, {"workflow_timeout": 1e12}])
def test_times_beyond_a_hundred_years(standing_site: Site, options: dict[str, float]) -> None:
    """Postgres could keep such a time, and nobody read it: nothing is enqueued."""
    before = workflows(standing_site)
    with pytest.raises((ValueError, ConfigurationError), match="100 years"):
        standing_site.shop.quick.apply_async((1,), **options)
    assert workflows(standing_site) == before
