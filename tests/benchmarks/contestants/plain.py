"""Celery alone, on the same broker: what there is without durability."""

from __future__ import annotations

import importlib
import time
from typing import Any

from celery import chain

from tests.benchmarks.contestants.contestant import Contestant
from tests.benchmarks.processes import CeleryWorker

APP = "tests.benchmarks.apps.plain"


class Plain(Contestant):
    """Tasks and chains of Celery, published by this process and run by one worker."""

    name = "celery"

    def start(self) -> None:
        self.tasks: Any = importlib.import_module(APP)
        self.process = CeleryWorker(APP, self.concurrency, self.stage.log(self.name))

    def warm_up(self) -> None:
        self.whole("nothing")

    def whole(self, task: str, *arguments: Any) -> float:
        """Run a task: seconds from `delay()` to `get()`."""
        began = time.perf_counter()
        getattr(self.tasks, task).delay(*arguments).get(timeout=120)
        return time.perf_counter() - began

    def run(self, tasks: int) -> tuple[float, float]:
        """Run a chain: seconds from the first body to the last, in proportion, and from `delay()` to `get()`.

        From body to body there is one hand-over less than tasks; the first one is taken to cost as much as the others.
        """
        began = time.perf_counter()
        last = self._chain(tasks).delay()
        ended = last.get(timeout=120)
        whole = time.perf_counter() - began
        return (ended - _first(last).get(timeout=10)) * tasks / (tasks - 1), whole

    def run_many(self, chains: int, tasks: int) -> float:
        """Run chains at once: seconds from the first `delay()` to the last result."""
        began = time.perf_counter()
        for result in [self._chain(tasks).delay() for _ in range(chains)]:
            result.get(timeout=300)
        return time.perf_counter() - began

    def run_tasks(self, tasks: int) -> float:
        """Run trivial tasks at once: seconds from the first `delay()` to the last result."""
        began = time.perf_counter()
        for result in [self.tasks.nothing.delay() for _ in range(tasks)]:
            result.get(timeout=300)
        return time.perf_counter() - began

    def _chain(self, tasks: int) -> Any:
        """A chain of trivial tasks, the first and the last of which tell the time."""
        clock, middle = self.tasks.now.si(), [self.tasks.nothing.si(number) for number in range(tasks - 2)]
        return chain(clock, *middle, clock)


def _first(result: Any) -> Any:
    while result.parent is not None:
        result = result.parent
    return result
