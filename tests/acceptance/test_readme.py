"""The README as a reader follows it: the patched task on a real worker, the kill, the session, Django."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures.brokers import Broker
from tests.fixtures.fix_django import django_settings
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.pages import CHECKOUT, blocks, patched, read
from tests.fixtures.site import FAST
from tests.fixtures.workers import Worker, Workers

INSTALL = 'durable.install(app, database_url="postgresql://localhost/shop")'
BROKER = "redis://localhost:6379/0"
DJANGO = """
SECRET_KEY = "test"
DATABASES = {"default": {"ENGINE": "django.db.backends.postgresql", **DATABASE}}
INSTALLED_APPS += ["django.contrib.admin", "django.contrib.auth", "django.contrib.contenttypes",
                   "django.contrib.messages", "django.contrib.sessions"]
"""
DJANGO_SESSION = """
import django
django.setup()
from django.db import transaction
import celery_durable as durable
from shop.celery import app
app.loader.import_default_modules()
assert "shop.tasks.welcome" in app.tasks
from shop.tasks import welcome
from django.core.management import call_command
call_command("migrate", verbosity=0)
with transaction.atomic():
    welcome.delay(7)
    assert durable.list_workflows() == []
(started,) = durable.list_workflows()
assert (started.name, started.args, started.state) == ("shop.tasks.welcome", (7,), "ENQUEUED")
"""


class Backoffice:
    """The service that the README's task posts to; its first charge of a held order waits to be let go."""

    def __init__(self) -> None:
        self.posts: list[tuple[str, dict[str, Any]]] = []
        self.held: str | None = None
        self.let_go = threading.Event()

    def of(self, what: str, order: str) -> list[dict[str, Any]]:
        """What was posted for an order."""
        return [body for kind, body in self.posts if (kind, body.get("order")) == (what, order)]

    def answer(self, what: str, body: dict[str, Any]) -> dict[str, Any]:
        """Note a request and answer it."""
        self.posts.append((what, body))
        if what == "charges" and body["order"] == self.held:
            self.let_go.wait(30)
        return {"id": f"payment-{body.get('order')}", "available": 1}


@contextmanager
def serving(backoffice: Backoffice) -> Iterator[str]:
    """Serve it over HTTP; the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = json.dumps(backoffice.answer(self.path.strip("/"), body)).encode()
            self.send_response(200)
            self.end_headers()
            try:
                self.wfile.write(content)
            except ConnectionError:
                return  # the caller was killed

        def log_message(self, *args: Any) -> None:
            """Nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        backoffice.let_go.set()
        server.shutdown()
        thread.join()


class Reader:
    """Somebody who types what the README says, with the shop that its diff makes."""

    def __init__(self, directory: Path, workers: Workers, env: dict[str, str]) -> None:
        self._directory = directory
        self._workers = workers
        self._env = env

    def worker(self) -> Worker:
        """Start a worker on the shop."""
        worker: Worker = self._workers.start(app="shop", concurrency=1, env=self._env)
        return worker

    def python(self, code: str) -> str:
        """Run Python in the shop's directory; what it prints."""
        return run(code, self._directory, self._env)


def run(code: str, directory: Path, env: dict[str, str]) -> str:
    command, env = [sys.executable, "-c", code], {**os.environ, **env}
    done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python_path(directory: Path) -> str:
    return os.pathsep.join([str(directory), str(CHECKOUT)])


@pytest.fixture
def backoffice() -> Backoffice:
    """What the shop's steps reach."""
    return Backoffice()


@pytest.fixture
def reader(
    backoffice: Backoffice, tmp_path: Path, workers: Workers, database_url: str, broker: Broker
) -> Iterator[Reader]:
    """A reader whose shop.py is docs/shop.py with the README's diff, and then its other Python blocks."""
    (diff,) = blocks("diff", page="README.md")
    others = [block.text for block in blocks("python", page="README.md") if block.file is None]
    code = "\n".join([patched(read("docs/shop.py"), diff.text), *others])
    assert INSTALL in code
    assert BROKER in code
    code = code.replace(INSTALL, f"durable.install(app, database_url={database_url!r}, **{FAST!r})")
    code = code.replace(BROKER, broker.url) + f"\napp.conf.task_default_queue = {broker.queue!r}\n"
    (tmp_path / "shop.py").write_text(code)
    with serving(backoffice) as url:
        yield Reader(tmp_path, workers, {"BACKOFFICE_URL": url, "PYTHONPATH": python_path(tmp_path)})


@pytest.mark.crash
def test_the_kill(reader: Reader, backoffice: Backoffice) -> None:
    """The worker is killed in charge(): stock is reserved once, and both charges bring the same key."""
    (kill,) = [block for block in blocks("console", page="README.md") if "pkill" in block.text]
    _, start, _, _, result = [line.partition("'")[2].rpartition("'")[0] for line in kill.commands]
    backoffice.held = "order-17"
    worker = reader.worker()
    reader.python(start)
    wait_until(lambda: backoffice.of("charges", "order-17"), message="the charge has begun")
    worker.kill()
    backoffice.let_go.set()
    reader.worker()
    assert reader.python(result) == "payment-order-17\n"
    assert len(backoffice.of("reservations", "order-17")) == 1
    first, second = backoffice.of("charges", "order-17")
    assert first == second
    assert first["key"]
    assert len(backoffice.of("mails", "order-17")) == 1


def test_the_session(reader: Reader, backoffice: Backoffice) -> None:
    """What the README types and shows is what comes, and its other workflows run, too."""
    (session,) = blocks("pycon", page="README.md")
    reader.worker()
    reader.python(
        f"import doctest, sys, shop\n"
        f"test = doctest.DocTestParser().get_doctest({session.text!r}, vars(shop), 'README', None, None)\n"
        f"sys.exit(doctest.DocTestRunner().run(test).failed)"
    )
    reader.python("import shop; shop.refund.delay('order-19', 'payment-1').get(timeout=30)")
    reader.python("import shop; shop.good.delay('order-20').get(timeout=30)")
    assert len(backoffice.of("charges", "order-18")) == 1
    assert len(backoffice.of("mails", "order-19")) == 1
    assert len(backoffice.of("charges", "order-20")) == 1


def test_django(tmp_path: Path, empty_database_url: str, broker: Broker) -> None:
    """The README's Django files make a project whose workflow starts by the commit."""
    for block in blocks("python", page="README.md"):
        if block.file is not None:
            path = tmp_path / block.file
            path.parent.mkdir(exist_ok=True)
            path.write_text(block.text.replace(BROKER, broker.url))
    (tmp_path / "shop/__init__.py").touch()
    with (tmp_path / "shop/settings.py").open("a") as settings:
        settings.write(f"DATABASE = {django_settings(empty_database_url)!r}\n{DJANGO}")
    env = {"DJANGO_SETTINGS_MODULE": "shop.settings", "PYTHONPATH": python_path(tmp_path)}
    run(DJANGO_SESSION, tmp_path, env)
    with closing(Sql(empty_database_url)) as sql:
        assert sql.value("SELECT count(*) FROM celery_durable.workflow") == 1
