"""The diffs of docs/adopting.md make a grown app durable: its own tests, its workers killed, what SQL shows of it."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from tests.fixtures.brokers import Broker
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.pages import CHECKOUT, blocks, patched
from tests.fixtures.site import FAST
from tests.fixtures.workers import Worker, Workers

PAGE = "docs/adopting.md"
FILE = re.compile(r"^--- (\S+)\n\+\+\+ \S+\n", re.MULTILINE)
BEFORE, AFTER = "before", "after"


class Services:
    """What the shop posts to. The first post of what is held waits; the first of what is broken fails."""

    def __init__(self) -> None:
        self.posts: list[tuple[str, dict[str, Any]]] = []
        self.held: set[str] = set()
        self.broken: set[str] = set()
        self.let_go = threading.Event()

    def answer(self, what: str, body: dict[str, Any]) -> int:
        """Note a request; its HTTP status."""
        self.posts.append((what, body))
        if what in self.held:
            self.held.discard(what)
            self.let_go.wait(30)
        if what in self.broken:
            self.broken.discard(what)
            return 503
        return 200

    def of(self, what: str, **facts: Any) -> list[dict[str, Any]]:
        """What was posted."""
        return [body for kind, body in self.posts if kind == what and facts.items() <= body.items()]

    def done(self, what: str, **facts: Any) -> int:
        """How often it was really done: once for each key."""
        return len({body["key"] for body in self.of(what, **facts)})


@contextmanager
def serving(services: Services) -> Iterator[str]:
    """Serve them over HTTP; the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status = services.answer(self.path.strip("/"), body)
            try:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(b'{"id": "1"}')
            except ConnectionError:
                return  # the caller was killed

        def log_message(self, *args: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        services.let_go.set()
        server.shutdown()
        thread.join()


class Shop:
    """The app in a directory of its own."""

    def __init__(self, directory: Path, workers: Workers, env: dict[str, str], sql: Sql) -> None:
        self.sql = sql
        self._directory = directory
        self._workers = workers
        self._given = env
        self._env = {**os.environ, **env, "PYTHONPATH": os.pathsep.join([str(directory), str(CHECKOUT)])}

    def older(self) -> Shop:
        """The same shop as it was before, beside this one."""
        directory = self._directory / BEFORE
        copy_app(directory, BEFORE)
        return Shop(directory, self._workers, self._given, self.sql)

    def worker(self) -> Worker:
        """Start a worker."""
        worker: Worker = self._workers.start(app="legacy.celery_app", concurrency=1, env=self._env)
        return worker

    def run(self, *command: str) -> str:
        """Run Python in the directory; what it prints."""
        done = subprocess.run(
            [sys.executable, *command], cwd=self._directory, env=self._env, capture_output=True, text=True, timeout=90
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    @contextmanager
    def web(self) -> Iterator[str]:
        """Run its web server; the URL."""
        command = [sys.executable, "-m", "legacy.web"]
        with subprocess.Popen(command, cwd=self._directory, env=self._env, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            yield f"http://127.0.0.1:{server.stdout.readline().strip()}"
            server.kill()

    def send(self, path: str) -> str:
        """Post to the web server; the task's id."""
        with self.web() as url, urlopen(Request(url + path, b"", {"X-Tenant": "acme"}), timeout=30) as answer:
            return str(answer.read().decode())

    def status(self) -> str:
        """How order 17 stands, in the shop's own table."""
        return str(self.sql.value("SELECT status FROM orders WHERE id = '17'"))


def apply_diffs(directory: Path) -> None:
    """Change the app as the page says."""
    for block in blocks("diff", page=PAGE):
        _, *parts = FILE.split(block.text)
        for name, diff in zip(parts[::2], parts[1::2], strict=True):
            path = directory / name
            path.write_text(patched(path.read_text(), diff))


def copy_app(directory: Path, version: str) -> None:
    shutil.copytree(CHECKOUT / "tests/fixtures/apps/legacy", directory / "legacy")
    if version == AFTER:
        apply_diffs(directory)


@pytest.fixture
def services() -> Services:
    """What the shop posts to."""
    return Services()


@pytest.fixture
def version() -> str:
    """Which of the two; tests name the other one by a parameter."""
    return AFTER


@pytest.fixture
def shop(
    version: str, tmp_path: Path, services: Services, workers: Workers, database_url: str, broker: Broker, sql: Sql
) -> Iterator[Shop]:
    """The shop, with its tables and short times."""
    copy_app(tmp_path, version)
    with (tmp_path / "legacy/celery_app.py").open("a") as file:
        file.write(f"app.conf.update({ {f'durable_{name}': value for name, value in FAST.items()} })\n")
    with serving(services) as url:
        env = {
            "DATABASE_URL": database_url,
            "BROKER_URL": broker.url,
            "SHOP_QUEUE": broker.queue,
            "SERVICES_URL": url,
        }
        shop = Shop(tmp_path, workers, env, sql)
        shop.run("-c", "from legacy import db; db.execute(db.TABLES)")
        yield shop


def functions(path: Path) -> dict[str, list[str]]:
    """The lines of each task, with its decorator."""
    text = path.read_text()
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    lines = text.splitlines()
    return {node.name: lines[node.decorator_list[0].lineno - 1 : node.end_lineno] for node in nodes}


def test_five_lines_a_task(tmp_path: Path) -> None:
    """No task gets more than five new lines, and none is lost."""
    copy_app(tmp_path, BEFORE)
    before = functions(tmp_path / "legacy/tasks.py")
    apply_diffs(tmp_path)
    after = functions(tmp_path / "legacy/tasks.py")
    assert before.keys() == after.keys()
    new = {name: [line for line in after[name] if line not in before[name]] for name in after}
    assert max(map(len, new.values())) == 5, new


@pytest.mark.parametrize("version", [BEFORE, AFTER])
def test_its_own_tests_pass(shop: Shop) -> None:
    """The app's own tests, in eager mode, pass before and after, unchanged."""
    assert "7 passed" in shop.run("-m", "pytest", "legacy/tests.py", "-q", "-p", "no:django", "-p", "no:cacheprovider")


@pytest.mark.parametrize(
    ("version", "expected"),
    [(BEFORE, {"cancel_order", "charge", "fulfil", "import_rows", "reserve", "ship"}), (AFTER, set())],
)
def test_advice(shop: Shop, expected: set[str]) -> None:
    """Advice names the tasks that the diffs change into workflows or steps; after them it has nothing to say."""
    found = json.loads(shop.run("-m", "celery", "-A", "legacy.celery_app", "durable", "advise", "--json"))
    assert {each["task"].rpartition(".")[2] for each in found} == expected


@pytest.mark.crash
def test_the_chain_is_killed(shop: Shop, services: Services) -> None:
    """Killed while it charges, the durable order ends without a reaper, with one payment, and the tenant is kept."""
    services.held.add("charges")
    worker = shop.worker()
    shop.send("/orders/17")
    wait_until(lambda: services.of("charges"), message="the charge has begun")
    worker.kill()
    services.let_go.set()
    shop.worker()
    wait_until(lambda: shop.status() == "shipped", 30, "the order is shipped")
    assert [services.done(what) for what in ("reservations", "charges", "shipments")] == [1, 1, 1]
    assert len(services.of("reservations")) == 1
    assert len(services.of("charges", tenant="acme")) == 2


@pytest.mark.crash
@pytest.mark.parametrize("version", [BEFORE])
def test_the_old_chain_pays_twice(shop: Shop, services: Services) -> None:
    """Killed while it charges, the order stands still before it is durable; sent again by the reaper it pays twice."""
    services.held.add("charges")
    worker = shop.worker()
    shop.send("/orders/17")
    wait_until(lambda: services.of("charges"), message="the charge has begun")
    worker.kill()
    services.let_go.set()
    shop.worker()
    assert shop.status() == "reserved"
    shop.run("-c", "from legacy.tasks import reap_stuck_orders; reap_stuck_orders.delay(minutes=0)")
    wait_until(lambda: shop.status() == "shipped", 30, "the order is shipped")
    assert services.done("charges") == 2


IMPORT = "from legacy.tasks import import_rows; print(import_rows.delay('i').id)"


def killed_import(shop: Shop, services: Services) -> str:
    """Kill the import in its second row; its id."""
    shop.sql.execute("INSERT INTO import (id, rows) VALUES ('i', '{a,b,c}')")
    worker = shop.worker()
    started = shop.run("-c", IMPORT).strip()
    wait_until(lambda: services.of("rows", row="b"), message="the second row has begun")
    worker.kill()
    services.let_go.set()
    shop.worker()
    return started


def position(shop: Shop) -> int:
    return int(shop.sql.value("SELECT position FROM import WHERE id = 'i'"))


class HoldsRow(Services):
    """The first post of row b waits."""

    def answer(self, what: str, body: dict[str, Any]) -> int:
        self.held = {what} if body.get("row") == "b" and not self.of("rows", row="b") else set()
        return super().answer(what, body)


@pytest.mark.crash
class TestTheImport:
    @pytest.fixture
    def services(self) -> Services:
        """Hold the second row."""
        return HoldsRow()

    def test_the_import_is_killed(self, shop: Shop, services: Services) -> None:
        """Killed in its second row, the durable import goes on there by itself, and each row is done once."""
        killed_import(shop, services)
        wait_until(lambda: position(shop) == 3, 30, "the import has ended")
        assert [services.done("rows", row=row) for row in "abc"] == [1, 1, 1]
        assert [len(services.of("rows", row=row)) for row in "abc"] == [1, 2, 1]

    @pytest.mark.parametrize("version", [BEFORE])
    def test_the_old_import_does_a_row_twice(self, shop: Shop, services: Services) -> None:
        """Killed in its second row, the import ends only if it is called again, and that row is done twice."""
        killed_import(shop, services)
        assert position(shop) == 1
        shop.run("-c", IMPORT)
        wait_until(lambda: position(shop) == 3, 30, "the import has ended")
        assert services.done("rows", row="b") == 2


@pytest.mark.crash
def test_the_cancellation_is_killed(shop: Shop, services: Services) -> None:
    """Killed while it restocks, and with a mail that fails at first, the durable one refunds once."""
    shop.sql.execute("INSERT INTO orders (id, status) VALUES ('17', 'charged')")
    services.held.add("restocks")
    services.broken.add("mails")
    worker = shop.worker()
    shop.send("/orders/17/cancel")
    wait_until(lambda: services.of("restocks"), message="the restocking has begun")
    worker.kill()
    services.let_go.set()
    shop.worker()
    wait_until(lambda: shop.status() == "cancelled", 40, "the order is cancelled")
    assert len(services.of("refunds")) == 1
    assert services.done("restocks") == 1


@pytest.mark.parametrize("version", [BEFORE])
def test_the_old_cancellation_refunds_twice(shop: Shop, services: Services) -> None:
    """A mail that fails at first makes the old one refund twice, without any crash."""
    shop.sql.execute("INSERT INTO orders (id, status) VALUES ('17', 'charged')")
    services.broken.add("mails")
    shop.worker()
    shop.send("/orders/17/cancel")
    wait_until(lambda: shop.status() == "cancelled", 30, "the order is cancelled")
    assert services.done("refunds") == 2


def test_what_fails_is_kept_as_before(shop: Shop) -> None:
    """The app's own `on_failure` is called for a workflow that fails in a step."""
    shop.worker()
    shop.run("-c", "from legacy.tasks import import_rows; import_rows.delay('unknown')")
    wait_until(lambda: shop.sql.all("SELECT 1 FROM incident"), message="the failure is noted")
    assert shop.sql.value("SELECT task FROM incident") == "legacy.tasks.import_rows"


def test_an_old_message_starts_a_workflow(shop: Shop, services: Services) -> None:
    """A message that a producer without us has sent is a workflow once a new worker claims it."""
    shop.sql.execute("INSERT INTO orders (id, status) VALUES ('17', 'new')")
    shop.run(
        "-c",
        "import os, celery\n"
        "app = celery.Celery(broker=os.environ['BROKER_URL'])\n"
        "app.conf.task_default_queue = os.environ['SHOP_QUEUE']\n"
        "app.send_task('legacy.tasks.fulfil', ['17'], task_id='order-17')",
    )
    assert shop.sql.all("SELECT id FROM celery_durable.workflow") == []
    shop.worker()
    wait_until(lambda: shop.status() == "shipped", 30, "the order is shipped")
    assert shop.sql.value("SELECT name FROM celery_durable.workflow WHERE id = 'order-17'") == "legacy.tasks.fulfil"
    assert_sql_shows_everything(shop)


def test_an_old_worker_runs_the_old_function(shop: Shop, services: Services) -> None:
    """A worker without the diffs runs a workflow's message as the task that it knows; a new one runs it once more."""
    old = shop.older().worker()
    shop.send("/orders/17")
    wait_until(lambda: shop.status() == "shipped", 30, "the order is shipped")
    assert shop.sql.value("SELECT state FROM celery_durable.workflow") == "ENQUEUED"
    old.kill()
    shop.worker()
    wait_until(
        lambda: shop.sql.value("SELECT state FROM celery_durable.workflow") == "SUCCESS", 30, "the workflow has ended"
    )
    assert services.done("charges") == 2


def assert_sql_shows_everything(shop: Shop) -> None:
    """The page's queries find the workflow's state, arguments, steps and outcome."""
    wait_until(
        lambda: shop.sql.all("SELECT 1 FROM celery_durable.workflow WHERE state = 'SUCCESS'"), message="it has ended"
    )
    by_state, unfinished, arguments, steps, outputs = (
        query for block in blocks("sql", page=PAGE) for query in filter(str.strip, block.text.split(";"))
    )
    assert [(row.state, row.name, row.count) for row in shop.sql.all(by_state)] == [
        ("SUCCESS", "legacy.tasks.fulfil", 1)
    ]
    assert shop.sql.all(unfinished) == []
    (message,) = shop.sql.all(arguments.replace("AND w.finished_at IS NULL", ""))
    assert (message.args, message.kwargs) == (["17"], {})
    assert [(row.key, row.ok, row.value) for row in shop.sql.all(steps)] == [
        ("legacy.db.set_status", True, None),
        ("legacy.tasks.reserve", True, None),
        ("legacy.tasks.charge", True, None),
        ("legacy.tasks.ship", True, None),
    ]
    assert [(row.workflow, row.ok, row.value) for row in shop.sql.all(outputs)] == [("order-17", True, None)]
