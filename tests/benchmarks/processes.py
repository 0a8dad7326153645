"""The processes of the contestants: workers that take messages, and servants that take orders."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
#: Longer than any of them needs to say goodbye.
PATIENCE = 20


class Process:
    """``python -m …`` as a process group of its own; what it writes goes into a file."""

    def __init__(self, arguments: Sequence[str], log: Path, env: Mapping[str, str] | None = None, **pipes: Any) -> None:
        self._log = log
        with log.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                cwd=ROOT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
                stderr=output,
                start_new_session=True,
                **{"stdin": subprocess.DEVNULL, "stdout": output, **pipes},
            )

    @property
    def pid(self) -> int:
        """Process id of the main process."""
        return self._process.pid

    def check(self) -> None:
        """Raise RuntimeError, with the log, if it has ended."""
        if self._process.poll() is not None:
            raise RuntimeError(
                f"A process of the benchmark has ended:\n{self._log.read_text(errors='replace')[-4000:]}"
            )

    def stop(self) -> None:
        """Ask it to end, and see to it that it does, with all its children."""
        with suppress(subprocess.TimeoutExpired):
            self._process.terminate()
            self._process.wait(PATIENCE)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()


class CeleryWorker(Process):
    """A `celery worker` as users start it: prefork, warnings only."""

    def __init__(
        self, app: str, concurrency: int, log: Path, env: Mapping[str, str] | None = None, options: Sequence[str] = ()
    ) -> None:
        command = ["celery", "-A", app, "worker", "--loglevel=WARNING", f"--concurrency={concurrency}", *options]
        super().__init__(command, log, env)


class Servant(Process):
    """A process that carries out orders: the other end of `orders.serve`."""

    def __init__(self, arguments: Sequence[str], log: Path) -> None:
        super().__init__(arguments, log, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._answer()

    def ask(self, do: str, **arguments: Any) -> Any:
        """Give an order, and return the answer."""
        self._process.stdin.write(json.dumps({"do": do, "with": arguments}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def stop(self) -> None:
        """Its input ends, and so does it."""
        self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(PATIENCE)
        super().stop()

    def _answer(self) -> Any:
        line = self._process.stdout.readline()
        if not line:
            self._process.wait(PATIENCE)
            self.check()
        return json.loads(line)
