"""Which connection URLs are taken without asking libpq: only such as it takes, too."""

from __future__ import annotations

from importlib.util import find_spec

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_durable.exceptions import ConfigurationError
from celery_durable.store import urls
from celery_durable.store.connecting import where

#: What a URL is made of, and what breaks one.
_PARTS = [
    "postgresql",
    "postgres",
    "://",
    "@",
    ":",
    "/",
    "user",
    "p~s",
    "db.host-1",
    "5432",
    "?",
    "%",
    "=",
    ",",
    " ",
    "",
]


class Asked(Exception):
    """libpq is asked."""


@given(st.from_regex(urls._PLAINEST, fullmatch=True))
def test_libpq_takes_what_it_is_not_asked_for(url: str) -> None:
    """Whatever is plain enough is a URL to libpq, and leads somewhere."""
    assert where(url)


@given(st.lists(st.sampled_from(_PARTS), max_size=14).map("".join))
def test_every_url_is_judged_as_libpq_does(url: str) -> None:
    """Good and bad ones alike: nothing passes that ``where`` refuses, and nothing is refused that it takes."""
    assert _is_taken(urls.check_url, url) == _is_taken(where, url)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://localhost/shop",
        "postgres://shop@db.example.com/shop",
        "postgresql://shop:s3cr~t@10.0.0.5:5432/shop",
    ],
)
def test_libpq_is_not_asked_for_a_plain_url(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """It takes long to load, and an app that only declares tasks needs nothing else of it."""
    monkeypatch.setattr("celery_durable.store.connecting.where", _asked)
    urls.check_url(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "shop",
        "host=localhost dbname=shop",
        "postgresql+psycopg://localhost/shop",
        "postgresql://localhost/shop?sslmode=verify-full",
        "postgresql://localhost/shop?ssl-mode=on",
        "postgresql://shop:p%40ss@localhost/shop",
        "postgresql://shop:p@ss@localhost/shop",
        "postgresql://shop:p/ss@localhost/shop",
        "postgresql://one,two/shop",
        "postgresql://[::1]/shop",
        "postgresql://löcalhost/shop",
        "postgresql://localhost/shop\n",
    ],
    ids=repr,
)
def test_libpq_is_asked_for_any_other(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Ours doesn't know what libpq makes of parameters, quotes and lists."""
    monkeypatch.setattr("celery_durable.store.connecting.where", _asked)
    with pytest.raises(Asked):
        urls.check_url(url)


def test_libpq_is_asked_where_it_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A psycopg that has brought none finds that of the system, or says at once that it can't."""
    monkeypatch.setattr("celery_durable.store.connecting.where", _asked)
    monkeypatch.setattr(urls, "find_spec", lambda name: None if name == "psycopg_binary" else find_spec(name))
    with pytest.raises(Asked):
        urls.check_url("postgresql://localhost/shop")


def _asked(url: str) -> str:
    raise Asked


def _is_taken(check: object, url: str) -> bool:
    assert callable(check)
    try:
        check(url)
    except ConfigurationError:
        return False
    return True
