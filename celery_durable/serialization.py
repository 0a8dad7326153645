"""Values and errors as bytes, and back, through kombu's registry of serializers.

Nothing that is read back is trusted: only content types that the app accepts are decoded, and an
error is rebuilt as an ``Exception`` subclass, without calling a constructor of its own.
"""

from __future__ import annotations

import builtins
import importlib
import re
import sys
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from typing import Any

from kombu.exceptions import SerializerNotInstalled
from kombu.serialization import dumps, loads, prepare_accept_content, registry
from kombu.utils.json import dumps as json_dumps

from .exceptions import ConfigurationError, PayloadTooLarge, SerializationError, StepError

JSON = "application/json"
REPR_LIMIT = 1024
TRACEBACK_LIMIT = 32 * 1024
#: A character takes up to 12 bytes as JSON, and there are two texts and some names in an error.
_LONGEST_IN_JSON = 2 * 12 + 8
_DOTTED_NAME = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*")


@dataclass(frozen=True, slots=True)
class Payload:
    """A serialized value as it is stored; no content type means JSON."""

    data: bytes
    content_type: str | None = None


@dataclass(frozen=True, slots=True)
class Codec:
    """Encodes with one serializer, decodes every content type that the app accepts."""

    serializer: str
    accept: frozenset[str]
    max_payload: int

    @classmethod
    def of(cls, serializer: str, accept_content: Iterable[str] | None, max_payload: int) -> Codec:
        """Build from the app's settings; raise ConfigurationError if one doesn't fit the others."""
        try:
            content_type = registry.name_to_type[serializer]
            accept = frozenset(prepare_accept_content(list(accept_content or ("json",))))
        except (KeyError, SerializerNotInstalled) as error:
            raise ConfigurationError(
                f"The serializer {serializer!r} isn't known to kombu: register it, or choose another one."
            ) from error
        if content_type not in accept:
            raise ConfigurationError(
                f"The serializer {serializer!r} isn't in accept_content, so nothing that it writes could be "
                f"read back: add it there, or set durable_serializer to one of the accepted."
            )
        return cls(serializer, accept, max_payload)

    def encode(self, value: Any, what: str) -> Payload:
        """Serialize; raise SerializationError or PayloadTooLarge, which name ``what``."""
        try:
            content_type, _, data = dumps(value, serializer=self.serializer)
        except Exception as error:
            raise SerializationError(
                f"{what} can't be serialized as {self.serializer} ({_summary(error)}): return plain data, "
                "or choose another durable_serializer."
            ) from error
        raw = data.encode() if isinstance(data, str) else data
        self.check_size(raw, what)
        return Payload(raw, None if content_type == JSON else content_type)

    def check_size(self, raw: bytes, what: str) -> None:
        """Raise PayloadTooLarge if the setting ``max_payload`` forbids so many bytes."""
        if len(raw) > self.max_payload:
            raise PayloadTooLarge(
                f"{what} takes {len(raw):,} bytes, more than durable_max_payload allows "
                f"({self.max_payload:,}): store it elsewhere and pass a reference."
            )

    def decode(self, payload: Payload, what: str) -> Any:
        """Return the stored value; raise SerializationError if it can't be read."""
        content_type = payload.content_type or JSON
        try:
            return loads(payload.data, content_type, _encoding_of(content_type), accept=self.accept)
        except Exception as error:
            raise SerializationError(f"{what} can't be read back ({_summary(error)}).") from error

    def encode_error(self, error: BaseException) -> Payload:
        """Describe an exception so that ``decode_error`` can rebuild it; never raises.

        Of one that ``max_payload`` forbids the attributes are left out, then the arguments and most of the text.
        """
        try:
            facts = _described(error)
        except Exception as broken:  # noqa: BLE001 - an error may be broken in any way, and must still be told
            facts = _described(StepError(_summary(broken), f"{type(error).__module__}.{type(error).__qualname__}"))
        if not self._fits(facts):
            facts["attributes"] = {}
        if not self._fits(facts):
            facts.pop("args", None)
            shorter = max(self.max_payload // _LONGEST_IN_JSON, 1)
            facts.update({name: printable(facts[name], shorter) for name in ("message", "traceback")})
        return Payload(json_dumps(facts).encode())

    def _fits(self, facts: dict[str, Any]) -> bool:
        return len(json_dumps(facts)) <= self.max_payload

    def decode_error(self, payload: Payload) -> Exception:
        """Rebuild an exception: by its class if that can be imported, else as a StepError."""
        try:
            facts = loads(payload.data, JSON, "utf-8", accept={JSON})
            return _rebuilt(facts)
        except Exception as error:  # noqa: BLE001 - what is stored isn't trusted to have any shape
            return SerializationError(f"A stored error can't be read back ({_summary(error)}).")


def fingerprint(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Return a digest of the arguments; those that can't be serialized don't count."""
    try:
        text = json_dumps([args, kwargs], sort_keys=True)
    except Exception:  # noqa: BLE001 - any object may refuse in its own way; then each argument alone
        text = json_dumps([[_comparable(arg) for arg in args], {k: _comparable(v) for k, v in sorted(kwargs.items())}])
    return blake2b(text.encode("utf-8", "backslashreplace"), digest_size=8).digest()


def call_repr(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    """Return the arguments of a call as text for people, of bounded length."""
    parts = [_safe_repr(arg) for arg in args] + [f"{name}={_safe_repr(value)}" for name, value in kwargs.items()]
    return printable(", ".join(parts), REPR_LIMIT)


def printable(text: str, limit: int = REPR_LIMIT) -> str:
    """Return text that Postgres stores as it is: no NUL, no lone surrogates, not too long."""
    text = text.replace("\x00", "\\x00")
    if len(text) > limit:
        text = text[: limit - 1] + "…"
    return text.encode("utf-8", "backslashreplace").decode()


def _comparable(value: Any) -> str | None:
    try:
        return str(json_dumps(value, sort_keys=True))
    except Exception:  # noqa: BLE001 - what can't be serialized can't be compared
        return None


def _safe_repr(value: Any) -> str:
    try:
        return repr(value)
    except Exception:  # noqa: BLE001 - a broken __repr__ must not break the step
        return f"<{type(value).__qualname__}>"


def _safe_str(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # noqa: BLE001 - a broken __str__ must not hide the error
        return f"<{type(error).__qualname__} whose text can't be made>"


def _summary(error: BaseException) -> str:
    return printable(f"{type(error).__name__}: {_safe_str(error)}", 300)


@lru_cache(maxsize=64)
def _encoding_of(content_type: str) -> str:
    for known, encoding, _ in registry._encoders.values():
        if known == content_type:
            return str(encoding)
    return "binary"


def _described(error: BaseException) -> dict[str, Any]:
    cls = type(error)
    facts = {
        "type": f"{cls.__module__}:{cls.__qualname__}",
        "message": printable(_safe_str(error), TRACEBACK_LIMIT),
        "traceback": printable(_traceback_text(error), TRACEBACK_LIMIT),
        "attributes": {name: value for name, value in vars(error).items() if _is_data(name) and _is_data(value)},
    }
    arguments = _arguments(error)
    if all(_is_data(argument) for argument in arguments):
        facts["args"] = list(arguments)
    return facts


def _arguments(error: BaseException) -> tuple[Any, ...]:
    """Return what the error's built-in base makes it of; the file names of an OSError aren't in its ``args``."""
    if isinstance(error, OSError):
        made_of = OSError.__reduce__(error)[1]
        return (*made_of[:2], *(name if _is_data(name) else str(name) for name in made_of[2:]))
    return error.args if isinstance(error.args, tuple) else ()


def _is_data(value: Any) -> bool:
    return _comparable(value) is not None


def _traceback_text(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(type(error), error, error.__traceback__))
    except Exception:  # noqa: BLE001 - e.g. a broken __str__ inside; the type is kept all the same
        return "".join(traceback.format_tb(error.__traceback__))


def _rebuilt(facts: dict[str, Any]) -> Exception:
    cls = _error_class(str(facts["type"]))
    error = _instance(cls, facts) if cls is not None and "args" in facts else None
    return error or StepError(str(facts["message"]), str(facts["type"]).replace(":", "."), str(facts["traceback"]))


def _error_class(path: str) -> type[Exception] | None:
    """Return the class behind ``module:qualname`` if it is an Exception subclass, else None."""
    module_name, _, qualname = path.partition(":")
    if not (_DOTTED_NAME.fullmatch(module_name) and _DOTTED_NAME.fullmatch(qualname)):
        return None
    try:
        found: Any = sys.modules.get(module_name) or importlib.import_module(module_name)
        for name in qualname.split("."):
            found = vars(found)[name]
    except Exception:  # noqa: BLE001 - importing runs the app's code, which may fail in any way
        return None
    return found if isinstance(found, type) and issubclass(found, Exception) else None


def _instance(cls: type[Exception], facts: dict[str, Any]) -> Exception | None:
    """Make the error through its built-in base alone, so that no constructor of the app runs."""
    base: Any = next(klass for klass in cls.__mro__ if klass.__module__ == builtins.__name__)
    args = tuple(facts["args"])
    try:
        error: Exception = base.__new__(cls, *args)
        base.__init__(error, *args)
        if not isinstance(error, OSError):
            error.args = args
        vars(error).update(facts["attributes"])
        str(error)
    except Exception:  # noqa: BLE001 - e.g. a __str__ that needs an attribute which was lost: told as StepError
        return None
    return error
