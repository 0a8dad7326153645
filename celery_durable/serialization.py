"""Values and errors as bytes, and back, through kombu's registries of serializers and compressions.

Nothing that is read back is trusted: only content types that the app accepts are decoded, a compressed value is only
expanded so far, and an error is rebuilt as an ``Exception`` subclass, without calling a constructor of its own.
"""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from functools import lru_cache, partial
from hashlib import blake2b
from pathlib import PurePath
from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any, cast

from kombu import compression as compressions
from kombu.serialization import dumps, loads, prepare_accept_content, registry
from kombu.utils.json import JSONEncoder
from kombu.utils.json import dumps as json_dumps
from kombu.utils.json import loads as json_loads

from .exceptions import ConfigurationError, PayloadTooLarge, SerializationError, StepError
from .shapes import MODES, Mode, Shape, fields_of

JSON = "application/json"
#: Smaller values aren't compressed.
COMPRESSED_FROM = 1024
#: A value may be so many times as large as ``max_payload`` where it is stored compressed.
MOST_EXPANSION = 16
REPR_LIMIT = 1024
TRACEBACK_LIMIT = 32 * 1024
#: Errors among the arguments of an error, as in a group, that are kept.
MOST_NESTED = 64
#: A character takes up to 12 bytes as JSON, and there are two texts and some names in an error.
_LONGEST_IN_JSON = 2 * 12 + 8
_DOTTED_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")
_CONTENT_TYPE = re.compile(r"(.+?)(?:; compression=([^;]+))?(?:; shape=(json|python))?", re.DOTALL)
#: How to expand only so far what kombu's decoders expand without bounds; a Python may lack a library.
_BOUNDED: list[tuple[Any, Callable[[], Any]]] = [
    (module.decompress, getattr(module, maker))
    for name, maker in (("zlib", "decompressobj"), ("bz2", "BZ2Decompressor"), ("lzma", "LZMADecompressor"))
    if (module := vars(compressions).get(name)) is not None
]


@dataclass(frozen=True, slots=True)
class Payload:
    """A serialized value as it is stored; no content type means JSON.

    How else it was written is in the parameters of the type: ``application/json; compression=application/x-gzip;
    shape=json``.
    """

    data: bytes
    content_type: str | None = None


@dataclass(frozen=True, slots=True)
class TryError:
    """What is told of a failed try; ``type`` is the dotted name of the error's class."""

    type: str
    message: str
    traceback: str
    at: datetime | None = None


@dataclass(frozen=True, slots=True)
class Codec:
    """Encodes with one serializer and compression, decodes every content type that the app accepts.

    ``max_payload`` is the size in the database: of what is compressed, the compressed bytes count. In memory that may
    be ``MOST_EXPANSION`` times as much, on the way in as on the way out.
    """

    serializer: str
    accept: frozenset[str]
    max_payload: int
    #: The content type of one of kombu's compressions.
    compression: str | None = None

    @classmethod
    def of(
        cls, serializer: str, accept_content: Iterable[str] | None, max_payload: int, compression: str | None = None
    ) -> Codec:
        """Build from the app's settings; raise ConfigurationError if one doesn't fit the others."""
        try:
            content_type = registry.name_to_type[serializer]
            dumps(None, serializer=serializer)
        except Exception as error:
            raise ConfigurationError(
                f"The serializer {serializer!r} isn't known to kombu, or can't be used ({_summary(error)}): register "
                "it, install its library, or choose another one."
            ) from error
        try:
            accept = frozenset(prepare_accept_content(list(accept_content or ("json",))))
        except Exception as error:
            raise ConfigurationError(
                f"accept_content has a serializer that isn't known to kombu ({_summary(error)}): register it first."
            ) from error
        if content_type not in accept:
            raise ConfigurationError(
                f"The serializer {serializer!r} isn't in accept_content, so nothing that it writes could be read "
                "back: add it there, or set durable_serializer, or the task's serializer, to one of the accepted."
            )
        return cls(serializer, accept, max_payload, _known_compression(compression))

    def using(self, serializer: str | None, compression: str | None) -> Codec:
        """Return the codec of a task with options of its own, None for ours; raise ConfigurationError."""
        if serializer in (None, self.serializer) and compression in (None, self.compression):
            return self
        return Codec.of(serializer or self.serializer, self.accept, self.max_payload, compression or self.compression)

    def encode(self, value: Any, what: str, shape: Shape | None = None) -> Payload:
        """Serialize; raise SerializationError or PayloadTooLarge, which name ``what``.

        With a shape, dataclasses and models are kept as plain data. A value that doesn't fit it is kept without, and
        so is one for pickle, which needs no help with instances.
        """
        unfit: Exception | None = None
        if shape is not None and shape.hint is not None and self.serializer != "pickle":
            for mode in MODES:
                try:
                    raw, content_type = self._serialized(shape.dump(value, mode))
                    shape.check(value, self._loaded(raw, content_type), mode)
                except Exception as error:  # noqa: BLE001 - told below, if it can't be kept without its shape either
                    unfit = error if unfit is None else unfit
                else:
                    return self._stored(raw, content_type, what, mode)
        try:
            raw, content_type = self._serialized(value)
        except Exception as error:
            hinted = "" if unfit is None else f"; by its type hint: {_summary(unfit)}"
            raise SerializationError(
                f"{what} can't be serialized as {self.serializer} ({_summary(error)}{hinted}): return plain data, "
                "or choose another serializer."
            ) from error
        return self._stored(raw, content_type, what)

    def check_size(self, raw: bytes, what: str) -> None:
        """Raise PayloadTooLarge if the setting ``max_payload`` forbids so many bytes."""
        if len(raw) > self.max_payload:
            raise PayloadTooLarge(
                f"{what} takes {len(raw):,} bytes, more than durable_max_payload allows "
                f"({self.max_payload:,}): store it elsewhere and pass a reference."
            )

    def decode(self, payload: Payload, what: str, shape: Shape | None = None) -> Any:
        """Return the stored value; raise SerializationError if it can't be read.

        Without a shape, what was written with one is plain data.
        """
        try:
            content_type, compression, mode = _written_as(payload)
            raw = payload.data if compression is None else self._expanded(payload.data, compression)
            data = self._loaded(raw, content_type)
            return data if shape is None or mode is None else shape.load(data, mode)
        except Exception as error:
            raise SerializationError(f"{what} can't be read back ({_summary(error)}).") from error

    def _serialized(self, value: Any) -> tuple[bytes, str]:
        content_type, _, data = dumps(value, serializer=self.serializer)
        return data.encode() if isinstance(data, str) else data, content_type

    def _loaded(self, raw: bytes, content_type: str) -> Any:
        if not raw:
            raise ValueError("there are no bytes")  # of which kombu would say that they are the value
        return loads(raw, content_type, _encoding_of(content_type), accept=self.accept)

    def _stored(self, raw: bytes, content_type: str, what: str, mode: Mode | None = None) -> Payload:
        parameters = f"; shape={mode}" if mode else ""
        if self.compression is not None and COMPRESSED_FROM <= len(raw) <= self._most_expanded:
            compressed = self._compressed(raw, self.compression, what)
            if len(compressed) < len(raw):
                raw, parameters = compressed, f"; compression={self.compression}{parameters}"
        self.check_size(raw, what)
        return Payload(raw, None if content_type == JSON and not parameters else content_type + parameters)

    def _compressed(self, raw: bytes, compression: str, what: str) -> bytes:
        try:
            return cast(bytes, compressions.compress(raw, compression)[0])
        except Exception as error:
            raise SerializationError(f"{what} can't be compressed as {compression} ({_summary(error)}).") from error

    def _expanded(self, data: bytes, compression: str) -> bytes:
        decoder = _decoder(compression)
        most = self._most_expanded
        make = next((make for known, make in _BOUNDED if known is decoder), None)
        if make is None:
            raw = decoder(data)
        else:
            stream = make()
            raw = stream.decompress(data, most + 1)
            if not stream.eof and len(raw) <= most:
                raise ValueError("the compressed bytes break off")
        if len(raw) > most:
            raise ValueError(f"it expands to more than {most:,} bytes")
        return raw

    @property
    def _most_expanded(self) -> int:
        return min(MOST_EXPANSION * self.max_payload, sys.maxsize - 1)

    def encode_error(self, error: BaseException, at: datetime | None = None) -> Payload:
        """Describe an exception so that ``decode_error`` can rebuild it; never raises.

        Of one that ``max_payload`` forbids the attributes are left out, then the arguments and most of the text.
        """
        when = {} if at is None else {"at": at.isoformat()}
        try:
            text = self._told({**_described(error, iter(range(MOST_NESTED))), **when})
        except Exception as broken:  # noqa: BLE001 - an error may be broken in any way, and must still be told
            message = f"<it can't be described: {_summary(broken)}>"
            text = self._told({"type": _path_of(type(error)), "message": message, "traceback": "", **when})
        return Payload(text.encode())

    def _told(self, facts: dict[str, Any]) -> str:
        """Return an error's facts as a line of JSON that fits."""
        text = json.dumps(facts)
        if len(text) > self.max_payload:
            text = json.dumps({**facts, "attributes": {}})
        if len(text) > self.max_payload:
            shorter = max(self.max_payload // _LONGEST_IN_JSON, 1)
            texts = {name: printable(facts[name], shorter) for name in ("message", "traceback")}
            text = json.dumps({**{name: facts[name] for name in ("type", "at") if name in facts}, **texts})
        return text

    def decode_error(self, payload: Payload) -> Exception:
        """Rebuild an exception: by its class if that can be imported, else as a StepError."""
        try:
            return _rebuilt(json_loads(payload.data))
        except Exception as error:  # noqa: BLE001 - what is stored isn't trusted to have any shape
            return SerializationError(f"A stored error can't be read back ({_summary(error)}).")


def decode_errors(log: bytes | None) -> tuple[TryError, ...]:
    """Return what a log of failed tries tells: lines of JSON, each made by ``encode_error``."""
    return tuple(map(_try_error, (log or b"").splitlines()))


def fingerprint(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Return a digest of the arguments, the same in every process; those that can't be serialized don't count.

    Sets, dataclasses and pydantic models count by what is in them.
    """
    try:
        text = _canonical([args, kwargs])
    except Exception:  # noqa: BLE001 - any object may refuse in its own way; then each argument alone
        text = json_dumps([[_comparable(arg) for arg in args], {k: _comparable(v) for k, v in sorted(kwargs.items())}])
    return blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8).digest()


def call_repr(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return the arguments of a call as text for people, of bounded length."""
    parts = [_safe_repr(arg) for arg in args] + [f"{name}={_safe_repr(value)}" for name, value in kwargs.items()]
    return printable(", ".join(parts), REPR_LIMIT)


def printable(text: str, limit: int = REPR_LIMIT) -> str:
    """Return text that Postgres stores as it is: no NUL, no lone surrogates, not too long."""
    text = text[: limit + 1].replace("\x00", "\\x00")
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return text.encode("utf-8", "backslashreplace").decode()


def _known_compression(compression: str | None) -> str | None:
    try:
        return cast(str, compressions.get_encoder(compression)[1]) if compression else None
    except (KeyError, TypeError) as error:
        raise ConfigurationError(
            f"The compression {compression!r} isn't known to kombu here: install its library, or choose one of "
            f"{', '.join(sorted(compressions._aliases))}."
        ) from error


def _decoder(compression: str) -> Callable[[bytes], bytes]:
    try:
        return cast("Callable[[bytes], bytes]", compressions.get_decoder(compression))
    except KeyError as error:
        raise ValueError(f"the compression {compression!r} isn't known to kombu here") from error


def _written_as(payload: Payload) -> tuple[str, str | None, Mode | None]:
    """Return a payload's content type alone, its compression, and the mode of its shape."""
    match = _CONTENT_TYPE.fullmatch(payload.content_type or JSON)
    assert match is not None, "one character is enough"
    return match[1], match[2], cast("Mode | None", match[3])


@lru_cache(maxsize=64)
def _encoding_of(content_type: str) -> str:
    for known, encoding, _ in registry._encoders.values():
        if known == content_type:
            return str(encoding)
    return "binary"


class _Canonical(JSONEncoder):
    """kombu's JSON, in which equal values have one text."""

    def default(self, o: Any) -> Any:
        if isinstance(o, set | frozenset):
            return {"__set__": sorted(map(_canonical, o))}
        if isinstance(o, Enum):
            return o.value
        if isinstance(o, PurePath | timedelta):
            return str(o)
        fields = None if hasattr(o, "__json__") else fields_of(o)
        return super().default(o) if fields is None else fields


def _canonical(value: Any) -> str:
    return str(json_dumps(value, cls=_Canonical, sort_keys=True))


def _comparable(value: Any) -> str | None:
    try:
        return _canonical(value)
    except Exception:  # noqa: BLE001 - what can't be serialized can't be compared
        return None


def _safe_repr(value: Any) -> str:
    try:
        return _exactly(repr(value))
    except Exception:  # noqa: BLE001 - a broken __repr__ must not break the step
        return f"<{_QUALNAME.__get__(type(value))}>"


def _safe_str(error: BaseException) -> str:
    try:
        return _exactly(str(error))
    except Exception:  # noqa: BLE001 - a broken __str__ must not hide the error
        return f"<{_QUALNAME.__get__(type(error))} whose text can't be made>"


def _exactly(text: str) -> str:
    """Return text as str itself: that of a __str__ or __repr__ may be of a subclass with methods of its own."""
    return str.__str__(text)


def _summary(error: BaseException) -> str:
    text = " ".join(printable(_safe_str(error), 2 * REPR_LIMIT).split())
    return printable(f"{_QUALNAME.__get__(type(error))}: {text}", 300)


# An error's class may have properties, a metaclass and special methods that do anything. So what Python itself keeps
# of an error or a class is read and set through Python's own descriptors.
_ARGS, _ATTRIBUTES, _TRACEBACK = (vars(BaseException)[name] for name in ("args", "__dict__", "__traceback__"))
_MODULE, _QUALNAME, _BASE, _MRO, _NAMESPACE = (
    vars(type)[name] for name in ("__module__", "__qualname__", "__base__", "__mro__", "__dict__")
)
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


def _described(error: BaseException, budget: Iterator[int]) -> dict[str, Any]:
    """Return the facts of an error as plain data; ``budget`` is spent on the errors among its arguments."""
    return {
        "type": _path_of(type(error)),
        "message": printable(_safe_str(error), TRACEBACK_LIMIT),
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
    return printable(f"{module if type(module) is str else '?'}:{_QUALNAME.__get__(cls)}")


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
        at = facts.get("at")
        return TryError(
            type=printable(facts["type"].replace(":", ".")),
            message=printable(facts["message"], TRACEBACK_LIMIT),
            traceback=printable(facts["traceback"], TRACEBACK_LIMIT),
            at=None if at is None else datetime.fromisoformat(at),
        )
    except Exception as error:  # noqa: BLE001 - what is stored isn't trusted to have any shape
        return TryError("", f"The error of this try can't be read back ({_summary(error)}).", "")


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
