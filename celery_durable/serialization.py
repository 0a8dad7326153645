"""Values and errors as bytes, and back: values through kombu's registries of serializers and compressions.

What is read back isn't trusted: only content types that the app accepts are decoded, and a compressed value is only
expanded so far. An error is JSON, whatever the app accepts. With a payload codec all of it is sealed at last; what was
written without one is still read.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from functools import lru_cache
from hashlib import blake2b
from json import JSONDecodeError, JSONDecoder, encoder
from pathlib import PurePath
from typing import Any, NamedTuple, cast

from kombu import compression as compressions
from kombu.serialization import dumps, loads, prepare_accept_content, registry
from kombu.utils.json import JSONEncoder, object_hook
from kombu.utils.json import dumps as json_dumps
from kombu.utils.json import loads as json_loads

from .errors import TryError, decode_error, decode_errors, encode_error, sealed_line, sealed_part, unread_line
from .exceptions import CodecError, ConfigurationError, PayloadTooLarge, SerializationError
from .seal import NO_SEAL, Seal
from .shapes import MODES, Mode, Shape, advice_on, fields_of
from .text import printable, qualname_of, summary

logger = logging.getLogger("celery_durable")

JSON = "application/json"
#: Smaller values aren't compressed.
COMPRESSED_FROM = 1024
#: A value may be so many times as large as ``max_payload`` where it is stored compressed.
MOST_EXPANSION = 16
#: By this key kombu's JSON knows values of other types again. Data of the app's own that has it may be no such value,
#: and can't be read back then: so what has it is read before it is kept or sent.
TYPED = b'"__type__"'
#: Characters.
LONGEST_HEADLINE = 200
_CONTENT_TYPE = re.compile(r"(.+?)(?:; compression=([^;]+))?(?:; shape=(json|python))?", re.DOTALL)
_SEALED = "; codec=payload"
_DIGEST_SIZE = 8
#: Stands before what is sealed of a call's arguments, so that no such thing has the size of a digest.
_SEALED_NOTE = b"="
#: How to expand only so far what kombu's decoders expand without bounds; a Python may lack a library.
_BOUNDED: list[tuple[Any, Callable[[], Any]]] = [
    (module.decompress, getattr(module, maker))
    for name, maker in (("zlib", "decompressobj"), ("bz2", "BZ2Decompressor"), ("lzma", "LZMADecompressor"))
    if (module := vars(compressions).get(name)) is not None
]


class Payload(NamedTuple):
    """A serialized value as it is stored; no content type means JSON.

    How else it was written is in the parameters of the type: ``application/json; compression=application/x-gzip;
    shape=json; codec=payload``.
    """

    data: bytes
    content_type: str | None = None

    @property
    def is_sealed(self) -> bool:
        """Whether it has passed a payload codec."""
        return _is_sealed(self.content_type)

    @property
    def is_shaped(self) -> bool:
        """Whether it is plain data of what only a type hint can rebuild."""
        return _written_as(self)[2] is not None


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
    seal: Seal = NO_SEAL

    @classmethod
    def of(
        cls,
        serializer: str,
        accept_content: Iterable[str] | None,
        max_payload: int,
        compression: str | None = None,
        seal: Seal = NO_SEAL,
    ) -> Codec:
        """Build from the app's settings; raise ConfigurationError if one doesn't fit the others."""
        try:
            content_type = registry.name_to_type[serializer]
            dumps(None, serializer=serializer)
        except Exception as error:
            raise ConfigurationError(
                f"The serializer {serializer!r} isn't known to kombu, or can't be used ({summary(error)}): register "
                "it, install its library, or choose another one."
            ) from error
        try:
            accept = frozenset(prepare_accept_content(list(accept_content or ("json",))))
        except Exception as error:
            raise ConfigurationError(
                f"accept_content has a serializer that isn't known to kombu ({summary(error)}): register it first."
            ) from error
        if content_type not in accept:
            raise ConfigurationError(
                f"The serializer {serializer!r} isn't in accept_content, so nothing that it writes could be read "
                "back: add it there, or set durable_serializer, or the task's serializer, to one of the accepted."
            )
        return cls(serializer, accept, max_payload, _known_compression(compression), seal)

    def using(self, serializer: str | None, compression: str | None) -> Codec:
        """Return the codec of a task with options of its own, None for ours; raise ConfigurationError."""
        if serializer in (None, self.serializer) and compression in (None, self.compression):
            return self
        return _with_options(self, serializer, compression)

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
            if TYPED in raw:
                self._loaded(raw, content_type)
        except Exception as error:
            hinted = "" if unfit is None else f"; by its type hint: {summary(unfit)}"
            raise SerializationError(
                f"{what} can't be serialized as {self.serializer} ({summary(error)}{hinted}): return plain data, "
                f"or choose another serializer.{advice_on(value)}"
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
        """Return the stored value; raise SerializationError if it can't be read, CodecError if the seal is why.

        Without a shape, what was written with one is plain data.
        """
        payload = self.opened(payload, what)
        try:
            raw, content_type, mode = self._unpacked(payload)
            data = self._loaded(raw, content_type)
            return data if shape is None or mode is None else shape.load(data, mode)
        except Exception as error:
            raise SerializationError(f"{what} can't be read back ({summary(error)}).") from error

    def opened(self, payload: Payload, what: str) -> Payload:
        """Return a payload without its seal; raise CodecError if that can't be opened here."""
        if payload.content_type is None or not payload.is_sealed:
            return payload
        content_type = payload.content_type.removesuffix(_SEALED)
        return Payload(self.seal.decode(payload.data, what), None if content_type == JSON else content_type)

    def seal_message(self, body: bytes, content_type: str, compression: str | None, what: str) -> Payload:
        """Compress and seal the body of a message, which is sent as it is stored.

        Raises CodecError, PayloadTooLarge, and ConfigurationError for a compression that isn't known.
        """
        return self.using(None, compression)._stored(body, content_type, what)

    def open_message(
        self, body: Any, content_type: str | None, content_encoding: str | None, what: str
    ) -> tuple[Any, str | None, str | None]:
        """Return a message's body, content type and encoding as they were before it was sealed; others as they are.

        Raises CodecError, and SerializationError for a body that can't be expanded.
        """
        if not _is_sealed(content_type):
            return body, content_type, content_encoding
        sealed = Payload(body.encode() if isinstance(body, str) else body, content_type)
        try:
            raw, inner_type, _ = self._unpacked(self.opened(sealed, what))
        except CodecError:
            raise
        except Exception as error:
            raise SerializationError(f"{what} can't be read back ({summary(error)}).") from error
        return raw, inner_type, _encoding_of(inner_type)

    def load_message(self, body: Any, content_type: str | None, content_encoding: str | None, what: str) -> Any:
        """Return what a message's body says; raises CodecError, and what kombu raises for one that can't be read."""
        return loads(*self.open_message(body, content_type, content_encoding, what), accept=self.accept)

    def note(self, text: str, digest: bytes) -> tuple[str | None, bytes]:
        """Return what is kept of a call's arguments: a text for people, and their digest.

        They are sealed together: who knows a few values that may have been passed could guess by the digest which.
        Raises CodecError.
        """
        if not self.seal.is_set:
            return text, digest
        return None, _SEALED_NOTE + self.seal.encode(digest + text.encode(), "What is kept of a call's arguments")

    def read_note(self, text: str | None, digest: bytes | None) -> tuple[str | None, bytes | None]:
        """Return what ``note`` was given; raise CodecError if it can't be read."""
        if digest is None or len(digest) == _DIGEST_SIZE or not digest.startswith(_SEALED_NOTE):
            return text, digest
        plain = self.seal.decode(digest.removeprefix(_SEALED_NOTE), "What is kept of a call's arguments")
        return plain[_DIGEST_SIZE:].decode(errors="replace"), plain[:_DIGEST_SIZE]

    def _unpacked(self, payload: Payload) -> tuple[bytes, str, Mode | None]:
        content_type, compression, mode = _written_as(payload)
        return payload.data if compression is None else self._expanded(payload.data, compression), content_type, mode

    def _serialized(self, value: Any) -> tuple[bytes, str]:
        content_type, data = _dumped(value, self.serializer)
        return data.encode() if isinstance(data, str) else data, content_type

    def _loaded(self, raw: bytes, content_type: str) -> Any:
        if not raw:
            raise ValueError("there are no bytes")  # of which kombu would say that they are the value
        if content_type == JSON and JSON in self.accept and registry._decoders.get(JSON) is json_loads:
            return _from_json(raw.decode())
        return loads(raw, content_type, _encoding_of(content_type), accept=self.accept)

    def _stored(self, raw: bytes, content_type: str, what: str, mode: Mode | None = None) -> Payload:
        parameters = f"; shape={mode}" if mode else ""
        if self.compression is not None and COMPRESSED_FROM <= len(raw) <= self._most_expanded:
            compressed = self._compressed(raw, self.compression, what)
            if len(compressed) < len(raw):
                raw, parameters = compressed, f"; compression={self.compression}{parameters}"
        if self.seal.is_set:
            raw, parameters = self.seal.encode(raw, what), parameters + _SEALED
        self.check_size(raw, what)
        return Payload(raw, None if content_type == JSON and not parameters else content_type + parameters)

    def _compressed(self, raw: bytes, compression: str, what: str) -> bytes:
        try:
            return cast(bytes, compressions.compress(raw, compression)[0])
        except Exception as error:
            raise SerializationError(f"{what} can't be compressed as {compression} ({summary(error)}).") from error

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

    def encode_error(self, error: BaseException, at: datetime | None = None, took: float | None = None) -> Payload:
        """Describe an exception so that ``decode_error`` can rebuild it; never raises.

        ``at`` is when it was raised, ``took`` how many seconds the try had taken.
        Of one that ``max_payload`` forbids the attributes are left out, then the arguments and most of the text. Of one
        that can't be sealed only the class is kept, and the rest is in the log.
        """
        if not self.seal.is_set:
            return Payload(encode_error(error, self.max_payload, at, took))
        try:
            return Payload(self._sealed_error(error, at, took))
        except CodecError as broken:
            logger.error("An error couldn't be encoded; only its class is kept: %s", broken, exc_info=error)
            lost = CodecError(f"{qualname_of(type(error))}, which durable_payload_codec couldn't encode: see the log.")
            return Payload(encode_error(lost, self.max_payload, at, took))

    def verdict(self, error: Exception) -> Payload:
        """Describe an error of our own, which has no value of the app's in it: never sealed, whoever gives it."""
        return Payload(encode_error(error, self.max_payload))

    def _sealed_error(self, error: BaseException, at: datetime | None, took: float | None) -> bytes:
        limit, most = self.max_payload, self.max_payload // 4
        while True:
            line = encode_error(error, limit, at, took)
            sealed = sealed_line(line, self.seal.encode(line, "An error"))
            if len(sealed) <= self.max_payload or limit <= most:
                return sealed
            limit //= 2

    def headline(self, error: BaseException) -> str:
        """Return the beginning of an error, which lists of workflows show and are searched for; of a sealed one only
        the class.
        """
        return printable(qualname_of(type(error)) if self.seal.is_set else summary(error), LONGEST_HEADLINE)

    def rebuilt(self, error: BaseException) -> Exception:
        """Return an error as it is when it was stored and read back; one that is no Exception is a StepError then."""
        return decode_error(encode_error(error, self.max_payload))

    def decode_error(self, payload: Payload) -> Exception:
        """Rebuild an exception: by its class if that can be imported, else as a StepError.

        Raises CodecError if it was sealed and can't be opened here.
        """
        return decode_error(self.opened_error(payload.data))

    def decode_errors(self, log: bytes | None) -> tuple[TryError, ...]:
        """Return what a log of failed tries tells; of what can't be opened here, the classes and times."""
        return decode_errors(b"\n".join(map(self._readable, (log or b"").splitlines())))

    def opened_error(self, line: bytes) -> bytes:
        """Return the line of an error without its seal; raise CodecError if that can't be opened here."""
        sealed = sealed_part(line)
        return line if sealed is None else self.seal.decode(sealed, "An error")

    def _readable(self, line: bytes) -> bytes:
        try:
            return self.opened_error(line)
        except CodecError as error:
            return unread_line(line, str(error))


def is_kept_exactly(value: Any, payload: Payload, serializer: str) -> bool:
    """Tell whether reading back a payload that was just made of a value gives this very value.

    An app's own JSON may make something else of it, and any JSON makes one character of two surrogates.
    """
    if payload.content_type is not None or type(value) not in _EXACT_IN_JSON or b"\\ud" in payload.data:
        return False
    found = registry._encoders.get(serializer)
    return found is not None and found.encoder is json_dumps and registry._decoders.get(JSON) is json_loads


def fingerprint(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """Return a digest of the arguments, the same in every process; those that can't be serialized don't count.

    Sets, dataclasses and pydantic models count by what is in them.
    """
    try:
        text = _canonical([args, kwargs])
    except Exception:  # noqa: BLE001 - any object may refuse in its own way; then each argument alone
        text = json_dumps([[_comparable(arg) for arg in args], {k: _comparable(v) for k, v in sorted(kwargs.items())}])
    return blake2b(text.encode("utf-8", "backslashreplace"), digest_size=_DIGEST_SIZE).digest()


def _dumped(value: Any, serializer: str) -> tuple[str, Any]:
    """Return a value as kombu serializes it, and its content type."""
    found = registry._encoders.get(serializer)
    if found is not None and found.encoder is json_dumps:
        return found.content_type, _json(value)
    content_type, _, data = dumps(value, serializer=serializer)
    return content_type, data


@lru_cache(maxsize=64)
def _with_options(codec: Codec, serializer: str | None, compression: str | None) -> Codec:
    """Return the codec of a task with options of its own, which is asked for at every call of a step."""
    return Codec.of(
        serializer or codec.serializer, codec.accept, codec.max_payload, compression or codec.compression, codec.seal
    )


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
    return (JSON, None, None) if payload.content_type is None else _parsed(payload.content_type)


@lru_cache(maxsize=64)
def _parsed(content_type: str) -> tuple[str, str | None, Mode | None]:
    match = _CONTENT_TYPE.fullmatch(content_type.removesuffix(_SEALED) or JSON)
    assert match is not None, "one character is enough"
    return match[1], match[2], cast("Mode | None", match[3])


def _is_sealed(content_type: str | None) -> bool:
    return content_type is not None and content_type.endswith(_SEALED)


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


def _encoding_by(like: JSONEncoder) -> Callable[[Any], str]:
    """Return what encodes as this does; the standard library makes more anew for each value than it needs."""
    make: Any = getattr(encoder, "c_make_encoder", None)
    if make is None:
        return like.encode
    settings = (
        like.default, encoder.encode_basestring_ascii, None, like.key_separator, like.item_separator, like.sort_keys,
        like.skipkeys, like.allow_nan,
    )  # fmt: skip

    def encode(value: Any) -> str:
        # The dictionary is for what it is in the midst of, by which a circular reference is found. Without one it would
        # go round until there is no stack left, or no memory.
        return "".join(make({}, *settings)(value, 0))

    return encode


_json = _encoding_by(JSONEncoder())
_canonical = _encoding_by(_Canonical(sort_keys=True))
_JSON_DECODER = JSONDecoder(object_hook=object_hook)


def _from_json(text: str) -> Any:
    """Return what a text says; ours never has space around it, for which the decoder looks first."""
    try:
        value, end = _JSON_DECODER.raw_decode(text)
    except JSONDecodeError:
        return _JSON_DECODER.decode(text)
    return value if end == len(text) else _JSON_DECODER.decode(text)


#: Types whose values JSON gives back as they are.
_EXACT_IN_JSON = frozenset({str, int, float, bool, type(None)})


def _comparable(value: Any) -> str | None:
    try:
        return _canonical(value)
    except Exception:  # noqa: BLE001 - what can't be serialized can't be compared
        return None
