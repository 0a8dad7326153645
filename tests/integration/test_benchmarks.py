"""The benchmarks run; what they measure isn't looked at, as tests beside them would spoil it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.crew import absent
from tests.benchmarks.measures import MEASURES
from tests.fixtures.pages import CHECKOUT

#: Measures in groups that share their workers.
GROUPS = [
    ["imports", "memory", "pickup", "payloads", "parallel", "events"],
    ["sequential", "publishing"],
    ["resume"],
    ["many", "short", "sleeping"],
]


def test_every_measure_is_tested() -> None:
    """Each is in one of the groups below."""
    assert sorted(name for group in GROUPS for name in group) == sorted(measure.name for measure in MEASURES)


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group[0])
def test_measures_run(group: list[str], tmp_path: Path) -> None:
    """Every figure of celery_durable and of plain Celery is told; who isn't installed is left out with a sentence."""
    told = tmp_path / "figures.json"
    command = ["tests.benchmarks", "--quick", "--rounds=1", f"--json={told}", "--only", *group]
    done = subprocess.run([sys.executable, "-m", *command], cwd=CHECKOUT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    for contestant in absent():
        assert f"{contestant} is left out" in done.stderr
    figures = json.loads(told.read_text())["figures"]
    units = {figure for measure in MEASURES if measure.name in group for figure in measure.units}
    # Quick runs are too short for the largest one, and a busy machine for sleepers that are due.
    assert units - set(figures) <= {"resume over 100,000 steps", "sleeping workflows, due to ended"}
    assert all(
        values and min(values) > 0
        for figure in figures.values()
        for values in figure["values"].values()
        if figure["unit"] != "MB"
    )
