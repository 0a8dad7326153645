"""Steps in a real prefork worker: what they return and raise, on the first run and on every replay."""

from __future__ import annotations

from typing import Any

import psutil
import pytest

import celery_durable as durable
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.site import Site

pytestmark = pytest.mark.oldest


@pytest.fixture(scope="module")
def site(standing_site: Site) -> Site:
    return standing_site


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    return str(request.node.name)


def kill_runner(site: Site, *entry: Any) -> None:
    """SIGKILL the pool process in which this was recorded."""
    site.reaches(*entry)
    pid = next(line.pid for line in site.ledger.lines() if [line.name, *line.args] == list(entry))
    psutil.Process(pid).kill()


def replayed(site: Site, name: str, handle: Any) -> Any:
    """Let a workflow crash at its last step; return what it says in its second attempt."""
    kill_runner(site, "work", name, 0)
    site.reaches("work", name, 0, times=2)
    site.gates.open(f"{name}-0")
    status = site.finished(handle.id)
    assert status.attempt == 2
    return status


@pytest.mark.crash
@pytest.mark.parametrize(
    "value", [None, 0, 1.5, "", "schön 🙂", [1, [2]], {"a": {"b": None}}], ids=lambda value: type(value).__name__
)
def test_a_replay_sees_the_same_value(site: Site, name: str, value: Any) -> None:
    """The body runs once, and both attempts see the value that it returned."""
    before = site.ledger.count("echo")
    site.gates.close(f"{name}-0")
    handle = site.shop.echoes.delay(name, value)
    assert replayed(site, name, handle).result == value
    assert site.ledger.count("saw", name, value) == 2
    assert site.ledger.count("echo") == before + 1


@pytest.mark.crash
def test_a_replay_sees_the_same_error(site: Site, name: str) -> None:
    """First run and replay catch an error of the same type, with the same arguments and attributes."""
    site.gates.close(f"{name}-0")
    handle = site.shop.catches.delay(name)
    assert replayed(site, name, handle).result == "caught"
    assert site.ledger.count("saw", name, "Refused", [402], name, True) == 2
    assert site.ledger.count("refuse", 402) == 1


def test_a_failing_step_is_tried_again(site: Site, name: str) -> None:
    """A step that fails twice succeeds in its third try, which the body knows and the record shows."""
    handle = site.shop.flaky_order.delay(name, 2)
    assert site.finished(handle.id).result == 3
    assert site.ledger.count("flaky", name) == 3
    (info,) = durable.list_workflow_steps(handle.id, app=site.shop.app)
    assert (info.state, info.tries) == ("SUCCESS", 3)


def test_a_step_without_tries_left_raises_its_last_error(site: Site, name: str) -> None:
    """Three retries are four runs; then the workflow gets the last one's error, as in Celery."""
    handle = site.shop.flaky_order.delay(name, 9)
    status = site.finished(handle.id)
    assert status.state == "FAILURE"
    assert isinstance(status.error, site.shop.Refused)
    assert status.error.reason == "try 4"
    assert site.ledger.count("flaky", name) == 4


@pytest.mark.parametrize(("code", "expected"), [(503, 3), (402, 1)])
def test_retry_if_decides(site: Site, name: str, code: int, expected: int) -> None:
    """Only the errors that the predicate accepts are worth another try."""
    handle = site.shop.picky_order.delay(name, code)
    assert site.finished(handle.id).state == "FAILURE"
    assert site.ledger.count("picky", name, code) == expected


def test_a_soft_time_limit_interrupts_a_blocking_step(site: Site, name: str) -> None:
    """A body that sleeps for a minute is interrupted, and the workflow can catch the timeout and go on."""
    handle = site.shop.impatient.delay(name)
    assert site.finished(handle.id, timeout=10).result == "StepTimeout"
    assert site.ledger.count("dawdle", name) == 1


@pytest.mark.crash
def test_the_idempotency_key_never_changes(site: Site, name: str) -> None:
    """One key per step: the same after a failed try and after a crash, and another one for the next step."""
    site.gates.close(f"key-{name}-1")
    handle = site.shop.keyed_order.delay(name)
    wait_until(lambda: keys_of(site, name, 1), message="the second step runs")
    psutil.Process(site.ledger.lines()[-1].pid).kill()
    site.gates.open(f"key-{name}-1")
    assert site.finished(handle.id).state == "SUCCESS"
    after_failure, after_crash = keys_of(site, name, 0), keys_of(site, name, 1)
    assert len(after_failure) == len(after_crash) == 2
    assert len(set(after_failure)) == len(set(after_crash)) == 1
    assert after_failure != after_crash


def keys_of(site: Site, name: str, number: int) -> list[str]:
    """The idempotency keys that the runs of one step had."""
    return [line.args[2] for line in site.ledger.lines() if line.name == "key" and line.args[:2] == [name, number]]
