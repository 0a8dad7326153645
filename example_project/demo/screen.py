"""What the demo shows: a bar, a line for each kill, and a table at the end."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

LOG_LINES = 25


class Screen:
    def __init__(self, orders: int) -> None:
        self._bar = Progress(
            TextColumn("orders finished"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("step bodies run {task.fields[bodies]}"),
            TimeElapsedColumn(),
            console=Console(highlight=False),
        )
        self._task = self._bar.add_task("orders", total=orders, bodies=0)
        self._began = time.monotonic()

    def __enter__(self) -> Screen:
        self._bar.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._bar.stop()

    def progress(self, finished: int, bodies: int) -> None:
        self._bar.update(self._task, completed=finished, bodies=bodies)

    def say(self, line: str) -> None:
        self._print(f"{time.monotonic() - self._began:5.1f} s  {line}")

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        table = Table(show_header=False)
        for row in rows:
            table.add_row(*row)
        self._bar.console.print(table)

    def complain(self, wrong: Sequence[str], logs: Mapping[str, str]) -> None:
        """Say what is wrong, with the end of each process' output."""
        for name, output in logs.items():
            self._bar.console.rule(name)
            for line in output.splitlines()[-LOG_LINES:]:
                self._print(line)
        self._bar.console.rule("wrong")
        for line in wrong:
            self._print(line, style="bold red")

    def _print(self, line: str, style: str | None = None) -> None:
        self._bar.console.print(line, style=style, markup=False, soft_wrap=True)
