"""Task options: defaults, wrong values, names, and warnings about what can't be meant."""

from __future__ import annotations

import functools
import math
import warnings
from datetime import timedelta
from typing import Any

import pytest
from celery import Celery

import celery_durable as durable
from celery_durable.engine.retry import RetryPolicy
from celery_durable.exceptions import ConfigurationError
from celery_durable.options import check_name, step_spec

LINE_TO_WRITE = r"add autoretry_for=\(Exception,\)"


@pytest.fixture
def app() -> Celery:
    app = Celery("shop", set_as_current=False)
    durable.install(app, database_url="postgresql://user@host/database")
    return app


def fetch(url: str = "") -> str:
    return url


class Fetcher:
    def __call__(self) -> str:
        return "called"

    def fetch(self) -> str:
        return "fetched"


def policy(**options: Any) -> RetryPolicy:
    return step_spec("fetch", options).retry


def policy_of(app: Celery, **options: Any) -> RetryPolicy:
    task: Any = app.task(base=durable.Step, shared=False, **options)(fetch)
    return task.durable_spec.retry


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, 0),
        ({"autoretry_for": (OSError,)}, 3),
        ({"autoretry_for": ()}, 0),
        ({"retry_if": bool}, 3),
        ({"retry_backoff": True}, 3),
        ({"retry_backoff": False}, 0),
        ({"retry_backoff_max": 5}, 0),
        ({"autoretry_for": (OSError,), "max_retries": 10}, 10),
        ({"autoretry_for": (OSError,), "max_retries": 0}, 0),
        ({"autoretry_for": (OSError,), "max_retries": None}, None),
        ({"autoretry_for": (OSError,), "retry_kwargs": {"max_retries": 7}}, 7),
    ],
    ids=repr,
)
def test_how_often_a_step_is_retried(options: dict[str, Any], expected: int | None) -> None:
    """Three times once any retry option is given, else never; a number that is given wins."""
    assert policy(**options).max_retries == expected


def test_a_declared_task_has_the_same_defaults(app: Celery) -> None:
    """Celery's own default of max_retries=3 isn't taken for the author's."""
    assert policy_of(app, name="plain").max_retries == 0
    assert policy_of(app, name="retried", autoretry_for=(OSError,)).max_retries == 3
    assert policy_of(app, name="for ever", autoretry_for=(OSError,), max_retries=None).max_retries is None


def test_max_retries_alone_means_any_exception_for_functions() -> None:
    """@step and as_step read as they look."""
    assert durable.as_step(fetch, max_retries=2)._spec.retry.autoretry_for == (Exception,)
    declared: Any = durable.step(max_retries=2)(functools.wraps(fetch)(lambda url: url))
    assert declared.durable_spec.retry.autoretry_for == (Exception,)
    assert durable.as_step(fetch, max_retries=0)._spec.retry.autoretry_for == ()
    assert durable.as_step(fetch, max_retries=2, retry_if=bool)._spec.retry.autoretry_for == ()


@pytest.mark.parametrize("options", [{"max_retries": 5}, {"retry_backoff": True}, {"retry_jitter": False}], ids=repr)
def test_a_task_that_is_never_retried_warns(app: Celery, options: dict[str, Any]) -> None:
    """Retry options without a condition are a mistake that Celery keeps to itself."""
    with pytest.warns(UserWarning, match=LINE_TO_WRITE):
        policy_of(app, **options)


@pytest.mark.parametrize("options", [{}, {"autoretry_for": (OSError,), "max_retries": 5}, {"retry_if": bool}], ids=repr)
def test_a_task_that_is_meant_does_not_warn(app: Celery, options: dict[str, Any]) -> None:
    """No warning without a reason."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy_of(app, **options)


@pytest.mark.parametrize(
    ("given", "seconds"),
    [(True, 1.0), (0.25, 0.25), (3, 3.0), (timedelta(minutes=1), 60.0), (None, None), (False, None)],
    ids=repr,
)
def test_retry_backoff_is_a_base_in_seconds(given: Any, seconds: float | None) -> None:
    """True is one second, as in Celery."""
    assert policy(retry_backoff=given).retry_backoff == seconds


def test_the_delay_without_backoff_is_celerys() -> None:
    """default_retry_delay, or the countdown of retry_kwargs."""
    assert policy(autoretry_for=(OSError,)).default_retry_delay == 180
    assert policy(default_retry_delay=0).default_retry_delay == 0
    assert policy(default_retry_delay=5, retry_kwargs={"countdown": 2}).default_retry_delay == 2


@pytest.mark.parametrize(
    "options",
    [
        {"max_retries": -1},
        {"max_retries": 1.5},
        {"max_retries": "3"},
        {"max_retries": True},
        {"retry_kwargs": {"max_retries": -1}},
        {"retry_backoff": -1},
        {"retry_backoff": "fast"},
        {"retry_backoff": math.nan},
        {"retry_backoff_rate": 0.5},
        {"retry_backoff_rate": "2"},
        {"retry_backoff_rate": math.inf},
        {"retry_backoff_rate": True},
        {"retry_backoff_max": 0},
        {"retry_backoff_max": None},
        {"default_retry_delay": -1},
        {"autoretry_for": ("OSError",)},
        {"autoretry_for": OSError("an instance")},
        {"autoretry_for": (int,)},
        {"dont_autoretry_for": int},
        {"retry_if": "always"},
        {"soft_time_limit": 0},
        {"soft_time_limit": "5"},
        {"soft_time_limit": True},
    ],
    ids=repr,
)
def test_a_value_that_cannot_be_meant_is_an_error(options: dict[str, Any]) -> None:
    """It names the option."""
    (option,) = options
    with pytest.raises(ConfigurationError, match=option if option != "retry_kwargs" else "max_retries"):
        step_spec("fetch", options)


@pytest.mark.parametrize("classes", [OSError, [OSError], {OSError}, (OSError,)], ids=repr)
def test_exception_classes_come_alone_or_in_any_collection(classes: Any) -> None:
    """As Celery takes them."""
    assert policy(autoretry_for=classes).autoretry_for == (OSError,)


def test_a_soft_limit_is_seconds_or_a_timedelta(app: Celery) -> None:
    """Celery itself gets seconds, for when the step runs as a task."""
    task: Any = app.task(base=durable.Step, shared=False, soft_time_limit=timedelta(seconds=90))(fetch)
    assert (task.durable_spec.soft_time_limit, task.soft_time_limit) == (90.0, 90.0)


def test_an_app_wide_limit_of_tasks_is_none_of_steps() -> None:
    """task_soft_time_limit is meant for whole tasks."""
    app = Celery("shop", set_as_current=False)
    app.conf.task_soft_time_limit = 60
    task: Any = app.task(base=durable.Step, shared=False)(fetch)
    assert task.durable_spec.soft_time_limit is None


def test_a_workflow_timeout_is_checked_where_it_is_declared(app: Celery) -> None:
    """The error comes at registration, not with the first order."""
    with pytest.raises(ConfigurationError, match="workflow_timeout"):
        app.task(base=durable.Workflow, shared=False, workflow_timeout="1 day")(fetch).name  # noqa: B018 - evaluates it


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (fetch, f"{__name__}.fetch"),
        (functools.partial(fetch, "url"), f"{__name__}.fetch"),
        (Fetcher().fetch, f"{__name__}.Fetcher.fetch"),
        (Fetcher(), f"{__name__}.Fetcher"),
        (len, "builtins.len"),
    ],
    ids=["function", "partial", "method", "object", "builtin"],
)
def test_a_step_is_named_after_what_it_calls(target: Any, name: str) -> None:
    """The default is module.qualname, of a partial what it wraps."""
    assert durable.as_step(target).name == name


def test_a_lambda_must_be_given_a_name() -> None:
    """Every lambda has the same one."""
    with pytest.raises(ConfigurationError, match="must be given a name"):
        durable.as_step(lambda: 1)
    with pytest.raises(ConfigurationError, match="must be given a name"):
        durable.as_step(functools.partial(lambda x: x, 1))
    assert durable.as_step(lambda: 1, name="one").name == "one"


@pytest.mark.parametrize("name", ["", "a\x00b", "x" * 256, "a\ud800b", "a#2"], ids=ascii)
def test_a_name_that_cannot_be_stored_is_refused(name: str) -> None:
    """At the declaration, before anything has run under it."""
    with pytest.raises(ConfigurationError):
        check_name(name)


def test_a_name_may_have_255_characters_of_any_script() -> None:
    """Postgres counts characters, not bytes."""
    check_name("ü" * 255)


@pytest.mark.parametrize("target", [5, "fetch", None], ids=repr)
def test_only_callables_are_steps(target: Any) -> None:
    """Calling the result of as_step's target instead of passing it is a common slip."""
    with pytest.raises(ConfigurationError, match="must be callable"):
        durable.as_step(target)


def test_only_functions_are_declared_as_tasks() -> None:
    """The error says what to use for anything else."""
    with pytest.raises(ConfigurationError, match="as_step"):
        durable.step(Fetcher())  # type: ignore[arg-type]


def test_an_existing_task_keeps_its_options_and_celerys_arithmetic(app: Celery) -> None:
    """as_step(task) takes over name and retries exactly."""

    @app.task(name="old", shared=False, autoretry_for=(OSError,), max_retries=9, retry_backoff=3, retry_backoff_max=40)
    def old() -> None: ...

    spec = durable.as_step(old)._spec
    assert spec.name == "old"
    assert spec.retry.autoretry_for == (OSError,)
    assert (spec.retry.max_retries, spec.retry.retry_backoff, spec.retry.retry_backoff_max) == (9, 3.0, 40.0)
    assert spec.retry.whole_seconds


def test_a_plain_function_as_a_step_has_no_queue() -> None:
    """delay() of it says what to do."""
    with pytest.raises(ConfigurationError, match="has no queue"):
        durable.as_step(fetch).delay()
