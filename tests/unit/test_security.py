"""The threat model against the repository."""

from __future__ import annotations

import re

from tests.fixtures.pages import CHECKOUT, read


def test_the_named_tests_exist() -> None:
    """What SECURITY.md claims is shown by files with tests in them."""
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", read("SECURITY.md")))
    assert len(named) >= 8
    for path in named:
        assert "def test_" in (CHECKOUT / path).read_text(), path
