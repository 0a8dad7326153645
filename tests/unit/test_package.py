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

import pytest

import celery_durable as durable
from celery_durable.version import __version__

CHECKOUT = Path(__file__).parents[2]
CORE = {"celery", "kombu", "psycopg", "tenacity"}


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
    """`celery --help` imports our command module, which by itself brings neither psycopg nor the store."""
    module = ast.parse((CHECKOUT / "celery_durable/cli.py").read_text())
    imported = {alias.name for node in module.body if isinstance(node, ast.Import) for alias in node.names}
    imported |= {"." * node.level + (node.module or "") for node in module.body if isinstance(node, ast.ImportFrom)}
    assert imported == {"__future__", "celery.bin.base", "click", "typing"}


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
