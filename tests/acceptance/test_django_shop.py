"""The Django variant of the example project, in a browser: its server and its workers are real, and one is killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from celery_durable.states import FINAL
from example_project.payments import Charge, Ledger
from tests.fixtures.bank import banking
from tests.fixtures.brokers import Broker
from tests.fixtures.browser import Browser
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.pages import CHECKOUT
from tests.fixtures.servers import free_port
from tests.fixtures.site import FAST
from tests.fixtures.workers import Worker, Workers

PROJECT = "example_project.django_shop"
ADMIN = {
    "DJANGO_SUPERUSER_USERNAME": "ann",
    "DJANGO_SUPERUSER_PASSWORD": "tea",
    "DJANGO_SUPERUSER_EMAIL": "a@b.example",
}
SETTINGS = f"""
from {PROJECT}.settings import *

CELERY_TASK_DEFAULT_QUEUE = {{queue!r}}
{"".join(f"CELERY_DURABLE_{name.upper()} = {value!r}{chr(10)}" for name, value in FAST.items())}
"""


class Bank(Ledger):
    """A book whose keeper books, but doesn't answer before he is allowed to."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.answers = threading.Event()
        #: The idempotency key of each call that was booked or found.
        self.keys: list[str | None] = []

    def book(self, key: str | None, order: str, cents: int) -> Charge:
        """Book a charge, then wait."""
        charge = super().book(key, order, cents)
        self.keys.append(key)
        assert self.answers.wait(60), "nobody has let the bank answer"
        return charge


class Shop:
    """The project with its own database, broker, settings and mails."""

    def __init__(self, env: dict[str, str], workers: Workers, sql: Sql, mails: Path) -> None:
        self.sql = sql
        self.url = f"http://127.0.0.1:{free_port()}"
        self._env = {**os.environ, **env}
        self._workers = workers
        self._mails = mails

    def manage(self, *words: str) -> list[str]:
        """Return the command line of one of Django's commands."""
        return [sys.executable, "-m", f"{PROJECT}.manage", *words]

    def run(self, *words: str) -> None:
        """Run a command to its end."""
        done = subprocess.run(words, cwd=CHECKOUT, env=self._env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr

    def serve(self, log: Path) -> subprocess.Popen[bytes]:
        """Start Django's server, and wait until it answers."""
        command = self.manage("runserver", "--noreload", self.url.removeprefix("http://"))
        with log.open("wb") as output:
            server = subprocess.Popen(
                command, cwd=CHECKOUT, env=self._env, stdout=output, stderr=output, start_new_session=True
            )

        def answers() -> bool:
            assert server.poll() is None, log.read_text()
            with suppress(URLError), urlopen(f"{self.url}/", timeout=10) as response:
                return bool(response.status == 200)
            return False

        wait_until(answers, 60, "the server answers")
        return server

    def worker(self, wait: bool = True) -> Worker:
        """Start a worker."""
        return self._workers.start(app=PROJECT, env=self._env, wait=wait)

    def state(self, workflow: str) -> str:
        """How a workflow stands."""
        return str(self.sql.value("SELECT state FROM celery_durable.workflow WHERE id = %s", workflow))

    def stock(self, name: str) -> int:
        """How many there are of a product."""
        return int(self.sql.value("SELECT stock FROM django_shop_product WHERE name = %s", name))

    def mails(self) -> list[str]:
        """What was sent, one by one."""
        return [path.read_text() for path in self._mails.iterdir()] if self._mails.exists() else []

    def order(self, browser: Browser, product: str, quantity: int) -> str:
        """Order something by the form; return the id of the workflow."""
        browser.open(self.url)
        browser.fill("[name=customer]", "eve@example.com")
        number = self.sql.value("SELECT id FROM django_shop_product WHERE name = %s", product)
        browser.fill(f"[name=product-{number}]", str(quantity))
        browser.click("#order")
        browser.wait_for("#steps")
        return f"order-{browser.url.rstrip('/').rpartition('/')[2]}"


@pytest.fixture
def bank(tmp_path: Path) -> Iterator[Bank]:
    """A payment provider's book."""
    with closing(Bank(tmp_path / "payments.db")) as bank:
        yield bank


@pytest.fixture
def worker_env(empty_database_url: str, broker: Broker, bank: Bank, tmp_path: Path) -> Iterator[dict[str, str]]:
    """What the project reads from its environment."""
    (tmp_path / "quick.py").write_text(SETTINGS.format(queue=broker.queue))
    with banking(bank) as payments:
        yield {
            "DATABASE_URL": empty_database_url,
            "BROKER_URL": broker.url,
            "PAYMENTS_URL": payments,
            "MAIL_DIR": str(tmp_path / "mails"),
            "DJANGO_SETTINGS_MODULE": "quick",
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(CHECKOUT)]),
            **ADMIN,
        }
        bank.answers.set()


@pytest.fixture
def project(worker_env: dict[str, str], workers: Workers, empty_database_url: str, tmp_path: Path) -> Iterator[Shop]:
    """The project, as it was checked out."""
    with closing(Sql(empty_database_url)) as sql:
        yield Shop(worker_env, workers, sql, tmp_path / "mails")


@pytest.fixture
def shop(project: Shop, tmp_path: Path) -> Iterator[Shop]:
    """The project with its tables, an administrator and a server; no worker runs yet."""
    project.run(*project.manage("migrate", "--verbosity=0"))
    project.run(*project.manage("createsuperuser", "--noinput"))
    log = tmp_path / "server.log"
    server = project.serve(log)
    yield project
    os.killpg(server.pid, signal.SIGKILL)
    server.wait()
    print(log.read_text(errors="replace"))


def test_its_own_tests(project: Shop) -> None:
    """They pass as their page says to run them."""
    project.run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "example_project/django_shop")


def test_a_checkout_under_a_kill(shop: Shop, bank: Bank, browser: Browser) -> None:
    """The worker dies when the bank has booked and not answered: another one ends it, and everything is done once."""
    worker, before = shop.worker(), shop.stock("Cup")
    order = shop.order(browser, "Cup", 3)
    wait_until(bank.charges, message="the bank has booked")
    browser.wait_for("#steps", "reserve_stock")
    browser.wait_for("#running", "RUNNING")
    worker.kill()
    bank.answers.set()
    shop.worker(wait=False)
    browser.wait_for("#done", "Shipped (SUCCESS)", timeout=40)
    assert browser.text("#steps").count("SUCCESS") == 4
    assert len(bank.keys) > 1
    assert len(set(bank.keys)) == 1
    assert [(charge.order, charge.cents) for charge in bank.charges()] == [(order, 3 * 7_50)]
    assert shop.stock("Cup") == before - 3
    (mail,) = shop.mails()
    assert "To: eve@example.com" in mail


def test_the_admin(shop: Shop, bank: Bank, browser: Browser) -> None:
    """A large order is approved by one action, and its steps are seen; another is cancelled, and given back."""
    bank.answers.set()
    before = shop.stock("Samovar")
    shop.worker()
    bought, cancelled = (shop.order(browser, "Samovar", 1) for _ in range(2))
    browser.wait_for("#running", "Waiting for an approval (SUSPENDED)")

    browser.open(f"{shop.url}/admin/django_shop/order/")
    browser.fill("#id_username", "ann")
    browser.fill("#id_password", "tea")
    browser.click("[type=submit]")
    act(browser, bought.removeprefix("order-"), "approve")
    browser.wait_for(".messagelist", "it is told")
    wait_until(lambda: shop.state(bought) in FINAL, message=f"{bought} has ended")

    browser.click(f"a[href$='/{bought}/change/']")
    browser.wait_for(".field-state", "SUCCESS")
    browser.wait_for(".field-steps", "ship")
    assert "charge" in browser.text(".field-steps")

    browser.open(f"{shop.url}/admin/celery_durable/workflow/")
    act(browser, cancelled, "cancel")
    browser.wait_for(".messagelist", "1 workflow(s) cancelled")
    browser.open(f"{shop.url}/orders/{cancelled.removeprefix('order-')}/")
    browser.wait_for("#done", "CANCELLED")
    wait_until(lambda: shop.stock("Samovar") == before - 1, message="what was cancelled is back")
    assert [charge.order for charge in bank.charges()] == [bought]


def act(browser: Browser, key: str, action: str) -> None:
    """Do something with one row of a list of the admin's."""
    browser.click(f"input[name=_selected_action][value='{key}']")
    browser.choose("select[name=action]", action)
    browser.click(".actions button")
