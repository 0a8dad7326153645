"""What Celery's result backend has of a workflow that runs: STARTED, and what it says of itself."""

from __future__ import annotations

import signal
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
from celery.exceptions import SoftTimeLimitExceeded

from celery_durable.started import A_MOMENT
from tests.fixtures.inprocess import Inprocess
from tests.integration.attempts import order, status


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    shop = Inprocess(database_url, broker_url)
    shop.app.conf.result_backend = "cache+memory://"
    yield shop
    shop.close()


@pytest.mark.parametrize("names_itself", [False, True])
def test_started_does_not_come_over_what_a_function_says(shop: Inprocess, names_itself: bool) -> None:
    """It is stored a moment after the claim, the function's own state before."""
    seen: list[str] = []

    @shop.workflow(bind=True, name="order")
    def task(self: Any) -> None:
        self.update_state(**({"task_id": self.request.id} if names_itself else {}), state="PROGRESS", meta={"done": 1})
        time.sleep(4 * A_MOMENT)
        seen.append(self.AsyncResult(self.request.id).state)

    workflow_id = str(uuid.uuid4())  # the backend in memory is that of all tests
    task.apply_async(task_id=workflow_id)
    shop.run(workflow_id, ignore_result=False)
    assert seen == ["PROGRESS"]


def test_celerys_limit_while_started_is_stored(shop: Inprocess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The function has ended, and its limit with it; nothing is stored over the outcome."""
    main, stored, begun = threading.get_ident(), [], threading.Event()
    backend = type(shop.app.backend)
    store_result = backend.store_result

    def strike(signum: int, frame: Any) -> None:
        raise SoftTimeLimitExceeded

    def slow(self: Any, task_id: str, result: Any, state: str, **kwargs: Any) -> Any:
        if state == "STARTED":
            begun.set()
            time.sleep(2 * A_MOMENT)
            signal.pthread_kill(main, signal.SIGUSR1)
            time.sleep(2 * A_MOMENT)
        stored.append(state)
        return store_result(self, task_id, result, state, **kwargs)

    monkeypatch.setattr(backend, "store_result", slow)
    order(shop, lambda: begun.wait(10))
    before = signal.signal(signal.SIGUSR1, strike)
    try:
        assert shop.run("w1", ignore_result=False) is True
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert status(shop).state == "SUCCESS"
    assert stored == ["STARTED", "SUCCESS"]
