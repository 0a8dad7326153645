"""Whether the setting can be a connection URL."""

from __future__ import annotations

import re
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
    that leaves it no choice.
    """
    if not url or _PLAINEST.fullmatch(url) is None:
        connecting.where(url)
