"""The fixtures of the test kit, in suites that a pytest of their own runs: with Celery's and with Django's."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.fixtures.fix_bakery import Bakery
from tests.fixtures.pages import blocks
from tests.fixtures.workers import ROOT

CONFTEST = 'pytest_plugins = ["celery_durable.testing.plugin"]\n'

OWN_APP = """
from celery import Celery, shared_task

import celery_durable as durable

app = Celery("shop", broker="redis://127.0.0.1:1/0", backend="redis://127.0.0.1:1/1")
app.conf.task_always_eager = True
durable.install(app, database_url="postgresql://me@127.0.0.1:1/developers", suspend_after=7)


@durable.step
def charge(order):
    return f"paid {order}"


@durable.workflow
def checkout(order):
    durable.sleep(86400)
    return charge.delay(order).get()
"""
OWN_SUITE = """
import os

import pytest
from shop import app, charge, checkout

from celery_durable.installation import installed_on
from celery_durable.testing import survives_crashes


@pytest.mark.parametrize("again", range(3))
def test_a_run(durable_run, again):
    assert durable_run(checkout.s(1).set(task_id="order-1")).get() == "paid 1"


def test_crashes(durable_app):
    assert durable_app is app
    survives_crashes(checkout, (1,))


def test_a_start_from_elsewhere(durable_app, durable_postgres):
    assert checkout.delay(1).state == "PENDING"
    assert "durable_test_" in installed_on(app).url() and installed_on(app).config.suspend_after == 7


def test_all_is_as_it_was():
    assert "developers" in installed_on(app).url()
    assert app.conf.task_always_eager and "redis" in app.conf.result_backend and "Redis" in repr(app.backend)
    assert app.conf.broker_url == os.environ["CELERY_BROKER_URL"]
    assert installed_on(app).config.suspend_after == 7
"""
OTHER_SUITE = """
import pytest
from shop import checkout

import celery_durable as durable


@pytest.mark.parametrize("again", range(3))
def test_a_run(durable_run, again):
    assert durable_run(checkout.s(1).set(task_id="order-1")).get() == "paid 1"
    assert len(durable.list_workflows()) == 2
"""
CELERYS_SUITE = """
import pytest

import celery_durable as durable
from celery_durable.testing import deliver

pytest_plugins = ["celery.contrib.pytest"]


@pytest.fixture(scope="session")
def celery_config():
    return {"broker_url": "memory://", "result_backend": "cache+memory://"}


@pytest.fixture(scope="session")
def celery_includes():
    return ["celery.contrib.testing.tasks"]


@pytest.fixture
def durable_settings():
    return {"suspend_after": 0.1, "heartbeat_interval": 0.2, "lease": 1.5, "recovery_interval": 0.2}


@durable.step
def charge(order):
    return f"paid {order}"


@durable.workflow
def checkout(order):
    durable.sleep(0.3)
    return charge(order), durable.recv("answer")


def test_a_run(celery_app, durable_app, durable_run):
    assert durable_app is celery_app
    run = durable_run(checkout, 1)
    assert deliver(run, "yes", "answer").get() == ["paid 1", "yes"]


def test_a_session_app(celery_session_app, durable_app, durable_run):
    assert durable_app is celery_session_app
    assert durable_run(checkout, 1).state == "SUSPENDED"


def test_a_worker(celery_app, celery_worker, durable_app):
    handle = checkout.delay(1)
    assert deliver(handle, "yes", "answer") is None
    assert handle.get(timeout=20) == ["paid 1", "yes"]
    assert durable.get_workflow_status(handle.id).state == "SUCCESS"
    assert len(durable.list_workflows()) == 1
"""
DJANGO_SUITE = """
import pytest
from bakery import celery_app
from django.db import connection
from orders.models import Loaf, Order
from orders.tasks import fulfil

import celery_durable as durable
from celery_durable.contrib.django.models import Workflow
from celery_durable.testing import survives_crashes


@pytest.fixture(autouse=True)
def ledger(monkeypatch, tmp_path):
    monkeypatch.setenv("LEDGER", str(tmp_path / "ledger"))


@durable.step
def grow(order_id):
    Order.objects.filter(pk=order_id).update(loaves=4)
    return Order.objects.get(pk=order_id).loaves


@durable.workflow
def growing(order_id):
    durable.sleep(86400)
    return grow(order_id)


@pytest.mark.parametrize("again", [1, 2])
def test_in_a_transaction_of_the_test(db, durable_app, durable_run, again):
    assert durable_app is celery_app
    order = Order.objects.create(loaves=3)
    assert durable_run(growing, order.pk).get() == 4
    assert Order.objects.count() == 1
    assert Workflow.objects.count() == 0


def test_committed(transactional_db, durable_run):
    order = Order.objects.create(loaves=3)
    assert durable_run(fulfil, order.pk).get() == 3
    survives_crashes(fulfil, (order.pk,))


def test_nothing_is_left(db):
    assert Order.objects.count() == Loaf.objects.count() == 0
"""


def run(directory: Path, files: dict[str, str], *options: str, env: dict[str, str]) -> int:
    """Run a suite; return how many tests have passed, and fail if one hasn't."""
    directory.mkdir(exist_ok=True)
    for name, text in files.items():
        (directory / name).write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly", *options, "."],
        cwd=directory, env={**os.environ, "PYTHONPATH": f"{ROOT}:{directory}", **env}, timeout=120, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    return int(passed[1])


def page(file: str) -> str:
    """What docs/testing.md says of one file; its blocks without a name belong to the file before them."""
    found, at = "", None
    for block in blocks("python", page="docs/testing.md"):
        at = block.file or at
        found += block.text if at == file else ""
    assert found, f"the page has no {file}"
    return found


def test_the_functions_do_without_pytest() -> None:
    """A history is recorded from a shell in which pytest isn't installed."""
    code = "import sys; import celery_durable.testing; assert 'pytest' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)


def test_the_page_and_celerys_own_fixtures(postgres_server: str, tmp_path: Path) -> None:
    """The tests in docs/testing.md pass; the apps of celery.contrib.pytest become durable, and so does its worker.

    Both have a worker in a thread, which takes seconds to stop: they wait for that at once.
    """
    files = {name: page(name) for name in ("conftest.py", "shop.py", "test_shop.py", "test_worker.py", "record.py")}
    (ini,) = blocks("text", page="docs/testing.md")
    files["pytest.ini"] = f"{ini.text}addopts = -p no:django\n"
    others = {"pytest.ini": "[pytest]\naddopts = -p no:django\n", "conftest.py": CONFTEST, "test_it.py": CELERYS_SUITE}
    with ThreadPoolExecutor() as at_once:
        suites = [
            at_once.submit(run, tmp_path / name, suite, env={"DATABASE_URL": postgres_server})
            for name, suite in {"page": files, "celerys": others}.items()
        ]
    assert [suite.result() for suite in suites] == [7, 3]


def test_an_app_of_ones_own(postgres_server: str, tmp_path: Path) -> None:
    """The app that pytest.ini names is on the test's database, without its broker; afterwards it is as before.

    Each process of xdist has a database of its own.
    """
    files = {
        "pytest.ini": "[pytest]\ndurable_app = shop:app\naddopts = -p no:django\nfilterwarnings = error\n",
        "conftest.py": CONFTEST, "shop.py": OWN_APP, "test_shop.py": OWN_SUITE, "test_other.py": OTHER_SUITE,
    }  # fmt: skip
    env = {"DATABASE_URL": postgres_server, "CELERY_BROKER_URL": "redis://127.0.0.1:1/5"}
    assert run(tmp_path, files, "-n2", "--dist=loadfile", env=env) == 9


def test_without_a_database_url(tmp_path: Path) -> None:
    """An embedded server is started, and nothing of it is left."""
    suite = "def test_it(durable_postgres, durable_run):\n    assert durable_postgres.startswith('postgresql://')\n"
    files = {"pytest.ini": "[pytest]\naddopts = -p no:django\n", "conftest.py": CONFTEST, "test_it.py": suite}
    assert run(tmp_path, files, env={"DATABASE_URL": ""}) == 1


def test_with_pytest_django(bakery: Bakery, postgres_server: str, tmp_path: Path) -> None:
    """Workflows live in the kit's database, and the ORM in Django's test database, rolled back with the test."""
    bakery.manage("migrate")
    files = {
        "pytest.ini": "[pytest]\ndurable_app = bakery:celery_app\n", "conftest.py": CONFTEST,
        "test_it.py": DJANGO_SUITE, "test_page.py": page("test_django.py"),
    }  # fmt: skip
    suite = tmp_path / "suite"
    suite.mkdir()
    for name, text in files.items():
        (suite / name).write_text(text)
    done = bakery.run(["-m", "pytest", "-p", "no:cacheprovider", "-p", "no:randomly", "."], cwd=suite)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "5 passed" in done.stdout
