"""Celery's own integration tests of canvas, with plain tasks and with workflows: what passes and what can't."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import celery
import pytest

from tests.fixtures.workers import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.celerys_own]

FILES = ("t/integration/test_canvas.py", "t/integration/test_group_chains.py")
#: Hundreds of tasks in one canvas tell how fast a machine is; how a canvas works, the others tell.
LEFT_OUT = "not large"
PYTEST = (
    sys.executable, "-m", "pytest", "-p", "tests.fixtures.celerys_own", "-p", "no:cacheprovider", "-W", "ignore",
    "-o", "python_classes=test_*", "-k", LEFT_OUT,
)  # fmt: skip
#: Seconds for a run of all, on a machine that has other things to do.
TIMEOUT = 600


class Suite:
    """Their tests, unpacked in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, processes: int, nodes: Sequence[str] = FILES, database_url: str = "") -> Run:
        """Run them in so many processes; with a database every task is a workflow."""
        run = Run(self.folder / f"{name}.log", self.folder / f"{name}.xml")
        command = [*PYTEST, f"-n{processes}", "--maxschedchunk=1", f"--junitxml={run.report}", *nodes]
        env = environment(DURABLE_DATABASE_URL=database_url)
        with run.log.open("wb") as output:
            run.process = subprocess.Popen(
                command, cwd=self.folder, env=env, stdout=output, stderr=output, start_new_session=True
            )
        self._processes.append(run.process)
        return run

    def cases(self) -> list[str]:
        """The names of all cases."""
        answer = subprocess.run(
            [*PYTEST, "--collect-only", "-q", *FILES],
            check=False, cwd=self.folder, env=environment(), capture_output=True, text=True, timeout=100,
        )  # fmt: skip
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return [short(line) for line in answer.stdout.splitlines() if "::" in line]

    def close(self) -> None:
        """End what still runs."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


class Run:
    """One run of them."""

    process: subprocess.Popen[bytes]

    def __init__(self, log: Path, report: Path) -> None:
        self.log = log
        self.report = report

    def failures(self) -> dict[str, str | None]:
        """Wait for its end, and return all cases, each with why it failed or was skipped: None if it has passed."""
        self.process.wait(TIMEOUT)
        assert self.report.exists(), self.log.read_text(errors="replace")
        return {_node_id(case): _failure(case) for case in ElementTree.parse(self.report).iter("testcase")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tests of the Celery that is installed; their waits for what mustn't come are cut short."""
    folder = tmp_path_factory.mktemp("celery")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "celery", "--dest", str(folder), f"celery=={celery.__version__}"]
    answer = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    if answer.returncode != 0:
        pytest.fail(f"Celery's sources, where its own tests are, can't be downloaded:\n{answer.stderr}", pytrace=False)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as sources:
        for member in filter(tarfile.TarInfo.isfile, sources):
            path = member.name.partition("/")[2]
            content = sources.extractfile(member)
            if path.startswith("t/") and ".." not in path and content is not None:
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                (folder / path).write_bytes(content.read())
    canvas = folder / FILES[0]
    canvas.write_text(shortened(canvas.read_text()))
    return folder


@pytest.fixture
def suite(folder: Path) -> Iterator[Suite]:
    suite = Suite(folder)
    yield suite
    suite.close()


def shortened(source: str) -> str:
    """Their tests with a third of their patience, and with a fifth where nothing is to come."""
    source, number = re.subn(r"^TIMEOUT = 60$", "TIMEOUT = 20", source, flags=re.MULTILINE)
    assert number == 1
    in_vain = r"(with pytest\.raises\(TimeoutError\):\n(?:\s+#.*\n)*.*)timeout=10\b"
    return re.sub(in_vain, r"\g<1>timeout=2", source)


def test_what_passes_with_plain_tasks_passes_with_workflows(suite: Suite, database_url: str) -> None:
    """Every case but those that docs/canvas.md lists with the reason, and each of those differs indeed."""
    plain, durable = suite.start("plain", 4), suite.start("durable", 6, database_url=database_url)
    passed = [name for name, failure in plain.failures().items() if failure is None]
    assert len(passed) > 200, plain.log.read_text(errors="replace")
    failures = durable.failures()
    listed = {name for name in passed if any(each.fullmatch(short(name)) for each in exceptions())}
    unexplained = [name for name in passed if failures[name] is not None and name not in listed]
    if unexplained:
        # As Celery itself does with those that fail: some need a machine that has nothing else to do.
        failures |= suite.start("again", 1, unexplained, database_url).failures()
    assert {name: failures[name] for name in unexplained if failures[name] is not None} == {}
    assert [name for name in listed if failures[name] is None] == [], "they pass: docs/canvas.md lists them in vain"


def test_every_exception_is_a_case(suite: Suite) -> None:
    """No pattern in the table outlives what it speaks of."""
    cases = suite.cases()
    assert [each.pattern for each in exceptions() if not any(map(each.fullmatch, cases))] == []


def environment(**more: str) -> dict[str, str]:
    """Ours, without what a pytest tells its own processes."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    return {**ours, "PYTHONPATH": str(ROOT), **more}


def exceptions() -> list[re.Pattern[str]]:
    """The patterns in the table of docs/canvas.md."""
    text = (ROOT / "docs" / "canvas.md").read_text().partition("## Celery's own tests")[2].partition("\n## ")[0]
    cells = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| `")]
    patterns = [name for cell in cells for name in re.findall(r"`(.+?)`", cell)]
    assert patterns
    return [re.compile(".*".join(map(re.escape, pattern.split("*")))) for pattern in patterns]


def short(node_id: str) -> str:
    """The name as docs/canvas.md has it: class and function."""
    return node_id.partition("::")[2]


def _failure(case: ElementTree.Element) -> str | None:
    reasons = [str(child.get("message") or child.text) for child in case]
    return reasons[0] if reasons else None


def _node_id(case: ElementTree.Element) -> str:
    *path, test_class = case.get("classname", "").split(".")
    return f"{'/'.join(path)}.py::{test_class}::{case.get('name')}"
