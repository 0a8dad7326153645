"""What is measured, one kind a file. Those with workers of the same kind follow each other."""

from __future__ import annotations

from tests.benchmarks.measures.events import EVENTS
from tests.benchmarks.measures.imports import IMPORTS
from tests.benchmarks.measures.many import MANY
from tests.benchmarks.measures.memory import MEMORY
from tests.benchmarks.measures.parallel import PARALLEL
from tests.benchmarks.measures.payloads import PAYLOADS
from tests.benchmarks.measures.pickup import PICKUP
from tests.benchmarks.measures.publishing import PUBLISHING
from tests.benchmarks.measures.resume import RESUME
from tests.benchmarks.measures.sequential import SEQUENTIAL
from tests.benchmarks.measures.short import SHORT
from tests.benchmarks.measures.sleeping import SLEEPING

MEASURES = (
    IMPORTS, MEMORY, SEQUENTIAL, PICKUP, PAYLOADS, PARALLEL, EVENTS, RESUME, MANY, SHORT, SLEEPING, PUBLISHING,
)  # fmt: skip
