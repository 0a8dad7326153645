"""Task options: defaults, wrong values, names, and warnings about what can't be meant."""

from __future__ import annotations

import functools
import math
import re
import warnings
import weakref
from collections.abc import AsyncIterator, Iterator
from datetime import timedelta
from typing import Any

import pytest
from celery import Celery, _state
from celery.exceptions import CDeprecationWarning

import celery_durable as durable
from celery_durable.engine.retry import RetryPolicy
from celery_durable.exceptions import ConfigurationError
from celery_durable.options import check_name, for_celery, step_spec

LINE_TO_WRITE = r"add autoretry_for=\(Exception,\)"


@pytest.fixture
def app() -> Celery:
    app = Celery("shop", set_as_current=False)
    durable.install(app, database_url="postgresql://user@host/database")
    return app


@pytest.fixture
def own_shared_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared tasks of this test are no other test's."""
    monkeypatch.setattr(_state, "_on_app_finalizers", set())
    monkeypatch.setattr(_state, "_apps", weakref.WeakSet())


def fetch(url: str = "") -> str:
    return url


class Fetcher:
    def __call__(self) -> str:
        return "called"

    def fetch(self) -> str:
        return "fetched"


def policy(**options: Any) -> RetryPolicy:
    return step_spec("fetch", options, fetch).retry


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


def test_max_retries_alone_means_any_exception_for_functions(app: Celery, own_shared_tasks: None) -> None:
    """@step and as_step read as they look."""
    assert durable.as_step(fetch, max_retries=2).durable_spec.retry.autoretry_for == (Exception,)
    durable.step(max_retries=2)(fetch)
    assert app.tasks[f"{__name__}.fetch"].durable_spec.retry.autoretry_for == (Exception,)
    assert durable.as_step(fetch, max_retries=0).durable_spec.retry.autoretry_for == ()
    assert durable.as_step(fetch, max_retries=2, retry_if=bool).durable_spec.retry.autoretry_for == ()


@pytest.mark.parametrize("options", [{"max_retries": 5}, {"retry_backoff": True}, {"retry_jitter": False}], ids=repr)
def test_a_task_that_is_never_retried_warns(app: Celery, options: dict[str, Any]) -> None:
    """Retry options without a condition are a mistake that Celery keeps to itself."""
    with pytest.warns(UserWarning, match=LINE_TO_WRITE):
        policy_of(app, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"autoretry_for": (OSError,), "max_retries": 5},
        {"retry_if": bool},
        {"max_retries": 0, "retry_jitter": False},
    ],
    ids=repr,
)
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
        {"retry_kwargs": {"max_retires": 5}},
        {"retry_kwargs": "max_retries=5"},
        {"retry_backoff": "fast"},
        {"retry_backoff_rate": 0.99},
        {"retry_backoff_rate": 0},
        {"retry_backoff_rate": -2},
        {"retry_backoff_rate": math.nan},
        {"retry_backoff_rate": "2"},
        {"retry_backoff_rate": math.inf},
        {"retry_backoff_rate": True},
        {"retry_backoff_max": None},
        {"retry_jitter": "no"},
        {"retry_jitter": 5},
        {"autoretry_for": ("OSError",)},
        {"autoretry_for": OSError("an instance")},
        {"autoretry_for": (int,)},
        {"dont_autoretry_for": int},
        {"retry_if": "always"},
        {"soft_time_limit": "5"},
        {"soft_time_limit": True},
        {"cancellable": "yes"},
        {"atomic": ""},
        {"atomic": 1},
        {"serializer": 5},
        {"compression": b"gzip"},
    ],
    ids=repr,
)
def test_a_value_that_cannot_be_meant_is_an_error(options: dict[str, Any]) -> None:
    """It names the option."""
    (option,) = options
    with pytest.raises(ConfigurationError, match=option if option != "retry_kwargs" else "max_retries"):
        step_spec("fetch", options, fetch)


def test_wrong_retry_kwargs_of_a_task_are_the_same_error(app: Celery) -> None:
    """Looking for durations in what is no mapping comes first there."""
    with pytest.raises(ConfigurationError, match="retry_kwargs must be a mapping"):
        policy_of(app, retry_kwargs="max_retries=5")


def test_retry_kwargs_may_hold_what_a_message_has() -> None:
    """Celery's retry passes on whatever it doesn't know itself."""
    assert policy(retry_kwargs={"max_retries": 7, "queue": "slow", "priority": 3}).asked_retries == 7


def test_the_jitter_of_an_unmodified_task_goes_by_its_truth(app: Celery) -> None:
    """As it does for Celery."""
    old: Any = app.task(shared=False, name="old", autoretry_for=(OSError,), retry_jitter=0)(fetch)
    assert durable.as_step(old, retry_backoff=2.0).durable_spec.retry.retry_jitter is False


@pytest.mark.parametrize("value", [0, -1, timedelta(0), timedelta(-1), math.nan, math.inf, -math.inf], ids=repr)
@pytest.mark.parametrize(
    "option", ["retry_backoff", "retry_backoff_max", "default_retry_delay", "soft_time_limit", "time_limit"]
)
def test_a_duration_is_positive_and_finite(option: str, value: Any) -> None:
    """Only the delay between tries may be none."""
    if option == "default_retry_delay" and value in (0, timedelta(0)):
        assert policy(default_retry_delay=value).default_retry_delay == 0
        return
    with pytest.raises(ConfigurationError, match=rf"{option} must be .* not {re.escape(repr_of(value))}"):
        step_spec("fetch", {option: value}, fetch)


def repr_of(duration: Any) -> str:
    return repr(duration.total_seconds() if isinstance(duration, timedelta) else duration)


@pytest.mark.parametrize("countdown", [-1, math.nan, math.inf, "soon"], ids=repr)
def test_the_countdown_of_retry_kwargs_is_a_duration_too(countdown: Any) -> None:
    """It is Celery's other place for the delay."""
    with pytest.raises(ConfigurationError, match="default_retry_delay"):
        policy(retry_kwargs={"countdown": countdown})


@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, "1 day", True], ids=repr)
def test_a_workflow_timeout_is_positive_and_finite(app: Celery, value: Any) -> None:
    """The error comes at registration, not with the first order."""
    with pytest.raises(ConfigurationError, match="workflow_timeout"):
        app.task(base=durable.Workflow, shared=False, workflow_timeout=value)(fetch).name  # noqa: B018 - evaluates it


@pytest.mark.parametrize("value", [-1, 1.5, "3", True], ids=repr)
def test_max_recovery_attempts_is_a_count(app: Celery, value: Any) -> None:
    """As for the timeout."""
    with pytest.raises(ConfigurationError, match="max_recovery_attempts"):
        app.task(base=durable.Workflow, shared=False, max_recovery_attempts=value)(fetch).name  # noqa: B018


@pytest.mark.parametrize(("soft", "hard"), [(5, 5), (6, 5), (timedelta(minutes=1), 59.5)], ids=repr)
def test_a_soft_limit_is_shorter_than_the_hard_one(soft: Any, hard: Any) -> None:
    """Else the process would be killed before the step is told."""
    with pytest.raises(ConfigurationError, match=r"soft_time_limit .* must be shorter than time_limit"):
        step_spec("fetch", {"soft_time_limit": soft, "time_limit": hard}, fetch)
    step_spec("fetch", {"soft_time_limit": 4.9, "time_limit": 5}, fetch)


def test_an_atomic_step_is_not_async() -> None:
    """Its transaction belongs to one thread."""

    async def transfer() -> None: ...

    with pytest.raises(ConfigurationError, match="can't be atomic and async"):
        durable.as_step(transfer, name="transfer", atomic=True)


def generator() -> Iterator[int]:
    yield 1


async def async_generator() -> AsyncIterator[int]:
    yield 1


class Yielding:
    def __call__(self) -> Iterator[int]:
        yield 1


GENERATORS: list[Any] = [generator, async_generator, functools.partial(generator), functools.lru_cache(generator)]


@pytest.mark.parametrize("target", [*GENERATORS, Yielding()], ids=lambda target: type(target).__name__)
def test_a_generator_is_no_step(target: Any) -> None:
    """Nobody would take its values."""
    with pytest.raises(ConfigurationError, match=r"A step can't be a generator, as .* is: return a list"):
        durable.as_step(target)


@pytest.mark.parametrize("function", [generator, async_generator])
@pytest.mark.parametrize("base", [durable.Step, durable.Workflow], ids=["step", "workflow"])
def test_a_generator_is_no_task_either(app: Celery, base: Any, function: Any) -> None:
    """The error comes at registration; of our own decorators at once, so that Celery doesn't keep the function."""
    with pytest.raises(ConfigurationError, match="can't be a generator"):
        app.task(base=base, shared=False)(function).name  # noqa: B018 - evaluates it
    shared = len(_state._on_app_finalizers)
    with pytest.raises(ConfigurationError, match="can't be a generator"):
        (durable.step if base is durable.Step else durable.workflow)(function)
    assert len(_state._on_app_finalizers) == shared


def test_wrong_options_of_our_decorators_are_refused_at_once() -> None:
    """Celery would keep the function, and every app that is made later would fail."""
    shared = len(_state._on_app_finalizers)
    with pytest.raises(ConfigurationError, match="max_retries"):
        durable.step(max_retries=-1)(fetch)
    with pytest.raises(ConfigurationError, match="workflow_timeout"):
        durable.workflow(workflow_timeout=0)(fetch)
    assert len(_state._on_app_finalizers) == shared


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


@pytest.mark.parametrize(
    ("options", "read"),
    [
        ({"retry_backoff": timedelta(seconds=0.5)}, {"retry_backoff": 0.5}),
        ({"retry_backoff_max": timedelta(minutes=1)}, {"retry_backoff_max": 60.0}),
        ({"default_retry_delay": timedelta(minutes=1)}, {"default_retry_delay": 60.0}),
        ({"retry_kwargs": {"countdown": timedelta(minutes=1)}}, {"retry_kwargs": {"countdown": 60.0}}),
        ({"autoretry_for": OSError, "throws": [KeyError]}, {"autoretry_for": (OSError,), "throws": (KeyError,)}),
        (
            {"dont_autoretry_for": {OSError}, "max_retries": None},
            {"dont_autoretry_for": (OSError,), "max_retries": None},
        ),
    ],
    ids=repr,
)
def test_celery_can_read_what_we_can(app: Celery, options: dict[str, Any], read: dict[str, Any]) -> None:
    """A step declared with a timedelta, or with one exception class, works as a plain task, too."""
    assert for_celery(options) == read
    task: Any = app.task(base=durable.Step, shared=False, **{"autoretry_for": (OSError,), **options})(fetch)
    assert {name: getattr(task, name) for name in read} == read
    assert task.apply(("url",)).get() == "url"


def test_a_class_may_declare_its_options(app: Celery) -> None:
    """A task as a class, with options as attributes."""

    class Fetch(durable.Step[[], str]):
        name = "fetch"
        autoretry_for = OSError
        default_retry_delay = timedelta(seconds=2)

        def run(self) -> str:
            return "fetched"

    task = app.register_task(Fetch())
    assert (task.autoretry_for, task.default_retry_delay) == ((OSError,), 2.0)
    assert task.durable_spec.retry.default_retry_delay == 2.0
    assert task() == "fetched"


# Names of options.


@pytest.mark.parametrize(
    ("base", "given", "meant"),
    [
        (durable.Step, "retry_backof", "retry_backoff"),
        (durable.Step, "retry_iff", "retry_if"),
        (durable.Step, "max_retry", "max_retries"),
        (durable.Step, "auto_retry_for", "autoretry_for"),
        (durable.Step, "cancelable", "cancellable"),
        (durable.Step, "soft_timelimit", "soft_time_limit"),
        (durable.Step, "throw", "throws"),
        (durable.Workflow, "workflow_timout", "workflow_timeout"),
        (durable.Workflow, "max_recovery_attempt", "max_recovery_attempts"),
        (durable.Workflow, "ignore_results", "ignore_result"),
        (durable.Workflow, "ack_late", "acks_late"),
    ],
)
def test_a_misspelt_option_of_a_task_warns(app: Celery, base: Any, given: str, meant: str) -> None:
    """Celery takes any name, and nobody would read it; at registration the nearest one is suggested."""
    with pytest.warns(UserWarning, match=f"fetch has the option {given}, which nobody reads: did you mean {meant}"):
        app.task(base=base, shared=False, name="fetch", **{given: 1})(fetch).name  # noqa: B018 - evaluates it


def test_a_misspelt_option_of_our_decorators_warns(app: Celery, own_shared_tasks: None) -> None:
    """When the function becomes a task of an app."""
    durable.step(retry_backof=0.5)(fetch)
    with pytest.warns(UserWarning, match="did you mean retry_backoff"):
        app.finalize()


@pytest.mark.parametrize("base", [durable.Step, durable.Workflow])
@pytest.mark.parametrize(
    "option",
    [
        "tenant", "description", "label", "queues", "owner", "unique_on", "retry_policy", "rate_limit_key",
        "expires_at", "time_limit_hours", "retry_count", "timeout", "names", "lock_expiry", "schema", "on_success",
        "queue", "routing_key", "priority", "store_eager_result", "acks_on_failure", "immutable", "shadow_name",
        "_retry_backof",
    ],
)  # fmt: skip
def test_an_attribute_of_the_apps_own_does_not_warn(app: Celery, base: Any, option: str) -> None:
    """Custom attributes are a habit of Celery's users, and Celery's own options aren't misspelt ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message=".*task attribute is deprecated")
        warnings.filterwarnings("ignore", category=CDeprecationWarning)
        app.task(base=base, shared=False, name="fetch", **{option: None})(fetch).name  # noqa: B018 - evaluates it


def test_attributes_and_methods_of_task_classes_do_not_warn(app: Celery) -> None:
    """What the app's own base calls its things is its affair, also where a task sets them."""

    class Tenant(durable.Step[..., Any]):
        abstract = True
        max_tries = 5

        def retry_iff(self) -> None: ...

    class Fetch(Tenant):
        name = "fetch"

        def retry_backof(self) -> None: ...
        def run(self) -> None: ...

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        app.register_task(Fetch())
        app.task(base=Tenant, shared=False, name="other", max_tries=6)(fetch).name  # noqa: B018 - evaluates it


@pytest.mark.parametrize(
    ("option", "hint"),
    [
        ("retry_backof", " Did you mean retry_backoff?"),
        ("max_retry", " Did you mean max_retries?"),
        ("RETRY_IF", " Did you mean retry_if?"),
        ("queue", ""),
        ("bind", ""),
    ],
)
def test_as_step_knows_its_options(app: Celery, option: str, hint: str) -> None:
    """Any other is an error, with the nearest one; also for a task."""
    for target in (fetch, app.task(shared=False, name="old")(fetch)):
        with pytest.raises(ConfigurationError, match=re.escape(f"There is no step option {option}.{hint}") + "$"):
            durable.as_step(target, **{option: 1})


# Steps as plain tasks.


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"retry_if": bool}, "retry_if is not asked, only autoretry_for counts"),
        ({"retry_backoff": True, "retry_backoff_rate": 3.0}, "retry_backoff_rate is 2"),
        ({"retry_backoff": 0.5}, "retry_backoff is 1 s"),
        ({"retry_backoff": 2.5}, "retry_backoff is 2 s"),
        ({"retry_backoff": timedelta(seconds=1.5)}, "retry_backoff is 1 s"),
        ({"retry_backoff_max": 0.5}, "retry_backoff_max is 0 s"),
        ({"cancellable": True}, "cancellable means nothing"),
        ({"atomic": True}, "atomic means nothing, and durable.current.connection isn't there"),
        ({"retry_if": bool, "cancellable": True}, "counts; cancellable means nothing"),
    ],
    ids=repr,
)
def test_a_step_sent_as_a_plain_task_tells_what_is_lost(app: Celery, options: dict[str, Any], told: str) -> None:
    """Once per step, and what Celery will do instead; the warning points at the caller."""
    app.conf.task_always_eager = True
    task: Any = app.task(base=durable.Step, shared=False, name="fetch", autoretry_for=(OSError,), **options)(fetch)
    with pytest.warns(RuntimeWarning, match=f"The step fetch is sent as a plain Celery task, where .*{told}") as caught:
        assert [task.delay(url).get() for url in ("a", "b")] == ["a", "b"]
    (warning,) = caught
    assert warning.filename == __file__


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"retry_backoff": 2.0, "retry_backoff_max": 30, "retry_jitter": False, "retry_backoff_rate": 2},
        {"max_retries": None, "default_retry_delay": 0.5, "retry_kwargs": {"countdown": 0.5}},
        {"soft_time_limit": 0.5, "time_limit": 1, "throws": (KeyError,), "serializer": "json", "cancellable": False},
    ],
    ids=repr,
)
def test_a_step_that_loses_nothing_does_not_warn(app: Celery, options: dict[str, Any]) -> None:
    """What Celery knows, it does."""
    app.conf.task_always_eager = True
    task: Any = app.task(base=durable.Step, shared=False, autoretry_for=(OSError,), **options)(fetch)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        task.delay("url")


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
        durable.step(Fetcher())


def test_a_plain_function_as_a_step_has_no_queue() -> None:
    """delay() of it says what to do."""
    with pytest.raises(ConfigurationError, match="has no queue"):
        durable.as_step(fetch).delay()


async def is_worth_it(error: BaseException) -> bool:
    """As one might write it for an async step."""
    return False


def test_a_predicate_cannot_be_async() -> None:
    """Its coroutine would always be true."""
    with pytest.raises(ConfigurationError, match="isn't async"):
        durable.as_step(print, retry_if=is_worth_it)


def test_max_retries_of_a_bound_step_is_for_its_own_retry(app: Celery) -> None:
    """No warning: self.retry goes by it, as in any bound task."""

    @app.task(base=durable.Step, bind=True, max_retries=5, default_retry_delay=1)
    def post(self: Any) -> None: ...

    assert post.durable_spec.retry.asked_retries == 5
