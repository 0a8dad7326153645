"""The package as pip installs it: version, files, dependencies, entry point, what importing it costs."""

from __future__ import annotations

import ast
import inspect
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email import message_from_string
from email.message import Message
from pathlib import Path
from statistics import median

import pytest

import celery_durable as durable
from celery_durable.version import __version__

CHECKOUT = Path(__file__).parents[2]
CORE = {"celery", "kombu", "psycopg", "tenacity"}
#: What a process needs that starts or runs workflows, but none that declares them.
_FOR_WORK = {"asyncio", "celery.worker.request", "psycopg", "tenacity"} | {
    f"celery_durable.{room}"
    for room in (
        *("client", "delivery", "envelope", "handle", "health", "history", "management", "node", "outboxes"),
        *("publisher", "recovery", "request", "serialization", "together", "worker"),
        *("engine.gathering", "engine.loop", "engine.process", "engine.runner"),
        *("store.connecting", "store.pool", "store.tables", "store.workflows"),
    )
}
_DECLARING = """
import sys
from celery import Celery
import celery_durable as durable
app = Celery("shop", broker="memory://")
durable.install(app, database_url="postgresql://localhost/shop")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy of the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(CHECKOUT / name, source)
    shutil.copytree(CHECKOUT / "celery_durable", source / "celery_durable", ignore=shutil.ignore_patterns("*.pyc"))
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return zipfile.ZipFile(source / done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def metadata(wheel: zipfile.ZipFile) -> Message:
    """What the wheel says of itself."""
    (name,) = [name for name in wheel.namelist() if name.endswith(".dist-info/METADATA")]
    return message_from_string(wheel.read(name).decode())


def test_wheel_has_every_file(wheel: zipfile.ZipFile) -> None:
    """The wheel has every module, statement, migration and type marker of the checkout, and nothing else."""
    wanted = {
        str(path.relative_to(CHECKOUT))
        for path in (CHECKOUT / "celery_durable").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert "celery_durable/py.typed" in wanted
    assert "celery_durable/store/migrations/0001_initial.sql" in wanted
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == wanted


def test_wheel_has_the_papers(wheel: zipfile.ZipFile, metadata: Message) -> None:
    """The license is in the wheel, and the README is its description."""
    assert any(name.endswith("LICENSE") for name in wheel.namelist())
    assert metadata.get_payload().strip() == (CHECKOUT / "README.md").read_text().strip()


def test_wheel_adds_the_command(wheel: zipfile.ZipFile) -> None:
    """Celery finds `celery durable` by the wheel's entry point."""
    (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    entries = ConfigParser()
    entries.read_string(wheel.read(name).decode())
    assert dict(entries["celery.commands"]) == {"durable": "celery_durable.cli:durable"}


def test_core_dependencies(metadata: Message) -> None:
    """Without extras it needs Celery, kombu, psycopg and tenacity, and nothing else."""
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert {re.split(r"[^\w-]", line)[0] for line in required} == CORE


def test_version(metadata: Message) -> None:
    """Package, wheel and the newest entry of the changelog have one version."""
    newest = re.findall(r"^## \[(.+?)\]", (CHECKOUT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert durable.__version__ == __version__ == metadata["Version"] == newest


@pytest.mark.parametrize("name", [name for name in durable.__all__ if not name.startswith("_")])
def test_public_names_have_docstrings(name: str) -> None:
    """Each public name says what it is, and so does each public method or property that is ours."""
    value = getattr(durable, name)
    assert inspect.getdoc(value)
    if inspect.isclass(value):
        for key, member in vars(value).items():
            if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                assert inspect.getdoc(member), f"{name}.{key}"


def test_errors_have_docstrings() -> None:
    """Each error's docstring is its default message."""
    for error in vars(durable.exceptions).values():
        if inspect.isclass(error) and error.__module__ == durable.exceptions.__name__:
            assert error.__doc__


def test_command_imports_little() -> None:
    """Every celery command imports ours: it brings no psycopg, no tenacity, no rich, and no room but its own."""
    code = """
import sys
import celery.bin.celery
import celery_durable.cli
print(sorted({"psycopg", "tenacity", "rich"} & set(sys.modules)))
print(sorted(name for name in sys.modules if name.startswith("celery_durable.") and ".cli" not in name))
"""
    assert _run(code).splitlines() == ["[]", "['celery_durable.states', 'celery_durable.version']"]


@pytest.mark.alone
def test_command_imports_fast() -> None:
    """Beyond Celery's own command without plugins, importing ours takes less than 60 ms."""
    code = """
import importlib.metadata, time  # the processor's: whatever else runs on this machine
importlib.metadata.entry_points = lambda **group: []
import celery.bin.celery
before = time.process_time()
import celery_durable.cli
print(time.process_time() - before)
"""
    assert median(float(_run(code)) for _ in range(9)) < 0.06


def test_importing_needs_the_core_dependencies_only() -> None:
    """Also where the libraries of brokers, pools and extras aren't installed; an app without them is installed on."""
    missing = ["django", "eventlet", "flower", "gevent", "pydantic", "redis", "sqlalchemy", "yaml"]
    code = f"""
import sys
sys.modules.update(dict.fromkeys({missing}))
import celery
import celery_durable as durable
app = celery.Celery("shop", broker="memory://", backend="cache+memory://")
durable.install(app, database_url="postgresql://localhost/shop")
app.finalize()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT, timeout=60)
    assert done.returncode == 0, done.stderr


def test_importing_contacts_nobody() -> None:
    """Importing the package starts no thread and opens no connection."""
    code = "import celery_durable, psutil; me = psutil.Process(); print(me.num_threads(), me.net_connections())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT)
    assert (done.returncode, done.stdout) == (0, "1 []\n"), done.stderr


def _run(code: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=CHECKOUT, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_loads_nothing_that_is_not_used() -> None:
    """The package by itself brings its version and nothing else; a name brings its room."""
    code = """
import sys
import celery_durable as durable
print(sorted(name for name in sys.modules if name.startswith("celery_durable.")))
print("psycopg" in sys.modules, "celery" in sys.modules)
durable.exceptions.NotInstalled
print("psycopg" in sys.modules, durable.sleep.__module__)
"""
    assert _run(code).splitlines() == [
        "['celery_durable.version']",
        "False False",
        "False celery_durable.timers",
    ]


def test_declaring_loads_nothing_that_runs_workflows() -> None:
    """A module with a workflow brings no database driver, no event loop, no worker, and none of our rooms for them."""
    code = f"""
{_DECLARING}
@app.task(base=durable.Workflow)
def fulfil(): pass
app.finalize()
print(sorted({_FOR_WORK} & set(sys.modules)))
"""
    assert _run(code) == "[]\n"


def test_declaring_a_step_loads_no_database() -> None:
    """A module with a step brings what keeps a step's policies and values, and nothing that speaks Postgres."""
    code = f"""
{_DECLARING}
@app.task(base=durable.Step, max_retries=3, atomic=True)
def charge(): pass
app.finalize()
assert app.tasks[charge.name].durable_spec.atomic
print(sorted({_FOR_WORK - {"celery_durable.serialization"}} & set(sys.modules)))
"""
    assert _run(code) == "[]\n"


def test_worker_loads_all() -> None:
    """Once a worker has its bootsteps, nothing is loaded late any more: not in a body, not under a time limit."""
    code = f"""
{_DECLARING}
from importlib import import_module
from celery_durable import late, store
from kombu.utils.imports import symbol_by_name
steps = [symbol_by_name(name) for name in app.steps["worker"]]
before = set(sys.modules)
ours = [module for name, module in list(sys.modules.items()) if name.startswith("celery_durable")]
rooms = [value._module for module in ours for value in vars(module).values() if isinstance(value, late._Late)]
assert steps and len(rooms) > 5
rooms += ["celery_durable.contrib.django.databases", "celery_durable.contrib.django.transactions"]
for name in rooms:
    import_module(name)
for house in (durable, store):
    for name in house.__all__:
        getattr(house, name)
print(sorted(set(sys.modules) - before))
"""
    assert _run(code) == "[]\n"


def test_bench_loads_all() -> None:
    """The test kit's bench, which runs bodies in a worker's place, has loaded what a worker has."""
    assert _run("import sys, celery_durable.testing.bench; print('celery_durable.worker' in sys.modules)") == "True\n"


def test_star_brings_every_public_name() -> None:
    """``from celery_durable import *`` and ``dir()`` know the names that are loaded lazily."""
    code = "from celery_durable import *; import celery_durable; print(set(celery_durable.__all__) <= set(dir()))"
    assert _run(code) == "True\n"
    assert _run("import celery_durable; print(set(celery_durable.__all__) <= set(dir(celery_durable)))") == "True\n"


def test_names_are_the_same_for_people_and_machines() -> None:
    """What a type checker imports, what is loaded lazily and ``__all__`` are the same names from the same rooms."""
    module = ast.parse((CHECKOUT / "celery_durable/__init__.py").read_text())
    (checked,) = [
        node for node in module.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    seen = {
        node.module: {alias.name for alias in node.names} for node in checked.body if isinstance(node, ast.ImportFrom)
    }
    assert seen.pop(None) == {"exceptions"}
    assert seen == {room: set(names) for room, names in durable._ROOMS.items()}
    names = [name for names in durable._ROOMS.values() for name in names]
    assert sorted([*names, "exceptions", "__version__"]) == durable.__all__


def test_no_room_takes_the_place_of_a_name() -> None:
    """No module of the package is called like a public name: importing it would overwrite that one."""
    rooms = {path.stem for path in (CHECKOUT / "celery_durable").iterdir()}
    assert rooms & set(durable.__all__) == {"exceptions"}


def test_unknown_name() -> None:
    """A name that isn't there is the usual error."""
    with pytest.raises(AttributeError, match="module 'celery_durable' has no attribute 'retry'"):
        _ = durable.retry
