"""The work as workflows of DBOS, in a process of its own that takes orders by its standard input.

The configuration is DBOS's own but for two things. ``max_executor_threads`` is the concurrency that the others have;
workflows are started in the process that runs them (`DBOS.start_workflow`), where neither a queue nor anything else is
polled between start and result.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from dbos import DBOS

from tests.benchmarks.orders import serve


@DBOS.step()
def nothing(number: int) -> int:
    return number


@DBOS.workflow()
def steps(count: int) -> float:
    """Return how long the steps took."""
    began = time.perf_counter()
    for number in range(count):
        nothing(number)
    return time.perf_counter() - began


def run(count: int) -> dict[str, float]:
    """One workflow, from its start to its result."""
    began = time.perf_counter()
    inside = DBOS.start_workflow(steps, count).get_result()
    return {"inside": inside, "whole": time.perf_counter() - began}


def run_many(count: int, workflows: int) -> dict[str, float]:
    """Many at once, from the first start to the last result."""
    began = time.perf_counter()
    handles = [DBOS.start_workflow(steps, count) for _ in range(workflows)]
    for handle in handles:
        handle.get_result()
    return {"whole": time.perf_counter() - began}


def replay(count: int) -> dict[str, float]:
    """A workflow that has completed all its steps, once more from behind the last of them."""
    done = DBOS.start_workflow(steps, count)
    done.get_result()
    return {"inside": DBOS.fork_workflow(done.workflow_id, count + 1).get_result()}


def main(url: str, concurrency: str) -> None:
    config: Any = {
        "name": "bench",
        "system_database_url": url,
        "max_executor_threads": int(concurrency),
        "log_level": "WARNING",
    }
    DBOS(config=config)
    DBOS.launch()
    serve({"run": run, "run_many": run_many, "replay": replay})
    DBOS.destroy()


if __name__ == "__main__":
    main(*sys.argv[1:])
