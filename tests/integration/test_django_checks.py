"""What `manage.py check` says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
from celery import Celery
from django.core.checks import CheckMessage
from django.test import modify_settings, override_settings

import celery_durable as durable
from celery_durable import installation
from tests.fixtures.fix_bakery import Bakery
from tests.fixtures.fix_django import configure_django, enter

configure_django()

from celery_durable.contrib.django.checks import check_settings  # noqa: E402 - its module needs Django's settings

NOWHERE = "postgresql://nobody@127.0.0.1:1/nothing"
Make = Callable[[], Celery | None]


@pytest.fixture(autouse=True)
def only_this_app(monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tests' apps live until they are collected."""
    monkeypatch.setattr(installation, "_apps", WeakSet())


@pytest.fixture
def database() -> Iterator[Callable[..., None]]:
    """Sets what DATABASES says of the default alias."""
    changed: dict[str, Any] = {}

    def set_database(**settings: Any) -> None:
        from django.db import connections

        old = connections["default"].settings_dict
        changed.update({name: old.get(name, False) for name in settings})
        enter("default", NOWHERE, **settings)

    yield set_database
    enter("default", NOWHERE, **changed)


def book() -> None: ...


def usual(**installed: Any) -> Celery:
    """An app that reads Django's settings, as it should."""
    app = Celery("shop", set_as_current=False)
    app.config_from_object("django.conf:settings", namespace="CELERY")
    durable.install(app, **installed)
    return app


def foreign(**installed: Any) -> Celery:
    """An app that doesn't."""
    app = Celery("shop", set_as_current=False)
    durable.install(app, **installed)
    return app


def found(make: Make = usual, **settings: Any) -> dict[str, str]:
    """What each finding says, by its id."""
    with override_settings(**settings):
        installation._apps.clear()
        app = make()
        findings: list[CheckMessage] = check_settings(None)
        del app
    said = {str(each.id).removeprefix("celery_durable."): f"{each.msg} {each.hint}" for each in findings}
    assert len(said) == len(findings)
    return said


def test_the_command(tmp_path: Path) -> None:
    """`manage.py check` contacts no database, finds nothing in a good project, and fails for an error."""
    bakery = Bakery(NOWHERE, tmp_path)
    assert "no issues" in bakery.manage("check")
    done = bakery.run(["manage.py", "check"], CELERY_DURABLE_DATABASE="lite")
    assert done.returncode == 1
    assert "celery_durable.E002" in done.stderr


def test_the_default_database_is_no_postgres(tmp_path: Path) -> None:
    """That matters to steps that are atomic there, but not to workflows that live in another alias."""
    databases = {
        "default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"},
        "durable": {"ENGINE": "django.db.backends.postgresql", "NAME": "x"},
    }
    bakery = Bakery(NOWHERE, tmp_path)
    done = bakery.run(["manage.py", "check"], DATABASES=databases, CELERY_DURABLE_DATABASE="durable")
    assert "1 issue" in done.stderr
    assert "celery_durable.E005) The step orders.tasks.bake is atomic='default'" in done.stderr


def test_tasks_that_can_not_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W003: it is told, and neither this check nor any other command ends by it."""
    (tmp_path / "broken_shop").mkdir()
    (tmp_path / "broken_shop" / "__init__.py").touch()
    (tmp_path / "broken_shop" / "tasks.py").write_text("raise RuntimeError('out of flour')")
    monkeypatch.syspath_prepend(tmp_path)
    with modify_settings(INSTALLED_APPS={"append": "broken_shop"}):
        findings = found(CELERY_DURABLE_DATABASE="default")
    assert "out of flour" in findings["W003"]


def test_no_alias() -> None:
    """E001: the admin and `migrate` don't know where."""
    findings = found(lambda: foreign(database_url=NOWHERE), CELERY_DURABLE_DATABASE=None)
    assert findings.keys() == {"E001"}
    assert "CELERY_DURABLE_DATABASE isn't set" in findings["E001"]


@pytest.mark.parametrize(("alias", "told"), [("lite", "SQLite"), ("nowhere", "only default, lite")])
def test_an_alias_that_is_no_postgres(alias: str, told: str) -> None:
    """E002: of another vendor, or not there."""
    findings = found(CELERY_DURABLE_DATABASE=alias)
    assert findings.keys() == {"E002"}
    assert told in findings["E002"]


@pytest.mark.parametrize("more", [{"AUTOCOMMIT": False}, {"ATOMIC_REQUESTS": True}, {"CONN_MAX_AGE": None}])
def test_what_is_fine(database: Callable[..., None], more: dict[str, Any]) -> None:
    """Two aliases of one database, and however Django makes its transactions there."""
    database(**more)
    enter("other", NOWHERE)
    assert found() == {}


@pytest.mark.parametrize(
    ("setting", "told"),
    [({"CELERY_DURABLE_LEESE": 15}, "Did you mean durable_lease?"), ({"CELERY_DURABLE_LEASE": 1}, "three times")],
)
def test_a_setting_that_is_wrong(setting: dict[str, Any], told: str) -> None:
    """E003: with the nearest name, or what the value must be."""
    findings = found(**setting)
    assert findings.keys() == {"E003"}
    assert told in findings["E003"]


@pytest.mark.parametrize(
    ("installed", "setting"),
    [
        ({"database_url": NOWHERE}, "CELERY_DURABLE_DATABASE"),
        ({"database": "default", "schema": "mine"}, "CELERY_DURABLE_SCHEMA"),
    ],
)
def test_an_app_with_another_place(installed: dict[str, Any], setting: str) -> None:
    """E004: its workflows aren't where the admin and `migrate` look."""
    findings = found(lambda: foreign(**installed))
    assert findings.keys() == {"E004"}
    assert findings["E004"].startswith(setting)
    assert "config_from_object" in findings["E004"]


def test_an_atomic_step_of_a_database_that_is_not_there() -> None:
    """E005: by its name."""

    def make(alias: str) -> Celery:
        app = usual()
        app.task(book, base=durable.Step, atomic=alias, name="book", shared=False)
        app.finalize()
        return app

    for alias, told in (("lite", "SQLite"), ("nowhere", "no alias")):
        findings = found(lambda alias=alias: make(alias))
        assert findings.keys() == {"E005"}
        assert f"The step book is atomic='{alias}'" in findings["E005"]
        assert told in findings["E005"]
    assert found(lambda: make("default")) == {}


def test_pgbouncer(database: Callable[..., None]) -> None:
    """W001: as long as CELERY_DURABLE_PGBOUNCER isn't set."""
    database(DISABLE_SERVER_SIDE_CURSORS=True)
    findings = found()
    assert findings.keys() == {"W001"}
    assert "CELERY_DURABLE_PGBOUNCER = True" in findings["W001"]
    assert found(CELERY_DURABLE_PGBOUNCER=True) == {}


def test_no_app() -> None:
    """W002: the project's Celery app isn't imported by its own package."""
    findings = found(lambda: None)
    assert findings.keys() == {"W002"}
    assert "__init__.py" in findings["W002"]
