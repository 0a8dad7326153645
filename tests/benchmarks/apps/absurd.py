"""The work as tasks of Absurd: a worker with the poll interval and the claim timeout that it comes with."""

from __future__ import annotations

import sys
import time
from typing import Any

from absurd_sdk import Absurd


def steps(params: dict[str, Any], ctx: Any) -> float:
    """Return how long the steps took."""
    began = time.perf_counter()
    for number in range(params["count"]):
        ctx.step("nothing", lambda number=number: number)
    return time.perf_counter() - began


def main(url: str, concurrency: str) -> None:
    absurd = Absurd(url)
    absurd.register_task("steps")(steps)
    absurd.start_worker(concurrency=int(concurrency))


if __name__ == "__main__":
    main(*sys.argv[1:])
