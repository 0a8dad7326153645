"""What reads from the broker or the database takes anything: it returns, or raises an error of ours, and runs nothing.

The decoders, each tried here or, where it needs a worker, in ``tests/acceptance/test_hostile_messages.py``:

=====================================  ==========================================================================
what comes in                          who reads it
=====================================  ==========================================================================
values: results, checkpoints,          ``serialization.Codec.decode``, with a shape ``shapes.Shape.load``
messages, events
errors, of tries and outcomes          ``errors.decode_error``, ``errors.decode_errors``
a workflow's kept message              ``envelope.Envelope.of_stored`` and ``under``; ``publisher.retries_of``
the arguments in it                    ``client`` (status, lists); Celery in the worker
headers and properties of messages     Celery's ``Request``; ``request.DurableRequest``, ``strategy.of_workflow``,
                                       ``delivery``, ``worker.UnknownTaskStep``
rows                                   ``store.rows``: columns have Postgres' types; ``store.pool`` reads dates
what nodes have accepted               the statement ``republish``, as text
keys of steps                          ``client`` (their names, by ``_PLACE``)
fingerprints, texts of arguments       compared, shown, and never parsed
payloads of NOTIFY                     nobody: that one has come is all that counts
ids, names, topics and keys of calls   ``tests/integration/test_odd_text.py``
=====================================  ==========================================================================

``FUZZ_EXAMPLES`` is how many examples each property gets (a few thousand take minutes); with it the seed is another
one each time.
"""

from __future__ import annotations

import bz2
import json
import lzma
import os
import pickle
import re
import sys
import time
import tracemalloc
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from celery.exceptions import InvalidTaskError
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st

from celery_durable.envelope import Envelope, is_id
from celery_durable.errors import TryError, decode_error, decode_errors
from celery_durable.exceptions import SerializationError, StepError
from celery_durable.history import _step
from celery_durable.publisher import retries_of
from celery_durable.request import _check_limits, published_at
from celery_durable.serialization import Codec, Payload, fingerprint
from celery_durable.shapes import shape_of
from celery_durable.store.rows import StepRow, StoredMessage
from celery_durable.text import is_storable, printable

#: What Hypothesis shows of a failure may be long.
pytestmark = pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "150"))
fuzz = settings(
    max_examples=EXAMPLES,
    derandomize="FUZZ_EXAMPLES" not in os.environ,
    database=None,
    deadline=5_000,  # milliseconds: no input, however large, is worth more
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

CODEC = Codec.of("json", ["json", "yaml"], 10_000)
LENIENT = Codec.of("json", ["json", "yaml", "pickle"], 10_000)
DEEP = 100_000
HUGE = [
    b"[" * DEEP, b"[" * DEEP + b"]" * DEEP, b'{"a":' * DEEP, b"9" * DEEP, b"1e999", b"-1e999", b"NaN",
    b'"\\ud800"', b'"\\u0000"', b'{"a": 1, "a": 2}', b"\xff\xfe[\x00]\x00", b"\xef\xbb\xbf[]", b"null",
    b'"' + b"x" * DEEP + b'"',
]  # fmt: skip
CONTENT_TYPES = (
    "application/json", "application/x-yaml", "application/x-python-serialize", "application/data", "text/plain", "x",
    "", "\x00", "application/json; compression=application/x-gzip", "application/json; shape=json",
    "application/x-python-serialize; compression=zlib; shape=python", "application/json; compression=; shape=x",
    "a; compression=nope", "application/json; charset=utf-7",
)  # fmt: skip

text = st.text(st.characters(), max_size=40)
scalars = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), text,
    st.sampled_from([10**400, "9999-99-99", "os:system", "builtins:eval", "\ud800", "\x00", "__class__", "0", "-1"]),
)  # fmt: skip
plain = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4), max_leaves=12
)
#: Types that kombu's JSON knows, with values that they haven't.
typed = st.fixed_dictionaries({
    "__type__": st.sampled_from(["datetime", "date", "time", "uuid", "decimal", "bytes", "base64", "x"]) | plain,
    "__value__": plain,
})  # fmt: skip
documents = st.one_of(
    st.binary(max_size=200),
    (plain | typed | st.lists(typed, max_size=3)).map(lambda value: json.dumps(value).encode()),
    st.sampled_from(HUGE),
)
content_types = st.none() | st.sampled_from(CONTENT_TYPES) | text


class Canary:
    """What makes a directory when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def canary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that only what is executed would make."""
    return tmp_path_factory.mktemp("fuzz") / "canary"


@pytest.fixture(autouse=True)
def nothing_runs(canary: Path) -> Any:
    """Check after each test that nothing of its inputs was executed."""
    yield
    assert not canary.exists()


@dataclass
class Item:
    """What a shape rebuilds."""

    name: str
    at: datetime
    parts: list[int]


def returns_items() -> list[Item]:
    """A function whose hint is the shape."""
    return []


def check_text(error: Exception) -> None:
    """What an error says can be logged and stored, and is short."""
    assert is_storable(str(error))
    assert len(str(error)) < 1000


# Values


@fuzz
@given(documents, content_types)
def test_any_bytes_of_any_type_are_a_value_or_an_error(data: bytes, content_type: str | None) -> None:
    """Reading what is stored raises nothing but SerializationError."""
    assume(not (data in HUGE and "yaml" in str(content_type)))  # pyyaml takes seconds for them
    payload = Payload(data, content_type)
    for shape in (None, shape_of(returns_items)):
        try:
            CODEC.decode(payload, "x", shape)
        except SerializationError as error:
            check_text(error)


@fuzz
@given(plain, st.sampled_from(["json", "python"]))
def test_any_data_fits_a_shape_or_is_an_error(data: Any, mode: str) -> None:
    """What is read for a dataclass is one, or a SerializationError."""
    payload = Payload(json.dumps(data).encode(), f"application/json; shape={mode}")
    try:
        found = CODEC.decode(payload, "x", shape_of(returns_items))
    except SerializationError:
        return
    assert all(type(item) is Item for item in found)


def test_no_pickle_is_read_unless_it_is_accepted(canary: Path) -> None:
    """Under none of the names and encodings that a content type may have."""
    evil = pickle.dumps(Canary(canary))
    for content_type in (*CONTENT_TYPES, "pickle", "application/x-python-serialize ", "APPLICATION/X-PYTHON-SERIALIZE"):
        for data in (evil, zlib.compress(evil)):
            try:
                # What says that it is nothing but bytes is left as it is, as kombu has it.
                assert CODEC.decode(Payload(data, content_type), "x") == data
            except SerializationError:
                continue


@fuzz
@given(st.binary(max_size=200))
def test_a_garbled_pickle_is_an_error_where_pickle_is_accepted(data: bytes) -> None:
    """Whoever accepts pickle has its risk; but what is merely broken doesn't end a worker."""
    raw = pickle.dumps([1, {"a": "b"}])
    # Only what names no global: that would be a program, which pickle runs.
    if not re.search(rb"[cioR\x81\x82-\x84\x92\x93]", data):
        for garbled in (data, raw[:10] + data, data + raw):
            try:
                LENIENT.decode(Payload(garbled, "application/x-python-serialize"), "x")
            except SerializationError:
                continue


@pytest.mark.parametrize(
    "document",
    [
        b"!!python/object/apply:os.mkdir ['CANARY']",
        b"!!python/object/new:os.mkdir ['CANARY']",
        b"!!python/name:os.system",
        b"!!python/module:antigravity",
        b"? !!python/object/apply:os.mkdir ['CANARY']\n: 1",
        b"- &a [*a]",
        b"[" * 3000,
        b"\x00",
        b"!!binary x",
        b"9999-99-99",
        b"!!float x",
    ],
)
def test_yaml_makes_no_objects(document: bytes, canary: Path) -> None:
    """It is plain data, or an error."""
    payload = Payload(document.replace(b"CANARY", str(canary).encode()), "application/x-yaml")
    with suppress(SerializationError):
        assert isinstance(CODEC.decode(payload, "x"), list)


@pytest.mark.parametrize("compress", [zlib.compress, bz2.compress, lzma.compress], ids=["zlib", "bz2", "lzma"])
@pytest.mark.parametrize("name", ["application/x-gzip", "application/x-bz2", "application/x-lzma"])
def test_a_bomb_takes_no_memory(compress: Callable[[bytes], bytes], name: str) -> None:
    """Fifty megabytes in some kilobytes aren't expanded, whatever they claim to be compressed with."""
    bomb = Payload(compress(bytes(50_000_000)), f"application/json; compression={name}")
    tracemalloc.start()
    try:
        with pytest.raises(SerializationError):
            CODEC.decode(bomb, "x")
        assert tracemalloc.get_traced_memory()[1] < 20_000_000  # lzma alone takes eight for itself
    finally:
        tracemalloc.stop()


@fuzz
@given(st.lists(plain, max_size=3), st.dictionaries(text, plain, max_size=3))
def test_any_arguments_have_a_fingerprint(args: list[Any], kwargs: dict[str, Any]) -> None:
    """Eight bytes, the same each time."""
    first = fingerprint(tuple(args), kwargs)
    assert len(first) == 8
    assert fingerprint(tuple(args), kwargs) == first


# Errors

PATHS = (
    "os:system", "os:mkdir", "builtins:eval", "builtins:exec", "builtins:type", "builtins:object", "subprocess:Popen",
    "builtins:BaseException", "builtins:KeyboardInterrupt", "builtins:SystemExit", "builtins:GeneratorExit",
    "builtins:Exception.__class__", "builtins:Exception.__subclasses__", "builtins:Exception.__init__.__globals__",
    "builtins:ValueError.__mro__", "os:__builtins__", "os:error", "sys:exit", "antigravity:x", "this:s",
    "asyncio:CancelledError", "celery_durable.exceptions:Cancelled", "celery_durable.engine.retry:TryAgain",
    "unittest.__main__:main", "__main__:X", "", ":", "::", "a:b:c", ".:.", "..os:system", "os.:x", "os:.x", "os\x00:x",
    "\ud800:x", "x" * 5000 + ":y", "builtins:" + "a." * 5000 + "b", "tests.unit.test_fuzz:Canary", "os.path:join",
)  # fmt: skip
FOUND = (
    "builtins:ValueError", "builtins:OSError", "builtins:UnicodeDecodeError", "builtins:ExceptionGroup",
    "builtins:StopIteration", "builtins:ImportError", "builtins:SyntaxError", "builtins:KeyError",
    "json:JSONDecodeError", "subprocess:CalledProcessError", "celery_durable.exceptions:StepTimeout",
    "celery.exceptions:Retry", "urllib.error:HTTPError", "concurrent.futures:CancelledError",
)  # fmt: skip
paths = st.sampled_from(PATHS + FOUND) | text
#: What an error's description consists of, with anything in each place.
facts = st.fixed_dictionaries(
    {},
    optional={
        "type": paths | plain, "message": plain, "traceback": plain,
        "args": st.lists(plain | typed, max_size=6) | plain, "attributes": plain, "at": plain,
        "members": st.dictionaries(
            st.sampled_from(["object", "start", "end", "reason", "encoding", "errno", "filename", "value", "name",
                             "exceptions", "msg", "print_file_and_line", "__dict__", "args", "__class__"]) | text,
            plain, max_size=5,
        ) | plain,
        "errors": st.dictionaries(st.sampled_from(["0", "1", "-1", "9" * 5000, "x"]) | text, plain, max_size=3) | plain,
    },
)  # fmt: skip
well_formed = st.fixed_dictionaries({
    "type": paths, "message": text, "traceback": text, "args": st.lists(scalars, max_size=6),
    "attributes": st.dictionaries(text, scalars, max_size=3),
    "members": st.dictionaries(st.sampled_from(["object", "start", "end", "reason", "encoding", "value"]), scalars),
})  # fmt: skip


@fuzz
@given(
    documents | facts.map(lambda each: json.dumps(each).encode()) | well_formed.map(lambda e: json.dumps(e).encode())
)
@example(json.dumps({"type": "builtins:ExceptionGroup", "message": "", "traceback": "", "args": ["", [1]],
                     "attributes": {}}).encode())  # fmt: skip
def test_any_bytes_are_an_error_and_it_can_be_shown(data: bytes) -> None:
    """What is stored as an error is an Exception, whose text and repr can be made."""
    error = decode_error(data)
    assert isinstance(error, Exception)
    str(error), repr(error)
    assert all(isinstance(each, TryError) for each in decode_errors(data))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: ascii(path[:40]))
def test_no_path_leads_to_what_is_no_error(path: str, canary: Path) -> None:
    """Nothing but a subclass of Exception is made, and nothing is called."""
    before = set(sys.modules)
    for args in ([], [str(canary)], [f"mkdir {canary}"], [[str(canary)]], [f"__import__('os').mkdir('{canary}')"]):
        data = json.dumps({"type": path, "message": "m", "traceback": "t", "args": args, "attributes": {}})
        error = decode_error(data.encode())
        assert type(error) in (StepError, SerializationError, OSError), error
    assert not {"antigravity", "this", "__main__.X"} & (set(sys.modules) - before)


def test_errors_in_errors_in_errors_are_an_error() -> None:
    """However deep they are, and however many."""
    leaf: Any = {"type": "builtins:ValueError", "message": "m", "traceback": "", "args": [None], "attributes": {}}
    deep = leaf
    for _ in range(5_000):
        deep = {**leaf, "errors": {"0": deep}}
    old = sys.getrecursionlimit()
    sys.setrecursionlimit(100_000)
    try:
        data = json.dumps(deep).encode()
    finally:
        sys.setrecursionlimit(old)
    wide = json.dumps({**leaf, "errors": {"0": [leaf] * 20_000}}).encode()
    began = time.monotonic()
    for each in (data, wide):
        assert isinstance(decode_error(each), Exception)
    assert time.monotonic() - began < 10


# Messages

envelopes = st.one_of(
    text,
    plain.map(json.dumps),
    st.fixed_dictionaries(
        {},
        optional={name: plain for name in ("headers", "properties", "exchange", "routing_key", "queue", "compression")},
    ).map(json.dumps),
    st.fixed_dictionaries({
        "headers": st.dictionaries(text | st.sampled_from(["task", "id", "expires"]), plain, max_size=3),
        "properties": st.dictionaries(text, plain, max_size=3),
        "exchange": text, "routing_key": text, "queue": st.none() | text, "compression": st.none() | text,
    }).map(json.dumps),
)  # fmt: skip


@fuzz
@given(envelopes, documents, content_types, text)
def test_any_stored_message_is_one_or_an_error(envelope: str, body: bytes, content_type: str | None, code: str) -> None:
    """What recovery sends, and a fork is made of, raises nothing but SerializationError."""
    message = StoredMessage("w1", None, 1, envelope, body, content_type or "application/json", code)
    with suppress(SerializationError):
        found = Envelope.of_stored(message)
        assert found.headers["expires"] is None
        assert isinstance(found.headers.get("task"), str | None)
        found.to_text()
        found.under("w2", CODEC)


@fuzz
@given(plain)
def test_anything_in_a_header_is_taken_or_left(value: Any) -> None:
    """Numbers of retries, ids, times of publishing and time limits: what isn't one counts as none."""
    assert type(retries_of(value)) is int
    assert is_id(value) in (True, False)
    published = published_at({"published": value})
    assert published is None or published.tzinfo is timezone.utc
    try:
        _check_limits(value)
    except InvalidTaskError as error:
        check_text(error)


# Rows

columns = st.tuples(
    text, st.integers(), st.integers(), st.integers(), st.none() | st.booleans(), st.none() | documents, content_types,
    st.none() | text, st.none() | documents, st.none() | documents, st.none() | text,
)  # fmt: skip


@fuzz
@given(columns)
def test_any_row_of_a_step_is_shown(row: tuple[Any, ...]) -> None:
    """A step that can't be read is told as one, and hides no other."""
    now = datetime.now()
    info = _step(SimpleNamespace(codec=CODEC), StepRow.of((*row[:6], 1, *row[6:], None, now, now)))  # type: ignore[arg-type]
    assert info.state in ("RETRY", "SUCCESS", "FAILURE")
    assert info.error is None or isinstance(info.error, Exception)


@fuzz
@given(st.text(st.characters()), st.integers(1, 50))
def test_any_text_becomes_printable(value: str, limit: int) -> None:
    """Of bounded length, and as Postgres stores it."""
    shown = printable(value, limit)
    assert is_storable(shown)
    assert len(shown) <= 10 * limit
