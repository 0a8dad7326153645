"""Text for people, whatever an object says of itself."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_durable.text import REPR_LIMIT, Hidden, call_repr, is_storable, printable, says_all, summary


class BrokenStr(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class Text(str):
    """Text with methods that aren't those of str."""

    def _broken(self, *_: Any) -> NoReturn:
        raise RuntimeError("no text either")

    __len__ = __getitem__ = __format__ = __str__ = replace = encode = split = _broken  # type: ignore[assignment]


class OddText(Exception):
    def __str__(self) -> str:
        return Text("odd")

    __repr__ = __str__


Misnamed: Any = type("Misnamed", (BrokenStr,), {})
Misnamed.__qualname__ = Text("misnamed")


def test_a_call_is_shown_for_people() -> None:
    """Bounded, storable, and whatever the arguments' __repr__ does."""
    assert call_repr((1, "a"), {"k": None}) == "1, 'a', k=None"
    assert call_repr((BrokenStr(),), {}) == "<BrokenStr>"
    assert call_repr((OddText(),), {"k": OddText()}) == "odd, k=odd"
    assert call_repr((Misnamed(),), {}) == "<misnamed>"
    assert len(call_repr(("x" * 5000,), {})) == REPR_LIMIT


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("two\n lines\x00"), "ValueError: two lines\\x00"),
        (ValueError("x" * 5000), f"ValueError: {'x' * 287}…"),
        (BrokenStr(), "BrokenStr: <BrokenStr whose text can't be made>"),
        (OddText(), "OddText: odd"),
        (Misnamed(), "misnamed: <misnamed whose text can't be made>"),
    ],
    ids=["lines", "long", "broken", "odd", "misnamed"],
)
def test_an_error_is_told_in_a_short_line(error: Exception, line: str) -> None:
    """Whatever its class and its __str__ are like."""
    assert summary(error) == line


@given(st.text(st.characters(exclude_categories=()), max_size=50))
def test_printable_text_can_be_stored(text: str) -> None:
    """Postgres takes UTF-8 without NUL."""
    shown = printable(text)
    assert "\x00" not in shown
    shown.encode("utf-8")


def test_an_argument_may_hide_itself() -> None:
    """What a value says of itself is all that is shown of it, here and there alike."""

    class Card(str):
        __slots__ = ()

        def __repr__(self) -> str:
            return "<card>"

    assert call_repr((Card("4111 1111"),), {"card": Card("4111 1111")}) == "<card>, card=<card>"


def test_hidden_text_is_text_and_not_shown() -> None:
    """Only its repr is another one."""
    assert repr(Hidden("hush")) == "'…'"
    assert Hidden("hush") == "hush"
    assert f"{Hidden('hush')}" == "hush"


@pytest.mark.parametrize("value", ["", "ü", "'; --", "x" * 10_000])
def test_what_postgres_stores(value: str) -> None:
    """All text is, but for two kinds of characters."""
    assert is_storable(value)


@pytest.mark.parametrize("value", ["a\x00b", "a\ud800b", None, 5, b"x", ["x"]], ids=ascii)
def test_what_postgres_does_not_store(value: Any) -> None:
    """Nor is what isn't text."""
    assert not is_storable(value)


def test_a_text_says_all_of_plain_arguments() -> None:
    """Unless a name, which may be any text, reads like other arguments."""
    assert says_all("1, a=2", (1,), {"a": 2})
    assert not says_all("a=1, b=2", (), {"a=1, b": 2})
    assert not says_all("1, a=2", (), {"1, a": 2})
