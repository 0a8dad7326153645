"""Histories: a workflow's arguments, steps and outcome as plain data, to be kept beside the tests."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from celery import Celery
from kombu.serialization import loads
from kombu.utils.json import loads as kombu_loads

from .. import states
from ..client import CALLER_PATIENCE, row_of
from ..envelope import check_id
from ..errors import decode_error
from ..exceptions import SerializationError
from ..history import step_name
from ..installation import Installation, find
from ..serialization import JSON, Codec, Payload
from ..store.rows import Checkpoint, StepRow, WorkflowRow

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Kept:
    """A stored value or error: JSON as it is, anything else as base64."""

    ok: bool
    data: Any
    content_type: str | None = None
    is_base64: bool = False

    @classmethod
    def of(cls, payload: Payload, *, ok: bool) -> Kept:
        """Keep what is stored."""
        if not ok or (
            (payload.content_type or JSON).partition(";")[0] == JSON
            and "compression=" not in (payload.content_type or "")
        ):
            return cls(ok, json.loads(payload.data), payload.content_type)
        return cls(ok, base64.b64encode(payload.data).decode(), payload.content_type, is_base64=True)

    @property
    def payload(self) -> Payload:
        """What is stored."""
        data = base64.b64decode(self.data) if self.is_base64 else json.dumps(self.data).encode()
        return Payload(data, self.content_type)

    @property
    def value(self) -> Any:
        """The value as plain data; what isn't JSON only an app can read, as ``durable.list_workflow_steps`` does."""
        return self.data if self.is_base64 or not self.ok else kombu_loads(json.dumps(self.data))

    @property
    def error(self) -> Exception | None:
        """The error, rebuilt."""
        return None if self.ok else decode_error(self.payload.data)

    def to_plain(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        plain = {"value" if self.ok else "error": self.data}
        if self.content_type is not None:
            plain["content_type"] = self.content_type
        return {**plain, "base64": True} if self.is_base64 else plain

    @classmethod
    def of_plain(cls, plain: dict[str, Any] | None) -> Kept | None:
        """Read back what ``to_plain`` returned."""
        if plain is None:
            return None
        ok = "value" in plain
        data, is_base64 = plain["value" if ok else "error"], plain.get("base64", False) is True
        if is_base64:
            base64.b64decode(_typed(data, str), validate=True)
        return cls(ok, data, _typed(plain.get("content_type"), str | None), is_base64)


@dataclass(frozen=True, slots=True)
class HistoryStep:
    """One step of a history; ``kept`` is None while it wasn't settled."""

    key: str
    seq: int
    tries: int
    kept: Kept | None
    #: The arguments as text, and their digest, which a replay compares.
    args: str | None = None
    fingerprint: str | None = None
    child_id: str | None = None

    @property
    def name(self) -> str:
        """The step's name: its key without branch and number."""
        return step_name(self.key)

    @property
    def state(self) -> str:
        """SUCCESS, FAILURE, or RETRY while it wasn't settled."""
        return "RETRY" if self.kept is None else states.SUCCESS if self.kept.ok else states.FAILURE

    @property
    def output(self) -> Any:
        """What it returned, as plain data."""
        return self.kept.value if self.kept is not None and self.kept.ok else None

    @property
    def error(self) -> Exception | None:
        """What it raised."""
        return None if self.kept is None else self.kept.error

    @property
    def checkpoint(self) -> Checkpoint:
        """The step as an attempt finds it."""
        kept = self.kept
        fingerprint = None if self.fingerprint is None else bytes.fromhex(self.fingerprint)
        return Checkpoint(
            self.key, self.seq, self.tries, None if kept is None else kept.ok, None if kept is None else kept.payload,
            args=self.args, fingerprint=fingerprint, child_id=self.child_id,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class History:
    """All that a workflow was given and has recorded, as it stood when this was taken.

    ``for step in history`` goes through its steps in the order of their first calls; ``history["charge"]`` is one of
    them. Arguments, results and errors are in it in the clear: mind what is secret before it is committed anywhere.
    """

    id: str
    name: str
    state: str
    #: ``[args, kwargs]``.
    arguments: Kept
    outcome: Kept | None
    steps: tuple[HistoryStep, ...]
    retries: int = 0
    root_id: str | None = None
    parent_id: str | None = None

    def __iter__(self) -> Iterator[HistoryStep]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, key: str | int) -> HistoryStep:
        if isinstance(key, int):
            return self.steps[key]
        found = [step for step in self.steps if key in (step.key, step.key.rpartition(".")[2])]
        if len(found) != 1:
            raise KeyError(f"{key} (there are {', '.join(self.keys()) or 'no steps'})")
        return found[0]

    def keys(self) -> list[str]:
        """Return the keys of the steps, in the order of their first calls."""
        return [step.key for step in self.steps]

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments, as plain data."""
        return tuple(self.arguments.value[0])

    @property
    def kwargs(self) -> dict[str, Any]:
        """The named arguments, as plain data."""
        return dict(self.arguments.value[1])

    @property
    def result(self) -> Any:
        """What it returned, as plain data."""
        return self.outcome.value if self.outcome is not None and self.outcome.ok else None

    @property
    def error(self) -> Exception | None:
        """What it ended with."""
        return None if self.outcome is None else self.outcome.error

    def to_json(self) -> str:
        """Return the history as JSON of many lines, which a diff shows well."""
        facts = {
            "format": _FORMAT, "id": self.id, "name": self.name, "state": self.state, "retries": self.retries,
            "root_id": self.root_id, "parent_id": self.parent_id, "arguments": self.arguments.to_plain(),
            "outcome": None if self.outcome is None else self.outcome.to_plain(),
            "steps": [_step_to_plain(step) for step in self.steps],
        }  # fmt: skip
        return json.dumps(facts, indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes) -> History:
        """Read back what ``to_json`` returned; raise SerializationError for anything else."""
        try:
            facts = json.loads(text)
            if facts["format"] != _FORMAT:
                raise ValueError(f"its format is {facts['format']!r}, and this version knows {_FORMAT}")
            state, outcome = _typed(facts["state"], str), Kept.of_plain(facts["outcome"])
            if outcome is None and state in (states.SUCCESS, states.FAILURE):
                raise ValueError(f"it is a {state} without an outcome")
            return cls(
                id=_typed(facts["id"], str), name=_typed(facts["name"], str), state=state,
                arguments=_arguments_of_plain(facts["arguments"]), outcome=outcome,
                steps=tuple(_step_of_plain(step) for step in facts["steps"]),
                retries=_typed(facts["retries"], int), root_id=_typed(facts["root_id"], str | None),
                parent_id=_typed(facts["parent_id"], str | None),
            )  # fmt: skip
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise SerializationError(
                f"This isn't the history of a workflow ({type(error).__name__}: {error}): record it again by "
                "history_of(id).save(path)."
            ) from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the history to a file."""
        Path(path).write_text(self.to_json(), encoding="utf-8", errors="surrogatepass")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> History:
        """Read a history from a file; raise SerializationError if there is none in it, and OSError."""
        try:
            text = Path(path).read_text(encoding="utf-8", errors="surrogatepass")
            return cls.from_json(text)
        except (SerializationError, UnicodeDecodeError) as error:
            raise SerializationError(f"{os.fspath(path)}: {error}") from error


def history_of(id: str, app: Celery | None = None) -> History:
    """Return what a workflow has recorded up to now. Reads only: two statements.

    Works with any database that the app is installed on, in production, too. Arguments, results and errors are in it
    in the clear.

    Raises WorkflowNotFound, NotInstalled, DatabaseUnavailable; SerializationError if its arguments can't be read, or
    anything of it was sealed by a payload codec that can't read it here.
    """
    return history_in(find(app), check_id(id, "id"))


def history_in(installation: Installation, workflow_id: str) -> History:
    """Return what a workflow of this app has recorded."""
    row = row_of(installation, workflow_id)
    steps = installation.store.checkpoints.of_workflow(workflow_id, patience=CALLER_PATIENCE)
    outcome = None
    if row.payload is not None and row.finished_at is not None:
        outcome = _kept(installation.codec, bool(row.ok), row.payload, f"The outcome of workflow {workflow_id}")
    return History(
        id=row.id, name=row.name, state=row.state, arguments=_arguments(installation, row), outcome=outcome,
        steps=tuple(_step_of(step, installation.codec) for step in steps), retries=row.retries,
        root_id=row.root_id, parent_id=row.parent_id,
    )  # fmt: skip


def arguments_of(installation: Installation, history: History) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments as the function gets them."""
    kept = history.arguments
    if not kept.is_base64:
        return history.args, history.kwargs
    try:
        payload = kept.payload
        args, kwargs = loads(payload.data, payload.content_type, "binary", accept=installation.codec.accept)[:2]
    except Exception as error:
        raise SerializationError(
            f"The arguments in the history of workflow {history.id} can't be read ({error}): they are "
            f"{kept.content_type}, which accept_content must allow."
        ) from error
    return tuple(args), dict(kwargs)


def _arguments(installation: Installation, row: WorkflowRow) -> Kept:
    if row.body is None:
        raise SerializationError(f"The message of workflow {row.id} isn't there, and with it its arguments.")
    body, content_type, _ = installation.codec.open_message(
        row.body, row.content_type, row.content_encoding, f"The message of workflow {row.id}"
    )
    if content_type == JSON:
        return Kept(True, json.loads(body)[:2])
    return Kept(True, base64.b64encode(body).decode(), content_type, is_base64=True)


def _step_of(step: StepRow, codec: Codec) -> HistoryStep:
    kept = None
    if step.ok is not None and step.payload is not None:
        kept = _kept(codec, step.ok, step.payload, f"The outcome of step {step.key!r}")
    args, digest = codec.read_note(step.args, step.fingerprint)
    fingerprint = None if digest is None else digest.hex()
    return HistoryStep(step.key, step.seq, step.tries, kept, args, fingerprint, step.child_id)


def _kept(codec: Codec, ok: bool, payload: Payload, what: str) -> Kept:
    """Keep what is stored, without its seal: a history is read where there is no payload codec, too."""
    plain = codec.opened(payload, what) if ok else Payload(codec.opened_error(payload.data))
    return Kept.of(plain, ok=ok)


def _step_to_plain(step: HistoryStep) -> dict[str, Any]:
    facts = {
        "key": step.key, "seq": step.seq, "tries": step.tries, "args": step.args, "fingerprint": step.fingerprint,
        "child_id": step.child_id,
    }  # fmt: skip
    given = {name: value for name, value in facts.items() if value is not None}
    return given if step.kept is None else {**given, **step.kept.to_plain()}


def _step_of_plain(plain: dict[str, Any]) -> HistoryStep:
    kept = Kept.of_plain(plain) if {"value", "error"} & plain.keys() else None
    fingerprint = _typed(plain.get("fingerprint"), str | None)
    bytes.fromhex(fingerprint or "")
    return HistoryStep(
        _typed(plain["key"], str), _typed(plain["seq"], int), _typed(plain["tries"], int), kept,
        _typed(plain.get("args"), str | None), fingerprint, _typed(plain.get("child_id"), str | None),
    )  # fmt: skip


def _arguments_of_plain(plain: dict[str, Any]) -> Kept:
    arguments = Kept.of_plain(plain)
    if arguments is None or not arguments.ok:
        raise ValueError("its arguments are missing")
    if not arguments.is_base64:
        args, kwargs = arguments.data
        _typed(args, list), _typed(kwargs, dict)
    return arguments


def _typed(value: Any, kind: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"{value!r:.100} is out of place")
    return value
