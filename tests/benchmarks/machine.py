"""What it was measured on."""

from __future__ import annotations

import os
import platform
from importlib.metadata import distributions
from pathlib import Path

import psutil

from tests.benchmarks.stage import DURABLE, Stage


def machine(stage: Stage) -> dict[str, str]:
    """Return what there is, each thing with its name."""
    return {
        "cores": str(os.cpu_count()),
        "CPU": _cpu(),
        "memory": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "OS": platform.platform(),
        "Python": platform.python_version(),
        "Postgres": f"{stage.server_version()}, {', '.join(f'{name} {value}' for name, value in DURABLE.items())}",
        "load before": f"{os.getloadavg()[0]:.1f}",
    }


def packages() -> dict[str, str]:
    """Return all that is installed, with versions."""
    found = {each.metadata["Name"]: each.version for each in distributions()}
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _cpu() -> str:
    """Linux tells its model; elsewhere its kind must do."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
