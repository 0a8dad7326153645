"""docs/tutorial.md as a reader follows it: the same files, commands and kills, and what is shown is what comes."""

from __future__ import annotations

import shlex
from itertools import groupby
from pathlib import Path

import pytest

from tests.acceptance.test_readme import BROKER, python_path, run
from tests.fixtures.brokers import Broker
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.pages import Block, blocks, patched
from tests.fixtures.site import FAST
from tests.fixtures.workers import Worker, Workers

PAGE = "docs/tutorial.md"
INSTALL = 'durable.install(app, database_url="postgresql://shop@localhost/shop")'
LONG = "time.sleep(10)"

pytestmark = pytest.mark.crash


class Reader:
    """Somebody who types what the tutorial says; a charge takes two seconds here, and a dead worker is seen as soon."""

    def __init__(self, directory: Path, workers: Workers, database_url: str, broker: Broker) -> None:
        (listing,) = blocks("python", page=PAGE)
        (self._diff,) = blocks("diff", page=PAGE)
        self._plain, self._directory, self._workers = listing.text, directory, workers
        self._database_url, self._broker = database_url, broker
        self._env = {"PYTHONPATH": python_path(directory)}
        self._worker: Worker | None = None

    def write(self, *, durable: bool) -> None:
        """Write shop.py as it is, or with the tutorial's diff."""
        code = patched(self._plain, self._diff.text) if durable else self._plain
        install = f"durable.install(app, database_url={self._database_url!r}, **{FAST!r})"
        code = code.replace(INSTALL, install).replace(BROKER, self._broker.url).replace(LONG, "time.sleep(2)")
        code += f"\napp.conf.task_default_queue = {self._broker.queue!r}\n"
        (self._directory / "shop.py").write_text(code.replace('"world.txt"', repr(str(self.world))))

    @property
    def world(self) -> Path:
        """The file that stands for the world."""
        return self._directory / "world.txt"

    def follow(self, session: Block) -> None:
        """Type the commands of a block, and look whether what is shown comes."""
        for command, shown in _exchanges(session):
            self._type(command, shown)

    def _type(self, command: str, shown: str) -> None:
        words = shlex.split(command, comments=True)
        if words[0] == "cat":
            wait_until(lambda: self.world.exists() and self.world.read_text() == shown, message=shown)
        elif words[0] == "rm":
            self._stop()
            self.world.unlink()
        elif words[0] == "pkill":
            self._stop()
        elif words[0] == "python":
            assert run(words[2], self._directory, self._env) == shown
        else:
            assert words[:5] == ["celery", "-A", "shop", "worker", "--concurrency=1"], command
            self._worker = self._workers.start(app="shop", concurrency=1, env=self._env)

    def _stop(self) -> None:
        assert self._worker is not None
        self._worker.kill()


def _exchanges(session: Block) -> list[tuple[str, str]]:
    """The commands of a block, each with what is shown after it."""
    found: list[tuple[str, str]] = []
    for is_command, lines in groupby(session.text.splitlines(), key=lambda line: line.startswith("$ ")):
        if is_command:
            found += [(line.removeprefix("$ "), "") for line in lines]
        else:
            found[-1] = (found[-1][0], "".join(f"{line}\n" for line in lines))
    return found


@pytest.fixture
def reader(tmp_path: Path, workers: Workers, database_url: str, broker: Broker) -> Reader:
    """A reader in an empty folder."""
    return Reader(tmp_path, workers, database_url, broker)


def test_the_tutorial(reader: Reader) -> None:
    """The plain order stays where it was killed; the durable one is shipped, reserved once; its id starts it once."""
    plain, killed, again = [block for block in blocks("console", page=PAGE) if "world.txt" in block.text]
    reader.write(durable=False)
    reader.follow(plain)
    reader.write(durable=True)
    reader.follow(killed)
    reader.follow(again)
