"""The embedded servers start, stop, keep their data, and leave nothing behind."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
import redis

from celery_durable.testing.servers import EmbeddedBroker, EmbeddedPostgres
from tests.fixtures.fix_wait import wait_until

OWNER = """
import sys, threading
from celery_durable.testing.servers import EmbeddedBroker, EmbeddedPostgres
with EmbeddedPostgres() as postgres, EmbeddedBroker() as broker:
    print(postgres.pid, broker.pid, postgres._directory, broker._directory, flush=True)
    threading.Event().wait()
"""


@pytest.fixture(scope="module")
def postgres() -> Iterator[EmbeddedPostgres]:
    with EmbeddedPostgres() as server:
        yield server


@pytest.fixture(scope="module")
def broker() -> Iterator[EmbeddedBroker]:
    with EmbeddedBroker() as server:
        yield server


def query(server: EmbeddedPostgres, text: str) -> object:
    with psycopg.connect(server.url, autocommit=True) as connection:
        cursor = connection.execute(text)
        row = cursor.fetchone() if cursor.description else None
        return row[0] if row else None


def test_postgres_is_durable_and_roomy(postgres: EmbeddedPostgres) -> None:
    assert query(postgres, "SHOW fsync") == "on"
    assert query(postgres, "SHOW max_connections") == "200"
    assert str(query(postgres, "SHOW server_version")).startswith("18")


@pytest.mark.parametrize("mode", ["fast", "immediate", "smart"])
def test_postgres_keeps_its_data_and_url_over_a_restart(postgres: EmbeddedPostgres, mode: str) -> None:
    url = postgres.url
    query(postgres, f"CREATE TABLE kept_{mode} AS SELECT 42 AS answer")
    postgres.restart(mode)
    assert query(postgres, f"SELECT answer FROM kept_{mode}") == 42
    assert postgres.url == url


def test_postgres_refuses_connections_while_stopped(postgres: EmbeddedPostgres) -> None:
    postgres.stop()
    assert postgres.pid is None
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(postgres.url)
    postgres.start()
    postgres.start()
    assert query(postgres, "SELECT 1") == 1


def test_smart_stop_waits_for_its_clients(postgres: EmbeddedPostgres) -> None:
    with psycopg.connect(postgres.url), pytest.raises(TimeoutError):
        postgres.stop("smart", timeout=0.2)
    wait_until(lambda: postgres.pid is None, message="the last client has gone")
    postgres.start()
    assert query(postgres, "SELECT 1") == 1


def test_an_older_postgres_is_a_choice() -> None:
    with EmbeddedPostgres(version=16) as server:
        assert str(query(server, "SHOW server_version")).startswith("16")
    with pytest.raises(ValueError, match="no PostgreSQL 12"):
        EmbeddedPostgres(version=12)


def test_a_given_directory_is_kept() -> None:
    with EmbeddedBroker() as lender:
        directory = lender._directory / "a" / ("long" * 20)
        directory.parent.mkdir()
        lender._directory.chmod(0o755)
        with EmbeddedPostgres(directory) as server:
            query(server, "CREATE TABLE kept AS SELECT 1")
        with EmbeddedPostgres(directory) as server:
            assert query(server, "SELECT count(*) FROM kept") == 1


def test_an_installation_in_a_private_home_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root runs PostgreSQL as somebody else")
    monkeypatch.setattr("celery_durable.testing.servers._reachable", lambda path: "site-packages" not in path.parts)
    with EmbeddedPostgres() as server:
        assert "site-packages" not in psutil.Process(server.pid).exe()
        assert psutil.Process(server.pid).uids().effective != 0
        directories = list(server._temporary)
    assert not any(Path(directory).exists() for directory in directories)


def test_broker_forgets_everything_but_its_port(broker: EmbeddedBroker) -> None:
    url = broker.url
    with redis.Redis.from_url(url) as client:
        client.set("key", "value")
        broker.flush()
        assert client.dbsize() == 0
        client.set("key", "value")
        broker.stop()
        broker.start()
        assert broker.url == url
        assert client.dbsize() == 0


def test_a_killed_broker_can_be_started_again(broker: EmbeddedBroker) -> None:
    os.kill(broker.pid or 0, signal.SIGKILL)
    wait_until(lambda: broker.pid is None, message="the broker's death is noticed")
    broker.start()
    broker.flush()


def test_servers_start_no_thread_and_live_in_a_session_of_their_own() -> None:
    before = threading.active_count()
    with EmbeddedBroker() as broker:
        assert threading.active_count() == before
        assert os.getsid(broker.pid or 0) != os.getsid(0)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_owner(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        pids, directories = _parse(owner.stdout.readline())
        assert all(psutil.pid_exists(pid) for pid in pids)
        owner.send_signal(number)
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), message="the servers are gone")
    wait_until(lambda: not any(path.exists() for path in directories), message="their files are gone")


def _parse(line: str) -> tuple[list[int], list[Path]]:
    words = line.split()
    return [int(word) for word in words[:2]], [Path(word) for word in words[2:]]


@pytest.mark.parametrize("server", [EmbeddedPostgres, EmbeddedBroker])
def test_missing_wheels_are_one_sentence(
    server: type[EmbeddedPostgres | EmbeddedBroker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install celery-durable\[testing\]$"):
        server()
