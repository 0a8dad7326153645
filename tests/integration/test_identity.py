"""A step is known by its name and number: what may change under a running workflow, and what stops it."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import celery_durable as durable
from celery_durable.engine.context import Attempt, boot_time, running
from celery_durable.exceptions import ConfigurationError, NondeterminismError
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.workers import ROOT

pytestmark = pytest.mark.oldest

Code = Callable[[], Any]


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    shop = Inprocess(database_url, broker_url)
    yield shop
    shop.close()


class Release:
    """A workflow whose code a deploy can change while it runs."""

    def __init__(self, shop: Inprocess) -> None:
        self.shop = shop
        self.calls: list[str] = []
        self.code: Code = list

        @shop.workflow(name="order")
        def order() -> Any:
            return self.code()

        order.apply_async(task_id="w1")

    def step(self, name: str) -> Callable[..., Any]:
        return durable.as_step(lambda *args: self.calls.append(name) or [name, *args], name=name)

    def crash_after(self, code: Code) -> None:
        """Run a part of the old code in an attempt that never ends, and hand it over."""
        store = self.shop.installation.store
        claim = store.workflows.claim("w1", "order", uuid.uuid4(), self.shop.node, retries=0, patience=0)
        assert claim is not None
        with running(Attempt.of(self.shop.installation.engine, "order", claim, boot_time())):
            code()
        assert store.workflows.release(claim.fence, 60, patience=0)

    def deploy(self, code: Code) -> Any:
        """Let the next attempt run this code."""
        self.code = code
        self.shop.run("w1")
        return durable.get_workflow_status("w1", app=self.shop.app)


@pytest.fixture
def release(shop: Inprocess) -> Release:
    return Release(shop)


def test_a_step_of_another_name_may_be_added_removed_and_moved(release: Release) -> None:
    """Those that have completed keep their values wherever they are called now, and run no more."""
    pick, charge, ship, wrap = map(release.step, ("pick", "charge", "ship", "wrap"))
    release.crash_after(lambda: [pick(), charge()])
    status = release.deploy(lambda: [charge(), wrap(), pick(), ship()])
    assert status.result == [["charge"], ["wrap"], ["pick"], ["ship"]]
    assert release.calls == ["pick", "charge", "wrap", "ship"]


def test_a_removed_step_is_left_alone(release: Release) -> None:
    """Its checkpoint stays, and nobody asks for it."""
    pick, charge = map(release.step, ("pick", "charge"))
    release.crash_after(pick)
    assert release.deploy(charge).result == ["charge"]
    assert [step.key for step in durable.list_workflow_steps("w1", app=release.shop.app)] == ["pick", "charge"]


def test_more_calls_of_a_name_may_follow(release: Release) -> None:
    """The first ones are answered from what there is."""
    ship = release.step("ship")
    release.crash_after(lambda: [ship(1), ship(2)])
    assert release.deploy(lambda: [ship(1), ship(2), ship(3)]).result == [["ship", 1], ["ship", 2], ["ship", 3]]
    assert release.calls == ["ship"] * 3


def test_other_arguments_stop_the_workflow_until_the_code_is_mended(release: Release) -> None:
    """As of a queryset that has changed: DEAD, with both argument lists, and resumed it goes on."""
    ship = release.step("ship")
    release.crash_after(lambda: [ship(order) for order in ("a", "b")])
    status = release.deploy(lambda: [ship(order) for order in ("b", "c")])
    assert (status.state, type(status.error)) == ("DEAD", NondeterminismError)
    assert "('a')" in str(status.error)
    assert "('b')" in str(status.error)
    durable.resume_workflow("w1", app=release.shop.app)
    assert release.deploy(lambda: [ship(order) for order in ("a", "b")]).result == [["ship", "a"], ["ship", "b"]]
    assert release.calls == ["ship"] * 2


def test_the_error_cannot_be_swallowed(release: Release) -> None:
    """Whatever the body makes of it, the workflow is DEAD, and no step of it runs any more."""
    ship = release.step("ship")
    release.crash_after(lambda: ship(1))

    def swallow() -> str:
        for _ in range(2):
            with contextlib.suppress(NondeterminismError):
                ship(2)
        return "well"

    assert release.deploy(swallow).state == "DEAD"
    assert release.calls == ["ship"]


SETS = """
import sys
import celery_durable as durable
from tests.fixtures.inprocess import Inprocess

url, fixed, crash = sys.argv[1], sys.argv[2] == "fixed", sys.argv[3] == "crash"
shop = Inprocess(url, "memory://")
ship = durable.as_step(lambda name: name, name="ship")
names = {"tea", "milk", "sugar", "bread", "jam", "salt", "rice", "oil"}

@shop.workflow(name="order")
def order():
    shipped = [ship(name) for name in (sorted(names) if fixed else names)]
    if crash:
        raise SystemExit(15 - 256)  # as Celery's pool ends a process
    return shipped

order.apply_async(task_id="w1")
try:
    shop.run("w1")
except SystemExit:
    shop.installation.store.workflows.hand_over(shop.node, ["w1"], patience=0)
print(durable.get_workflow_status("w1", app=shop.app).state)
"""


def run_sets(url: str, seed: int, *arguments: str) -> str:
    env = {**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SETS, url, *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, check=True, timeout=60, capture_output=True, text=True)
    return done.stdout.split()[-1]


def test_a_loop_over_a_set_is_found_under_hash_randomisation(shop: Inprocess, database_url: str) -> None:
    """Another process loops over the same strings in another order: the workflow stops rather than mix them up."""
    assert run_sets(database_url, 1, "broken", "crash") == "ENQUEUED"
    assert run_sets(database_url, 2, "broken", "go on") == "DEAD"
    error = durable.get_workflow_status("w1", app=shop.app).error
    assert isinstance(error, NondeterminismError)
    assert str(error).count("('") == 2


def test_a_sorted_loop_is_the_remedy(database_url: str) -> None:
    """It has the same order in each process."""
    assert run_sets(database_url, 1, "fixed", "crash") == "ENQUEUED"
    assert run_sets(database_url, 2, "fixed", "go on") == "SUCCESS"


@pytest.mark.parametrize("name", ["charge#2", "charge[pack]", "a" * 256, "nul\x00", "", "<lambda>"])
def test_a_name_that_would_be_mistaken_for_a_key_is_refused(name: str) -> None:
    """Keys add a number or a branch to it."""
    with pytest.raises(ConfigurationError):
        durable.as_step(print, name=name or "x<lambda>")
