"""Errors as plain data, and back; what is stored isn't trusted."""

from __future__ import annotations

import json
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NoReturn

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kombu.utils.json import dumps as json_dumps

from celery_durable.errors import MOST_NESTED, TRACEBACK_LIMIT, TryError, decode_error, decode_errors, encode_error
from celery_durable.exceptions import SerializationError, StepError, StepLost, StepTimeout
from tests.unit.test_text import BrokenStr, OddText

ROOT = Path(__file__).parents[2]
LIMIT = 10_000
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


class NeedsAttribute(Exception):
    """An error whose text needs what couldn't be kept."""

    def __init__(self) -> None:
        super().__init__("x")
        self.lock = object()

    def __str__(self) -> str:
        return f"locked by {self.lock!r:.0}"


class Lost(OSError):
    """A subclass of an error that is made in C."""


class Slots(Exception):
    """An error that keeps what it has in slots."""

    __slots__ = ("__secret", "code", "lock", "unset")

    def __init__(self, code: int) -> None:
        super().__init__("slotted")
        self.code = code
        self.lock = object()
        self.__secret = [code]

    @property
    def secret(self) -> list[int]:
        return self.__secret


class Frozen(Exception):
    """An error that refuses to be changed, and whose attributes are properties."""

    def __init__(self, code: int) -> None:
        super().__init__("frozen")
        vars(self)["code"] = code

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError("frozen")

    @property
    def code(self) -> int:
        return vars(self)["code"]


class Mixed(ValueError, OSError):
    """The layout is that of its second base."""


class Falsy(Exception):
    def __bool__(self) -> bool:
        return False


class BrokenCause(Exception):
    """An error whose traceback can't be formatted."""

    @property
    def __cause__(self) -> NoReturn:  # type: ignore[override]
        raise RuntimeError("no cause")


CALLS: list[str] = []


def recorded(name: str) -> Callable[..., Any]:
    def call(*_: Any, **__: Any) -> NoReturn:
        CALLS.append(name)
        raise RuntimeError(name)

    return call


class Meta(type):
    """A metaclass with ideas of its own."""

    __call__ = __eq__ = __instancecheck__ = __subclasscheck__ = recorded("metaclass")  # type: ignore[assignment]
    __hash__ = recorded("hash")  # type: ignore[assignment]
    __mro__ = __bases__ = __base__ = __dict__ = __module__ = property(  # type: ignore[assignment]
        recorded("property of the metaclass")
    )


HOSTILE = (
    "__new__", "__init__", "__setattr__", "__delattr__", "__getattribute__", "__setstate__", "__getstate__",
    "__reduce__", "__reduce_ex__", "__bool__", "__len__", "__eq__", "__hash__", "__repr__", "__init_subclass__",
    "__getnewargs__", "__copy__", "with_traceback", "add_note",
)  # fmt: skip
#: A class all of whose code says when it is called. Like many an odd class, it claims to be built in.
Hostile: Any = type.__new__(
    Meta,
    "Hostile",
    (KeyError,),
    {
        **{name: recorded(name) for name in HOSTILE},
        **{name: property(recorded(name)) for name in ("args", "__dict__", "__class__", "__traceback__", "__notes__")},
        "__slots__": ("code",),
        "__module__": __name__,
    },
)


def hostile() -> Any:
    """An error of it, made behind its back."""
    error = KeyError.__new__(Hostile, "key")
    vars(BaseException)["__dict__"].__get__(error)["limit"] = [7]
    type.__dict__["__dict__"].__get__(Hostile)["code"].__set__(error, 402)
    return error


class Outer:
    class Inner(ValueError):
        """A nested class can be imported by its qualified name."""


def raised(error: Exception) -> Exception:
    try:
        raise error
    except Exception as caught:
        return caught


def encoded(error: BaseException, at: datetime | None = None) -> bytes:
    return encode_error(error, LIMIT, at)


def rebuilt(error: Exception) -> Exception:
    """What a step's caller sees on the first run, and the same on every replay."""
    line = encoded(raised(error))
    first, replayed = decode_error(line), decode_error(line)
    assert facts_of(first) == facts_of(replayed)
    assert facts_of(rebuilt_again(first)) == facts_of(first), "passed on by an outer step it stays what it is"
    return first


def rebuilt_again(error: Exception) -> Exception:
    return decode_error(encoded(error))


def facts_of(error: Exception) -> tuple[type, str, str, dict[str, Any]]:
    return type(error), str(error), repr(error.args), vars(error)


def stored(**facts: Any) -> bytes:
    defaults = {"type": "builtins:ValueError", "message": "m", "traceback": "t", "attributes": {}, "args": []}
    return json.dumps({**defaults, **facts}).encode()


@given(st.binary() | PLAIN.map(lambda value: json.dumps(value).encode()))
def test_garbage_in_place_of_an_error_is_an_error(data: bytes) -> None:
    """decode_error returns an exception for any bytes."""
    assert isinstance(decode_error(data), Exception)


@given(st.fixed_dictionaries({}, optional={
    "type": PLAIN | st.sampled_from([f"builtins:{name}" for name in (
        "ValueError", "OSError", "UnicodeDecodeError", "UnicodeEncodeError", "SyntaxError", "ExceptionGroup")]),
    "message": PLAIN, "traceback": PLAIN, "args": PLAIN | st.lists(PLAIN), "attributes": PLAIN | st.just({}),
    "members": PLAIN | st.dictionaries(st.sampled_from(
        ["object", "start", "end", "reason", "encoding", "errno", "filename", "characters_written", "lineno", "text",
         "exceptions", "message"]), PLAIN),
    "errors": PLAIN | st.dictionaries(st.sampled_from(["0", "1", "-1", "x"]), PLAIN),
}))  # fmt: skip
def test_a_misshapen_error_is_an_error(facts: dict[str, Any]) -> None:
    """The right keys with wrong values do no harm either."""
    assert isinstance(decode_error(json.dumps(facts).encode()), Exception)


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
    error = decode_error(stored(type=f"{__name__}:Made", args=["x"]))
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


def with_members(error: Any, **members: Any) -> Any:
    for name, value in members.items():
        setattr(error, name, value)
    return error


def raised_by(function: Callable[[], Any]) -> Exception:
    try:
        function()
    except Exception as error:
        return error
    raise AssertionError("it raised nothing")


@pytest.mark.parametrize(
    ("error", "members"),
    [
        (ImportError("no", name="shop", path="/shop.py"), ["msg", "name", "path"]),
        (raised_by(lambda: __import__("no_such_module")), ["msg", "name"]),
        (raised_by(lambda: (5).nothing), ["name"]),  # type: ignore[attr-defined]
        (raised_by(lambda: nowhere), ["name"]),  # type: ignore[name-defined]  # noqa: F821
        (raised_by(lambda: compile("a = (", "shop.py", "exec")),
         ["msg", "filename", "lineno", "offset", "text", "end_lineno", "end_offset"]),
        (StopIteration(3), ["value"]),
        (with_members(StopIteration(3), value=4), ["value"]),
        (raised_by(lambda: b"ab\xff".decode()), ["encoding", "object", "start", "end", "reason"]),
        (with_members(UnicodeEncodeError("ascii", "aüü", 1, 2, "no"), end=3, reason="two"),
         ["encoding", "object", "start", "end", "reason"]),
        (UnicodeTranslateError("aü", 1, 2, "no"), ["object", "start", "end", "reason"]),
        (UnicodeDecodeError("utf-8", b"", 0, 1, "at the end"), ["object", "start", "end"]),
        (BlockingIOError(11, "full", 512), ["errno", "strerror", "characters_written"]),
        (with_members(OSError("text"), errno=5, filename="a", filename2="b"), ["errno", "filename", "filename2"]),
        (Mixed(2, "gone", "there"), ["errno", "strerror", "filename"]),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)  # fmt: skip
def test_what_built_in_errors_have_in_c_is_kept(error: Exception, members: list[str]) -> None:
    """These members are neither in ``args`` nor in ``__dict__``."""
    found = rebuilt(error)
    assert type(found) is type(error)
    assert (str(found), found.args) == (str(error), json_like(error.args))
    assert [getattr(found, name) for name in members] == [getattr(error, name) for name in members]


def json_like(args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(list(arg) if isinstance(arg, tuple) else arg for arg in args)


def test_the_object_that_lacks_an_attribute_is_not_kept() -> None:
    """It may be anything, of any size; Python's own pickles leave it out, too."""
    line = encoded(raised_by(lambda: {"a": "plain data"}.nothing))  # type: ignore[attr-defined]
    assert json.loads(line)["members"] == {"name": "nothing"}


def test_slots_are_kept() -> None:
    """Those that can be serialized, and private ones too."""
    error = rebuilt(Slots(5))
    assert isinstance(error, Slots)
    assert (error.code, error.secret) == (5, [5])
    assert not hasattr(error, "lock")
    assert not hasattr(error, "unset")


def test_an_error_that_cannot_be_changed_is_rebuilt() -> None:
    """Without its __setattr__, and although a property has the name of what is in its ``__dict__``."""
    error = rebuilt(Frozen(5))
    assert isinstance(error, Frozen)
    assert error.code == 5


def test_nothing_of_a_class_but_its_text_is_called() -> None:
    """Neither by describing an error nor by rebuilding it, whatever its class and its metaclass override."""
    line = encoded(hostile())
    CALLS.clear()
    error = decode_error(line)
    assert CALLS == []
    assert type(error) is Hostile
    assert vars(BaseException)["args"].__get__(error) == ("key",)
    assert vars(BaseException)["__dict__"].__get__(error) == {"limit": [7]}
    assert type.__dict__["__dict__"].__get__(Hostile)["code"].__get__(error) == 402
    assert json.loads(line)["message"] == "'key'"


class Pretender(ValueError):
    """A class that says that it is built in, with a constructor that isn't."""

    def __new__(cls, *args: Any) -> Pretender:
        raise AssertionError("nobody may construct this from stored bytes")


def test_a_class_that_says_it_is_built_in_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is built in is known by identity."""
    monkeypatch.setattr(Pretender, "__module__", "builtins")
    assert type(decode_error(stored(type=f"{__name__}:Pretender"))) is Pretender


class Liar:
    """An object that says it is a subclass of Exception."""

    __class__ = type  # type: ignore[assignment]
    __bases__ = (Exception,)
    __mro__ = (Exception, BaseException, object)


NO_CLASS = Liar()


def test_what_only_says_that_it_is_an_exception_class_is_not_called() -> None:
    """Only real classes count."""
    assert isinstance(NO_CLASS, type)
    assert type(decode_error(stored(type=f"{__name__}:NO_CLASS"))) is StepError


def test_a_falsy_error_is_an_error() -> None:
    """It is its identity that counts."""
    assert type(rebuilt(Falsy("x"))) is Falsy


def test_text_of_an_odd_class_is_text() -> None:
    """What __str__ returns may be of a subclass of str that can do nothing."""
    assert json.loads(encoded(OddText("x")))["message"] == "odd"


def test_an_error_without_a_traceback_text_is_rebuilt() -> None:
    """What can't be formatted is left out, here the cause."""
    line = encoded(raised(BrokenCause("x")))
    assert type(decode_error(line)) is BrokenCause
    assert "in raised" in json.loads(line)["traceback"]


def test_a_traceback_that_cannot_be_made_at_all_is_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Type and message are kept all the same."""
    for name in ("format_exception", "format_tb"):
        monkeypatch.setattr(traceback, name, recorded(name))
    facts = json.loads(encoded(raised(ValueError("x"))))
    assert (facts["type"], facts["message"], facts["traceback"]) == ("builtins:ValueError", "x", "")


def test_an_error_that_cannot_be_described_is_told_by_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """encode_error raises nothing, whatever goes wrong in it."""
    monkeypatch.setattr("celery_durable.errors._described_arguments", recorded("arguments"))
    found = decode_error(encoded(ValueError("x")))
    assert type(found) is StepError
    assert "builtins.ValueError: <it can't be described: RuntimeError: arguments>" in str(found)


def test_what_is_no_error_of_an_attribute_is_not_caught() -> None:
    """Ctrl-C while an attribute is serialized is Ctrl-C."""

    class Interrupted:
        def __json__(self) -> NoReturn:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encoded(with_members(ValueError("x"), attribute=Interrupted()))


class Once:
    """Can be serialized only once."""

    def __init__(self) -> None:
        self.calls = 0

    def __json__(self) -> str:
        self.calls += 1
        return "once" if self.calls == 1 else recorded("twice")()


def test_an_attribute_is_serialized_once() -> None:
    """What it was then is kept."""
    assert vars(decode_error(encoded(with_members(ValueError("x"), attribute=Once())))) == {"attribute": "once"}


def test_an_attribute_that_could_not_be_read_back_is_left_out() -> None:
    """It would take the whole error with it."""
    error = with_members(ValueError("x"), odd={"__type__": "nobody's", "__value__": 1}, at=datetime.min, code=5)
    assert vars(rebuilt(error)) == {"at": datetime.min, "code": 5}


def test_odd_text_in_errors_is_kept() -> None:
    """In arguments as it was, in texts so that Postgres stores it."""
    error = ValueError("a\x00b\ud800", "x" * 2 * TRACEBACK_LIMIT)
    line = encode_error(raised(error), sys.maxsize)
    facts = json.loads(line)
    assert decode_error(line).args == error.args
    assert "\x00" not in facts["message"] + facts["traceback"]
    (facts["message"] + facts["traceback"]).encode("utf-8")
    assert len(facts["message"]) <= TRACEBACK_LIMIT
    assert b"\n" not in line


def test_of_a_long_traceback_both_ends_are_kept() -> None:
    """The last lines say what happened, the first ones what it began with."""
    try:
        try:
            raise KeyError("first" + "x" * TRACEBACK_LIMIT)
        except KeyError:
            raise ValueError("last") from None
    except ValueError as error:
        error.__suppress_context__ = False
        text = json.loads(encode_error(error, sys.maxsize))["traceback"]
    assert len(text) <= TRACEBACK_LIMIT
    assert text.startswith("Traceback (most recent call last)")
    assert text.endswith("ValueError: last\n")


def test_a_deep_recursion_is_an_error_like_another() -> None:
    """Its traceback is long, and the stack is deep no more."""

    def dive() -> Any:
        return dive()

    assert type(decode_error(encoded(raised_by(dive)))) is RecursionError


def test_errors_among_the_arguments_are_rebuilt_as_well() -> None:
    """As libraries do that wrap the errors of other libraries."""
    error = rebuilt(RuntimeError(Refused({}, code=5), [ValueError("one"), OSError(2, "gone", "there")], "text"))
    assert type(error) is RuntimeError
    refused, several, text = error.args
    assert (type(refused), refused.code, text) == (Refused, 5, "text")
    assert [type(each) for each in several] == [ValueError, FileNotFoundError]
    assert several[1].filename == "there"


def test_an_argument_that_cannot_be_rebuilt_is_a_step_error() -> None:
    """The error around it is still of its class."""
    error = rebuilt(ConnectionError(ValueError(object())))
    assert type(error) is ConnectionError
    assert type(error.args[0]) is StepError
    assert error.args[0].type_name == "builtins.ValueError"


def test_errors_in_errors_end_somewhere() -> None:
    """Deep ones, many ones, and those that hold themselves."""
    own = ValueError()
    own.args = (own, [own, own])
    many = ValueError([ValueError(number) for number in range(MOST_NESTED + 1)])
    deep = ValueError("x")
    for _ in range(5000):
        deep = ValueError(deep)
    for error in (own, many, deep):
        found = decode_error(encode_error(error, sys.maxsize))
        while type(found) is ValueError:
            found = found.args[0]
        assert type(found) is StepError
        assert found.type_name == "builtins.ValueError"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups are new in Python 3.11")
def test_an_exception_group_is_rebuilt_with_its_members() -> None:
    """So that ``except*`` works, and the groups in it are kept."""
    inner = ExceptionGroup("inner", [Refused({}, code=5)])  # noqa: F821
    error: Any = rebuilt(ExceptionGroup("two things", [ValueError("one"), inner]))  # noqa: F821
    assert type(error) is ExceptionGroup  # noqa: F821
    assert str(error) == "two things (2 sub-exceptions)"
    assert error.subgroup(Refused).exceptions[0].exceptions[0].code == 5


@pytest.mark.skipif(sys.version_info < (3, 11), reason="exception groups are new in Python 3.11")
def test_an_exception_group_that_cannot_be_rebuilt_tells_all_its_tracebacks() -> None:
    """Here because one member is an interrupt, so that it isn't an Exception."""
    line = encoded(BaseExceptionGroup("two", [ValueError("one"), KeyboardInterrupt("other")]))  # noqa: F821
    found = decode_error(line)
    assert type(found) is StepError
    assert "ValueError: one" in found.traceback_text
    assert "KeyboardInterrupt: other" in found.traceback_text


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("UnicodeDecodeError", {"encoding": "a", "object": b"x", "start": -(10**12), "end": 1 - 10**12, "reason": "r"}),
        ("UnicodeDecodeError", {"encoding": "a", "object": 5, "start": 0, "end": 1, "reason": "r"}),
        ("UnicodeDecodeError", {"encoding": "a", "object": "x", "start": 0, "end": 1, "reason": "r"}),
        ("UnicodeEncodeError", {"encoding": "a", "object": b"x", "start": 0, "end": 1, "reason": "r"}),
        ("UnicodeEncodeError", {"encoding": "a", "object": "x", "start": -5, "end": -4, "reason": "r"}),
        ("UnicodeTranslateError", {"object": [1], "start": 0, "end": 1, "reason": "r"}),
        ("UnicodeDecodeError", {"object": {"a": 1}, "start": 10**30}),
        ("OSError", {"errno": [1], "characters_written": "x"}),
        ("ImportError", {"msg": 5, "__class__": 5, "unknown": 1, "__dict__": 7}),
        ("SyntaxError", {"lineno": "x", "filename": 5, "text": [1], "offset": {}}),
        ("StopIteration", ["value"]),
    ],
)
def test_wrong_members_do_no_harm(name: str, members: Any) -> None:
    """Python's own code in C reads memory by some of them: a row must not end the process."""
    members = json.loads(json_dumps(members))
    arguments = ["a", {"__type__": "bytes", "__value__": "x"}, -(10**12), 1 - 10**12, "r"]
    for args in ([], arguments):
        error = decode_error(stored(type=f"builtins:{name}", args=args, members=members))
        assert isinstance(error, Exception)
        assert isinstance(str(error), str)


def test_a_unicode_error_that_skips_its_bases_constructor_is_rebuilt() -> None:
    """It has nothing that could be read."""
    error = rebuilt(Undecoded(5))
    assert isinstance(error, Undecoded)
    assert error.code == 5


class Undecoded(UnicodeDecodeError):
    def __init__(self, code: int) -> None:
        self.code = code

    def __str__(self) -> str:
        return f"undecoded {self.code}"


def test_the_time_of_an_error_is_kept() -> None:
    """Whoever rebuilds it doesn't need it; the list of tries does."""
    at = datetime(2025, 1, 2, 3, 4, 5, 6, tzinfo=timezone.utc)
    line = encoded(ValueError("x"), at)
    assert json.loads(line)["at"] == "2025-01-02T03:04:05.000006+00:00"
    assert repr(decode_error(line)) == "ValueError('x')"
    assert "at" not in json.loads(encoded(ValueError("x")))


def test_a_log_of_tries_is_read() -> None:
    """Type, message, traceback and time of each."""
    at = datetime(2025, 1, 2, tzinfo=timezone.utc)
    log = b"\n".join([
        encoded(raised(Outer.Inner("one")), at),
        encoded(ValueError("y" * 100_000), at + timedelta(1)),
        encoded(OSError(2, "gone")),
    ])  # fmt: skip
    first, second, third = decode_errors(log)
    assert (first.type, first.message, first.at) == (f"{__name__}.Outer.Inner", "one", at)
    assert "in raised" in first.traceback
    assert (second.type, second.message[:3], second.at) == ("builtins.ValueError", "yyy", at + timedelta(1))
    assert third == TryError("builtins.FileNotFoundError", "[Errno 2] gone", "FileNotFoundError: [Errno 2] gone\n")


@pytest.mark.parametrize("log", [None, b""])
def test_no_log_has_no_errors(log: bytes | None) -> None:
    """Nothing has failed."""
    assert decode_errors(log) == ()


@pytest.mark.parametrize(
    "line",
    [
        b"{", b"\xff", b"null", b"[]", b"5", b'"type"', b"{}", b'{"type": 5, "message": "m", "traceback": "t"}',
        b'{"type": "a:b", "message": null, "traceback": "t"}', b"[" * 100_000,
        b'{"type": "a:b", "message": "m", "traceback": "t", "at": "yesterday"}',
        b'{"type": "a:b", "message": "m", "traceback": "t", "at": 5}',
    ],
)  # fmt: skip
def test_an_unreadable_line_of_the_log_says_so(line: bytes) -> None:
    """And hides no other."""
    broken, fine = decode_errors(line + b"\n" + encoded(ValueError("x")))
    assert (broken.type, broken.traceback, broken.at) == ("", "", None)
    assert broken.message.startswith("The error of this try can't be read back (")
    assert fine.message == "x"


@given(st.binary())
def test_any_log_is_read(log: bytes) -> None:
    """With one error for each line."""
    assert len(decode_errors(log)) == len(log.splitlines())


def test_a_huge_error_is_cut_to_the_limit() -> None:
    """The limit holds for errors too: what is told of one that is too large fits."""
    error = ValueError("x" * 100_000)
    error.body = "y" * 100_000  # type: ignore[attr-defined]
    line = encoded(error)
    found = decode_error(line)
    assert len(line) <= LIMIT
    assert type(found) is StepError
    assert found.type_name == "builtins.ValueError"


def test_large_attributes_go_before_the_class_does() -> None:
    """An error with a response body is still caught by its class."""
    error = ValueError("short")
    error.body = "y" * 100_000  # type: ignore[attr-defined]
    line = encoded(error)
    found = decode_error(line)
    assert len(line) <= LIMIT
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
    error = decode_error(stored(type=path, args=["echo"]))
    assert type(error) is StepError
    assert error.args[0] == "m"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory to import from: a script, a package of the app, and an installed library."""
    place = tmp_path_factory.mktemp("place")
    module = "class Error(Exception): pass"
    library = place / "site-packages"
    for path in (place / "script.py", place / "shop" / "errors.py", library / "library" / "errors.py"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(module)
    for package in (place / "shop", library / "library"):
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(module)
    (place / "shop" / "exits.py").write_text("import sys; sys.exit(5)")
    (library / "single.py").write_text(module)
    return place


RESOLVE = """
import json, sys
from celery_durable.errors import decode_error, encode_error
stored = encode_error(ValueError("x"), 1000)
found = {}
for path in sys.argv[1:]:
    found[path] = type(decode_error(stored.replace(b"builtins:ValueError", path.encode()))).__name__
print(json.dumps(found))
"""


def resolved(place: Path, *paths: str, imported: str = "sys") -> dict[str, str]:
    """The classes that another process, which has imported something, makes of what is stored."""
    done = subprocess.run(
        [sys.executable, "-c", f"import {imported}\n{RESOLVE}", *paths],
        env={"PYTHONPATH": f"{place}:{place / 'site-packages'}:{ROOT}"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


def test_an_error_has_its_class_although_its_module_is_not_imported_yet(place: Path) -> None:
    """That of a library, or of a package in use, which only the body of a step imports: a replay doesn't run it."""
    paths = ("shop.errors:Error", "library.errors:Error", "single:Error", "tarfile:ReadError")
    assert list(resolved(place, *paths, imported="shop").values()) == ["Error", "Error", "Error", "ReadError"]


def test_a_row_cannot_import_what_it_likes(place: Path) -> None:
    """Only libraries and parts of packages in use: no scripts, no jokes, no foreign package."""
    paths = (
        "script:Error",
        "shop.errors:Error",
        "shop:Error",
        "this:s",
        "antigravity:webbrowser",
        "idlelib.idle:Exit",
    )
    assert set(resolved(place, *paths).values()) == {"StepError"}


def test_a_row_cannot_run_a_program(place: Path) -> None:
    """Nor can it make the process exit."""
    paths = ("shop.__main__:Error", "library.__main__:Error", "shop.exits:Error", "shop.nothing:Error")
    assert set(resolved(place, *paths, imported="shop").values()) == {"StepError"}


def test_a_module_that_breaks_on_import_is_no_error_of_ours(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The class is out of reach then, and the error a StepError."""
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "breaks_on_import.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path / "site-packages")
    assert type(decode_error(stored(type="breaks_on_import:Error"))) is StepError
