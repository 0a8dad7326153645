"""Fixtures for pytest: ``pytest_plugins = ["celery_durable.testing.plugin"]`` in a conftest, or ``-p`` with that name.

====================  ==================================================================================
``durable_postgres``  URL of a database made for this session, and dropped after it
``durable_app``       an app that is installed on it, with empty tables for each test
``durable_run``       ``durable_run(workflow, *args, **kwargs)`` runs it in this process, to its end
``durable_clock``     time, which then only passes when the test says so
====================  ==================================================================================

To be overridden: ``durable_settings``, ``durable_project_app``, ``durable_server``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from celery import Celery, _state
from celery.app.utils import find_app

import celery_durable as durable

from .. import broker
from ..config import Config, seconds
from ..exceptions import ConfigurationError
from ..installation import Installation, installed_on, registered
from ..store.testkit import TestKit, new_database
from .bench import Bench, on_bench
from .runs import Run, go_on, id_of, start

_INI = "durable_app"
#: Celery's own fixtures, of which the first counts; their broker is the tests' own.
_CELERYS = {"celery_app", "celery_session_app"}
_SERVERS = ("CELERY_BROKER_URL", "CELERY_BROKER_READ_URL", "CELERY_BROKER_WRITE_URL", "CELERY_RESULT_BACKEND")
#: No test needs a broker or a result backend, and none may reach those of the developer's settings.
_CONF = {
    "broker_url": "memory://localhost", "broker_read_url": None, "broker_write_url": None, "result_backend": None,
    "task_always_eager": False,
}  # fmt: skip


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the ini option that names the project's app."""
    parser.addini(_INI, "The Celery app that the fixture durable_app is, as celery -A takes it: proj.celery:app")


def pytest_itemcollected(item: pytest.Item) -> None:
    """Let the app be durable before Celery's own fixture starts a worker on it."""
    names = getattr(item, "fixturenames", [])
    if "durable_app" in names and "celery_worker" in names:
        names.remove("durable_app")
        names.insert(names.index("celery_worker"), "durable_app")


class DurableRun:
    """Runs workflows of the test's app in this process, without a worker or a broker."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def __call__(self, workflow: Any, /, *args: Any, **kwargs: Any) -> Run:
        """Start a workflow, and run it with its children until it has ended, or waits for something from outside.

        ``workflow`` may be a signature, too, which takes Celery's options: ``checkout.s(42).set(task_id="order-42")``;
        a chain of workflows; or what ``with_steps_done`` has returned. Waits for time are skipped, unless the test
        has the fixture ``durable_clock``.

        Returns ``outcome, history``: a WorkflowStatus, and what was recorded. Raises ConfigurationError for what isn't
        a workflow of the test's app, and what a start raises. What the workflow raises is ``outcome.error``.
        """
        return go_on(self._bench, *start(self._bench, workflow, args, kwargs))

    def go_on(self, workflow: Any) -> Run:
        """Go on with a workflow, by its run, handle or id: one that ``delay()`` has started, or that was resumed."""
        return go_on(self._bench, id_of(workflow))


class DurableClock:
    """The time of the test's workflows."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench

    def now(self) -> datetime:
        """Return the database's time."""
        return self._bench.kit.now()

    def advance(self, by: float | timedelta = 0, **units: float) -> None:
        """Let time pass, and run what becomes due: timers, retries, deadlines.

        ``by`` is in seconds, or a timedelta; ``units`` are those of a timedelta: ``advance(days=3)``. Raises
        ConfigurationError for a time that runs backwards.
        """
        parts = (by, timedelta(**units))
        self._bench.advance(sum(seconds(part, "The time to advance", zero=True) for part in parts))


@pytest.fixture(scope="session")
def durable_server() -> Iterator[str]:
    """URL of a server on which databases may be created: ``DATABASE_URL``, else an embedded one. May be overridden."""
    if url := os.environ.get("DATABASE_URL"):
        yield url
        return
    from .servers import EmbeddedPostgres

    with EmbeddedPostgres() as server:
        yield server.url


@pytest.fixture(scope="session")
def durable_postgres(durable_server: str) -> Iterator[str]:
    """URL of a database that is made for this session and dropped after it; each process of xdist has its own."""
    with new_database(durable_server) as url:
        yield url


@pytest.fixture
def durable_settings() -> Mapping[str, Any]:
    """Settings of durable_app, without their prefix. May be overridden."""
    return {}


@pytest.fixture
def durable_project_app(request: pytest.FixtureRequest) -> Celery | None:
    """The app that durable_app is; None for one of its own. May be overridden.

    That of Celery's fixtures ``celery_app`` or ``celery_session_app`` where the test has them, else the one that the
    ini option ``durable_app`` names.
    """
    for name in sorted(_CELERYS & set(request.fixturenames)):
        app: Celery = request.getfixturevalue(name)
        return app
    named = request.config.getini(_INI)
    return _app_named(named) if named else None


@pytest.fixture
def durable_app(
    request: pytest.FixtureRequest,
    durable_postgres: str,
    durable_settings: Mapping[str, Any],
    durable_project_app: Celery | None,
) -> Iterator[Celery]:
    """A Celery app with celery_durable on the database of the tests, which is empty; Celery's current app, too."""
    with ExitStack() as stack:
        app = durable_project_app
        if app is None:
            app = stack.enter_context(_new_app())
        elif not _CELERYS & set(request.fixturenames):
            stack.enter_context(_without_servers(app))
        stack.enter_context(_current(app))
        if registered(app) is None:
            durable.install(app)
        installation = installed_on(app)
        stack.enter_context(_pointed_at(installation, durable_postgres, durable_settings))
        TestKit(installation.store).clear()
        yield app


@pytest.fixture
def durable_bench(durable_app: Celery) -> Iterator[Bench]:
    """What durable_run and durable_clock share."""
    with on_bench(durable_app) as bench:
        yield bench


@pytest.fixture
def durable_run(durable_bench: Bench) -> DurableRun:
    """``durable_run(workflow, *args, **kwargs)``: run it here, and return ``outcome, history``."""
    return DurableRun(durable_bench)


@pytest.fixture
def durable_clock(durable_bench: Bench) -> DurableClock:
    """The time of the workflows, which passes by ``advance`` only."""
    durable_bench.check_clock()
    durable_bench.skips_time = False
    return DurableClock(durable_bench)


def _app_named(name: str) -> Celery:
    try:
        app = find_app(name)
    except Exception as error:
        raise ConfigurationError(
            f"The ini option {_INI} names {name!r}, which can't be imported ({type(error).__name__}: {error}): write "
            "it as celery -A takes it, such as proj.celery:app."
        ) from error
    if not isinstance(app, Celery):
        raise ConfigurationError(f"The ini option {_INI} names {name!r}, which is no Celery app.")
    return app


@contextmanager
def _new_app() -> Iterator[Celery]:
    app = Celery("durable_app", set_as_current=False)
    try:
        with _without_servers(app):
            yield app
    finally:
        app.close()


@contextmanager
def _current(app: Celery) -> Iterator[None]:
    """Make this Celery's current app, and the default one of other threads."""
    current, default = _state._tls.current_app, _state.default_app
    _state._set_current_app(app)
    _state.set_default_app(app)
    try:
        yield
    finally:
        _state._set_current_app(current)
        _state.set_default_app(default)


@contextmanager
def _without_servers(app: Celery) -> Iterator[None]:
    """Let the app send its messages to nobody, and its handles read Postgres."""
    with pytest.MonkeyPatch.context() as environment:
        for name in _SERVERS:
            environment.delenv(name, raising=False)
        app.conf.broker_url  # noqa: B018 - reads the app's configuration, which would replace what is set
        layer = app.conf.maps[0]
        usual = dict(layer)
        app.conf.update(_CONF)
        _forget_connections(app)
        try:
            yield
        finally:
            layer.clear()
            layer.update(usual)
            _forget_connections(app)


def _forget_connections(app: Celery) -> None:
    broker.forget(app)
    app._pool, app._backend_cache = None, None
    vars(app._local).pop("backend", None)
    if (amqp := vars(app).get("amqp")) is not None:
        amqp._producer_pool = None


@contextmanager
def _pointed_at(installation: Installation, url: str, settings: Mapping[str, Any]) -> Iterator[None]:
    """Let an installation have its workflows in another database for the block, and other settings."""
    config = _config(installation, url, settings)
    parts = vars(installation)
    usual: dict[str, Any] = {name: parts.pop(name) for name in ("config", "codec", "store", "engine") if name in parts}
    parts["config"] = config
    try:
        yield
    finally:
        if "store" in parts:
            parts["store"].close()
        for name in ("config", "codec", "store", "engine"):
            parts.pop(name, None)
        parts.update(usual)


def _config(installation: Installation, url: str, settings: Mapping[str, Any]) -> Config:
    """Return an app's settings with those of the test."""
    usual = replace(installation.read_config(), database=None, database_url=url)
    given = {field.name: getattr(usual, field.name) for field in fields(usual)} | dict(settings)
    if settings.get("database") is not None:
        given["database_url"] = ""
    return Config.from_settings(given)
