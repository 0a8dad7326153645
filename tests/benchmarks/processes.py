"""The processes of the contestants: workers that take messages, and servants that take orders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
#: In seconds: longer than any of them needs to say goodbye.
PATIENCE = 20


class Process:
    """``python -m …`` as a process group of its own; what it writes goes into a file."""

    def __init__(self, arguments: Sequence[str], log: Path, **pipes: Any) -> None:
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
                stderr=output,
                start_new_session=True,
                **{"stdin": subprocess.DEVNULL, "stdout": output, **pipes},
            )

    @property
    def pid(self) -> int:
        """Process id of the main process."""
        return self._process.pid

    def children(self) -> list[psutil.Process]:
        """The pool's processes."""
        return psutil.Process(self.pid).children(recursive=True)

    def memory(self) -> float:
        """Megabytes of it and its children, what they share in proportion (PSS)."""
        return sum(each.memory_full_info().pss for each in (psutil.Process(self.pid), *self.children())) / 1e6

    def ask_to_end(self) -> None:
        """Begin its end, without waiting for it."""
        self._process.terminate()

    def stop(self, patience: float = PATIENCE) -> None:
        """Wait so many seconds for its end, then see to it, and to that of all its children."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def said(self) -> str:
        """The end of what it has written."""
        return self._log.read_text(errors="replace")[-4000:]


class CeleryWorker(Process):
    """A `celery worker` as users start it: prefork, warnings only."""

    def __init__(self, app: str, concurrency: int, log: Path) -> None:
        options = ["--loglevel=WARNING", f"--concurrency={concurrency}", f"--hostname={app.rpartition('.')[2]}@bench"]
        super().__init__(["celery", "-A", app, "worker", *options], log)


class Servant(Process):
    """A process that carries out orders: the other end of `orders.serve`."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        super().__init__(arguments, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait_ready(self) -> None:
        """Return once it takes orders."""
        self._answer()

    def ask(self, do: str, **arguments: Any) -> Any:
        """Give an order, and return the answer; RuntimeError with what it has written if there is none."""
        self._process.stdin.write(json.dumps({"do": do, "with": arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def ask_to_end(self) -> None:
        """Its input ends, and so does it."""
        self._process.stdin.close()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"A process of the benchmark has ended:\n{self.said()}")
        return json.loads(line)
