"""Sphinx builds the papers where they lie: the source is the checkout, so that links work here as they do in it."""

from __future__ import annotations

import sys
from pathlib import Path

CHECKOUT = Path(__file__).parents[1]
sys.path.insert(0, str(CHECKOUT))

from celery_durable.version import __version__  # noqa: E402

project = "celery_durable"
author = "the authors of celery_durable"
release = version = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc"]
root_doc = "docs/index"
include_patterns = ["*.md", "docs/*.md", "docs/*.rst", "example_project/README.md"]
exclude_patterns = [".*", "build", "dist", "celery_durable", "tests", "*.egg-info"]

# Anchors of headings as GitHub makes them.
myst_heading_anchors = 4

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True

nitpicky = True
# Nothing is downloaded when the pages are built, so other projects' names lead nowhere.
nitpick_ignore_regex = [
    ("py:.*", r"(collections|datetime|logging|os|typing|uuid)\..*"),
    ("py:.*", r"(billiard|celery|kombu|opentelemetry|prometheus_client)\..*"),
    # Names in signatures that are no part of the interface.
    ("py:.*", r"(celery_durable\.\w+\.)?(P\.(kw)?args|[PRC]|Awaited|InlineStep|Result|_Makes\w+)"),
    ("py:class", r"celery_durable\.(here\.TaskStep|engine\.context\.PlainStep|store\.rows\.Checkpoint)"),
    ("py:class", r"celery_durable\.testing\.(bench\.Bench|history\.Kept|runs\.WithStepsDone)"),
]

html_theme = "furo"
html_title = f"celery_durable {release}"
html_static_path = ["_static"]
html_css_files = ["tables.css"]
html_copy_source = False
html_show_copyright = False
