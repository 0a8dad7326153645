"""Installing on real apps: which app is meant, whose task bases are kept, and what bad input costs nobody."""

from __future__ import annotations

import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from celery import Celery, Task, shared_task

import celery_durable as durable
from celery_durable import installation
from celery_durable.beat import TASK
from celery_durable.exceptions import (
    ConfigurationError,
    DatabaseUnavailable,
    NotInstalled,
    NotInWorkflow,
    PayloadTooLarge,
    SerializationError,
    WorkflowConflict,
    WorkflowNotFound,
)
from celery_durable.installation import find, installed_on, registered
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.proxy import PostgresProxy

pytestmark = pytest.mark.oldest

URL = "postgresql://user@host/database"
NOWHERE = "postgresql://user:hush@127.0.0.1:1/database"
COUNT = "SELECT count(*) FROM celery_durable.workflow"


@pytest.fixture(autouse=True)
def no_other_apps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Apps of other tests may still be alive: here only those of this test count, and none is current."""
    monkeypatch.setattr(installation, "_apps", type(installation._apps)())
    monkeypatch.setattr("celery._state.default_app", None)
    monkeypatch.setattr("celery._state._tls", type("Local", (threading.local,), {"current_app": None})())


@pytest.fixture
def shop(database_url: str, broker_url: str, queue_name: str) -> Celery:
    """An installed app on the test's servers."""
    return new_app("shop", database_url, broker=broker_url, queue=queue_name)


def new_app(
    name: str, url: str | None = URL, *, broker: str | None = None, queue: str = "celery", **settings: Any
) -> Celery:
    app = Celery(name, broker=broker, set_as_current=False)
    app.conf.task_default_queue = queue
    if url is not None:
        durable.install(app, database_url=url, **settings)
    return app


def messages_in(app: Celery, queue: str) -> int:
    with app.connection_for_read() as connection:
        try:
            return int(connection.default_channel.queue_declare(queue, passive=True).message_count)
        except connection.channel_errors:
            return 0  # there is no such queue yet


def order(*args: Any, **kwargs: Any) -> Any:
    return [args, kwargs]


def workflow_of(app: Celery, function: Any = order, name: str = "order", **options: Any) -> Any:
    return app.task(base=durable.Workflow, shared=False, name=name, **options)(function)


def step_of(app: Celery, function: Any = order, name: str = "step", **options: Any) -> Any:
    return app.task(base=durable.Step, shared=False, name=name, **options)(function)


# install()


def test_installing_twice_is_installing_once() -> None:
    """With the same settings, or with none."""
    app = new_app("shop", lease=30)
    first = installed_on(app)
    durable.install(app, database_url=URL, lease=30)
    durable.install(app)
    assert installed_on(app) is first
    assert list(app.steps["worker"]) == ["celery_durable.worker:NodeStep"]


def test_other_settings_at_a_second_call_are_an_error() -> None:
    """Nobody would know which of them hold."""
    app = new_app("shop", lease=30)
    for settings in ({"lease": 60}, {"database_url": URL}, {"database_url": URL, "lease": 30, "retention": 60}):
        with pytest.raises(ConfigurationError, match="already installed on this app with other settings"):
            durable.install(app, **settings)


@pytest.mark.parametrize("thing", [None, "shop", object()])
def test_only_an_app_can_be_installed_on(thing: Any) -> None:
    """A common slip is the settings' dictionary."""
    with pytest.raises(ConfigurationError, match="takes the Celery app first"):
        durable.install(thing, database_url=URL)


def test_a_failed_install_leaves_nothing() -> None:
    """It may be made again."""
    app = new_app("shop", None)
    with pytest.raises(ConfigurationError):
        durable.install(app, database_url=URL, leese=5)
    assert registered(app) is None
    durable.install(app, database_url=URL)


@pytest.mark.parametrize("assign", ["before", "after"])
def test_the_beat_entry_stands_beside_the_users(assign: str) -> None:
    """Whenever the schedule is assigned; in whole seconds, to the queue of the setting."""
    app = new_app("shop", None)
    theirs = {"tick": {"task": "tick", "schedule": 1.0}}
    if assign == "before":
        app.conf.beat_schedule = theirs
    durable.install(app, database_url=URL, recovery_interval=2.5, recovery_queue="ops")
    if assign == "after":
        app.conf.beat_schedule = theirs
    app.finalize()
    assert set(app.conf.beat_schedule) == {"tick", TASK}
    entry = app.conf.beat_schedule[TASK]
    assert (entry["schedule"], entry["options"]["queue"]) == (3.0, "ops")
    assert app.tasks[TASK].expires == 3


def test_an_app_that_is_finalized_already_can_be_installed_on() -> None:
    """A library may have touched its tasks."""
    app = new_app("shop", None)
    app.finalize()
    durable.install(app, database_url=URL)
    assert TASK in app.conf.beat_schedule


# Which app


def test_the_only_installed_app_is_found_from_any_thread() -> None:
    """Celery's current app is thread-local, and web servers have many threads."""
    app = new_app("shop")
    with ThreadPoolExecutor(1) as threads:
        assert threads.submit(find).result().app is app


def test_of_several_apps_the_current_one_is_meant() -> None:
    """Else the error names the candidates."""
    shop, bank = new_app("shop"), new_app("bank")
    with pytest.raises(NotInstalled, match=r"several apps \(bank, shop\): say which one with app="):
        find()
    bank.set_current()
    assert find().app is bank
    assert find(shop).app is shop


def test_a_closed_app_is_none_of_the_candidates() -> None:
    """That of an earlier test may live on until it is garbage."""
    shop, bank = new_app("shop"), new_app("bank")
    bank.close()
    assert find().app is shop
    assert find(bank).app is bank


def test_a_current_app_that_is_not_installed_on_does_not_hide_the_only_one() -> None:
    """The plain app of another library may be current."""
    shop = new_app("shop")
    new_app("plain", None).set_current()
    assert find().app is shop


def test_an_app_that_is_named_must_be_installed_on() -> None:
    """Another one doesn't step in."""
    new_app("shop")
    with pytest.raises(NotInstalled, match=r"isn't installed on the app plain: call durable\.install"):
        find(new_app("plain", None))


def test_without_any_app_the_error_says_what_to_do() -> None:
    """Nothing has been installed."""
    with pytest.raises(NotInstalled, match=r"call durable.install\(app\) first"):
        find()
    with pytest.raises(NotInstalled):
        workflow_of(new_app("plain", None)).delay()


def test_two_apps_have_their_own_databases(
    shop: Celery, sql: Sql, empty_database_url: str, broker_url: str, queue_name: str
) -> None:
    """A workflow belongs to the app of its task, whichever is current."""
    bank = new_app("bank", empty_database_url, broker=broker_url, queue=queue_name)
    bank.set_current()
    handle = workflow_of(shop).delay()
    assert sql.value(COUNT) == 1
    assert durable.get_workflow_status(handle.id, app=shop).name == "order"
    with pytest.raises(WorkflowNotFound):
        durable.get_workflow_status(handle.id, app=bank)
    for app in (shop, bank):
        installed_on(app).store.close()


def test_a_web_thread_starts_and_asks(shop: Celery) -> None:
    """With the app not current anywhere."""
    task = workflow_of(shop)
    with ThreadPoolExecutor(1) as threads:
        handle = threads.submit(task.delay, 1).result()
        status = threads.submit(durable.get_workflow_status, handle.id).result()
    assert (status.state, status.args) == ("ENQUEUED", (1,))
    installed_on(shop).store.close()


# Task bases


class Tenant(Task):
    """A user's own task class."""

    abstract = True
    tenant = "acme"

    def of_tenant(self) -> str:
        return self.tenant

    def before_start(self, task_id: str, args: Any, kwargs: Any) -> None: ...


class Mixed(durable.Workflow, Tenant):
    abstract = True


class Polite(Tenant):
    """Passes the call on."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return super().__call__(*args, **kwargs)


class Bypassing(Tenant):
    """Calls run() itself, as Celery's documentation once did."""

    abstract = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)


class BypassedFirst(Bypassing, durable.Workflow):
    abstract = True


class BypassedStep(Bypassing, durable.Step):
    abstract = True


class BehindOurs(durable.Workflow, Bypassing):
    abstract = True


class PoliteFirst(Polite, durable.Workflow):
    abstract = True


def test_a_users_task_base_is_mixed_in(shop: Celery) -> None:
    """Its methods and options are there, and it is a workflow."""
    task: Any = shop.task(base=Mixed, shared=False, name="order")(order)
    assert task.of_tenant() == "acme"
    assert isinstance(task, durable.Workflow)
    assert task(1) == [(1,), {}]


@pytest.mark.parametrize("declare", [workflow_of, step_of])
def test_the_apps_own_task_class_is_kept(declare: Any) -> None:
    """What it adds to every task, such as Django's delay_on_commit, stays."""
    app = Celery("shop", task_cls=Tenant, set_as_current=False)
    durable.install(app, database_url=URL)
    task = declare(app)
    assert task.of_tenant() == "acme"
    assert isinstance(task, app.Task)
    assert task(1) == [(1,), {}]


def test_a_base_that_passes_the_call_on_may_come_first(shop: Celery) -> None:
    """Before ours or behind."""
    assert shop.task(base=PoliteFirst, shared=False, name="order")(order)(1) == [(1,), {}]


@pytest.mark.parametrize("base", [BypassedFirst, BypassedStep])
def test_a_base_that_bypasses_ours_is_an_error_at_registration(shop: Celery, base: Any) -> None:
    """The error names the class and the remedy."""
    with pytest.raises(ConfigurationError, match=r"Bypassing.__call__ doesn't call super\(\).__call__"):
        shop.task(base=base, shared=False, name="order")(order).name  # noqa: B018 - evaluates the declaration


def test_a_bypassing_base_behind_ours_sees_the_call(shop: Celery) -> None:
    """Ours calls it."""
    assert shop.task(base=BehindOurs, shared=False, name="order")(order)(1) == [(1,), {}]


def test_a_task_class_that_bypasses_is_found_behind_the_workflow() -> None:
    """It comes after ours, so nothing is lost."""
    app = Celery("shop", task_cls=Bypassing, set_as_current=False)
    durable.install(app, database_url=URL)
    assert workflow_of(app)(1) == [(1,), {}]


def test_shared_tasks_belong_to_the_app_that_is_current() -> None:
    """Those of our decorators and those of Celery's."""
    ours: Any = durable.workflow(name=f"ours-{uuid.uuid4()}")(order)
    theirs: Any = shared_task(base=durable.Workflow, name=f"theirs-{uuid.uuid4()}")(order)
    step: Any = durable.step(name=f"step-{uuid.uuid4()}")(order)
    shop, bank = new_app("shop"), new_app("bank")
    for app in (shop, bank):
        app.set_current()
        for task in (ours, theirs, step):
            assert task.app is app
            assert task.name in app.tasks
        assert isinstance(app.tasks[ours.name], durable.Workflow)
        assert ours(1) == [(1,), {}]


# Plain calls


def test_a_direct_call_is_a_plain_function() -> None:
    """No database, no broker: its steps are plain calls too."""
    app = new_app("shop", NOWHERE)
    step = step_of(app, lambda_free)
    inline = durable.as_step(lambda number: number + 1, name="inline")
    task = workflow_of(app, calls(step, inline))
    assert task(3) == 8
    assert not durable.current


def lambda_free(number: int) -> int:
    return number * 2


def calls(step: Any, inline: Any) -> Any:
    def body(number: int) -> int:
        return int(inline(number) + step(2))

    return body


def test_eager_mode_is_a_plain_function() -> None:
    """Tests of an app never write to a developer's database."""
    app = new_app("shop", NOWHERE)
    app.conf.task_always_eager = True
    step = step_of(app, lambda_free)
    inline = durable.as_step(lambda number: number + 1, name="inline")
    task = workflow_of(app, calls(step, inline))
    assert task.delay(3).get() == 8
    assert task.apply((3,)).get() == 8


def test_what_is_current_is_only_there_in_a_workflow() -> None:
    """The errors say where."""
    with pytest.raises(NotInWorkflow):
        durable.current.workflow_id  # noqa: B018
    with pytest.raises(NotInWorkflow):
        durable.current.step  # noqa: B018
    assert durable.current.idempotency_key != durable.current.idempotency_key


# Starting


def test_a_start_returns_a_handle_of_what_is_stored(shop: Celery, sql: Sql) -> None:
    """With the id that was asked for."""
    handle = workflow_of(shop).apply_async((1,), {"x": 2}, task_id="order-42")
    assert handle.id == "order-42"
    status = durable.get_workflow_status("order-42", app=shop)
    assert (status.name, status.state, status.args, status.kwargs) == ("order", "ENQUEUED", (1,), {"x": 2})
    installed_on(shop).store.close()


def test_one_id_is_one_workflow(shop: Celery, sql: Sql) -> None:
    """From any number of callers; another task can't have it."""
    task, other = workflow_of(shop), workflow_of(shop, name="refund")
    with ThreadPoolExecutor(5) as threads:
        handles = list(threads.map(lambda number: task.apply_async((number,), task_id="w1"), range(10)))
    assert {handle.id for handle in handles} == {"w1"}
    assert sql.value(COUNT) == 1
    with pytest.raises(WorkflowConflict, match="'w1' is taken by a workflow of the task order, so refund"):
        other.apply_async(task_id="w1")
    installed_on(shop).store.close()


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"args": (object(),)}, SerializationError),
        ({"args": ("x" * 20_000,)}, PayloadTooLarge),
        ({"headers": {"lock": object()}}, SerializationError),
        ({"task_id": "x" * 256}, ValueError),
        ({"task_id": "a\x00b"}, ValueError),
        ({"task_id": ""}, ValueError),
        ({"task_id": "\ud800"}, ValueError),
        ({"workflow_timeout": "1 day"}, ConfigurationError),
        ({"workflow_timeout": -1}, ConfigurationError),
    ],
    ids=lambda part: str(part)[:30] if isinstance(part, dict) else part.__name__,
)
def test_bad_input_is_an_error_and_nothing_is_enqueued(
    database_url: str, broker_url: str, queue_name: str, sql: Sql, kwargs: dict[str, Any], error: type[Exception]
) -> None:
    """Neither a row nor a message."""
    app = new_app("shop", database_url, broker=broker_url, queue=queue_name, max_payload=10_000)
    with pytest.raises(error):
        workflow_of(app).apply_async(**kwargs)
    assert sql.value(COUNT) == 0
    assert messages_in(app, queue_name) == 0
    installed_on(app).store.close()


@pytest.mark.parametrize("away", ["refused", "silent"])
def test_without_a_database_a_start_fails_within_seconds(
    proxy: PostgresProxy, broker_url: str, queue_name: str, away: str
) -> None:
    """The error names host and setting, not the password; nothing was enqueued, and it may be tried again."""
    app = new_app("shop", proxy.url.replace("postgres@", "postgres:hush@"), broker=broker_url, queue=queue_name)
    task = workflow_of(app)
    proxy.refuse() if away == "refused" else proxy.blackhole()
    began = time.monotonic()
    with pytest.raises(DatabaseUnavailable, match=r"127\.0\.0\.1:\d+/\w+ \(setting durable_database_url\)") as caught:
        task.apply_async((1,), task_id="w1")
    assert time.monotonic() - began < 8
    assert "hush" not in str(caught.value)
    assert messages_in(app, queue_name) == 0
    proxy.accept()
    task.apply_async((1,), task_id="w1")
    assert messages_in(app, queue_name) == 1
    assert durable.get_workflow_status("w1", app=app).state == "ENQUEUED"
    installed_on(app).store.close()


def test_an_unreachable_database_is_told_without_its_password() -> None:
    """Also where status is asked for."""
    app = new_app("shop", NOWHERE)
    for call in (lambda: durable.get_workflow_status("w1", app=app), lambda: durable.list_workflows(app=app)):
        with pytest.raises(DatabaseUnavailable, match=r"127.0.0.1:1/database \(setting durable_database_url") as caught:
            call()
        assert "hush" not in str(caught.value)


@pytest.mark.parametrize("name", ["memory", "out of memory"])
def test_a_host_whose_name_has_memory_in_it_is_unreachable_as_any_other(name: str, tmp_path: Path) -> None:
    """Only a statement's error says that this process has none."""
    app = new_app("shop", f"postgresql:///database?host={quote(str(tmp_path / name))}")
    with pytest.raises(DatabaseUnavailable, match=name):
        durable.get_workflow_status("w1", app=app)


def test_an_unknown_state_is_an_error(shop: Celery) -> None:
    """It names those that there are."""
    with pytest.raises(ValueError, match=r"no state \['DONE'\]"):
        durable.list_workflows(state="DONE", app=shop)
