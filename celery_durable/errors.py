"""Errors as plain data, and back.

An error is kept as a line of JSON. What is read back isn't trusted: it is rebuilt as an ``Exception`` subclass, without
calling a constructor of its own.
"""

from __future__ import annotations

import base64
import builtins
import importlib
import importlib.util
import json
import re
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import PurePath
from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any

from kombu.utils.json import dumps as json_dumps
from kombu.utils.json import loads as json_loads

from .exceptions import SerializationError, StepError
from .text import printable, qualname_of, safe_str, summary

TRACEBACK_LIMIT = 32 * 1024
#: What of an error can be read without the payload codec that has sealed the rest.
_UNSEALED = ("type", "at", "took")
#: Errors among the arguments of an error, as in a group, that are kept.
MOST_NESTED = 64
#: A character takes up to 12 bytes as JSON, and there are two texts and some names in an error.
_LONGEST_IN_JSON = 2 * 12 + 8
_DOTTED_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")

# An error's class may have properties, a metaclass and special methods that do anything. So what Python itself keeps
# of an error or a class is read and set through Python's own descriptors.
_ARGS, _ATTRIBUTES, _TRACEBACK = (vars(BaseException)[name] for name in ("args", "__dict__", "__traceback__"))
_MODULE, _BASE, _MRO, _NAMESPACE = (vars(type)[name] for name in ("__module__", "__base__", "__mro__", "__dict__"))
#: By identity, because a metaclass may have its own idea of what is equal.
_BUILT_IN = {
    id(found) for found in vars(builtins).values() if isinstance(found, type) and issubclass(found, BaseException)
}
#: What these have is either made of the arguments, or lives with the process.
_WITHOUT_MEMBERS = {id(vars(builtins).get(name)) for name in ("object", "BaseException", "BaseExceptionGroup")}
_UNICODE_ERRORS = (UnicodeDecodeError, UnicodeEncodeError, UnicodeTranslateError)
#: In the standard library, what does something when it is imported.
_NOT_ONLY_IMPORTED = {"antigravity", "idlelib", "this", "turtledemo"}
_LOST = object()


@dataclass(frozen=True, slots=True)
class TryError:
    """What is told of a failed try; ``type`` is the dotted name of the error's class."""

    type: str
    message: str
    traceback: str
    at: datetime | None = None
    #: When the try began.
    started_at: datetime | None = None


def encode_error(error: BaseException, limit: int, at: datetime | None = None, took: float | None = None) -> bytes:
    """Describe an exception, in a line from which ``decode_error`` can rebuild it; never raises.

    ``at`` is when it was raised, ``took`` how many seconds the try had taken.
    Of one that takes more bytes than the limit the attributes are left out, then the arguments and most of the text.
    """
    when: dict[str, Any] = {} if at is None else {"at": at.isoformat()}
    if took is not None:
        when["took"] = round(took, 6)
    try:
        return _told({**_described(error, iter(range(MOST_NESTED))), **when}, limit)
    except Exception as broken:  # noqa: BLE001 - an error may be broken in any way, and must still be told
        message = f"<it can't be described: {summary(broken)}>"
        return _told({"type": _path_of(type(error)), "message": message, "traceback": "", **when}, limit)


def decode_error(line: bytes) -> Exception:
    """Rebuild an exception: by its class if that can be imported, else as a StepError."""
    try:
        return _rebuilt(json_loads(line))
    except Exception as error:  # noqa: BLE001 - what is stored isn't trusted to have any shape
        return SerializationError(f"A stored error can't be read back ({summary(error)}).")


def decode_errors(log: bytes | None) -> tuple[TryError, ...]:
    """Return what a log of failed tries tells: lines, each made by ``encode_error``."""
    return tuple(map(_try_error, (log or b"").splitlines()))


def sealed_line(line: bytes, sealed: bytes) -> bytes:
    """Return a line that has an error's class and time, and all of it only sealed."""
    facts = json.loads(line)
    open_to_all = {name: facts[name] for name in _UNSEALED if name in facts}
    return json.dumps({**open_to_all, "sealed": base64.b64encode(sealed).decode()}).encode()


def sealed_part(line: bytes) -> bytes | None:
    """Return what ``sealed_line`` was given; None for a line that isn't sealed, whatever else it is."""
    try:
        return base64.b64decode(json.loads(line)["sealed"], validate=True)
    except Exception:  # noqa: BLE001 - what is stored isn't trusted to have any shape
        return None


def unread_line(line: bytes, why: str) -> bytes:
    """Return a line that says of a sealed one why it can't be read."""
    facts = json.loads(line)
    return json.dumps({**{"type": "?"}, **facts, "message": why, "traceback": ""}).encode()


def _told(facts: dict[str, Any], limit: int) -> bytes:
    """Return an error's facts as a line of JSON that fits."""
    text = json.dumps(facts)
    if len(text) > limit:
        text = json.dumps({**facts, "attributes": {}})
    if len(text) > limit:
        shorter = max(limit // _LONGEST_IN_JSON, 1)
        texts = {name: printable(facts[name], shorter) for name in ("message", "traceback")}
        text = json.dumps({**{name: facts[name] for name in ("type", "at", "took") if name in facts}, **texts})
    return text.encode()


def _described(error: BaseException, budget: Iterator[int]) -> dict[str, Any]:
    """Return the facts of an error as plain data; ``budget`` is spent on the errors among its arguments."""
    return {
        "type": _path_of(type(error)),
        "message": printable(safe_str(error), TRACEBACK_LIMIT),
        "traceback": _without_middle(_traceback_text(error), TRACEBACK_LIMIT),
        "attributes": _kept(_ATTRIBUTES.__get__(error)),
        "members": _kept(_member_values(error)),
        **_described_arguments(error, budget),
    }


def _described_arguments(error: BaseException, budget: Iterator[int]) -> dict[str, Any]:
    """Return the arguments, those that are errors apart and by their place; nothing if one of them is lost."""
    args: list[Any] = []
    errors: dict[str, Any] = {}
    for place, argument in enumerate(_ARGS.__get__(error)):
        members = argument if type(argument) in (list, tuple) else [argument]
        if members and all(issubclass(type(member), Exception) for member in members):
            if any(next(budget, None) is None for _ in members):
                return {}
            described = [_described(member, budget) for member in members]
            errors[str(place)] = described[0] if members is not argument else described
            args.append(None)
        else:
            args.append(_plain(argument))
    if any(argument is _LOST for argument in args):
        return {}
    return {"args": args, "errors": errors} if errors else {"args": args}


def _member_values(error: BaseException) -> dict[str, Any]:
    """Return what an error has in slots and in C, e.g. the file names of an OSError; no member means None."""
    found = {}
    for name, member in _members(type(error)).items():
        try:
            value = member.__get__(error)
        except AttributeError:  # never set
            continue
        if value is not None:
            found[name] = str(value) if issubclass(type(value), PurePath) else value
    return found


def _members(cls: type) -> dict[str, Any]:
    """Return the descriptors of a class' slots, and of what its built-in base has in C."""
    found: dict[str, Any] = {}
    for klass in reversed(_MRO.__get__(cls)):
        namespace = _NAMESPACE.__get__(klass)
        built_in = id(klass) in _BUILT_IN
        if (built_in or "__slots__" in namespace) and id(klass) not in _WITHOUT_MEMBERS:
            kinds = (MemberDescriptorType, GetSetDescriptorType) if built_in else (MemberDescriptorType,)
            found.update({name: member for name, member in namespace.items() if type(member) in kinds})
    if found.get("obj") is vars(AttributeError).get("obj"):
        found.pop("obj", None)  # any object, of any size; Python doesn't pickle it either
    return found


def _kept(values: dict[Any, Any]) -> dict[str, Any]:
    plain = {name: _plain(value) for name, value in values.items() if type(name) is str}
    return {name: value for name, value in plain.items() if value is not _LOST}


def _plain(value: Any) -> Any:
    """Return a value as what JSON itself has, if kombu can write it and read it back."""
    try:
        text = json_dumps(value)
        json_loads(text)
        return json.loads(text)
    except Exception:  # noqa: BLE001 - any object may refuse in its own way
        return _LOST


def _path_of(cls: type) -> str:
    module = _MODULE.__get__(cls)
    return printable(f"{module if type(module) is str else '?'}:{qualname_of(cls)}")


def _traceback_text(error: BaseException) -> str:
    trace = _TRACEBACK.__get__(error)
    for formatted in (
        partial(traceback.format_exception, type(error), error, trace),
        partial(traceback.format_tb, trace),
    ):
        try:
            return "".join(formatted())
        except Exception:  # noqa: BLE001, S112 - e.g. a broken property of a cause; type and message are kept all the same
            continue
    return ""


def _without_middle(text: str, limit: int) -> str:
    """Return a text of bounded length with both its ends: of a chain of errors, the first one and the last."""
    if len(text) > limit:
        text = f"{text[: limit // 2 - 2]}\n…\n{text[1 - limit // 2 :]}"
    return printable(text, limit)


def _try_error(line: bytes) -> TryError:
    try:
        facts = json.loads(line)
        at = None if facts.get("at") is None else datetime.fromisoformat(facts["at"])
        took = facts.get("took")
        return TryError(
            type=printable(facts["type"].replace(":", ".")),
            message=printable(facts["message"], TRACEBACK_LIMIT),
            traceback=printable(facts["traceback"], TRACEBACK_LIMIT),
            at=at,
            started_at=None if at is None or took is None else at - timedelta(seconds=took),
        )
    except Exception as error:  # noqa: BLE001 - what is stored isn't trusted to have any shape
        return TryError("", f"The error of this try can't be read back ({summary(error)}).", "")


def _rebuilt(facts: dict[str, Any]) -> Exception:
    cls = _error_class(str(facts["type"]))
    error = _instance(cls, facts) if cls is not None and "args" in facts else None
    if error is not None:
        return error
    return StepError(str(facts["message"]), str(facts["type"]).replace(":", "."), str(facts["traceback"]))


def _error_class(path: str) -> type[Exception] | None:
    """Return the class behind ``module:qualname`` if it is an Exception subclass, else None."""
    module_name, _, qualname = path.partition(":")
    if not (_DOTTED_NAME.fullmatch(module_name) and _DOTTED_NAME.fullmatch(qualname)):
        return None
    try:
        found: Any = _module(module_name)
        for name in qualname.split("."):
            found = (_NAMESPACE.__get__(found) if issubclass(type(found), type) else vars(found))[name]
    except (Exception, SystemExit):  # noqa: BLE001 - importing runs a module, which may fail in any way, or exit
        return None
    return found if issubclass(type(found), type) and issubclass(found, Exception) else None


def _module(name: str) -> Any:
    """Return a module, imported if it has to be; raises what importing it raises.

    Importing runs code, and a row isn't trusted to choose which. But an error must have its class again after a
    restart, even if only the body of its step, which a replay doesn't run, imports the module. So what is part of a
    package that is in use here is imported, and installed libraries are: they are made for being imported. A script
    that lies in the working directory isn't.
    """
    if name in sys.modules:
        return sys.modules[name]
    top, *rest = name.split(".")
    if "__main__" in rest or not (top in sys.modules or _is_library(top)):
        raise ImportError(f"{name} isn't part of a library, nor of a package that is in use here")
    return importlib.import_module(name)


def _is_library(top: str) -> bool:
    if top in sys.stdlib_module_names:
        return top not in _NOT_ONLY_IMPORTED
    spec = importlib.util.find_spec(top)
    places = [] if spec is None else [spec.origin or "", *(spec.submodule_search_locations or ())]
    return any({"site-packages", "dist-packages"} & set(PurePath(place).parts) for place in places)


def _instance(cls: type[Exception], facts: dict[str, Any]) -> Exception | None:
    """Make the error through its built-in base alone, so that of its own class nothing runs but ``__str__``."""
    base: Any = cls
    while id(base) not in _BUILT_IN:
        base = _BASE.__get__(base)
    try:
        args = _rebuilt_arguments(facts)
        error: Exception = base.__new__(cls, *args)
        _ARGS.__set__(error, args)
        _ATTRIBUTES.__get__(error).update(facts["attributes"])
        _set_members(error, facts.get("members", {}))
        str(error)
    except Exception:  # noqa: BLE001 - e.g. a __str__ that needs an attribute which was lost: told as StepError
        return None
    return error


def _rebuilt_arguments(facts: dict[str, Any]) -> tuple[Any, ...]:
    args = list(facts["args"])
    for place, errors in facts.get("errors", {}).items():
        args[int(place)] = list(map(_rebuilt, errors)) if isinstance(errors, list) else _rebuilt(errors)
    return tuple(args)


def _set_members(error: Exception, values: dict[str, Any]) -> None:
    members = _members(type(error))
    for name, value in values.items():
        if name in members and value is not None:
            members[name].__set__(error, value)
    _check_unicode_error(error, members)


def _check_unicode_error(error: Exception, members: dict[str, Any]) -> None:
    """Raise ValueError if what a UnicodeError has isn't what its code in C takes for granted.

    Its text is made of the memory at that place, wherever that is, which can end the process.
    """
    if not issubclass(type(error), _UNICODE_ERRORS):
        return
    text, start = members["object"].__get__(error), members["start"].__get__(error)
    wanted = bytes if issubclass(type(error), UnicodeDecodeError) else str
    if text is not None and (type(text) is not wanted or start < 0):
        raise ValueError("a UnicodeError of nothing")
