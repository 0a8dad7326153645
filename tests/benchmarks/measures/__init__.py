"""What is measured, one kind a file."""

from __future__ import annotations

from tests.benchmarks.measures.sequential import SEQUENTIAL

MEASURES = (SEQUENTIAL,)
