"""The app's own codec, which everything of a workflow's passes that is stored or sent: ``durable_payload_codec``.

What has passed it is sealed. Serialization and compression come before it, so that it meets nothing but bytes.
"""

from __future__ import annotations

from typing import Any, Protocol

from kombu.utils.imports import symbol_by_name

from .exceptions import CodecError, ConfigurationError, SoftTimeLimitExceeded
from .text import qualname_of, summary

#: What is shown in the place of a value that only whoever has the codec may see.
HIDDEN = "<encoded>"


class PayloadCodec(Protocol):
    """What the setting ``durable_payload_codec`` takes, such as something that encrypts.

    Both methods are called wherever workflows are started, run or looked at, by many threads at once, and in a worker's
    main process for each message: a method that asks a server for a key should keep it. What they raise is told as
    SerializationError.
    """

    def encode(self, data: bytes) -> bytes:
        """Return the bytes that are stored and sent in place of these."""

    def decode(self, data: bytes) -> bytes:
        """Return the bytes that ``encode`` was given; raise any exception if these can't be read here."""


class Seal:
    """A payload codec, or none, in which case nothing is sealed and nothing sealed can be read."""

    def __init__(self, codec: PayloadCodec | None) -> None:
        self._codec = codec

    @classmethod
    def of(cls, setting: Any) -> Seal:
        """Build from what the setting says: an object, its dotted path, or None. Raises ConfigurationError."""
        codec = _found(setting) if isinstance(setting, str) else setting
        if codec is not None and not is_codec(codec):
            raise ConfigurationError(
                f"durable_payload_codec is a value of type {qualname_of(type(codec))}: it must be an object with the "
                "methods encode(data) and decode(data), or the dotted path of one."
            )
        return cls(codec)

    @property
    def is_set(self) -> bool:
        """Whether there is a codec."""
        return self._codec is not None

    def encode(self, data: bytes, what: str) -> bytes:
        """Return these bytes sealed, or as they are without a codec; raise CodecError, which names ``what``."""
        return data if self._codec is None else _passed(self._codec.encode, data, f"{what} can't be encoded")

    def decode(self, data: bytes, what: str) -> bytes:
        """Return what was sealed; raise CodecError, which names ``what``."""
        if self._codec is None:
            raise CodecError(
                f"{what} was encoded by a payload codec, and this process has none: let the setting "
                "durable_payload_codec be the same wherever the app is."
            )
        return _passed(self._codec.decode, data, f"{what} can't be decoded")


NO_SEAL = Seal(None)


def is_codec(value: Any) -> bool:
    """Tell whether this has what a payload codec has."""
    return not isinstance(value, type) and all(callable(getattr(value, name, None)) for name in ("encode", "decode"))


def _passed(method: Any, data: bytes, failure: str) -> bytes:
    try:
        passed = method(data)
    except SoftTimeLimitExceeded:
        raise  # a limit of the task, which has only met the codec
    except Exception as error:
        raise CodecError(
            f"{failure} by durable_payload_codec ({summary(error).removesuffix(': ')}): does it have the same keys "
            "wherever the app is?"
        ) from error
    if not isinstance(passed, bytes):
        raise CodecError(f"{failure}: durable_payload_codec returned {qualname_of(type(passed))} in place of bytes.")
    return passed


def _found(path: str) -> Any:
    try:
        return symbol_by_name(path)
    except Exception as error:
        raise ConfigurationError(
            f"durable_payload_codec is {path!r}, which can't be imported ({summary(error)}): write it as "
            "package.module:name."
        ) from error
