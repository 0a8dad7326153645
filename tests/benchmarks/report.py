"""What was measured, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median
from typing import Any

from tests.benchmarks.contestants import ALL, Durable
from tests.benchmarks.measures.sequential import BARE
from tests.benchmarks.measuring import Cell, Figures
from tests.benchmarks.targets import TARGETS, Target

ORDER = [*(kind.name for kind in ALL), BARE]
OURS = Durable.name


def report(figures: Figures, machine: Mapping[str, str]) -> str:
    """Return it for reading: the machine, all figures, the targets."""
    parts = [table(("machine", ""), machine.items()), table(*_measured(figures)), table(*_targets(figures))]
    return "\n\n".join(parts)


def as_json(figures: Figures, machine: Mapping[str, str], packages: Mapping[str, str], rounds: int) -> dict[str, Any]:
    """Return it for other programs, with the values of each round."""
    shown = {figure: {"unit": figures.units[figure], "values": values} for figure, values in figures.values.items()}
    targets = [_target_as_json(target, figures) for target in TARGETS]
    return {"machine": machine, "packages": packages, "rounds": rounds, "figures": shown, "targets": targets}


def _measured(figures: Figures) -> tuple[Sequence[str], list[Sequence[str]]]:
    header = ("measure", "of", "median", "min", "max", "unit", "ours to this")
    return header, [
        (figure, name, *map(_number, (median(values), min(values), max(values))), unit, _ratio(figures, figure, name))
        for figure, unit in figures.units.items()
        for name, values in sorted(figures.values[figure].items(), key=lambda item: ORDER.index(item[0]))
    ]


def _ratio(figures: Figures, figure: str, other: str) -> str:
    """Ours to another's, within each round."""
    if other == OURS:
        return ""
    ratio = figures.compared(Cell(figure, OURS), Cell(figure, other), lambda ours, theirs: ours / theirs)
    return "" if ratio is None else f"{ratio:.2f}"


def _targets(figures: Figures) -> tuple[Sequence[str], list[Sequence[str]]]:
    return ("target", "bound", "measured", ""), [
        (target.says, target.bound, *_judged(target, target.measured(figures))) for target in TARGETS
    ]


def _judged(target: Target, value: float | None) -> tuple[str, str]:
    return ("", "not measured") if value is None else (_number(value), "met" if target.met(value) else "NOT MET")


def _target_as_json(target: Target, figures: Figures) -> dict[str, Any]:
    value = target.measured(figures)
    met = None if value is None else target.met(value)
    return {"target": target.says, "bound": target.bound, "measured": value, "met": met}


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown that can be read as it is."""
    lines = [tuple(header), *map(tuple, rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, tuple("-" * width for width in widths))
    return "\n".join(f"| {' | '.join(map(str.ljust, line, widths))} |" for line in lines)
