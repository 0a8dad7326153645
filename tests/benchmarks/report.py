"""What was measured, as tables."""

from __future__ import annotations

from statistics import median

from tests.benchmarks.measuring import Figures


def report(figures: Figures) -> str:
    lines = []
    for figure, contestants in figures.values.items():
        for name, values in contestants.items():
            lines.append(
                f"{figure:40} {name:15} {median(values):10.1f} {min(values):10.1f} {max(values):10.1f} {figures.units[figure]}"
            )
    return "\n".join(lines)
