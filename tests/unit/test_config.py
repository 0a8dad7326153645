"""Settings: read from install() and from app.conf, checked by name, type and value."""

from __future__ import annotations

import dataclasses
import math
import re
from datetime import timedelta
from typing import Any

import pytest
from celery import Celery

import celery_durable as durable
from celery_durable.config import Config, seconds, setting_names
from celery_durable.exceptions import ConfigurationError
from celery_durable.installation import installed_on
from celery_durable.states import FINAL
from tests.fixtures.codecs import Encrypted

URL = "postgresql://user@host/database"
DURATIONS = ["heartbeat_interval", "lease", "recovery_interval", "suspend_after", "republish_after"]
STRINGS = ["database_url", "database", "schema", "recovery_queue", "serializer"]
BOOLEANS = ["auto_migrate", "pgbouncer"]
COUNTS = ["max_recovery_attempts", "max_payload"]
CHOICES = ["nondeterminism", "step_events"]

WRONG = [
    *[(name, value) for name in DURATIONS for value in ("5", True, -1, math.nan, math.inf, [5])],
    *[("retention", value) for value in ("5", True, -1, 0, math.nan, math.inf, [5])],
    *[(name, 0) for name in DURATIONS if name != "suspend_after"],
    *[(name, value) for name in STRINGS for value in (5, b"text", ["text"])],
    *[(name, value) for name in BOOLEANS for value in (1, "yes", "False")],
    *[(name, value) for name in COUNTS for value in (0, -1, 1.5, "10", True)],
    *[(name, value) for name in CHOICES for value in ("perhaps", 7, [])],
    *[("step_events", value) for value in (0, 1, "True", "on")],
    *[("payload_codec", value) for value in (5, b"package.module:codec", "", [], Encrypted)],
    *[("schema", value) for value in ("", "a\x00b", "a\ud800b", "100%", "x" * 64, "ü" * 32, "pg_durable")],
]


class Named:
    """A settings object, as Django's is."""

    def __init__(self, **settings: Any) -> None:
        vars(self).update(settings)


def new_app(**conf: Any) -> Celery:
    app = Celery("shop", set_as_current=False)
    app.conf.update(conf)
    return app


def with_namespace(**settings: Any) -> Celery:
    app = Celery("shop", set_as_current=False)
    app.config_from_object(Named(**settings), namespace="CELERY")
    return app


def read(app: Celery, **settings: Any) -> Config:
    durable.install(app, **settings)
    return installed_on(app).config


def test_every_setting_is_tried_with_wrong_values() -> None:
    """The list of wrong values leaves out no setting."""
    assert {name for name, _ in WRONG} == set(setting_names())


@pytest.mark.parametrize(("name", "value"), WRONG, ids=repr)
def test_a_wrong_value_is_refused_at_once(name: str, value: Any) -> None:
    """install() raises an error that names the setting."""
    with pytest.raises(ConfigurationError, match=f"durable_{name}"):
        durable.install(new_app(), **{"database_url": URL, name: value})


@pytest.mark.parametrize(("name", "value"), WRONG, ids=repr)
def test_a_wrong_value_in_app_conf_is_refused_when_it_is_read(name: str, value: Any) -> None:
    """What only app.conf says is checked as strictly."""
    app = new_app(**{"durable_database_url": URL, f"durable_{name}": value})
    with pytest.raises(ConfigurationError, match=f"durable_{name}"):
        read(app)


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("leese", "lease"),
        ("databse_url", "database_url"),
        ("heartbeat", "heartbeat_interval"),
        ("retension", "retention"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_nearest_one(name: str, meant: str) -> None:
    """A slip of the pen is found, wherever the setting was written."""
    message = f"no setting durable_{name}. Did you mean durable_{meant}"
    with pytest.raises(ConfigurationError, match=message):
        durable.install(new_app(), database_url=URL, **{name: 5})
    with pytest.raises(ConfigurationError, match=message):
        read(new_app(**{f"durable_{name}": 5}), database_url=URL)
    with pytest.raises(ConfigurationError, match=message):
        read(with_namespace(**{f"CELERY_DURABLE_{name.upper()}": 5}), database_url=URL)


def test_an_unknown_name_without_a_near_one_is_refused_too() -> None:
    """No hint is better than a wild one."""
    with pytest.raises(ConfigurationError, match=r"no setting durable_zzzzzz\.$"):
        durable.install(new_app(), database_url=URL, zzzzzz=1)


def test_settings_come_from_djangos_namespace() -> None:
    """CELERY_DURABLE_* is read where the app has the namespace CELERY."""
    config = read(with_namespace(CELERY_DURABLE_DATABASE_URL=URL, CELERY_DURABLE_LEASE=20, CELERY_TIMEZONE="UTC"))
    assert (config.database_url, config.lease) == (URL, 20.0)


def test_an_argument_wins_over_app_conf() -> None:
    """install() has the last word, app.conf comes before the default."""
    config = read(new_app(durable_lease=30, durable_schema="theirs"), database_url=URL, lease=timedelta(minutes=1))
    assert (config.lease, config.schema, config.retention) == (60.0, "theirs", 14 * 86400.0)


@pytest.mark.parametrize("value", ["auto", True, False])
def test_step_events_may_be_switched_or_left_to_the_worker(value: Any) -> None:
    """One setting that is a word or a truth value."""
    assert read(new_app(durable_step_events=value), database_url=URL).step_events is value


def test_none_means_the_default() -> None:
    """A setting that isn't set in an environment may be passed on as None."""
    assert read(new_app(), database_url=URL, lease=None, serializer=None) == Config(database_url=URL)


def test_a_lease_takes_three_heartbeats() -> None:
    """One late heartbeat must not look like a death."""
    assert read(new_app(), database_url=URL, lease=3, heartbeat_interval=1).lease == 3.0
    with pytest.raises(ConfigurationError, match=r"durable_lease \(2.9 s\) must be at least three times"):
        durable.install(new_app(), database_url=URL, lease=2.9, heartbeat_interval=1)
    with pytest.raises(ConfigurationError, match="at least three times"):
        read(new_app(durable_lease=5), database_url=URL)


def test_lease_and_heartbeat_may_come_from_two_places() -> None:
    """They are compared once both are known."""
    assert read(new_app(durable_heartbeat_interval=0.5), database_url=URL, lease=2).lease == 2.0
    with pytest.raises(ConfigurationError, match="at least three times"):
        read(new_app(durable_heartbeat_interval=1), database_url=URL, lease=2)


@pytest.mark.parametrize("value", [URL.encode(), 5, ["postgresql://user:hush@host"]], ids=repr)
def test_a_wrong_database_url_is_not_repeated(value: Any) -> None:
    """The value may hold a password, so the error says its type only."""
    with pytest.raises(ConfigurationError) as caught:
        durable.install(new_app(), database_url=value)
    assert "hush" not in str(caught.value)
    assert type(value).__name__ in str(caught.value)


def test_settings_are_frozen() -> None:
    """Nothing changes them after they were checked."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().lease = 1  # type: ignore[misc]


@pytest.mark.parametrize(("given", "expected"), [(2, 2.0), (0.5, 0.5), (timedelta(minutes=2), 120.0)], ids=str)
def test_durations_are_seconds_or_timedeltas(given: Any, expected: float) -> None:
    """Both spellings mean the same everywhere."""
    assert seconds(given, "it") == expected


def test_a_duration_may_be_zero_only_where_that_makes_sense() -> None:
    """Zero is a mistake for a lease, and a choice for suspend_after."""
    assert seconds(0, "it", zero=True) == 0.0
    with pytest.raises(ConfigurationError, match="it must be a positive"):
        seconds(timedelta(0), "it")


def test_retention_for_all() -> None:
    """One duration is every final state's."""
    assert set(Config.of_values({"retention": timedelta(days=1)}).kept.items()) == {(state, 86400.0) for state in FINAL}
    assert Config.of_values({"retention": None}).kept["DEAD"] == 14 * 86400.0


def test_retention_by_state() -> None:
    """Those that aren't named have the default; None is for ever."""
    config = Config.of_values({"retention": {"SUCCESS": 60, "FAILURE": timedelta(days=90), "DEAD": None}})
    assert config.kept == {"SUCCESS": 60.0, "FAILURE": 90 * 86400.0, "CANCELLED": 14 * 86400.0, "DEAD": None}


@pytest.mark.parametrize(
    ("retention", "told"),
    [
        ({"RUNNING": 60}, "durable_retention is by final state, SUCCESS, FAILURE, CANCELLED, DEAD: 'RUNNING' is none"),
        ({"failed": 60}, "Did you mean FAILURE?"),
        ({"success": 60}, "Did you mean SUCCESS?"),
        ({1: 60}, "1 is none of them."),
        ({"DEAD": 0}, "durable_retention['DEAD'] must be a positive duration"),
        ({"DEAD": "14 days"}, "durable_retention['DEAD'] must be seconds or a timedelta, not '14 days'"),
        ("14 days", "durable_retention must be seconds or a timedelta, not '14 days'"),
        (0, "durable_retention must be a positive duration"),
    ],
)
def test_a_wrong_retention(retention: Any, told: str) -> None:
    """The sentence names the state, and the nearest one."""
    with pytest.raises(ConfigurationError, match=re.escape(told)):
        Config.of_values({"retention": retention})
