"""The Workflows tab in Flower 2.x.

It appears by itself with ``celery -A proj flower`` where ``durable.install(app)`` is called when the app's module is
imported. An app that does that later has ``install()`` called in ``flowerconfig.py``.
"""

from __future__ import annotations

import sys


def is_starting() -> bool:
    """Tell whether this process is a ``celery flower`` that hasn't taken its pages yet.

    Every celery command imports Flower where it is installed, so that alone says nothing.
    """
    return "flower" in sys.argv and "flower.urls" in sys.modules


def install() -> None:
    """Add the tab and its pages to the Flower that this process starts; a second call does nothing.

    Raises ImportError where Flower isn't installed.
    """
    from flower import urls

    from .pages import ROUTES
    from .templating import Templates

    if any(route is ROUTES[0] for route in urls.handlers):
        return
    # Before the last one, which answers to everything else.
    urls.handlers[-1:-1] = ROUTES
    urls.settings["template_loader"] = Templates(urls.settings["template_path"])
