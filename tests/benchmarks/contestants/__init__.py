"""Who is measured: celery_durable, what one would use instead, and the limits.

Each does the same work in its own words, and is emptied between turns. `start` starts its processes, `warm_up` waits
until they work; `ask_to_end` and `stop` end them.
"""

from __future__ import annotations

from tests.benchmarks.contestants.absurd import Absurd
from tests.benchmarks.contestants.bare import Bare
from tests.benchmarks.contestants.dbos import Dbos
from tests.benchmarks.contestants.durable import Durable
from tests.benchmarks.contestants.limit import Limit
from tests.benchmarks.contestants.plain import Plain

__all__ = ["ALL", "Absurd", "Bare", "Dbos", "Durable", "Limit", "Plain"]

ALL = (Durable, Dbos, Absurd, Plain, Limit, Bare)
