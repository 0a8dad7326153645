"""Celery alone, on the same broker: what there is without durability."""

from __future__ import annotations

import importlib
import time
from typing import Any

from celery import chain

from tests.benchmarks.processes import CeleryWorker
from tests.benchmarks.stage import Stage

APP = "tests.benchmarks.apps.plain"


class Plain:
    """Tasks and chains of Celery, published by this process and run by one worker."""

    name = "celery"
    needs: tuple[str, ...] = ()

    def __init__(self, stage: Stage, concurrency: int) -> None:
        self.stage, self._concurrency = stage, concurrency

    def __enter__(self) -> Plain:
        self.tasks: Any = importlib.import_module(APP)
        self.worker = CeleryWorker(
            APP, self._concurrency, self.stage.log(self.name), options=["--hostname=plain@bench"]
        )
        self.run(2)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.worker.stop()

    def empty(self) -> None:
        """It keeps nothing but results, which expire."""

    def chain(self, tasks: int) -> Any:
        """A chain of trivial tasks, the first and the last of which tell the time."""
        clock, middle = self.tasks.now.si(), [self.tasks.nothing.si(number) for number in range(tasks - 2)]
        return chain(clock, *middle, clock)

    def run(self, tasks: int) -> tuple[float, float]:
        """Run a chain: seconds from the first body to the last, in proportion, and from `delay()` to `get()`.

        From body to body there is one hand-over less than tasks; the first one is taken to cost as much as the others.
        """
        began = time.perf_counter()
        last = self.chain(tasks).delay()
        ended = last.get(timeout=120)
        whole = time.perf_counter() - began
        first = last
        while first.parent is not None:
            first = first.parent
        return (ended - first.get(timeout=10)) * tasks / (tasks - 1), whole

    def run_many(self, chains: int, tasks: int) -> float:
        """Run chains at once: seconds from the first `delay()` to the last result."""
        began = time.perf_counter()
        for result in [self.chain(tasks).delay() for _ in range(chains)]:
            result.get(timeout=300)
        return time.perf_counter() - began

    def run_tasks(self, tasks: int) -> float:
        """Run trivial tasks at once: seconds from the first `delay()` to the last result."""
        began = time.perf_counter()
        for result in [self.tasks.nothing.delay() for _ in range(tasks)]:
            result.get(timeout=300)
        return time.perf_counter() - began
