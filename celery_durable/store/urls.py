"""Whether the setting can be a connection URL."""

from __future__ import annotations

import re
from importlib.util import find_spec
from typing import TYPE_CHECKING

from ..late import late

if TYPE_CHECKING:
    from . import connecting
else:
    connecting = late("store.connecting")

#: A URL in which nothing is quoted, listed or added: libpq, and so ``where``, takes each of them.
_PLAINEST = re.compile(r"postgres(ql)?://([\w.~-]+(:[\w.~-]+)?@)?[\w.-]+(:\d+)?/[\w.~-]+", re.ASCII)


def check_url(url: str) -> None:
    """Raise ConfigurationError if this can't be a Postgres connection URL.

    libpq says so, but it takes as long to load as all that an app needs to declare its tasks: it isn't asked for a URL
    that leaves it no choice, where it is sure to be there.
    """
    if not url or _PLAINEST.fullmatch(url) is None or not _has_libpq():
        connecting.where(url)


def _has_libpq() -> bool:
    """Tell whether psycopg has brought a libpq of its own; whether it finds another one, only its import says."""
    return find_spec("psycopg") is not None and find_spec("psycopg_binary") is not None
