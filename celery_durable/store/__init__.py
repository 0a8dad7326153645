"""The only room that speaks Postgres: one module and one ``.sql`` file a table, each transition one statement.

Each name is loaded when it is first used: what a row or a URL looks like is known without psycopg.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .connecting import Url
    from .host import Host, HostTransaction, Place, PsycopgHost
    from .lists import Filters
    from .messages import Letter
    from .nodes import NodeFacts
    from .outgoing import Listener, Outgoing
    from .rows import StepRecord
    from .tables import Store
    from .transaction import Conflict
    from .urls import check_url
    from .workflows import Birth, Fork

#: The module of each name, as the imports above have it.
_MODULES = {
    "connecting": ("Url",),
    "host": ("Host", "HostTransaction", "Place", "PsycopgHost"),
    "lists": ("Filters",),
    "messages": ("Letter",),
    "nodes": ("NodeFacts",),
    "outgoing": ("Listener", "Outgoing"),
    "rows": ("StepRecord",),
    "tables": ("Store",),
    "transaction": ("Conflict",),
    "urls": ("check_url",),
    "workflows": ("Birth", "Fork"),
}

__all__ = [
    "Birth",
    "Conflict",
    "Filters",
    "Fork",
    "Host",
    "HostTransaction",
    "Letter",
    "Listener",
    "NodeFacts",
    "Outgoing",
    "Place",
    "PsycopgHost",
    "StepRecord",
    "Store",
    "Url",
    "check_url",
]


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        for module, names in _MODULES.items():
            if name in names:
                value = getattr(import_module(f".{module}", __name__), name)
                globals()[name] = value
                return value
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
