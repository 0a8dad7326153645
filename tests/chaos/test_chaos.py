"""A short chaos; `make chaos` has a long one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.fixtures import rabbit
from tests.fixtures.workers import ROOT

SEED = 20
SECONDS = 15
NEEDS_RABBITMQ = pytest.mark.skipif(not rabbit.is_installed(), reason="rabbitmq-server isn't installed")


@pytest.mark.alone
@pytest.mark.crash
@pytest.mark.slow
@pytest.mark.parametrize("broker", ["redis", pytest.param("rabbitmq", marks=NEEDS_RABBITMQ)])
def test_a_short_chaos(broker: str) -> None:
    """Under everything at once every promise is kept."""
    command = ["-m", "tests.chaos", f"--seed={SEED}", f"--duration={SECONDS}", f"--broker={broker}"]
    run = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]
