"""The settings of one app: read once, validated, frozen."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from datetime import timedelta
from typing import Any

from .exceptions import ConfigurationError
from .seal import PayloadCodec, is_codec
from .states import CANCELLED, DEAD, FAILURE, SUCCESS
from .text import is_storable, qualname_of

#: The longest duration in seconds, 100 years: later times are beyond what Python can read from Postgres.
LONGEST = 100 * 365.25 * 86400
#: How long what has finished is kept, in seconds: longer than any broker keeps a message.
_RETENTION = 14 * 86400.0


@dataclass(frozen=True)
class Config:
    """What ``install(app, …)`` or ``app.conf.durable_*`` say; durations are in seconds."""

    #: Where the workflows live: ``postgresql://user:password@host:5432/database``, without a driver in the scheme.
    #: Required, or ``durable_database``. Celery hides it from its reports, as DATABASE is in its name.
    database_url: str = field(default="", repr=False)
    #: In a Django project, in place of the URL: the alias in ``DATABASES`` of the Postgres where the workflows live,
    #: such as ``"default"``.
    database: str | None = None
    #: The Postgres schema of all tables; at most 63 bytes. Several apps may share one.
    schema: str = "celery_durable"
    #: Bring the schema up to date on first use. ``False`` leaves it to ``celery -A proj durable migrate``, and an old
    #: schema is an error.
    auto_migrate: bool = True
    #: How often a worker says that it lives.
    heartbeat_interval: float = 5.0
    #: A worker that was silent for so long is taken for dead. At least three heartbeats.
    lease: float = 15.0
    #: How often the elected worker sweeps; the beat task comes in whole seconds.
    recovery_interval: float = 5.0
    #: Queue of the beat task; ``None`` is the app's default queue.
    recovery_queue: str | None = None
    #: So many crashes without a completed step between them are survived; one more, and the workflow is DEAD. A task
    #: may have its own ``max_recovery_attempts``.
    max_recovery_attempts: int = 10
    #: A longer sleep or wait for a retry gives the worker back; ``0`` gives it back for each.
    suspend_after: float = 5.0
    #: A message that wasn't taken for so long may have been lost, and is sent again when later ones of its queue were
    #: taken, or nothing moves. Doubles each time, up to an hour.
    republish_after: float = 60.0
    #: Finished workflows are kept for so long: 14 days. Longer than any broker keeps a message. All of them, or by
    #: final state, in a mapping such as ``{"SUCCESS": 86400, "DEAD": None}``: ``None`` is for ever, and a state that
    #: isn't named is kept for 14 days.
    retention: float | Mapping[str, float | None] = _RETENTION
    #: kombu serializer of results and step values; ``None`` is the app's ``task_serializer``. It must be in
    #: ``accept_content``.
    serializer: str | None = None
    #: Largest message, result or step value, serialized, in bytes: 16 MiB.
    max_payload: int = 16 * 1024 * 1024
    #: An object with ``encode(data)`` and ``decode(data)``, or its dotted path: it encodes, or encrypts, whatever of a
    #: workflow is stored or sent.
    payload_codec: PayloadCodec | str | None = field(default=None, repr=False)
    #: What a replay does that calls a step with other arguments: ``"error"`` stops in DEAD, ``"warn"`` logs and goes on
    #: with the kept outcome.
    nondeterminism: str = "error"
    #: Show each executed step as a task in Flower and ``celery events``, arguments and results included: ``"auto"``
    #: while the worker sends task events (``-E``, ``celery control enable_events``, Flower), ``True`` always, ``False``
    #: never. A running attempt keeps what it began with. With a ``durable_payload_codec`` no value is shown.
    step_events: str | bool = "auto"
    #: Set it if the database is reached through pgbouncer or another pooler, in any of its modes.
    pgbouncer: bool = False

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Config:
        """Build from names without prefix; raise ConfigurationError for a wrong name or value."""
        config = cls.of_values(settings)
        config._check_lease()
        return config

    @classmethod
    def of_values(cls, settings: Mapping[str, Any]) -> Config:
        """Build from a part of the settings: each is checked, but not whether they fit those that aren't here."""
        check_names(settings)
        given = {name: value for name, value in settings.items() if value is not None}
        config = cls(**{name: _converted(name, value) for name, value in given.items()})
        config._check_choices()
        config._check_database()
        return config

    @property
    def kept(self) -> dict[str, float | None]:
        """For how many seconds workflows are kept, by their final state; None: for ever."""
        if isinstance(self.retention, Mapping):
            return {state: self.retention.get(state, _RETENTION) for state in _BY_AGE}
        return {state: self.retention for state in _BY_AGE}

    def _check_lease(self) -> None:
        if self.lease < 3 * self.heartbeat_interval:
            raise ConfigurationError(
                f"durable_lease ({self.lease:g} s) must be at least three times "
                f"durable_heartbeat_interval ({self.heartbeat_interval:g} s), "
                "else a single late heartbeat looks like a dead worker."
            )

    def _check_database(self) -> None:
        if self.database is not None and self.database_url:
            raise ConfigurationError(
                "durable_database names a Django alias and durable_database_url a database: set one of them."
            )

    def _check_choices(self) -> None:
        for name, allowed in _CHOICES.items():
            given = getattr(self, name)
            # By type, too: to Python 1 is True.
            if not any(type(given) is type(choice) and given == choice for choice in allowed):
                choices = ", ".join(repr(choice) for choice in allowed)
                raise ConfigurationError(f"durable_{name} is {given!r}; choose one of {choices}.")


_FIELDS = {each.name: each for each in fields(Config)}
_CHOICES: dict[str, tuple[str | bool, ...]] = {
    "nondeterminism": ("error", "warn"),
    "step_events": ("auto", True, False),
}
_DURATIONS = {
    "heartbeat_interval",
    "lease",
    "recovery_interval",
    "suspend_after",
    "republish_after",
}
#: Final states, the most frequent one first.
_BY_AGE = (SUCCESS, FAILURE, CANCELLED, DEAD)
_MAY_BE_ZERO = {"suspend_after"}


def check_names(names: Iterable[str]) -> None:
    """Raise ConfigurationError for a name that isn't a setting, with the nearest one."""
    for name in names:
        if name not in _FIELDS:
            nearest = difflib.get_close_matches(name.lower(), _FIELDS, n=1)
            hint = f" Did you mean durable_{nearest[0]}?" if nearest else ""
            raise ConfigurationError(f"There is no setting durable_{name}.{hint}")


def setting_names() -> list[str]:
    """Return all names of settings, without their prefix."""
    return list(_FIELDS)


def seconds(value: Any, what: str, *, zero: bool = False) -> float:
    """Return a duration given as seconds or timedelta; raise ConfigurationError if it can't be one."""
    if isinstance(value, timedelta):
        value = value.total_seconds()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigurationError(f"{what} must be seconds or a timedelta, not {value!r}.")
    if not 0 <= value <= LONGEST or (value == 0 and not zero):
        raise ConfigurationError(f"{what} must be a positive duration of at most 100 years, not {value!r}.")
    return float(value)


def duration(value: Any, what: str) -> float:
    """Return a duration that a call was given, which may be zero; raise ValueError if it can't be one."""
    try:
        return seconds(value, what, zero=True)
    except ConfigurationError as error:
        raise ValueError(str(error)) from None


def timeout_of(value: Any) -> float | None:
    """Return a timeout that a call was given; None: it waits for ever. Raises ValueError."""
    return None if value is None else duration(value, "timeout")


def _converted(name: str, value: Any) -> Any:
    setting = f"durable_{name}"
    if name in _DURATIONS:
        return seconds(value, setting, zero=name in _MAY_BE_ZERO)
    if name == "retention":
        return _retention(value, setting)
    default = _FIELDS[name].default
    if name in _CHOICES:
        return value
    if name == "payload_codec":
        return _codec(value, setting)
    if isinstance(default, bool):
        return _typed(value, bool, setting, "True or False")
    if isinstance(default, int):
        return _positive(_typed(value, int, setting, "a whole number"), setting)
    if name == "schema":
        return _identifier(_typed(value, str, setting, "a string"), setting)
    return _typed(value, str, setting, "a string")


def _retention(value: Any, setting: str) -> float | dict[str, float | None]:
    if not isinstance(value, Mapping):
        return seconds(value, setting)
    for state in value:
        if state not in _BY_AGE:
            nearest = difflib.get_close_matches(str(state).upper(), _BY_AGE, n=1)
            hint = f" Did you mean {nearest[0]}?" if nearest else ""
            raise ConfigurationError(
                f"{setting} is by final state, {', '.join(_BY_AGE)}: {state!r} is none of them.{hint}"
            )
    return {state: None if age is None else seconds(age, f"{setting}[{state!r}]") for state, age in value.items()}


def _typed(value: Any, wanted: type, setting: str, description: str) -> Any:
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        # The value itself stays out of the text: it may be a connection string.
        raise ConfigurationError(f"{setting} must be {description}, not a value of type {type(value).__name__}.")
    return value


def _codec(value: Any, setting: str) -> Any:
    """Return it as it was given: what a dotted path names is imported when it is first needed."""
    if is_codec(value) or (isinstance(value, str) and value):
        return value
    kind = f"the class {qualname_of(value)}" if isinstance(value, type) else f"a value of type {type(value).__name__}"
    raise ConfigurationError(
        f"{setting} must be an object with the methods encode(data) and decode(data), or its dotted path, not {kind}."
    )


def _identifier(value: str, setting: str) -> str:
    # Postgres cuts longer names off, and the parameters of our statements are marked by a percent sign.
    if not is_storable(value) or not 1 <= len(value.encode()) <= 63 or "%" in value:
        raise ConfigurationError(
            f"{setting} must be a name of 1 to 63 bytes without NUL, lone surrogates and percent, not {value!r}."
        )
    if value.startswith("pg_"):
        raise ConfigurationError(f"{setting} is {value!r}, but Postgres keeps names with pg_ for itself.")
    return value


def _positive(value: int, setting: str) -> int:
    if value < 1:
        raise ConfigurationError(f"{setting} must be at least 1, not {value}.")
    return value
