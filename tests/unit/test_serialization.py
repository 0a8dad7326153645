"""Values and errors as bytes and back; what is stored isn't trusted."""

from __future__ import annotations

import bz2
import json
import lzma
import pickle
import subprocess
import sys
import uuid
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from pathlib import Path
from random import Random
from typing import Any, NoReturn

import kombu.compression
import kombu.serialization
import kombu.utils.json
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.exceptions import SerializerNotInstalled
from kombu.serialization import registry

from celery_durable.exceptions import (
    CodecError,
    ConfigurationError,
    PayloadTooLarge,
    SerializationError,
)
from celery_durable.seal import Seal
from celery_durable.serialization import (
    COMPRESSED_FROM,
    MOST_EXPANSION,
    Codec,
    Payload,
    fingerprint,
    is_kept_exactly,
)
from celery_durable.shapes import Shape
from tests.fixtures.codecs import Encrypted, Failing, new_key
from tests.fixtures.readings import readings
from tests.unit.test_errors import PLAIN
from tests.unit.test_text import BrokenStr

ROOT = Path(__file__).parents[2]
CODEC = Codec.of("json", ["json"], 10_000)


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


def test_an_error_fits_the_payload_limit() -> None:
    """Whatever the serializer, it is rebuilt from what is kept of it."""
    codec = Codec.of("pickle", ["pickle"], 2000)
    at = datetime(2025, 1, 2, tzinfo=timezone.utc)
    short, long = codec.encode_error(KeyError("key"), at), codec.encode_error(ValueError("x" * 10_000))
    assert (repr(codec.decode_error(short)), short.content_type) == ("KeyError('key')", None)
    assert json.loads(short.data)["at"] == at.isoformat()
    assert len(long.data) <= 2000
    assert str(codec.decode_error(long)).startswith("builtins.ValueError: xxx")


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


@pytest.mark.parametrize(("serializer", "message"), [("jsonn", "isn't known"), ("pickle", "isn't in accept_content")])
def test_a_tasks_serializer_that_does_not_fit_is_an_error(serializer: str, message: str) -> None:
    """As the app's own."""
    with pytest.raises(ConfigurationError, match=message):
        CODEC.using(serializer, None)


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


def test_a_tasks_own_codec_is_made_once() -> None:
    """Every call of a step asks for it, and making it tries the serializer out."""
    codec = Codec.of("json", ["json", "pickle"], 10_000)
    own = codec.using("pickle", "gzip")
    assert codec.using("pickle", "gzip") is own
    assert Codec.of("json", ["json", "pickle"], 10_000).using("pickle", "gzip") is own
    assert Codec.of("json", ["json", "pickle"], 500).using("pickle", "gzip").max_payload == 500


def test_what_kombu_comes_to_know_later_can_be_used_then() -> None:
    """That it didn't know it isn't kept."""
    with pytest.raises(ConfigurationError, match="'later' isn't known to kombu here"):
        CODEC.using(None, "later")
    with registered("later", zlib.compress, zlib.decompress):
        assert CODEC.using(None, "later").compression == "application/x-later"


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
    small, random = "x" * (COMPRESSED_FROM - 100), Random(0).randbytes(3000)
    for value in (small, random):
        payload = codec.encode(value, "it")
        assert payload.content_type == "application/x-python-serialize"
        assert codec.decode(payload, "it") == value


def test_a_compression_that_kombu_lacks_is_an_error() -> None:
    """The known ones are named."""
    for codec in (lambda: Codec.of("json", ["json"], 100, "zipp"), lambda: CODEC.using(None, "zipp")):
        with pytest.raises(ConfigurationError, match=r"'zipp' isn't known to kombu here.*gzip"):
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
    bomb = Payload(compress(b" " * 5_000_000 + b"1"), f"application/json; compression={compression}")
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


def test_a_value_whose_decoding_fails_is_named() -> None:
    """The engine reads what it writes, so that this is the step's outcome."""
    codec = Codec.of("pickle", ["pickle"], 10_000)
    payload = codec.encode(Unreadable(), "The result of step 'charge'")
    with pytest.raises(SerializationError, match="The result of step 'charge' can't be read back"):
        codec.decode(payload, "The result of step 'charge'")


@pytest.mark.parametrize(
    "value",
    [object(), {1: object()}, {"x": lambda: 1}, [{"__type__": "nobody's", "__value__": 1}]],
    ids=["object", "inside", "lambda", "taken for another type"],
)
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


class Color(Enum):
    RED = "red"


@dataclass
class Item:
    name: str
    price: Decimal = Decimal("1.10")
    seen: datetime = field(default_factory=lambda: datetime.now(timezone.utc), compare=False)


@dataclass(frozen=True, slots=True)
class Basket:
    items: tuple[Item, ...]
    tags: frozenset[str] = frozenset()
    color: Color = Color.RED


class Order(pydantic.BaseModel):
    id: int
    basket: Basket | None = None
    note: str = pydantic.Field(default="", exclude=True)
    _lock: object = pydantic.PrivateAttr(default_factory=object)


class Loose(pydantic.BaseModel, extra="allow"):
    id: int


@dataclass
class Locked:
    """Has what can't be serialized."""

    id: int
    lock: Any = field(default_factory=object)


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
        (((Item("a"),), {}), ((Item("a"),), {}), True),
        (((Item("a"),), {}), ((Item("b"),), {}), False),
        (((Basket((Item("a"),)),), {}), ((Basket((Item("b"),)),), {}), False),
        ((([Basket(())],), {}), (([Basket((), frozenset("a"))],), {}), False),
        (((Order(id=1),), {}), ((Order(id=1, note="not sent"),), {}), True),
        (((Order(id=1),), {}), ((Order(id=2),), {}), False),
        (((), {"x": Order(id=1, basket=Basket(()))}), ((), {"x": Order(id=1)}), False),
        (((Loose(id=1, more=1),), {}), ((Loose(id=1, more=2),), {}), False),  # type: ignore[call-arg]
        (((Locked(1),), {}), ((Locked(2),), {}), True),
        (((Locked(1), 1), {}), ((Locked(1), 2), {}), False),
        ((({"a", "b"},), {}), (({"b", "a"},), {}), True),
        ((({"a", "b"},), {}), (({"a", "c"},), {}), False),
        ((({"a"},), {}), ((["a"],), {}), False),
        ((({object()},), {}), (({object()},), {}), True),
        (((Color.RED, Path("a"), timedelta(1)), {}), ((Color.RED, Path("b"), timedelta(1)), {}), False),
        (((Order,), {}), ((Basket,), {}), True),
    ],
)
def test_fingerprints_compare_what_can_be_compared(one: Any, other: Any, same: bool) -> None:
    """The order of keywords and keys doesn't count, and neither do arguments that can't be serialized."""
    assert (fingerprint(*one) == fingerprint(*other)) is same
    assert len(fingerprint(*one)) == 8


class Circular:
    """Holds itself: directly, or in a set."""

    asked = 0

    def __init__(self, kind: type[list[Any]] | type[set[Any]]) -> None:
        self.kind = kind

    def __json__(self) -> Any:
        Circular.asked += 1
        if Circular.asked > 2 * sys.getrecursionlimit():
            raise RuntimeError("it would take twice as long with each level")
        return self.kind([self])


def test_a_circular_value_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when the stack is full: each turn takes the memory of all that is in it."""
    monkeypatch.setattr(Circular, "asked", 0)
    with pytest.raises(SerializationError, match="Circular reference"):
        CODEC.encode(Circular(list), "It")
    assert Circular.asked == 1


@pytest.mark.parametrize("kind", [list, set])
def test_circular_arguments_are_not_compared(monkeypatch: pytest.MonkeyPatch, kind: Any) -> None:
    """Such as those that refer to one another through sets; each is tried alone, and none of its levels twice."""
    monkeypatch.setattr(Circular, "asked", 0)
    one = Circular(kind)
    assert fingerprint((one, 1), {}) == fingerprint((object(), 1), {})
    assert fingerprint((one, 1), {}) != fingerprint((one, 2), {})
    assert 0 < Circular.asked < 2 * sys.getrecursionlimit()


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    """It is stored, so nothing random or new may enter it."""
    assert fingerprint((1, "a"), {"k": [None]}).hex() == FINGERPRINT


FINGERPRINT = "87fe146c24d19962"
SETS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from dataclasses import dataclass
from celery_durable.serialization import fingerprint
@dataclass(frozen=True)
class Basket:
    tags: frozenset
tags = frozenset("abcdefgh")
args = (tags, {{"k": tags}}, Basket(tags), {{Basket(tags), Basket(frozenset())}})
print(fingerprint(args, {{"b": 1, "a": {{1, 2}}}}).hex())
"""


def test_sets_have_one_fingerprint_under_every_hash_seed() -> None:
    """Their order differs from process to process."""
    found = {
        subprocess.run(
            [sys.executable, "-c", SETS], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


# A payload codec

KEYS = [new_key(), new_key()]
#: Encrypts with the first key, and with the second.
OLD, NEW = (
    Codec.of("json", ["json", "pickle", "yaml"], 10_000, seal=Seal(Encrypted(*keys))) for keys in (KEYS, reversed(KEYS))
)
STRANGER = Codec.of("json", ["json", "yaml"], 10_000, seal=Seal(Encrypted(new_key())))
SECRET = "hush-7f3Kq9-zebra"


@pytest.mark.parametrize("serializer", ["json", "yaml", "pickle"])
@pytest.mark.parametrize("compression", [None, "gzip"])
def test_a_sealed_value_comes_back(serializer: str, compression: str | None) -> None:
    """It is compressed before, as what is encrypted can't be; its type says so, as of all that has been done to it."""
    codec = OLD.using(serializer, compression)
    value = [f"{SECRET}-{number}" for number in range(100)]
    payload = codec.encode(value, "it")
    assert payload.content_type is not None
    assert payload.content_type.endswith("; codec=payload")
    assert ("compression=application/x-gzip" in payload.content_type) is (compression is not None)
    assert payload.is_sealed
    assert not is_in(SECRET, payload.data)
    assert codec.decode(payload, "it") == value
    assert NEW.decode(payload, "it") == value


@dataclass
class Card:
    """Kept by its shape."""

    number: str


def card() -> Card:
    """Says what it returns."""
    return Card(SECRET)


def test_a_sealed_value_keeps_its_shape() -> None:
    """A dataclass is one again."""
    shape = Shape(card)
    payload = OLD.encode(Card(SECRET), "it", shape)
    assert payload.is_shaped
    assert payload.content_type == "application/json; shape=json; codec=payload"
    assert OLD.decode(payload, "it", shape) == Card(SECRET)


def test_what_was_written_without_a_codec_is_still_read() -> None:
    """The rows of before the setting, and their errors."""
    assert OLD.decode(CODEC.encode([1], "it"), "it") == [1]
    assert repr(OLD.decode_error(CODEC.encode_error(KeyError(1)))) == "KeyError(1)"
    assert OLD.decode_errors(CODEC.encode_error(KeyError(1)).data)[0].type == "builtins.KeyError"
    assert OLD.read_note("1", fingerprint((1,), {})) == ("1", fingerprint((1,), {}))
    assert OLD.open_message(b"[]", "application/json", "utf-8", "it") == (b"[]", "application/json", "utf-8")


@pytest.mark.parametrize(
    ("reader", "why"),
    [(CODEC, "this process has none: let the setting durable_payload"), (STRANGER, "same keys")],
)
def test_what_cannot_be_opened_is_an_error(reader: Codec, why: str) -> None:
    """It names the setting; of an error the class and the time can still be read."""
    at = datetime(2025, 1, 2, tzinfo=timezone.utc)
    payload, error = OLD.encode(SECRET, "it"), OLD.encode_error(ValueError(SECRET), at)
    body = OLD.seal_message(b"[]", "application/json", None, "it")
    _, digest = OLD.note(SECRET, fingerprint((), {}))
    for read in (
        lambda: reader.decode(payload, "The value"),
        lambda: reader.decode_error(error),
        lambda: reader.open_message(body.data, body.content_type, "binary", "The message"),
        lambda: reader.read_note(None, digest),
    ):
        with pytest.raises(CodecError, match=why):
            read()
    (told,) = reader.decode_errors(error.data)
    assert (told.type, told.at, told.traceback) == ("builtins.ValueError", at, "")
    assert "durable_payload_codec" in told.message


def test_a_sealed_error_comes_back() -> None:
    """With all that it had, as one line; the log of tries has one more."""
    error = Refused(SECRET)
    error.hint = SECRET
    lines = [OLD.encode_error(error).data, CODEC.encode_error(KeyError("plain")).data, NEW.encode_error(error).data]
    assert not is_in(SECRET, lines[0])
    assert b"\n" not in lines[0]
    found = OLD.decode_error(Payload(lines[0]))
    assert isinstance(found, Refused)
    assert (found.args, found.hint) == ((SECRET,), SECRET)
    log = b"\n".join(lines)
    assert [told.message for told in OLD.decode_errors(log)] == [SECRET, "'plain'", SECRET]


class Refused(Exception):
    """Has an attribute."""

    hint = ""


def test_a_sealed_error_fits_the_payload_limit() -> None:
    """It is larger than what it was made of."""
    codec = Codec.of("json", ["json"], 4000, seal=OLD.seal)
    kept = codec.encode_error(ValueError("x" * 10_000))
    assert len(kept.data) <= 4000
    assert str(codec.decode_error(kept)).startswith("builtins.ValueError: xxx")


def test_the_limit_counts_what_is_stored() -> None:
    """The encrypted bytes."""
    codec = Codec.of("json", ["json"], 150, seal=OLD.seal)
    codec.encode("x" * 20, "it")
    with pytest.raises(PayloadTooLarge, match="it takes 2"):
        codec.encode("x" * 100, "it")


def test_an_error_that_cannot_be_sealed_keeps_its_class(caplog: pytest.LogCaptureFixture) -> None:
    """All of it is in the log, and nothing of it is stored in the clear."""
    failing = Failing(Encrypted(*KEYS))
    failing.fails = ["encode"]
    codec = Codec.of("json", ["json"], 10_000, seal=Seal(failing))
    kept = codec.encode_error(ValueError(SECRET))
    assert not is_in(SECRET, kept.data)
    assert str(codec.decode_error(kept)) == "ValueError, which durable_payload_codec couldn't encode: see the log."
    assert SECRET in caplog.text


def test_a_message_is_sealed_as_it_is_sent() -> None:
    """Compressed first; a broker's library may have made text of it."""
    body = json.dumps([[SECRET] * 100, {}, {}]).encode()
    sealed = OLD.seal_message(body, "application/json", "gzip", "it")
    assert sealed.content_type == "application/json; compression=application/x-gzip; codec=payload"
    for data in (sealed.data, sealed.data.decode()):
        assert NEW.open_message(data, sealed.content_type, "binary", "it") == (body, "application/json", "utf-8")
        assert NEW.load_message(data, sealed.content_type, "binary", "it")[0] == [SECRET] * 100


def test_a_digest_cannot_be_guessed() -> None:
    """Of a call's arguments text and digest are sealed together, anew each time."""
    digest = fingerprint((1234,), {})
    notes = [OLD.note("1234", digest) for _ in range(2)]
    assert notes[0] != notes[1]
    assert all(text is None and digest not in kept for text, kept in notes)
    assert NEW.read_note(*notes[0]) == ("1234", digest)


def test_a_task_with_options_of_its_own_has_the_same_seal() -> None:
    """And an app with other keys another one."""
    assert OLD.using("yaml", None).seal is OLD.seal
    assert STRANGER.using("yaml", None).seal is STRANGER.seal


def is_in(secret: str, data: bytes) -> bool:
    """Tell whether a text is in these bytes: as it is, in base64, or compressed."""
    return any(secret.encode() in each for each in readings(data))


def test_what_is_kept_exactly_need_not_be_read_back() -> None:
    """Unless two surrogates become one character, or the app's own JSON makes something else of a value."""
    codec = Codec.of("json", ["json"], 1000)
    for value in ("a", "\ud800", 1, 1.5, True, None, float("inf")):
        payload = codec.encode(value, "It")
        assert codec.decode(payload, "It") == value
    assert is_kept_exactly("a", codec.encode("a", "It"), "json")
    assert not is_kept_exactly("\ud83d\ude00", codec.encode("\ud83d\ude00", "It"), "json")
    before = registry._encoders["json"]
    kombu.serialization.register("json", lambda value: "null", json.loads, "application/json")
    try:
        assert not is_kept_exactly(1, codec.encode(1, "It"), "json")
    finally:
        kombu.serialization.register("json", before.encoder, kombu.utils.json.loads, "application/json")
