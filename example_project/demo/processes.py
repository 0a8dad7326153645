"""The processes of the demo: each in a group of its own, that dies as a whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

CONCURRENCY = 3


class Process:
    """`python -m …` with its output in a file."""

    def __init__(self, name: str, *arguments: str, log: Path, environment: Mapping[str, str]) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as output:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self.pid = self._popen.pid

    def is_running(self) -> bool:
        return self._popen.poll() is None

    def output(self) -> str:
        return self._log.read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL to the process and all its children, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._popen.wait()

    def stop(self, timeout: float) -> None:
        """Ask it to end, and wait until it has."""
        self._popen.terminate()
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(timeout)
        self.kill()


class Fleet:
    """All processes of the demo. They are gone when the `with` block is left, however it is left."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._workers_started = 0
        self.environment: dict[str, str] = {}
        self.all: list[Process] = []
        self.workers: list[Process] = []

    def __enter__(self) -> Fleet:
        return self

    def __exit__(self, *exc_info: object) -> None:
        for process in self.all:
            process.kill()

    def start(self, name: str, *arguments: str) -> Process:
        process = Process(name, *arguments, log=self._home / f"{name}.log", environment=self.environment)
        self.all.append(process)
        return process

    def start_worker(self) -> Process:
        self._workers_started += 1
        name = f"worker-{self._workers_started}"
        options = ("--concurrency", str(CONCURRENCY), "--hostname", f"{name}@%h", "--loglevel", "INFO")
        worker = self.start(name, "celery", "--app", "example_project.app", "worker", *options)
        self.workers.append(worker)
        return worker

    def start_beat(self) -> Process:
        schedule = str(self._home / "beat-schedule")
        return self.start("beat", "celery", "--app", "example_project.app", "beat", "--schedule", schedule)

    def kill_worker(self, worker: Process) -> None:
        worker.kill()
        self.workers.remove(worker)
