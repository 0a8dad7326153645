"""Values and errors as bytes and back; what is stored isn't trusted."""

from __future__ import annotations

import bz2
import json
import lzma
import pickle
import subprocess
import sys
import traceback
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import Any, NoReturn

import kombu.compression
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.exceptions import SerializerNotInstalled

from celery_durable.exceptions import (
    ConfigurationError,
    PayloadTooLarge,
    SerializationError,
    StepError,
    StepLost,
    StepTimeout,
)
from celery_durable.serialization import (
    COMPRESSED_FROM,
    MOST_EXPANSION,
    MOST_NESTED,
    REPR_LIMIT,
    TRACEBACK_LIMIT,
    Codec,
    Payload,
    TryError,
    call_repr,
    decode_errors,
    fingerprint,
    printable,
)

ROOT = Path(__file__).parents[2]
CODEC = Codec.of("json", ["json"], 10_000)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


class Refused(Exception):
    """An error whose constructor takes other arguments than it stores."""

    constructed = 0

    def __init__(self, response: dict[str, Any], *, code: int) -> None:
        type(self).constructed += 1
        super().__init__(f"refused with {code}")
        self.code = code
        self.response = response


class Silent(Exception):
    """An error that never calls its base's constructor."""

    def __init__(self, *, code: int) -> None:
        self.code = code


class Made(Exception):
    """An error with a __new__ of its own."""

    def __new__(cls, *args: Any) -> Made:
        raise AssertionError("nobody may construct this from stored bytes")


class BrokenStr(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")

    __repr__ = __str__


class NeedsAttribute(Exception):
    """An error whose text needs what couldn't be kept."""

    def __init__(self) -> None:
        super().__init__("x")
        self.lock = object()

    def __str__(self) -> str:
        return f"locked by {self.lock!r:.0}"


class Lost(OSError):
    """A subclass of an error that is made in C."""


class Outer:
    class Inner(ValueError):
        """A nested class can be imported by its qualified name."""


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def rebuilt(error: Exception) -> Exception:
    """What a step's caller sees on the first run, and the same on every replay."""
    payload = CODEC.encode_error(raised(error))
    first, replayed = CODEC.decode_error(payload), CODEC.decode_error(payload)
    assert facts_of(first) == facts_of(replayed)
    assert facts_of(rebuilt_again(first)) == facts_of(first), "passed on by an outer step it stays what it is"
    return first


def rebuilt_again(error: Exception) -> Exception:
    return CODEC.decode_error(CODEC.encode_error(error))


def facts_of(error: Exception) -> tuple[type, str, str, dict[str, Any]]:
    return type(error), str(error), repr(error.args), vars(error)


def stored(**facts: Any) -> Payload:
    defaults = {"type": "builtins:ValueError", "message": "m", "traceback": "t", "attributes": {}, "args": []}
    return Payload(json.dumps({**defaults, **facts}).encode())


@given(PLAIN)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    """JSON keeps every plain value."""
    assert CODEC_WITHOUT_LIMIT.decode(CODEC_WITHOUT_LIMIT.encode(value, "it"), "it") == value


CODEC_WITHOUT_LIMIT = Codec.of("json", ["json"], sys.maxsize)


@pytest.mark.parametrize(
    "value",
    [datetime(2025, 1, 2, tzinfo=timezone.utc), uuid.UUID(int=5), Decimal("1.10"), b"\x00\xff", {"deep": [b"x"]}],
    ids=repr,
)
def test_kombus_types_come_back_as_they_were(value: Any) -> None:
    """What Celery's JSON takes as an argument, a step may return."""
    assert CODEC.decode(CODEC.encode(value, "it"), "it") == value


@pytest.mark.parametrize("serializer", ["json", "yaml", "pickle"])
@pytest.mark.parametrize("text", ["a\x00b", "a\ud800b", "ü€😀", "\\u0000"], ids=ascii)
def test_odd_strings_survive_every_serializer(serializer: str, text: str) -> None:
    """NUL and lone surrogates are values like others."""
    codec = Codec.of(serializer, ["json", "yaml", "pickle"], 10_000)
    payload = codec.encode({"text": [text]}, "it")
    assert codec.decode(payload, "it") == {"text": [text]}


def test_json_needs_no_content_type() -> None:
    """The usual case takes no room for it."""
    assert CODEC.encode(1, "it") == Payload(b"1", None)
    assert Codec.of("yaml", ["yaml"], 100).encode(1, "it").content_type == "application/x-yaml"


def test_what_was_written_before_a_change_of_serializer_is_still_read() -> None:
    """Every accepted content type is."""
    before = Codec.of("yaml", ["yaml"], 100).encode({"a": 1}, "it")
    assert Codec.of("json", ["json", "yaml"], 100).decode(before, "it") == {"a": 1}


def test_pickle_is_refused_unless_accepted() -> None:
    """Bytes in the database can't turn it on."""
    payload = Codec.of("pickle", ["pickle"], 100).encode({"a": 1}, "it")
    with pytest.raises(SerializationError, match="it can't be read back"):
        CODEC.decode(payload, "it")


class Bomb:
    """Says so when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("a pickle was loaded",)


def test_an_error_is_never_a_pickle() -> None:
    """Errors are JSON, whatever the app accepts and whatever content type was stored with them."""
    codec = Codec.of("pickle", ["pickle", "json"], 10_000)
    error = codec.decode_error(Payload(pickle.dumps(Bomb()), "application/x-python-serialize"))
    assert isinstance(error, SerializationError)


@pytest.mark.parametrize(
    ("serializer", "accept", "message"),
    [
        ("jsonn", ["json"], "The serializer 'jsonn' isn't known"),
        ("", ["json"], "The serializer '' isn't known"),
        (["json"], ["json"], "isn't known"),
        ("raw", ["json"], "isn't known"),
        ("json", ["jsonn"], "accept_content has a serializer that isn't known"),
        ("pickle", ["json"], "isn't in accept_content"),
    ],
)
def test_a_serializer_that_does_not_fit_is_an_error(serializer: Any, accept: list[str], message: str) -> None:
    """It is found when the worker starts, not with the first result."""
    with pytest.raises(ConfigurationError, match=message):
        Codec.of(serializer, accept, 100)
    with pytest.raises(ConfigurationError, match=message):
        Codec("json", frozenset(accept), 100).using(serializer or "jsonn", "gzip")


def test_a_serializer_without_its_library_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """kombu knows msgpack by name even where it isn't installed."""

    def missing(*_: Any) -> NoReturn:
        raise SerializerNotInstalled("No decoder installed for msgpack")

    encoders = kombu.serialization.registry._encoders
    monkeypatch.setitem(encoders, "msgpack", encoders["msgpack"]._replace(encoder=missing))
    with pytest.raises(ConfigurationError, match="install its library"):
        Codec.of("msgpack", ["msgpack"], 100)


def test_a_task_has_its_own_serializer() -> None:
    """Among those that the app accepts; what is stored is read by every codec of the app."""
    codec = Codec.of("json", ["json", "pickle"], 10_000)
    own = codec.using("pickle", None)
    value = {1: {2}, "c": Color.RED}
    payload = own.encode(value, "it")
    assert payload.content_type == "application/x-python-serialize"
    assert codec.decode(payload, "it") == own.decode(payload, "it") == value


def test_without_options_of_its_own_a_task_has_the_apps_codec() -> None:
    """The very same, as most steps do."""
    packing = Codec.of("json", ["json"], 10_000, "gzip")
    assert CODEC.using(None, None) is CODEC
    assert CODEC.using("json", None) is CODEC
    assert packing.using(None, "application/x-gzip") is packing
    assert packing.using("json", None).compression == "application/x-gzip"


COMPRESSIONS = kombu.compression.encoders()
LONG = {"text": "lorem ipsum " * 1000}


@pytest.mark.parametrize("compression", [*COMPRESSIONS, "gzip", "zlib", "bzip2", "lzma"])
@pytest.mark.parametrize("serializer", ["json", "yaml", "pickle"])
def test_large_values_are_compressed(serializer: str, compression: str) -> None:
    """By every compression that kombu has here, under every serializer; any codec of the app reads them."""
    codec = Codec.of(serializer, ["json", "yaml", "pickle"], 10_000)
    payload = codec.using(None, compression).encode(LONG, "it")
    assert len(payload.data) < 1000
    assert payload.content_type is not None
    assert payload.content_type.split("; compression=")[1] in COMPRESSIONS
    assert codec.decode(payload, "it") == LONG


def test_small_values_and_those_that_do_not_shrink_are_stored_plain() -> None:
    """Compression costs time, and may make a value larger."""
    codec = Codec.of("pickle", ["pickle"], 10_000, "gzip")
    small, random = "x" * (COMPRESSED_FROM - 100), zlib.compress(str(list(range(3000))).encode())
    for value in (small, random):
        payload = codec.encode(value, "it")
        assert payload.content_type == "application/x-python-serialize"
        assert codec.decode(payload, "it") == value


def test_a_compression_that_kombu_lacks_is_an_error() -> None:
    """The known ones are named."""
    for codec in (lambda: Codec.of("json", ["json"], 100, "zipp"), lambda: CODEC.using(None, "zipp")):
        with pytest.raises(ConfigurationError, match="'zipp' isn't known to kombu here.*gzip"):
            codec()


def test_the_payload_limit_is_about_what_is_stored() -> None:
    """A compressed value may be larger in memory, yet not without bounds."""
    codec = Codec.of("json", ["json"], 2000, "gzip")
    large = "x" * (MOST_EXPANSION * 2000 - 2)
    assert codec.decode(codec.encode(large, "it"), "it") == large
    with pytest.raises(PayloadTooLarge, match="32,001 bytes"):
        codec.encode(large + "x", "it")
    with pytest.raises(PayloadTooLarge, match="4,002 bytes"):
        CODEC_OF_2000.encode("x" * 4000, "it")


CODEC_OF_2000 = Codec.of("json", ["json"], 2000)


@pytest.mark.parametrize(
    ("compress", "compression"),
    [(zlib.compress, "application/x-gzip"), (bz2.compress, "application/x-bz2"), (lzma.compress, "application/x-lzma")],
)
def test_a_compressed_bomb_is_not_expanded(compress: Callable[[bytes], bytes], compression: str) -> None:
    """Few bytes in the database can't fill a worker's memory."""
    bomb = Payload(compress(b" " * 50_000_000 + b"1"), f"application/json; compression={compression}")
    with pytest.raises(SerializationError, match="it expands to more than 32,000 bytes"):
        CODEC_OF_2000.decode(bomb, "it")


@contextmanager
def registered(name: str, compress: Callable[[bytes], bytes], expand: Callable[[bytes], bytes]) -> Iterator[None]:
    """A compression of the app's own."""
    kombu.compression.register(compress, expand, f"application/x-{name}", aliases=[name])
    try:
        yield
    finally:
        for registry in (kombu.compression._encoders, kombu.compression._decoders):
            del registry[f"application/x-{name}"]
        del kombu.compression._aliases[name]


def test_a_compression_of_the_app_is_used() -> None:
    """And checked for its size afterwards."""
    with registered("mine", zlib.compress, lambda data: zlib.decompress(data)):
        payload = CODEC.using(None, "mine").encode(LONG, "it")
        assert payload.content_type == "application/json; compression=application/x-mine"
        assert CODEC.decode(payload, "it") == LONG
        with pytest.raises(SerializationError, match="expands to more than"):
            CODEC_OF_2000.decode(Payload(zlib.compress(b"1" * 33_000), payload.content_type), "it")
    with pytest.raises(SerializationError, match="'application/x-mine' isn't known to kombu here"):
        CODEC.decode(payload, "it")


def test_a_compression_that_fails_is_named() -> None:
    """The error of a library doesn't stand alone."""
    with (
        registered("broken", lambda data: 1 / 0, zlib.decompress),  # type: ignore[arg-type, return-value]
        pytest.raises(SerializationError, match="it can't be compressed as application/x-broken"),
    ):
        CODEC.using(None, "broken").encode(LONG, "it")


@pytest.mark.parametrize("cut", [0, 1, 5, -1])
@pytest.mark.parametrize("compression", ["gzip", "bzip2", "lzma"])
def test_broken_compressed_bytes_are_an_error(compression: str, cut: int) -> None:
    """Even if only the end is missing."""
    payload = CODEC.using(None, compression).encode(LONG, "it")
    with pytest.raises(SerializationError, match="it can't be read back"):
        CODEC.decode(Payload(payload.data[:cut], payload.content_type), "it")


def test_a_value_cannot_choose_an_unaccepted_type_by_parameters() -> None:
    """Neither compressed nor with whatever else a content type may have."""
    bomb = zlib.compress(pickle.dumps(Bomb()))
    for end in ("", "; compression=application/x-gzip", "; charset=utf-8", "; shape=json", "; shape=other"):
        with pytest.raises(SerializationError):
            CODEC.decode(Payload(bomb, f"application/x-python-serialize{end}"), "it")


def test_no_bytes_are_no_value() -> None:
    """kombu would return them."""
    with pytest.raises(SerializationError, match="there are no bytes"):
        CODEC.decode(Payload(b""), "it")


class Unreadable:
    """Can be written, but not read back."""

    def __reduce__(self) -> tuple[Any, ...]:
        return int, ("not a number",)


@pytest.mark.parametrize(
    ("serializer", "value"),
    [("pickle", Unreadable()), ("json", {"__type__": "nobody's", "__value__": 1})],
    ids=["pickle", "json"],
)
def test_a_value_whose_decoding_fails_is_named(serializer: str, value: Any) -> None:
    """The engine reads what it writes, so that this is the step's outcome."""
    codec = Codec.of(serializer, [serializer], 10_000)
    payload = codec.encode(value, "The result of step 'charge'")
    with pytest.raises(SerializationError, match="The result of step 'charge' can't be read back"):
        codec.decode(payload, "The result of step 'charge'")


@pytest.mark.parametrize("value", [object(), {1: object()}, {"x": lambda: 1}], ids=["object", "inside", "lambda"])
def test_a_value_that_cannot_be_encoded_is_named(value: Any) -> None:
    """The error says what it was, and what to do."""
    with pytest.raises(SerializationError, match="The result of step 'charge' can't be serialized as json"):
        CODEC.encode(value, "The result of step 'charge'")


def test_a_recursive_value_is_an_error_like_another() -> None:
    """Not a crash of the worker."""
    value: list[Any] = []
    value.append(value)
    with pytest.raises(SerializationError):
        CODEC.encode(value, "it")


def test_the_payload_limit_is_exact() -> None:
    """A value of max_payload bytes fits, one byte more doesn't."""
    assert len(CODEC.encode("x" * 9_998, "it").data) == 10_000
    with pytest.raises(PayloadTooLarge, match=r"it takes 10,001 bytes, more than durable_max_payload"):
        CODEC.encode("x" * 9_999, "it")


@given(
    st.binary(),
    st.sampled_from([
        None, "application/json", "application/x-yaml", "application/data", "nonsense", ";", "; shape=json",
        "application/json; compression=", "application/json; compression=application/x-gzip",
        "application/json; compression=application/x-lzma; shape=json", "application/json; compression=zip\x00",
    ]) | st.text(),
)  # fmt: skip
def test_garbage_is_a_serialization_error(data: bytes, content_type: str | None) -> None:
    """Whatever was stored, reading it raises nothing else."""
    with suppress(SerializationError):
        CODEC.decode(Payload(data, content_type), "it")


@given(st.binary() | PLAIN.map(lambda value: json.dumps(value).encode()))
def test_garbage_in_place_of_an_error_is_an_error(data: bytes) -> None:
    """decode_error returns an exception for any bytes."""
    assert isinstance(CODEC.decode_error(Payload(data)), Exception)


@given(st.fixed_dictionaries({}, optional={
    "type": PLAIN | st.sampled_from(["builtins:ValueError", "builtins:OSError", "builtins:UnicodeDecodeError"]),
    "message": PLAIN, "traceback": PLAIN, "args": PLAIN, "attributes": PLAIN,
}))  # fmt: skip
def test_a_misshapen_error_is_an_error(facts: dict[str, Any]) -> None:
    """The right keys with wrong values do no harm either."""
    assert isinstance(CODEC.decode_error(Payload(json.dumps(facts).encode())), Exception)


def test_an_error_with_an_odd_constructor_is_rebuilt_without_it() -> None:
    """Class, args and plain attributes are kept; the constructor runs once, when it is raised."""
    Refused.constructed = 0
    error = rebuilt(Refused({"status": [402]}, code=402))
    assert type(error) is Refused
    assert (error.args, error.code, error.response) == (("refused with 402",), 402, {"status": [402]})
    assert Refused.constructed == 1


def test_an_error_that_skips_its_bases_constructor_is_rebuilt() -> None:
    """Its attributes are what it has."""
    error = rebuilt(Silent(code=3))
    assert type(error) is Silent
    assert error.code == 3


def test_no_constructor_of_the_app_runs() -> None:
    """Neither __init__ nor __new__."""
    error = CODEC.decode_error(stored(type=f"{__name__}:Made", args=["x"]))
    assert type(error) is Made
    assert error.args == ("x",)


def test_a_nested_class_is_found() -> None:
    """By its qualified name."""
    assert type(rebuilt(Outer.Inner("x"))) is Outer.Inner


def test_a_local_class_becomes_a_step_error() -> None:
    """It can't be imported, so its name, text and traceback are told."""

    class Local(ValueError):
        pass

    error = rebuilt(Local("lost"))
    assert type(error) is StepError
    assert str(error).endswith("Local: lost")
    assert error.type_name.startswith(f"{__name__}.test_a_local_class")
    assert "in raised" in error.traceback_text


@pytest.mark.parametrize("error", [BrokenStr("x"), BrokenStr()], ids=["args", "bare"])
def test_an_error_without_a_text_is_told_all_the_same(error: Exception) -> None:
    """A broken __str__ doesn't hide it."""
    found = rebuilt(error)
    assert type(found) is StepError
    assert "BrokenStr" in str(found)


def test_attributes_that_cannot_be_kept_are_left_out() -> None:
    """The rest of the error is there."""
    error = ValueError("x")
    error.lock, error.code = object(), 5  # type: ignore[attr-defined]
    assert vars(rebuilt(error)) == {"code": 5}


def test_an_error_that_cannot_speak_without_a_lost_attribute_is_a_step_error() -> None:
    """Rather than one that breaks whoever prints it."""
    assert type(rebuilt(NeedsAttribute())) is StepError


def test_arguments_that_cannot_be_kept_make_a_step_error() -> None:
    """An error without its arguments would be another one."""
    error = rebuilt(ValueError(object()))
    assert type(error) is StepError
    assert error.type_name == "builtins.ValueError"


def opened_nothing() -> OSError:
    try:
        Path("/no/such/file").read_bytes()
    except OSError as error:
        return error
    raise AssertionError("there is no such file")


@pytest.mark.parametrize(
    "error",
    [
        opened_nothing(),
        OSError(5, "broken", "from", None, "to"),
        OSError("only a text"),
        Lost(2, "gone", "there"),
        ConnectionResetError(104, "reset"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
        UnicodeEncodeError("ascii", "ü", 0, 1, "invalid"),
        KeyError("key"),
        StopIteration(3),
        ImportError("no module"),
        StepTimeout("too long"),
        StepLost("lost"),
        StepError("m", "shop.Refused", "tb"),
        SerializationError("not plain"),
        ValueError(b"\x00\xff"),
        ValueError("a\x00b\ud800"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_made_in_c_and_our_own_come_back(error: Exception) -> None:
    """Class, text and arguments are those of the original."""
    found = rebuilt(error)
    assert type(found) is type(error)
    assert (str(found), found.args) == (str(error), error.args)
    if isinstance(error, OSError):
        assert isinstance(found, OSError)
        assert (found.errno, found.filename, found.filename2) == (error.errno, error.filename, error.filename2)


def test_a_file_name_that_is_a_path_is_kept_as_text() -> None:
    """It is what the reader looks for."""
    error = rebuilt(FileNotFoundError(2, "gone", Path("/no/such/file")))
    assert isinstance(error, FileNotFoundError)
    assert error.filename == "/no/such/file"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups are new in Python 3.11")
def test_an_exception_group_becomes_a_step_error_with_all_tracebacks() -> None:
    """Its members are no plain data."""
    error = rebuilt(ExceptionGroup("two things", [ValueError("one"), OSError("other")]))  # noqa: F821
    assert type(error) is StepError
    assert "ValueError: one" in error.traceback_text
    assert "OSError: other" in error.traceback_text


def test_a_huge_error_is_cut_to_the_payload_limit() -> None:
    """The limit holds for errors too: what is told of one that is too large fits."""
    error = ValueError("x" * 100_000)
    error.body = "y" * 100_000  # type: ignore[attr-defined]
    payload = CODEC.encode_error(error)
    found = CODEC.decode_error(payload)
    assert len(payload.data) <= CODEC.max_payload
    assert type(found) is StepError
    assert found.type_name == "builtins.ValueError"


def test_large_attributes_go_before_the_class_does() -> None:
    """An error with a response body is still caught by its class."""
    error = ValueError("short")
    error.body = "y" * 100_000  # type: ignore[attr-defined]
    payload = CODEC.encode_error(error)
    found = CODEC.decode_error(payload)
    assert len(payload.data) <= CODEC.max_payload
    assert (type(found), found.args) == (ValueError, ("short",))


@pytest.mark.parametrize(
    "path",
    [
        "builtins:KeyboardInterrupt", "builtins:SystemExit", "builtins:BaseException", "builtins:int", "builtins:eval",
        "os:system", "builtins:__import__", "no_such_module:Error", "builtins:NoSuchError", "builtins", ":", "",
        "builtins:ValueError.__init__", "celery_durable.exceptions:Suspended", "os:path.sys.exit", "../os:system",
    ],
)  # fmt: skip
def test_only_exception_classes_are_made(path: str) -> None:
    """Whatever name is stored, nothing else is called."""
    error = CODEC.decode_error(stored(type=path, args=["echo"]))
    assert type(error) is StepError
    assert error.args[0] == "m"


def test_a_module_that_breaks_on_import_is_no_error_of_ours(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class is out of reach then, and the error a StepError."""
    (tmp_path / "breaks_on_import.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    assert type(CODEC.decode_error(stored(type="breaks_on_import:Error"))) is StepError


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (((1, 2), {}), ((1, 2), {}), True),
        (((1, 2), {}), ((2, 1), {}), False),
        (((), {"a": 1, "b": 2}), ((), {"b": 2, "a": 1}), True),
        ((({"a": 1, "b": 2},), {}), (({"b": 2, "a": 1},), {}), True),
        (((1,), {}), (("1",), {}), False),
        (((object(), 1), {}), ((object(), 1), {}), True),
        (((object(), 1), {}), ((object(), 2), {}), False),
        (((), {"x": object(), "y": 1}), ((), {"x": object(), "y": 2}), False),
        ((("\ud800",), {}), (("\ud801",), {}), False),
        ((({1: "a", "b": 2},), {}), (({1: "a", "b": 2},), {}), True),
        (((BrokenStr(),), {}), ((BrokenStr(),), {}), True),
    ],
)
def test_fingerprints_compare_what_can_be_compared(one: Any, other: Any, same: bool) -> None:
    """The order of keywords and keys doesn't count, and neither do arguments that can't be serialized."""
    assert (fingerprint(*one) == fingerprint(*other)) is same
    assert len(fingerprint(*one)) == 8


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    """It is stored, so nothing random or new may enter it."""
    assert fingerprint((1, "a"), {"k": [None]}).hex() == FINGERPRINT


FINGERPRINT = "87fe146c24d19962"


def test_a_call_is_shown_for_people() -> None:
    """Bounded, storable, and whatever the arguments' __repr__ does."""
    assert call_repr((1, "a"), {"k": None}) == "1, 'a', k=None"
    assert call_repr((BrokenStr(),), {}) == "<BrokenStr>"
    assert len(call_repr(("x" * 5000,), {})) == REPR_LIMIT


@given(st.text(st.characters(exclude_categories=()), max_size=50))
def test_printable_text_can_be_stored(text: str) -> None:
    """Postgres takes UTF-8 without NUL."""
    shown = printable(text)
    assert "\x00" not in shown
    shown.encode("utf-8")
