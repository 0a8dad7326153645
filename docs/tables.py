"""The tables of settings and options, made of the code: ``python -m docs.tables`` writes them into the pages.

A table stands between ``<!-- table: its name -->`` and ``<!-- end -->``, so that the pages can be read as they are.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import Any

from sphinx.pycode import ModuleAnalyzer

from celery_durable import config, options

PAGES = Path(__file__).parent
_TABLE = re.compile(r"(<!-- table: ([\w ]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, *([["---"] * len(list(header))]), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def filled(text: str, tables: Mapping[str, str]) -> str:
    """Return a page with these tables in their places; other places stay as they are."""
    return _TABLE.sub(lambda match: f"{match[1]}{tables[match[2]]}{match[3]}" if match[2] in tables else match[0], text)


def write(tables: Mapping[str, str]) -> None:
    """Write these tables into all pages that have places for them."""
    for page in PAGES.glob("*.md"):
        text = page.read_text()
        if (new := filled(text, tables)) != text:
            page.write_text(new)


def of_the_code() -> dict[str, str]:
    """Return all tables that the code alone says."""
    return {"settings": settings(), "step options": step_options(), "workflow options": workflow_options()}


def settings() -> str:
    """Each setting with its default and what the comment above it says."""
    defaults = {field.name: field.default for field in fields(config.Config)}
    rows = [
        (f"`durable_{name}`", f"`{_shown(defaults[name])}`", kind, meaning)
        for name, kind, meaning in _described(config, "Config")
    ]
    return table(("setting", "default", "type", "meaning"), rows)


def step_options() -> str:
    """Each option of a step, with the default of one that was declared without options."""
    spec = options.step_spec("fetch", {}, settings)
    defaults = {field.name: getattr(owner, field.name) for owner in (spec, spec.retry) for field in fields(owner)}
    defaults["retry_kwargs"] = None
    rows = [
        (f"`{name}`", f"`{_shown(defaults[name])}`", kind, meaning)
        for name, kind, meaning in _described(options, "StepOptions")
    ]
    name = ("`name`", "the task's, or `module.qualname`", "text", "What its outcome is kept under; a lambda needs one.")
    return table(("option", "default", "type", "meaning"), [name, *rows])


def workflow_options() -> str:
    """Each option of a workflow that Celery doesn't have."""
    rows = [(f"`{name}`", "`None`", kind, meaning) for name, kind, meaning in _described(options, "WorkflowOptions")]
    return table(("option", "default", "type", "meaning"), rows)


def _described(module: ModuleType, owner: str) -> list[tuple[str, str, str]]:
    """Return the fields of a class: name, type as a reader takes it, and the comment above it."""
    comments = ModuleAnalyzer.for_module(module.__name__).find_attr_docs()
    declared = getattr(module, owner).__annotations__
    assert declared.keys() == {name for cls, name in comments if cls == owner}, "each field has a comment with #:"
    return [
        (name, _kind(module, annotation), _markdown(comments[owner, name])) for name, annotation in declared.items()
    ]


def _kind(module: ModuleType, annotation: Any) -> str:
    """Return what a reader calls this type; every float of a setting is a duration."""
    text = annotation if isinstance(annotation, str) else annotation.__forward_arg__
    if "timedelta" in text or (module is config and "float" in text):
        return "seconds" + (" or `True`" if "bool" in text else " or dict" if "Mapping" in text else "")
    kinds = [_KINDS.get(part.partition("[")[0], f"`{part}`") for part in text.split(" | ")]
    return " or ".join(kind for kind in kinds if kind != "`None`")


_KINDS = {
    "str": "text", "int": "whole number", "float": "number", "bool": "bool", "tuple": "exception classes",
    "Callable": "function", "Mapping": "dict", "Signature": "signature", "PayloadCodec": "object", "Any": "object",
}  # fmt: skip


def _shown(default: Any) -> str:
    if isinstance(default, str):
        return f'"{default}"'
    return f"{default:.12g}" if isinstance(default, float) else repr(default)


def _markdown(comment: Iterable[str]) -> str:
    return inspect.cleandoc(" ".join(comment)).replace("``", "`").strip()


if __name__ == "__main__":
    write(of_the_code())
