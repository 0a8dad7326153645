"""No password is told, whatever fails and however loud the logs are."""

from __future__ import annotations

import logging
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psycopg
import pytest
from celery import Celery

import celery_durable as durable
from celery_durable.config import Config
from celery_durable.exceptions import ConfigurationError, DatabaseUnavailable
from celery_durable.installation import installed_on
from celery_durable.store import migrate
from celery_durable.testing.servers import EmbeddedPostgres
from tests.fixtures.proxy import PostgresProxy
from tests.fixtures.workers import ROOT

SECRET = "hush-7f3Kq9"
ROLE, PASSWORD = "keeper", f"{SECRET}-of-a-role"


def app_at(url: Any, **settings: Any) -> Celery:
    app = Celery("quiet", broker="memory://", set_as_current=False)
    durable.install(app, database_url=url, **settings)
    return app


def told(error: BaseException) -> str:
    """All that a tracker of errors shows of one, but for the frames of this test: its chain, and their variables."""
    pending, texts = [traceback.TracebackException.from_exception(error, capture_locals=True)], []
    while pending:
        shown = pending.pop()
        pending += [other for other in (shown.__cause__, shown.__context__) if other is not None]
        texts += [f"{frame.name}: {frame.locals}" for frame in shown.stack if frame.filename != __file__]
        texts += shown.format_exception_only()
    return "\n".join(texts)


@pytest.fixture(scope="module")
def guarded() -> Iterator[str]:
    """URL of a server that asks a role for its password."""
    with EmbeddedPostgres() as server:
        with psycopg.connect(server.url, autocommit=True) as connection:
            connection.execute(f"CREATE ROLE {ROLE} LOGIN SUPERUSER PASSWORD '{PASSWORD}'")
            row = connection.execute("SHOW hba_file").fetchone()
            assert row is not None
            Path(row[0]).write_text(f"local all {ROLE} scram-sha-256\nlocal all all trust\n")
            connection.execute("SELECT pg_reload_conf()")
        yield server.url


def as_role(url: str, password: str, database: str = "postgres", **query: str) -> str:
    """The URL of a role, with its password in it."""
    parts = urlsplit(url)
    more = "".join(f"&{name}={value}" for name, value in query.items())
    return f"postgresql://{ROLE}:{password}@/{database}?{parts.query}{more}"


def unreachable(guarded: str, proxy: PostgresProxy, tmp_path: Path) -> dict[str, str]:
    """URLs that can't work, each for a reason of its own."""
    sockets = dict(pair.split("=") for pair in urlsplit(guarded).query.split("&"))["host"].replace("%2F", "/")
    key = tmp_path / "key"
    key.write_text(SECRET)
    via_proxy = urlsplit(proxy.url)
    return {
        "no host": f"postgresql://user:{SECRET}@no.such.host.invalid/database",
        "no server": f"postgresql://user:{SECRET}@127.0.0.1:1/database",
        "keywords": f"host=127.0.0.1 port=1 user=user password={SECRET} dbname=database",
        "several hosts": f"postgresql://user:{SECRET}@127.0.0.1:1,127.0.0.1:2/database",
        "wrong password": as_role(guarded, f"{SECRET}-which-is-wrong"),
        "wrong database": as_role(guarded, PASSWORD, "nowhere"),
        "no TLS": via_proxy._replace(
            netloc=f"postgres:{SECRET}@{via_proxy.netloc.rpartition('@')[2]}", query="sslmode=require"
        ).geturl(),
        "no certificate": f"postgresql://user:{SECRET}@127.0.0.1:1/x?sslmode=verify-full&sslpassword={SECRET}"
        f"&sslkey={key}&sslrootcert={key}",
        "wrong option": as_role(guarded, PASSWORD, options="-c%20nothing%3Dat%20all"),
        "wrong port": f"host={sockets} port=9 user={ROLE} password={SECRET} dbname=postgres",
    }


@pytest.mark.parametrize(
    "why",
    [
        "no host", "no server", "keywords", "several hosts", "wrong password", "wrong database", "no TLS",
        "no certificate", "wrong option", "wrong port",
    ],
)  # fmt: skip
def test_no_failure_of_a_connection_tells_it(
    guarded: str, proxy: PostgresProxy, tmp_path: Path, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    """Neither the error, nor its chain with the variables of all frames, nor any log at its loudest."""
    caplog.set_level(logging.DEBUG)
    url = unreachable(guarded, proxy, tmp_path)[why]
    app = app_at(url)
    installation = installed_on(app)
    actions: dict[str, Callable[[], Any]] = {
        "status": lambda: installation.store.workflows.by_id("x", patience=0.1),
        "transaction": lambda: installation.store._database.transaction(patience=0).__enter__(),
        "one thread": lambda: installation.store_of_one_thread().workflows.by_id("x", patience=0),
        "migrate": lambda: migrate.migrate(installation.url()),
        "missing": lambda: migrate.missing_in(installation.url(), "celery_durable"),
        "listen": lambda: installation.listener().fileno(),
    }
    for name, action in actions.items():
        with pytest.raises(DatabaseUnavailable) as caught:
            action()
        assert SECRET not in told(caught.value), name
    assert SECRET not in caplog.text


#: Of each, something must be wrong, and the password must be in it.
WRONG_URLS = (
    f"postgresql+psycopg://user:{SECRET}@host/database",
    f"user:{SECRET}@host",
    f"postgresql://user:{SECRET}@host:port/database",
    f"postgresql://user:{SECRET}@host/database?sslmod=1",
    f"postgresql://user:{SECRET}@[::1/database",
    f"postgresql://user:a@{SECRET}@host/database",
    f"postgresql://user:a/{SECRET}@host/database",
    f"postgresql://user:1/{SECRET}@host/database",
    f"postgresql://user:%zz{SECRET}@host/database",
    f"postgresql://user:a b{SECRET}@host/database",
    f"postgresql://host/database?passwd={SECRET}",
    f"host=host password='{SECRET}",
    f"host=host password=a {SECRET}",
    f"host=host pasword={SECRET}",
    f"dbname='host=host password={SECRET}'",
    f"dbname='postgresql://user:{SECRET}@host/database'",
    f"mysql://user:{SECRET}@host/database",
    f"postgresql://user:{SECRET}\x00@host/database",
    f"postgresql://user:{SECRET}\ud800@host/database",
    f"postgresql://user:{SECRET}@host/database".encode(),
    [f"postgresql://user:{SECRET}@host/database"],
)


@pytest.mark.parametrize("url", WRONG_URLS, ids=range(len(WRONG_URLS)))
def test_no_malformed_url_is_repeated(url: Any) -> None:
    """Neither by install(), nor where the setting is read from app.conf."""
    with pytest.raises(ConfigurationError) as caught:
        app_at(url)
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None
    app = Celery("quiet", set_as_current=False)
    durable.install(app)
    app.conf.durable_database_url = url
    with pytest.raises(ConfigurationError) as caught:
        installed_on(app).store  # noqa: B018 - builds it
    assert SECRET not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    "settings",
    [
        {"lease": -1}, {"databse_url": f"postgresql://user:{SECRET}@host/x"}, {"database": "default"}, {"schema": ""},
        {"max_payload": f"postgresql://user:{SECRET}@host/x"}, {"retention": 0}, {"serializer": 5},
    ],
    ids=lambda settings: next(iter(settings)),
)  # fmt: skip
def test_a_wrong_setting_beside_it_tells_only_of_itself(settings: dict[str, Any]) -> None:
    """A URL under a mistyped name isn't repeated either."""
    with pytest.raises(ConfigurationError) as caught:
        app_at(f"postgresql://user:{SECRET}@host/database", **settings)
    assert SECRET not in str(caught.value)


def test_nothing_shows_it_by_its_repr() -> None:
    """Neither the settings, nor what is made of them; the settings can be pickled all the same."""
    app = app_at(f"postgresql://user:{SECRET}@host/database")
    installation = installed_on(app)
    parts = [
        installation, installation.config, installation.store, installation.engine, installation.listener(), app,
        installation.codec, installation.url(), {"url": installation.url()}, app.conf,
    ]  # fmt: skip
    for part in parts:
        assert SECRET not in repr(part), type(part)
    assert pickle.loads(pickle.dumps(installation.config)) == installation.config
    assert SECRET in installation.url()
    assert Config(database_url=SECRET) != Config()


def test_no_failure_of_a_migration_tells_it(guarded: str, caplog: pytest.LogCaptureFixture) -> None:
    """A role that may do nothing is told what it may not."""
    caplog.set_level(logging.DEBUG)
    with psycopg.connect(guarded, autocommit=True) as connection:
        connection.execute(f"CREATE ROLE nobody LOGIN PASSWORD '{SECRET}'")
        connection.execute("CREATE DATABASE bare")
    url = as_role(guarded, SECRET, "bare").replace(ROLE, "nobody")
    with pytest.raises(durable.exceptions.SchemaVersionError) as caught:
        migrate.migrate(installed_on(app_at(url)).url())
    assert SECRET not in told(caught.value)
    with pytest.raises(durable.exceptions.SchemaVersionError) as caught:
        durable.list_workflows(app=app_at(url))
    assert SECRET not in told(caught.value)
    assert SECRET not in caplog.text


def celery(env: dict[str, str], *args: str) -> str:
    """The whole output of a command of the shop, at its loudest."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "ignore", "-m", "celery", "-A", "tests.fixtures.apps.shop", *args],
        cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.parametrize("why", ["wrong password", "malformed"])
def test_no_command_tells_it(guarded: str, tmp_path: Path, why: str) -> None:
    """An error of `celery durable` is a line, without traceback and password."""
    urls = {"wrong password": as_role(guarded, SECRET), "malformed": f"postgresql://{ROLE}:a/{SECRET}@host/database"}
    service = tmp_path / "pg_service.conf"
    service.write_text(f"[quiet]\nhost=127.0.0.1\nport=1\npassword={SECRET}\n")
    passfile = tmp_path / "pgpass"
    passfile.write_text(f"*:*:*:*:{SECRET}")  # libpq warns of its rights
    env = {
        "DATABASE_URL": urls[why], "BROKER_URL": "memory://", "PGPASSWORD": SECRET, "PGSERVICEFILE": str(service),
        "PGPASSFILE": str(passfile), "LEDGER": str(tmp_path / "ledger"),
    }  # fmt: skip
    said = celery(env, "durable", "migrate")
    assert "durable_database_url" in said
    assert SECRET not in said
    if why == "wrong password":
        said = celery({**env, "DATABASE_URL": "service=quiet"}, "durable", "migrate")
        assert "can't be reached" in said
        assert SECRET not in said
