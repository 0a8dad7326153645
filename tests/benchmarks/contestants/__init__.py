"""Who is measured: celery_durable, what one would use instead, and the limit.

Each is opened with its worker running and warm, does the same work in its own words, and is emptied between turns.
"""

from __future__ import annotations

from contextlib import ExitStack
from importlib.util import find_spec

from tests.benchmarks.contestants.absurd import Absurd
from tests.benchmarks.contestants.dbos import Dbos
from tests.benchmarks.contestants.durable import Durable
from tests.benchmarks.contestants.limit import Limit
from tests.benchmarks.contestants.plain import Plain
from tests.benchmarks.stage import Stage

__all__ = ["ALL", "Absurd", "Dbos", "Durable", "Limit", "Plain", "entered", "missing"]

ALL = (Durable, Dbos, Absurd, Plain, Limit)


def missing() -> dict[str, str]:
    """Return those that aren't installed, each with the package that it lacks."""
    lacking = {each.name: [name for name in each.needs if find_spec(name) is None] for each in ALL}
    return {name: ", ".join(packages) for name, packages in lacking.items() if packages}


def entered(stage: Stage, stack: ExitStack, concurrency: int, *kinds: type) -> list:
    """Open those that are installed; the stack closes them."""
    absent = missing()
    return [stack.enter_context(kind(stage, concurrency)) for kind in kinds if kind.name not in absent]
