"""The example project on a real worker: its workflows that wait, and the commands of its README."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import celery_durable as durable
from celery_durable.states import FINAL
from example_project.payments import Ledger
from tests.fixtures.bank import banking
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.pages import CHECKOUT, blocks
from tests.fixtures.site import FAST
from tests.fixtures.workers import Workers

APP = "example_project.app"
#: Orders of less and of more than what needs an approval.
SMALL, LARGE = "order-1", "order-4"
DONE = ["reserve_stock", "charge", "book_shipment", "declare"]
UNDONE = ["cancel_shipment", "refund", "release_stock"]


class Example:
    """The order shop, with a worker of its own and everything that it has done."""

    def __init__(self, home: Path, env: dict[str, str], bank: Ledger) -> None:
        self.bank = bank
        self._home = home
        self._env = env
        from example_project import shop, tasks

        self.shop = shop
        self.tasks: Any = tasks

    def status(self, order: str) -> durable.WorkflowStatus:
        """How a workflow stands."""
        return durable.get_workflow_status(order, app=self.tasks.app)

    def waits(self, order: str, what: str) -> None:
        """Wait until a workflow waits for something."""

        def is_waiting() -> bool:
            status = self.status(order)
            return status.state == "SUSPENDED" and what in (status.waiting_for or "")

        wait_until(is_waiting, message=lambda: f"{order} waits for {what}: {self.status(order)}")

    def finished(self, order: str) -> durable.WorkflowStatus:
        """Wait for the end of a workflow."""
        wait_until(lambda: self.status(order).state in FINAL, 40, lambda: f"the end of {self.status(order)}")
        return self.status(order)

    def send(self, order: str, message: Any, topic: str) -> None:
        """Send a message to a workflow."""
        durable.send(order, message, topic=topic, app=self.tasks.app)

    def compensation_of(self, order: str) -> durable.WorkflowStatus:
        """What was started by the cancel of a workflow, when it has finished."""
        (started,) = durable.list_workflows(parent_id=order, app=self.tasks.app)
        return self.finished(started.id)

    def journal(self, order: str) -> list[str]:
        """What was done in the world for an order; what was tried several times in a row counts once."""
        done = [entry["what"] for entry in self._entries() if entry["order"] == order]
        return [what for what, before in zip(done, [None, *done], strict=False) if what != before]

    def notes(self, order: str, what: str) -> list[str]:
        """What was written down with something that was done for an order."""
        return [entry["note"] for entry in self._entries() if (entry["order"], entry["what"]) == (order, what)]

    def types(self, command: str) -> str:
        """Type a command of the README; what it prints."""
        program, *args = shlex.split(command)
        words = [sys.executable, *(["-m", "celery"] if program == "celery" else []), *args]
        env = {**os.environ, **self._env}
        done = subprocess.run(words, cwd=CHECKOUT, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def _entries(self) -> list[dict[str, Any]]:
        path = self._home / "journal.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def forget_example() -> None:
    """Undo the import of the modules that read the environment, and of those that use them."""
    for name in [name for name in sys.modules if name.startswith("example_project.")]:
        if name != "example_project.payments":
            module = sys.modules.pop(name)
            package, _, last = name.rpartition(".")
            if getattr(sys.modules.get(package), last, None) is module:
                delattr(sys.modules[package], last)


@pytest.fixture
def example(tmp_path: Path, workers: Workers, database_url: str, broker: Broker) -> Iterator[Example]:
    """The shop with a worker as its README starts one, and a payment provider that fails now and then.

    Settings of the app are read while the environment is patched: Celery reads them when they are first needed.
    """
    quick = {**FAST, "suspend_after": 0.3}
    settings = {**{f"durable_{name}": value for name, value in quick.items()}, "task_default_queue": broker.queue}
    (tmp_path / "quick.py").write_text("".join(f"{name} = {value!r}\n" for name, value in settings.items()))
    ledger = Ledger(tmp_path / "payments.db")
    with banking(ledger) as url:
        env = {
            "DATABASE_URL": database_url,
            "BROKER_URL": broker.url,
            "PAYMENTS_URL": url,
            "SHOP_HOME": str(tmp_path / "shop"),
            "CELERY_CONFIG_MODULE": "quick",
            "PYTHONPATH": os.pathsep.join([str(tmp_path), str(CHECKOUT)]),
        }
        workers.start(app=APP, env=env, args=["--queues", f"{broker.queue},warehouse"])
        forget_example()
        with patch.dict(os.environ, env), patch.object(sys, "path", [str(tmp_path), *sys.path]):
            example = Example(tmp_path / "shop", env, ledger)
            assert example.tasks.app.conf.task_default_queue == broker.queue
        yield example
        example.tasks.app.close()
        forget_example()
        sys.modules.pop("quick", None)
        workers.kill_all()
    ledger.close()


def test_a_small_order_needs_no_approval(example: Example) -> None:
    """It is fulfilled at once, as a child."""
    example.tasks.checkout.apply_async((SMALL,), task_id=SMALL)
    assert example.finished(SMALL).result["payment"].startswith("pay-")
    assert example.journal(SMALL) == ["reserve_stock", "charge", "book_shipment", "write_invoice", "notify"]


def test_a_large_order_is_approved(example: Example) -> None:
    """Nothing is reserved before, all is done after."""
    example.tasks.checkout.apply_async((LARGE,), task_id=LARGE)
    example.waits(LARGE, "approval")
    assert example.journal(LARGE) == ["mail"]
    example.send(LARGE, True, "approval")
    assert set(example.finished(LARGE).result) == {"payment", "shipment", "invoice"}
    assert example.bank.balance(LARGE) == example.shop.price(LARGE)


@pytest.mark.parametrize("answer", [False, None], ids=["no", "none"])
def test_a_large_order_is_refused(example: Example, answer: bool | None) -> None:
    """By whoever says no, and by the timeout."""
    example.tasks.checkout.apply_async((LARGE,), {"approve_within": 0.5 if answer is None else 3600}, task_id=LARGE)
    if answer is not None:
        example.send(LARGE, answer, "approval")
    assert example.finished(LARGE).result == {"refused": "it wasn't approved"}
    question, refusal = example.notes(LARGE, "mail")
    assert "approve" in question
    assert "sorry" in refusal
    assert example.bank.balance(LARGE) == 0


def test_a_reminder(example: Example) -> None:
    """It is sent when the time has come, and not before; no worker is held until then."""
    started = example.tasks.remind.delay(LARGE, 3600)
    example.tasks.remind.apply_async((SMALL, 2), task_id="reminder")
    example.waits("reminder", "sleep")
    assert example.notes(SMALL, "mail") == []
    status = example.finished("reminder")
    assert status.finished_at is not None
    assert (status.finished_at - status.created_at).total_seconds() >= 2
    assert len(example.notes(SMALL, "mail")) == 1
    example.waits(started.id, "sleep")
    assert example.notes(LARGE, "mail") == []


def test_the_parcels_of_an_order(example: Example) -> None:
    """Each is packed once, on the warehouse's queue; their numbers come in order."""
    example.tasks.ship.apply_async((LARGE, 5), task_id=LARGE)
    numbers = example.finished(LARGE).result
    assert [number.rpartition("-")[2] for number in numbers] == ["1", "2", "3", "4", "5"]
    children = durable.list_workflows(parent_id=LARGE, app=example.tasks.app)
    assert [child.queue for child in children] == ["warehouse"] * 5
    assert Counter(example.notes(LARGE, "pack")) == Counter("12345")
    assert example.notes(LARGE, "mail") == [f"on their way: {', '.join(numbers)}"]


def test_an_export_that_customs_clear(example: Example) -> None:
    """Nothing is undone."""
    example.tasks.export.apply_async((SMALL, "Japan"), task_id=SMALL)
    example.waits(SMALL, "customs")
    example.send(SMALL, True, "customs")
    assert example.finished(SMALL).result.startswith("parcel-")
    assert example.journal(SMALL) == [*DONE, "notify"]
    assert example.bank.balance(SMALL) == example.shop.price(SMALL)


def test_an_export_whose_step_fails(example: Example) -> None:
    """What was done is undone in reverse, and the order fails with the step's error."""
    example.tasks.export.apply_async((SMALL, "Atlantis"), task_id=SMALL)
    status = example.finished(SMALL)
    assert status.state == "FAILURE"
    assert isinstance(status.error, example.shop.CustomsRefused)
    assert example.journal(SMALL) == [*DONE, *UNDONE]
    assert len(example.bank.charges()) == 1
    assert example.bank.balance(SMALL) == 0


def test_an_export_that_customs_do_not_answer(example: Example) -> None:
    """The timeout is as good as a refusal."""
    example.tasks.export.apply_async((SMALL, "Chile"), {"cleared_within": 0.5}, task_id=SMALL)
    assert example.finished(SMALL).state == "FAILURE"
    assert example.journal(SMALL) == [*DONE, *UNDONE]
    assert example.bank.balance(SMALL) == 0


def test_an_export_that_is_cancelled(example: Example) -> None:
    """Its own `except` doesn't run; its on_cancel undoes it, once."""
    undo = example.tasks.undo_export.s(SMALL, after=0)
    example.tasks.export.apply_async((SMALL, "Iceland"), task_id=SMALL, on_cancel=undo)
    example.waits(SMALL, "customs")
    assert durable.cancel_workflow(SMALL, app=example.tasks.app)
    assert example.compensation_of(SMALL).state == "SUCCESS"
    assert example.status(SMALL).state == "CANCELLED"
    assert example.journal(SMALL) == [*DONE, *UNDONE]
    assert len(example.bank.charges()) == 1
    assert example.bank.balance(SMALL) == 0


@pytest.mark.slow
def test_the_commands_of_the_readme(example: Example) -> None:
    """What the page types, one after the other, does what it says."""
    commands = {
        command: None
        for block in blocks("console", page="example_project/README.md")
        for command in block.commands
        if command.startswith("python -c") or " call " in command or "--export" in command
    }
    for command in commands:
        if "cancel_workflow" in command:
            example.waits("order-7", "customs")
        commands[command] = example.types(command)
    printed = list(commands.values())
    assert any("'payment': 'pay-" in each for each in printed)
    assert "{'refused': \"it wasn't approved\"}\n" in printed
    assert any(each.startswith("['parcel-") for each in printed)
    assert "order-5: nobody delivers to Atlantis\n" in printed
    assert example.journal("order-5") == [*DONE, *UNDONE]
    assert example.journal("order-6") == [*DONE, "notify"]
    assert example.compensation_of("order-7").state == "SUCCESS"
    assert example.journal("order-7") == [*DONE, *UNDONE]
