"""Runs one server for its owner, and cleans up when the owner is gone.

`servers.py` starts this file as a script of its own, `python -I -S keeper.py DIRECTORY...`, in a session of
its own. It answers one JSON object a line: commands come on stdin, answers go to stdout. The end of stdin
means that the owner, with every child it forked without exec, has closed it or died by whatever signal: then
the server is put down and the directories are removed. So nothing is left behind even by SIGKILL, on every
POSIX system, and whichever thread of the owner started the server (a parent-death signal is sent when that
*thread* ends).
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

PUT_DOWN = (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL)
GRACE = 5.0


class Keeper:
    """The parent of at most one running server, so that its process id can't be taken by another."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, argv: list[str], log: str, cwd: str, env: dict[str, str], owner: list[int] | None) -> Any:
        """Start a command that appends its output to `log`, as the user and group `owner` if given."""
        identity: dict[str, Any] = {}
        if owner is not None:
            identity = {"user": owner[0], "group": owner[1], "extra_groups": []}
        with Path(log).open("ab") as output:
            self._process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=cwd, env=env, **identity
            )
        return self._process.pid

    def poll(self) -> int | None:
        """The exit code, None while it runs, 0 if nothing was started."""
        return 0 if self._process is None else self._process.poll()

    def signal(self, number: int) -> None:
        """Send a signal, unless the command has ended."""
        if self._process is not None:
            self._process.send_signal(number)

    def put_down(self) -> None:
        """Stop the command: politely, firmly, then by SIGKILL."""
        for number in PUT_DOWN:
            self.signal(number)
            try:
                if self._process is not None:
                    self._process.wait(GRACE)
                return
            except subprocess.TimeoutExpired:
                continue

    def answer(self, line: str) -> dict[str, Any]:
        """Carry out one command and wrap its result or its error."""
        command = json.loads(line)
        number, name = command.pop("id"), command.pop("do")
        try:
            return {"id": number, "result": getattr(self, name)(**command)}
        except OSError as error:
            return {"id": number, "error": str(error)}


def outlive_signals() -> None:
    """Ignore polite signals; handlers rather than SIG_IGN, which the server would inherit."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)


def serve(directories: Iterable[str]) -> None:
    """Obey the owner until stdin ends, then stop the server and remove the directories."""
    outlive_signals()
    keeper = Keeper()
    try:
        for line in sys.stdin:
            print(json.dumps(keeper.answer(line)), flush=True)
    except BrokenPipeError:
        pass  # the owner is gone and reads no answers: what is left to do stands below
    finally:
        keeper.put_down()
        for directory in directories:
            shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    serve(sys.argv[1:])
