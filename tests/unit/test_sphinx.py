"""The papers as Sphinx builds them: without a warning, with every public name, and with no page left out."""

from __future__ import annotations

import posixpath
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sphinx.util.inventory import InventoryFile

import celery_durable as durable
from celery_durable import testing
from tests.fixtures.pages import CHECKOUT, read

OPTIONS = ["--builder", "html", "--conf-dir", "docs", "--fail-on-warning", "--keep-going"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built as `make docs` builds them."""
    site = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", *OPTIONS, "--quiet", ".", str(site)]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
    return site


def test_make_docs_builds_the_same() -> None:
    """What is tested here is what `make docs` does."""
    assert " ".join(OPTIONS) in read("Makefile")


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    """Nothing public is missing from the reference, exceptions and the test kit included."""
    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", posixpath.join)
    documented = {name for kind in ("class", "data", "exception", "function") for name in inventory[f"py:{kind}"]}
    names = set(durable.__all__) - {"exceptions", "__version__"}
    assert {f"celery_durable.{name}" for name in names} <= documented
    assert {f"celery_durable.testing.{name}" for name in testing.__all__} <= documented


def test_links_work_in_what_was_built(site: Path) -> None:
    """Links between pages, and to headings in them, lead somewhere."""
    for page in site.glob("**/*.html"):
        for target in re.findall(r'<a class="reference internal" href="([^"#]+)', page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_index_shows_what_the_side_bar_has() -> None:
    """Each page is in one chapter of docs/index.md: as a link for readers, and for Sphinx, in the same order."""
    text, chapters = read("docs/index.md").partition("\n## ")[2], []
    for chapter in text.split("\n## "):
        links, _, tree = chapter.partition("```{toctree}")
        shown = [target.removeprefix("..").rpartition(".")[0] for target in re.findall(r"\]\(([^)]+)\)", links)]
        assert shown == [line for line in tree.splitlines() if re.match(r"[/\w]", line)]
        chapters += shown
    pages = {path.stem for path in CHECKOUT.glob("docs/*.md")} - {"index"}
    assert pages <= set(chapters)
    assert len(chapters) == len(set(chapters))
