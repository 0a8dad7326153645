"""Retries in a real worker: a fetch over HTTP, long waits that hold nobody up, bound tasks and their result."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

import celery_durable as durable
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.ledger import Ledger
from tests.fixtures.site import Site, shop_env

#: Workflows that back off at once, and for how many seconds.
MANY, DELAY = 100, 10.0


@pytest.fixture
def worker_env(database_url: str, broker: Broker, ledger: Ledger) -> dict[str, str]:
    """A shop of a test's own, in which a wait of over a second gives the worker back."""
    return shop_env(database_url, broker.url, broker.queue, ledger, suspend_after=1)


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    return str(request.node.name)


class Web:
    """A server whose answers a test has laid out; after the last of them it answers well."""

    def __init__(self, server: ThreadingHTTPServer) -> None:
        self.url = f"http://127.0.0.1:{server.server_port}/rates"
        #: 503, or None for a connection that is dropped.
        self.failures: list[int | None] = []
        #: When requests came.
        self.asked: list[float] = []

    def next_answer(self) -> int | None:
        self.asked.append(time.monotonic())
        return self.failures.pop(0) if self.failures else 200


@pytest.fixture
def web() -> Iterator[Web]:
    """A server on this machine."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = web.next_answer()
            if status is not None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(b"42")

        def log_message(self, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        web = Web(server)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield web
        server.shutdown()
        thread.join()


def step_of(site: Site, handle: Any) -> durable.StepInfo:
    (info,) = durable.list_workflow_steps(handle.id, app=site.shop.app)
    return info


@pytest.mark.oldest
def test_the_example_of_the_field(standing_site: Site, web: Web) -> None:
    """A page that fails three times is fetched in the fourth try; each failure is told with time and traceback."""
    web.failures = [503, None, 503]
    began = datetime.now(timezone.utc)
    handle = standing_site.shop.fetching.delay(web.url)
    assert standing_site.finished(handle.id).result == "42"
    assert len(web.asked) == 4
    gaps = [later - earlier for earlier, later in zip(web.asked, web.asked[1:], strict=False)]
    assert all(gap < most + 1 for gap, most in zip(gaps, [0.5, 1, 2], strict=True)), "a delay is at most the formula's"
    info = step_of(standing_site, handle)
    assert (info.tries, info.output) == (4, "42")
    assert [error.type for error in info.errors] == [
        "urllib.error.HTTPError", "http.client.RemoteDisconnected", "urllib.error.HTTPError",
    ]  # fmt: skip
    assert "503" in info.errors[0].message
    assert all("in fetch\n" in error.traceback for error in info.errors)
    times = [error.at for error in info.errors if error.at is not None]
    assert began - timedelta(seconds=5) < times[0] < times[1] < times[2] < datetime.now(timezone.utc)


@pytest.mark.oldest
def test_a_page_that_never_comes(standing_site: Site, web: Web) -> None:
    """Ten retries are eleven requests, at the delays of the formula up to its cap; the last one is followed by none."""
    web.failures = [503] * 20
    options = {"retry_backoff": 0.01, "retry_backoff_rate": 2.0, "retry_backoff_max": 0.1, "retry_jitter": False}
    handle = standing_site.shop.fetching_by.delay(web.url, options)
    status = standing_site.finished(handle.id)
    assert type(status.error).__name__ == "HTTPError"
    assert len(web.asked) == 11
    gaps = [later - earlier for earlier, later in zip(web.asked, web.asked[1:], strict=False)]
    delays = [0.01, 0.02, 0.04, 0.08, *[0.1] * 6]
    assert all(gap >= delay for gap, delay in zip(gaps, delays, strict=True))
    info = step_of(standing_site, handle)
    assert (info.state, info.tries, len(info.errors)) == ("FAILURE", 11, 11)


def test_there_is_no_wait_after_the_last_try(standing_site: Site, web: Web) -> None:
    """With a next delay of a minute, the error is there at once."""
    web.failures = [503] * 20
    options = {"max_retries": 1, "retry_backoff": 0.01, "retry_backoff_rate": 6000, "retry_jitter": False}
    handle = standing_site.shop.fetching_by.delay(web.url, {**options, "retry_backoff_max": 60})
    standing_site.finished(handle.id, timeout=20)
    assert len(web.asked) == 2


@pytest.mark.oldest
def test_a_step_as_a_plain_task_asks_for_another_try(standing_site: Site, name: str) -> None:
    """Sent to a queue, current.step.retry is Celery's own retry."""
    shop = standing_site.shop
    if not standing_site.workers.env["RESULT_BACKEND"]:
        pytest.skip("a plain task's result is in Celery's result backend")
    assert shop.asks.delay(name, 2).get(timeout=20) == 3
    assert standing_site.ledger.count("asks", name) == 3


@pytest.mark.parametrize(("how", "of"), [("task", None), ("task", "itself"), ("step", None)])
def test_update_state_shows_the_workflow(standing_site: Site, name: str, how: str, of: str | None) -> None:
    """What a bound task says of itself inline is said of the workflow, until that has its result."""
    shop = standing_site.shop
    if not standing_site.workers.env["RESULT_BACKEND"]:
        pytest.skip("states are shown in Celery's result backend")
    standing_site.gates.close(name)
    handle = shop.progressing.delay(name, how, of)
    seen = shop.app.AsyncResult(handle.id)
    wait_until(lambda: seen.state == "PROGRESS", message="the progress is seen")
    assert seen.info == {"done": name}
    standing_site.gates.open(name)
    assert handle.get(timeout=20) == name
    assert seen.state == "SUCCESS"


def test_update_state_elsewhere_is_celerys(standing_site: Site, name: str) -> None:
    """In a plain task it is that task's state; and another id in a step is the other's."""
    shop = standing_site.shop
    if not standing_site.workers.env["RESULT_BACKEND"]:
        pytest.skip("states are shown in Celery's result backend")
    standing_site.gates.close(name)
    plain = shop.shows_progress.delay(name)
    wait_until(lambda: plain.state == "PROGRESS", message="the progress is seen")
    standing_site.gates.open(name)
    assert plain.get(timeout=20) == name
    handle = shop.progressing.delay(name, "task", f"other-{name}")
    assert handle.get(timeout=20) == name
    assert shop.app.AsyncResult(f"other-{name}").state == "PROGRESS"


@pytest.mark.alone
@pytest.mark.slow
def test_a_long_backoff_frees_the_worker(site: Site) -> None:
    """While a hundred workflows back off, plain tasks run at once in a worker of two processes; then all finish."""
    site.workers.start(concurrency=2)
    handles = [site.shop.backing_off.delay(f"b{number}", 1, DELAY) for number in range(MANY)]
    wait_until(lambda: site.ledger.count("backs_off") >= MANY, message="each has failed once")
    waiting = site.sql.value("SELECT count(*) FROM celery_durable.workflow WHERE state = 'SUSPENDED'")
    latencies: list[float] = []
    while site.ledger.count("backs_off") == MANY:
        sent_at, label = time.monotonic(), f"ping{len(latencies)}"
        site.shop.note.delay(label)
        site.reaches("note", label)
        latencies.append(time.monotonic() - sent_at)
    assert waiting > 0.9 * MANY
    assert len(latencies) > 3
    assert statistics.median(latencies) < 0.3
    assert max(latencies) < 2
    for handle in handles:
        assert site.finished(handle.id).result == 2
    assert site.ledger.count("backs_off") == 2 * MANY
