"""Names of tasks: which second registration is a mistake, and which is the same code once more."""

from __future__ import annotations

import importlib
import pickle
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from celery import Celery, Task, _state

import celery_durable as durable
from celery_durable import task
from celery_durable.exceptions import ConfigurationError
from celery_durable.registration import Names

# Celery 5.7 itself warns of a second task that isn't the very same object, after a reload, too.
pytestmark = pytest.mark.filterwarnings("ignore:Task name .* is already registered")

TAKEN = r"Two tasks can't have the name charge: .*test_registration.*line \d+\) has it already, and .*line \d+\)"
MODULE = """
import celery_durable as durable

def declare(app, **options):
    @app.task(base=durable.Step, name="charge", shared=False, **options)
    def charge():
        return 1
    return charge

@durable.step
def refund():
    return 1
"""
TWICE = """
@app.task(base=durable.Step, name="charge", shared=False)
def charge():
    return {}
"""


@pytest.fixture(autouse=True)
def own_shared_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared tasks of this test are no other test's."""
    monkeypatch.setattr(_state, "_on_app_finalizers", set())
    monkeypatch.setattr(_state, "_apps", weakref.WeakSet())
    monkeypatch.setattr(task, "_shared_names", Names((durable.Workflow, durable.Step)))


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports a module with this source, or loads it again."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(source: str, name: str = "durable_shop") -> ModuleType:
        (tmp_path / f"{name}.py").write_text(source)
        importlib.invalidate_caches()
        monkeypatch.delitem(sys.modules, name, raising=False) if name not in loaded else None
        loaded.add(name)
        return importlib.reload(sys.modules[name]) if name in sys.modules else importlib.import_module(name)

    loaded: set[str] = set()
    return load


def new_app() -> Celery:
    app = Celery("shop", set_as_current=False)
    durable.install(app, database_url="postgresql://user@host/database")
    return app


def one() -> int:
    return 1


def other() -> int:
    return 2


class Base(Task):
    abstract = True


def declare(app: Celery, function: Any, base: Any = durable.Step, name: str = "charge", **options: Any) -> Any:
    declared = app.task(base=base, shared=False, name=name, **options)(function)
    assert declared.name == name
    return declared


@pytest.mark.parametrize("first", [durable.Step, durable.Workflow])
@pytest.mark.parametrize("second", [durable.Step, durable.Workflow])
def test_a_name_is_taken_by_other_code(first: Any, second: Any) -> None:
    """Celery would keep the first in silence; the error says where both are, when the second is declared."""
    app = new_app()
    declare(app, one, first)
    with pytest.raises(ConfigurationError, match=TAKEN):
        declare(app, other, second)
    app.finalize()
    assert app.tasks["charge"]() == 1


def test_what_celery_shares_between_apps_is_left_alone() -> None:
    """An app gets the tasks of every other app of the process; that one has its name already is no mistake."""
    first, second = new_app(), new_app()
    first.task(base=durable.Step, name="charge")(one)
    mine = second.task(base=durable.Step, name="charge")(other)
    assert mine() == 2
    second.finalize()
    assert second.tasks["charge"]() == 2


def test_names_of_plain_tasks_are_celerys_own_affair() -> None:
    """Celery warns of them itself."""
    app = new_app()
    declare(app, one, None)
    declare(app, other, None)
    declare(app, other, durable.Step)


def test_one_function_is_not_a_step_and_a_workflow() -> None:
    """The second would be called as the first."""
    app = new_app()
    declare(app, one, durable.Step)
    with pytest.raises(ConfigurationError, match="Two tasks can't have the name charge"):
        declare(app, one, durable.Workflow)


def test_two_functions_of_one_name_in_a_module_are_other_code(module: Callable[[str], ModuleType]) -> None:
    """The slip of who copies a task and forgets to rename it."""
    source = "import celery_durable as durable\nfrom celery import Celery\napp = Celery(set_as_current=False)\n"
    install = "durable.install(app, database_url='postgresql://user@host/database')\n"
    with pytest.raises(ConfigurationError, match=r"durable_shop.py, line 6\) has it already.*durable_shop.py, line 10"):
        module(source + install + TWICE.format(1) + TWICE.format(2) + "app.finalize()\n")


def test_wrapped_functions_are_told_apart() -> None:
    """A decorator's own code is the same each time."""

    def traced(function: Any) -> Any:
        def call() -> Any:
            return function()

        call.__wrapped__ = function  # type: ignore[attr-defined]
        call.__name__ = function.__name__
        return call

    app = new_app()
    declare(app, traced(one))
    declare(app, traced(one))
    with pytest.raises(ConfigurationError, match=TAKEN):
        declare(app, traced(other))


def test_the_same_function_may_be_registered_again() -> None:
    """Also bound, and after Celery has wrapped it for its retries."""
    app = new_app()
    first = declare(app, one, autoretry_for=(OSError,))
    assert declare(app, one, autoretry_for=(OSError,))._get_current_object() is first._get_current_object()


def test_a_factory_makes_the_same_code() -> None:
    """On many apps, and on one."""

    def make(app: Celery) -> Any:
        def charge() -> int:
            return 1

        return declare(app, charge)

    apps = [new_app(), new_app()]
    for app in (*apps, *apps):
        assert make(app)() == 1


def test_a_module_may_be_loaded_again(module: Callable[[str], ModuleType]) -> None:
    """As importlib.reload and shells do, edited or not."""
    app = new_app()
    for source in (MODULE, MODULE, f"\n\n{MODULE}", MODULE.replace("return 1", "return 2")):
        module(source).declare(app).name  # noqa: B018 - evaluates it


def test_a_module_may_be_imported_under_two_names(
    module: Callable[..., ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a script and as a module: it is one file."""
    app = new_app()
    first = module(MODULE)
    first.declare(app).name  # noqa: B018 - evaluates it
    spec = importlib.util.spec_from_file_location("__main__", first.__file__)
    assert spec is not None
    again = importlib.util.module_from_spec(spec)
    assert spec.loader is not None
    spec.loader.exec_module(again)
    again.declare(app).name  # noqa: B018 - evaluates it


def test_in_a_shell_a_function_may_be_defined_again() -> None:
    """Celery keeps the first, and says so."""
    app = new_app()
    namespace = {"__name__": "__main__", "app": app, "durable": durable}
    for result in (1, 2):
        exec(TWICE.format(result), namespace)
        assert namespace["charge"].name == "charge"  # type: ignore[attr-defined]


def test_a_task_as_a_class_has_its_name_too() -> None:
    """Celery would replace the first."""

    class Charge(durable.Step[..., Any]):
        name = "charge"

        def run(self) -> int:
            return 1

    class Refund(Charge):
        def run(self) -> int:
            return 2

    app = new_app()
    app.register_task(Charge)
    app.register_task(Charge())
    with pytest.raises(ConfigurationError, match=TAKEN):
        app.register_task(Refund())
    with pytest.raises(ConfigurationError, match=TAKEN):
        declare(app, one)
    assert app.tasks["charge"]() == 1


def test_a_shared_task_is_refused_before_celery_keeps_it() -> None:
    """Else each app that is made later would fail."""
    durable.step(name="charge")(one)
    durable.step(name="charge")(one)
    shared = len(_state._on_app_finalizers)
    for declare in (durable.step, durable.workflow):
        with pytest.raises(ConfigurationError, match=TAKEN):
            declare(name="charge")(other)
    assert len(_state._on_app_finalizers) == shared
    app = new_app()
    assert app.tasks["charge"]() == 1


def test_a_module_of_shared_tasks_may_be_loaded_again(module: Callable[[str], ModuleType]) -> None:
    """Edited or not."""
    for source in (MODULE, MODULE, f"\n\n{MODULE}", MODULE.replace("return 1", "return 2")):
        module(source)
    assert new_app().tasks["durable_shop.refund"]() in (1, 2)


def test_names_given_to_as_step_are_free() -> None:
    """An agent's tools are a table of lambdas."""
    tools = [durable.as_step(lambda number=number: number, name="tool") for number in range(3)]
    assert [tool() for tool in tools] == [0, 1, 2]


def test_what_others_put_around_an_app_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before us on the app, or after us on its class."""
    seen: list[str] = []
    app = Celery("shop", broker="memory://", set_as_current=False)
    celerys = app.send_task
    app.send_task = lambda *args, **kwargs: seen.append("app") or celerys(*args, **kwargs)  # type: ignore[func-returns-value]
    durable.install(app, database_url="postgresql://user@host/database")
    app.send_task("anything")
    late = new_app()
    monkeypatch.setattr(Celery, "send_task", lambda self, name, **kwargs: seen.append(name))
    late.send_task(name="anything")
    assert seen == ["app", "anything"]


def test_an_app_can_still_be_pickled() -> None:
    """As Celery does for processes that are spawned."""
    assert pickle.loads(pickle.dumps(new_app())).main == "shop"
