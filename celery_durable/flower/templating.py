"""Flower's templates with ours beside them, and the tab in its navigation bar."""

from __future__ import annotations

import logging
from pathlib import Path

from tornado.template import Loader, Template

logger = logging.getLogger("celery_durable")

_OURS = Path(__file__).with_name("templates")
_NAVIGATION = "navbar.html"
_END_OF_TABS = "</ul>"
_TAB = """
        <li class="nav-item">
          <a class="nav-link{% if active_tab == 'workflows' %} active{% end %}"
            href="{{ reverse_url('durable-workflows') }}"
            {% if active_tab == 'workflows' %}aria-current="page"{% end %}>Workflows</a>
        </li>
"""


class Templates(Loader):
    """Finds our templates first, then Flower's."""

    def _create_template(self, name: str) -> Template:
        ours = _OURS / name
        text = (ours if ours.is_file() else Path(self.root, name)).read_text(encoding="utf-8")
        return Template(with_tab(text) if name == _NAVIGATION else text, name=name, loader=self)


def with_tab(text: str) -> str:
    """Return Flower's navigation bar with our tab as the last of its first list."""
    if _END_OF_TABS not in text:
        logger.warning("This Flower's navigation bar is another one: the workflows are at /workflows, without a tab.")
    return text.replace(_END_OF_TABS, f"{_TAB}{_END_OF_TABS}", 1)
