"""The browser of the acceptance tests, on a page of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures.browser import Browser

PAGE = """
<form onsubmit="document.querySelector('h1').innerText = this.name.value + ' ' + this.kind.value; return false">
  <h1>Nobody</h1>
  <div style="height: 3000px"></div>
  <input name="name" value="old"><select name="kind"><option value="a">A<option value="b">B</select>
  <button>Go</button>
</form>
"""


@pytest.fixture
def page(browser: Browser, tmp_path: Path) -> Browser:
    path = tmp_path / "page.html"
    path.write_text(PAGE)
    browser.open(path.as_uri())
    return browser


def test_a_form(page: Browser) -> None:
    """It is filled and clicked as by a person, also below the fold."""
    assert page.text("h1") == "Nobody"
    page.fill("[name=name]", "Ann é")
    page.choose("[name=kind]", "b")
    page.click("button")
    page.wait_for("h1", "Ann é b")


def test_what_is_not_there(page: Browser) -> None:
    """The error says what was waited for, and what the page shows."""
    with pytest.raises(AssertionError, match=r"(?s)#nothing.*page\.html.*Nobody"):
        page.wait_for("#nothing", timeout=0.1)


def test_a_screenshot(page: Browser, tmp_path: Path) -> None:
    """It is a picture."""
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes().startswith(b"\x89PNG")
