"""An unmodified task under `as_step` does what Celery does: as many runs, the same delays, the same end."""

from __future__ import annotations

import logging
import random
import re
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest
from celery import signals
from celery.app.trace import _install_stack_protection
from celery.exceptions import Ignore

import celery_durable as durable
from tests.fixtures.brokers import isolated
from tests.fixtures.fix_postgres import Sql, _new_database
from tests.fixtures.inprocess import Inprocess
from tests.integration.attempts import DUE

pytestmark = pytest.mark.oldest

SEED = 20240229
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass
class Like:
    """Equals an outcome that says the same; Celery's errors have the id of the task in their text."""

    outcome: Any

    def __eq__(self, other: object) -> bool:
        return said(self.outcome) == said(other)


def said(outcome: Any) -> Any:
    if isinstance(outcome, Exception):
        return type(outcome), UUID.sub("<id>", repr(outcome.args)), UUID.sub("<id>", str(outcome))
    return outcome


#: What the runs of a body do, one after the other; the last goes on for ever.
Deeds = list[Callable[[Any], Any]]


def returns(value: Any) -> Callable[[Any], Any]:
    return lambda task: value


def fails(error: Callable[[], BaseException]) -> Callable[[Any], Any]:
    def deed(task: Any) -> Any:
        raise error()

    return deed


def retries(during: Callable[[], Exception] | None = None, **options: Any) -> Callable[[Any], Any]:
    """Calls `self.retry`, while it handles an error or not; `exc` is made anew each time."""

    def deed(task: Any) -> Any:
        given = {**options, **({"exc": options["exc"]()} if "exc" in options else {})}
        if during is None:
            raise task.retry(**given)
        try:
            raise during()
        except Exception:
            raise task.retry(**given)  # noqa: B904 - as people write it

    return deed


def reset() -> Exception:
    return ConnectionError("reset")


def gone() -> Exception:
    return FileNotFoundError(2, "gone", "/f")


OS = {"autoretry_for": (OSError,)}
CASES: dict[str, tuple[Deeds, dict[str, Any]]] = {
    # Celery's autoretry.
    "default delay": ([fails(reset)], OS),
    "another default delay": ([fails(reset)], {**OS, "default_retry_delay": 7}),
    "no delay": ([fails(reset)], {**OS, "default_retry_delay": 0}),
    "a success at the third run": ([fails(reset), fails(gone), returns({"paid": 5})], {**OS, "default_retry_delay": 7}),
    "backoff": ([fails(reset)], {**OS, "retry_backoff": True, "retry_jitter": False, "max_retries": 5}),
    "backoff with jitter": ([fails(reset)], {**OS, "retry_backoff": True, "max_retries": 8}),
    "another base": ([fails(reset)], {**OS, "retry_backoff": 5, "retry_jitter": False}),
    "another base with jitter": ([fails(reset)], {**OS, "retry_backoff": 300, "max_retries": 5}),
    "fractions": ([fails(reset)], {**OS, "retry_backoff": 0.5, "retry_jitter": False}),
    "more fractions": ([fails(reset)], {**OS, "retry_backoff": 2.9, "retry_backoff_max": 7.9, "retry_jitter": False}),
    "a maximum": ([fails(reset)], {**OS, "retry_backoff": 9, "retry_backoff_max": 20, "retry_jitter": False}),
    "a maximum with jitter": ([fails(reset)], {**OS, "retry_backoff": 9, "retry_backoff_max": 20, "max_retries": 6}),
    "never": ([fails(reset)], {**OS, "max_retries": 0, "retry_backoff": True}),
    "for ever": ([*[fails(reset)] * 12, returns(13)], {**OS, "max_retries": None, "retry_backoff": True}),
    "retry_kwargs": ([fails(reset)], {**OS, "retry_kwargs": {"max_retries": 5, "countdown": 2}}),
    "a countdown against a backoff": (
        [fails(reset)], {**OS, "retry_kwargs": {"countdown": 2}, "retry_backoff": 4, "retry_jitter": False},
    ),
    "retry_kwargs against max_retries": ([fails(reset)], {**OS, "retry_kwargs": {"max_retries": 1}, "max_retries": 4}),
    "retry_kwargs without a number": ([fails(reset)], {**OS, "retry_kwargs": {"max_retries": None}, "max_retries": 1}),
    "dont_autoretry_for": ([fails(gone)], {**OS, "dont_autoretry_for": (FileNotFoundError,), "retry_backoff": True}),
    "dont_autoretry_for at the second run": (
        [fails(reset), fails(gone)], {**OS, "dont_autoretry_for": (FileNotFoundError,), "retry_backoff": True},
    ),
    "another error": ([fails(lambda: KeyError("k"))], {**OS, "retry_backoff": True}),
    "another error at the second run": ([fails(reset), fails(lambda: KeyError("k"))], {**OS, "retry_backoff": True}),
    "throws": ([fails(gone)], {**OS, "throws": (FileNotFoundError,), "max_retries": 1}),
    "throws alone": ([fails(gone)], {"throws": (FileNotFoundError,)}),
    "no options": ([fails(reset)], {}),
    "options that nothing triggers": ([fails(reset)], {"max_retries": 5, "retry_backoff": True}),
    "ignored": ([fails(Ignore)], OS),
    "ignored at the second run": ([fails(reset), fails(Ignore)], {"autoretry_for": (Exception,), "retry_backoff": 3}),
    # self.retry of a bound task.
    "retry": ([retries()], {}),
    "retry, then success": ([retries(countdown=3), returns([1])], {}),
    "retry of an error": ([retries(reset)], {"max_retries": 1}),
    "retry with a reason": ([retries(exc=reset)], {"default_retry_delay": 4}),
    "retry of an error with a reason": ([retries(gone, exc=reset)], {"max_retries": 1}),
    "retry with a countdown": ([retries(exc=reset, countdown=9), retries(exc=gone, countdown=1.5)], {"max_retries": 2}),
    "retry at once": ([retries(exc=reset, countdown=0)], {}),
    "retry with a number": ([retries(exc=reset, max_retries=1)], {"max_retries": 5}),
    "retry with a larger number": ([retries(exc=reset, max_retries=5)], {"max_retries": 1}),
    "retry with numbers that change": (
        [retries(exc=reset, max_retries=9), retries(exc=reset, max_retries=9), retries(exc=gone)], {"max_retries": 1},
    ),
    "retry never": ([retries(exc=reset)], {"max_retries": 0}),
    "retry for ever": ([*[retries(exc=reset)] * 9, returns(10)], {"max_retries": None}),
    "retry, then an error": ([retries(exc=reset), fails(gone)], {}),
    "retry beside autoretry": (
        [fails(reset), retries(exc=gone, countdown=2), fails(reset), retries(exc=gone)],
        {**OS, "retry_backoff": 8, "retry_jitter": False, "max_retries": 9, "retry_kwargs": {"max_retries": 3}},
    ),
    "retry of an error that autoretry knows": ([retries(reset, countdown=6)], {**OS, "retry_backoff": 2}),
}  # fmt: skip


@pytest.fixture(scope="module")
def shop(postgres_server: str, template_database: str, broker_server: str) -> Iterator[Inprocess]:
    """An app for all tests here, whose tasks Celery's tracer has prepared, as in a worker."""
    _install_stack_protection()
    with _new_database(postgres_server, template_database) as url, isolated(broker_server) as broker:
        shop = Inprocess(url, broker.url, suspend_after=0)
        shop.app.finalize()
        yield shop
        shop.close()


def by_celery(task: Any) -> tuple[list[float], Any]:
    """Let Celery run a task: its eager mode tries again as a worker would, but without the waits."""
    delays: list[float] = []

    def retried(reason: Any = None, **kwargs: Any) -> None:
        delays.append(reason.when)

    signals.task_retry.connect(retried, weak=False)
    try:
        result = task.apply((1,))
    finally:
        signals.task_retry.disconnect(retried)
    return delays, None if isinstance(result.result, Ignore) else result.result


def as_step(shop: Inprocess, task: Any, log: pytest.LogCaptureFixture) -> tuple[list[float], Any]:
    """Let a workflow run a task as a step: each wait gives the worker back, and ends at once."""
    step, workflow_id = durable.as_step(task), f"order of {task.name}"

    def order() -> Any:
        return step(1)

    shop.workflow(order, name=workflow_id).apply_async(task_id=workflow_id)
    sql = Sql(shop.installation.config.database_url)
    with log.at_level(logging.INFO, "celery_durable"), closing(sql):
        while (status := durable.get_workflow_status(workflow_id, app=shop.app)).state not in ("SUCCESS", "FAILURE"):
            shop.run(workflow_id)
            sql.execute(DUE)
            sql.execute("UPDATE celery_durable.workflow SET wake_at = clock_timestamp() WHERE state = 'SUSPENDED'")
            shop.installation.store.workflows.wake(limit=1, patience=0)
    failed: list[Any] = [record.args for record in log.records if " failed in try " in record.msg]
    return [args[-1] for args in failed], status.error or status.result


@pytest.mark.parametrize("case", CASES)
def test_an_unmodified_task_runs_as_under_celery(shop: Inprocess, case: str, caplog: pytest.LogCaptureFixture) -> None:
    """With the same random numbers: the runs and their number of retries, the delays, and the last error or value."""
    deeds, options = CASES[case]
    runs: list[int] = []

    def old(self: Any, first: int) -> Any:
        runs.append(self.request.retries)
        return deeds[min(len(runs), len(deeds)) - first](self)

    task = shop.app.task(old, name=case, bind=True, shared=False, **options)
    random.seed(SEED)
    delays, outcome = by_celery(task)
    celerys, runs[:] = list(runs), []
    random.seed(SEED)
    assert as_step(shop, task, caplog) == (delays, Like(outcome))
    assert runs == celerys
    (step,) = durable.list_workflow_steps(f"order of {case}", app=shop.app)
    assert step.tries == len(runs) == len(delays) + 1
