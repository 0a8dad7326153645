"""What can be a step, and what a wrapped task keeps of itself."""

from __future__ import annotations

import asyncio
import functools
from decimal import Decimal
from typing import Any

import pytest
from asgiref.sync import markcoroutinefunction
from celery import Celery, shared_task
from celery.exceptions import MaxRetriesExceededError, Retry

import celery_durable as durable
from celery_durable.exceptions import ConfigurationError


@pytest.fixture
def app() -> Celery:
    app = Celery("shop", broker="memory://", set_as_current=False)
    durable.install(app, database_url="postgresql://user@host/database")
    return app


def fetch(url: str = "") -> str:
    return url


class Client:
    def fetch(self, url: str) -> str:
        return url

    async def afetch(self, url: str) -> str:
        return url

    @classmethod
    def make(cls, url: str) -> str:
        return url

    @staticmethod
    def read(url: str) -> str:
        return url

    def __call__(self, url: str) -> str:
        return url


class AsyncClient:
    async def __call__(self, url: str) -> str:
        return url


async def afetch(url: str = "") -> str:
    return url


@functools.wraps(fetch)
def decorated(url: str) -> str:
    return fetch(url)


@markcoroutinefunction
def marked(url: str) -> Any:
    return afetch(url)


@functools.wraps(afetch)
def passed_on(url: str) -> Any:
    return afetch(url)


SYNC: list[tuple[Any, str]] = [
    (fetch, f"{__name__}.fetch"),
    (decorated, f"{__name__}.fetch"),
    (functools.partial(fetch), f"{__name__}.fetch"),
    (functools.lru_cache(fetch), f"{__name__}.fetch"),
    (Client().fetch, f"{__name__}.Client.fetch"),
    (Client.make, f"{__name__}.Client.make"),
    (Client.read, f"{__name__}.Client.read"),
    (Client(), f"{__name__}.Client"),
    (str, "builtins.str"),
    (str.strip, "builtins.str.strip"),
    ("{}".format, "builtins.str.format"),
    (durable.as_step(fetch), f"{__name__}.fetch"),
]
ASYNC: list[tuple[Any, str]] = [
    (afetch, f"{__name__}.afetch"),
    (functools.partial(afetch), f"{__name__}.afetch"),
    (Client().afetch, f"{__name__}.Client.afetch"),
    (marked, f"{__name__}.marked"),
    (AsyncClient(), f"{__name__}.AsyncClient"),
    (AsyncClient().__call__, f"{__name__}.AsyncClient.__call__"),
    (durable.as_step(afetch), f"{__name__}.afetch"),
]


@pytest.mark.parametrize(("target", "name"), SYNC, ids=lambda value: value if isinstance(value, str) else "")
def test_any_callable_is_a_step(target: Any, name: str) -> None:
    """Outside a workflow it is the plain call that it was; its name says where it comes from."""
    step = durable.as_step(target)
    assert (step.name, step.durable_spec.is_async) == (name, False)
    assert step("url") == "url"
    assert asyncio.run(step.acall("url")) == "url"


@pytest.mark.parametrize(("target", "name"), ASYNC, ids=lambda value: value if isinstance(value, str) else "")
def test_any_coroutine_function_is_an_async_step(target: Any, name: str) -> None:
    """A call of it is awaited."""
    step = durable.as_step(target)
    assert (step.name, step.durable_spec.is_async) == (name, True)
    assert asyncio.run(step("url")) == "url"
    assert asyncio.run(step.acall("url")) == "url"


def test_a_decorated_coroutine_function_is_called_as_it_is() -> None:
    """Whether it returns a coroutine only the call shows; acall awaits it."""
    step = durable.as_step(passed_on)
    assert (step.name, step.durable_spec.is_async) == (f"{__name__}.afetch", False)
    assert asyncio.run(step("url")) == "url"
    assert asyncio.run(step.acall("url")) == "url"


def test_a_class_is_a_step_that_makes_instances() -> None:
    """Whether they can be kept is up to the serializer."""
    assert durable.as_step(Decimal)("1.5") == Decimal("1.5")
    assert durable.as_step(AsyncClient).durable_spec.is_async is False


@pytest.mark.parametrize("made", [True, False], ids=["made", "not made yet"])
def test_a_workflow_is_no_step(app: Celery, made: bool) -> None:
    """It is a child, and started as one."""
    task: Any = app.task(base=durable.Workflow, shared=False, name="order")(fetch)
    if made:
        app.finalize()
        with pytest.raises(ConfigurationError, match=r"order is a workflow, .* start it with delay\(\)"):
            durable.as_step(task)
    else:
        step = durable.as_step(task)
        with pytest.raises(ConfigurationError, match=r"order is a workflow, .* start it with delay\(\)"):
            step("url")


# Tasks that Celery makes later.


def test_a_task_that_is_not_made_yet_stays_so(app: Celery) -> None:
    """Making it would read the configuration before the app's own module has given it."""
    task: Any = app.task(shared=False, name="old", autoretry_for=(OSError,))(fetch)
    step, sized = durable.as_step(task), durable.as_step(task, name="sized", max_retries=1)
    assert not task.__evaluated__()
    assert not app.configured
    app.conf.task_serializer = "pickle"
    assert (step.name, sized.name, repr(sized)) == ("old", "sized", "<step sized>")
    assert step("url") == "url"
    assert task.serializer == "pickle"
    assert sized.durable_spec.retry.autoretry_for == (OSError,)


def test_a_shared_task_waits_for_its_app(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looking at it would make Celery's default app, or finalize the current one."""
    monkeypatch.setattr("celery._state._on_app_finalizers", set())
    later = Celery("later", set_as_current=False)
    monkeypatch.setattr("celery._state._tls.current_app", later)
    step = durable.as_step(shared_task(name="shared")(fetch), max_retries=0)
    assert not later.finalized
    assert (step("url"), step.name) == ("url", "shared")
    later.close()


def test_wrong_option_names_are_told_at_once_all_the_same(app: Celery) -> None:
    """They need no look at the task."""
    with pytest.raises(ConfigurationError, match="Did you mean max_retries"):
        durable.as_step(app.task(shared=False, name="old")(fetch), max_retry=1)


# What a task keeps of itself.


def test_without_options_celery_itself_retries_a_task(app: Celery) -> None:
    """The step's own policy has nothing to add."""

    @app.task(name="old", shared=False, autoretry_for=(OSError,), max_retries=9, retry_backoff=3, throws=(KeyError,))
    def old() -> None: ...

    spec = durable.as_step(old).durable_spec
    assert (spec.name, spec.retry.autoretry_for, spec.throws) == ("old", (), (KeyError,))
    assert (spec.retry.max_retries, spec.retry.asked_retries) == (9, 9)


def test_with_options_the_policy_is_ours_and_the_tasks(app: Celery) -> None:
    """Options win over the task's own, of which the others stay."""

    @app.task(name="old", shared=False, autoretry_for=(OSError,), max_retries=9, retry_backoff=3, retry_backoff_max=40)
    def old() -> None: ...

    retry = durable.as_step(old, retry_backoff=0.5, retry_if=bool).durable_spec.retry
    assert (retry.autoretry_for, retry.max_retries, retry.retry_backoff_max) == ((OSError,), 9, 40.0)
    assert (retry.retry_backoff, retry.retry_if) == (0.5, bool)


def test_a_step_stays_what_it_is(app: Celery) -> None:
    """as_step of a step gives it another name, or other options; it has no arithmetic of Celery's."""
    charge: Any = app.task(
        base=durable.Step, shared=False, name="charge", autoretry_for=(OSError,), retry_backoff=0.5, soft_time_limit=5
    )(fetch)
    app.finalize()
    assert durable.as_step(charge).durable_spec == charge.durable_spec
    again = durable.as_step(durable.as_step(charge, name="again", max_retries=7), retry_backoff_max=9).durable_spec
    assert (again.name, again.soft_time_limit) == ("again", 5.0)
    assert (again.retry.max_retries, again.retry.retry_backoff, again.retry.retry_backoff_max) == (7, 0.5, 9.0)
    assert durable.as_step(charge)("url") == "url"


@pytest.mark.parametrize("base", [None, durable.Step], ids=["plain", "step"])
def test_retries_of_a_task_that_nothing_triggers_warn(app: Celery, base: Any) -> None:
    """As they do where a task is declared."""
    task: Any = app.task(base=base, shared=False, name="old")(fetch)
    app.finalize()
    with pytest.warns(UserWarning, match=r"The step old .* add autoretry_for=\(Exception,\)"):
        durable.as_step(task, max_retries=5)
    durable.as_step(task, max_retries=5, autoretry_for=OSError)


def test_a_partial_of_a_task_is_a_plain_function(app: Celery) -> None:
    """Celery's retries need the task itself."""

    @app.task(name="old", shared=False, bind=True, autoretry_for=(OSError,))
    def old(self: Any, url: str) -> str:
        if not url:
            raise OSError("empty")
        return url

    step = durable.as_step(functools.partial(old, "url"))
    assert step.name.endswith("<locals>.old")
    assert step() == "url"
    with pytest.raises((OSError, Retry, MaxRetriesExceededError)):
        durable.as_step(functools.partial(old, ""))()


def test_delay_of_a_wrapped_task_sends_the_task(app: Celery) -> None:
    """Under its own name, with its own options."""
    task: Any = app.task(shared=False, name="old")(fetch)
    app.conf.task_always_eager = True
    assert durable.as_step(task, name="other", max_retries=0).delay("url").get() == "url"
    assert durable.as_step(task).s("url").task == "old"
