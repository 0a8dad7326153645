"""Dataclasses and pydantic models come back by the return hint, and nothing else changes."""

from __future__ import annotations

import functools
import math
import re
import subprocess
import sys
import typing
import uuid
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Generic, NewType, Optional, TypeVar

import pytest
from celery import VERSION, Celery
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, RootModel, SecretStr, computed_field
from pydantic.dataclasses import dataclass as pydantic_dataclass

from celery_durable import shapes
from celery_durable.exceptions import SerializationError
from celery_durable.serialization import Codec, Payload
from celery_durable.shapes import Shape, fields_of, shape_of

if TYPE_CHECKING:
    from decimal import Context as OnlyForTypes

CODEC = Codec.of("json", ["json", "yaml", "pickle"], 100_000)
NOW = datetime(2025, 1, 2, 3, 4, 5, 6, tzinfo=timezone.utc)
T = TypeVar("T")


class Color(Enum):
    RED = "red"


@dataclass
class Order:
    id: int
    at: datetime | None = None
    price: Decimal = Decimal("1.10")


@dataclass(frozen=True, slots=True)
class Basket:
    orders: tuple[Order, ...]
    tags: frozenset[str] = frozenset()


@dataclass(kw_only=True)
class Everything:
    day: date = date(2025, 1, 2)
    hour: time = time(1, 2)
    duration: timedelta = timedelta(days=3, microseconds=1)
    key: uuid.UUID = field(default=uuid.UUID(int=5))
    color: Color = Color.RED
    path: Path = Path("a/b")
    colors: frozenset[Color] = frozenset(Color)
    raw: bytes = b"text"
    number: float = math.inf
    by_id: dict[int, Order] = field(default_factory=lambda: {5: Order(5)})


@dataclass
class Either:
    id: str | datetime | uuid.UUID | Decimal
    color: Color = Color.RED
    path: Path = Path("a/b")
    tags: frozenset[Color] = frozenset({Color.RED})
    prices: dict[date, Decimal] = field(default_factory=lambda: {date(2025, 1, 2): Decimal("1.1")})


@dataclass
class Computed:
    a: int
    b: int = field(init=False)

    def __post_init__(self) -> None:
        self.b = 2 * self.a


@dataclass(eq=False)
class Unequal:
    number: float


@dataclass
class Box(Generic[T]):
    content: T


@dataclass
class Raw:
    raw: bytes
    color: Color = Color.RED
    duration: timedelta = timedelta(days=3)


@dataclass
class Cat:
    name: str


@dataclass
class Dog:
    name: str


@dataclass
class Puppy(Dog):
    weeks: int = 1


@dataclass
class WithInit:
    a: InitVar[int]
    b: int = 0


@dataclass
class WithLock:
    lock: Any


@pydantic_dataclass
class Checked:
    id: int


class Model(BaseModel):
    id: int
    order: Order | None = None
    nested: list[Model] = []


class Strict(BaseModel, strict=True):
    at: datetime
    tags: set[str]


class Aliased(BaseModel):
    id: int = Field(alias="Id")


class Closed(BaseModel, extra="forbid"):
    id: int

    @computed_field  # type: ignore[prop-decorator]
    @property
    def twice(self) -> int:
        return 2 * self.id


class Open(BaseModel, extra="allow"):
    id: int


class Hiding(BaseModel):
    id: int
    password: str = Field(default="", exclude=True)
    _lock: object = PrivateAttr(default_factory=object)

    @functools.cached_property
    def twice(self) -> int:
        return 2 * self.id


class Secret(BaseModel):
    password: SecretStr


class Numbers(RootModel[list[int]]):
    pass


class Odd(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)
    lock: object


class Card(BaseModel):
    kind: typing.Literal["card"] = "card"
    number: str


class Cash(BaseModel):
    kind: typing.Literal["cash"] = "cash"
    number: str


Payment = Annotated[Card | Cash, Field(discriminator="kind")]
OrderLike = NewType("OrderLike", Order)


def brief(value: Any) -> str:
    """The beginning of its text, without an address: a test has the same name in every process."""
    return re.sub(" at 0x[0-9a-f]+", "", str(value))[:30]


def returning(hint: Any) -> Callable[[], Any]:
    def function() -> Any: ...

    function.__annotations__["return"] = hint
    return function


def there_and_back(hint: Any, value: Any, codec: Codec = CODEC) -> Any:
    """What a step's first run and its replays see of its value."""
    shape = shape_of(returning(hint))
    payload = codec.encode(value, "it", shape)
    first, replayed = (codec.decode(payload, "it", shape_of(returning(hint))) for _ in range(2))
    assert repr(first) == repr(replayed)
    assert type(first) is type(replayed)
    return first


@pytest.mark.parametrize("serializer", ["json", "yaml", "pickle"])
@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (Order, Order(1, NOW, Decimal("2.50"))),
        ("Order", Order(1)),
        (Basket, Basket((Order(1), Order(2, NOW)), frozenset({"a", "b"}))),
        (Everything, Everything()),
        (Computed, Computed(1)),
        (Checked, Checked(1)),
        (Box[Order], Box(Order(1))),
        (Model, Model(id=1, order=Order(2), nested=[Model(id=3)])),
        (Strict, Strict(at=NOW, tags={"a"})),
        (Aliased, Aliased(Id=1)),
        (Closed, Closed(id=1)),
        (Open, Open(id=1, more={"a": [1]})),  # type: ignore[call-arg]
        (Numbers, Numbers([1, 2])),
        (Order | None, None),
        (Order | None, Order(1)),
        (Optional[Model], Model(id=1)),  # noqa: UP045
        ("list[Order | Model]", [Order(1), Model(id=1)]),
        (list[Order], []),
        (set[Basket], set()),
        (dict[str, list[Model]], {"a": [Model(id=1)], "b": []}),
        (dict[uuid.UUID, Order], {uuid.UUID(int=1): Order(1)}),
        (tuple[Order, Model, int], (Order(1), Model(id=2), 3)),
        (Payment, Cash(number="1")),
        (list[Payment], [Cash(number="1"), Card(number="2")]),
        (OrderLike, Order(1)),
        (Annotated[Order, ["no hash"]], Order(1)),
        (Order | dict, {"id": 1}),
        (Order | int, 5),
    ],
    ids=brief,
)
def test_values_come_back_as_they_were(serializer: str, hint: Any, value: Any) -> None:
    """Of the same class and equal, under every serializer."""
    found = there_and_back(hint, value, CODEC.using(serializer, None))
    assert type(found) is type(value)
    assert found == value


@pytest.mark.parametrize("value", [Raw(b"\xff\x00"), Raw(b"text"), Raw(b"")], ids=repr)
def test_bytes_come_back_although_json_has_none(value: Raw) -> None:
    """They are left to kombu if they are no text; the rest of the value is as plain as ever."""
    assert there_and_back(Raw, value) == value


@pytest.mark.parametrize(
    "id", [NOW, "2025-01-02T03:04:05Z", str(uuid.UUID(int=7)), uuid.UUID(int=7), "1.0", Decimal(1)]
)
def test_unions_of_what_is_text_in_json_come_back(id: Any) -> None:
    """They are left to kombu if JSON wouldn't tell them apart."""
    found = there_and_back(Either, Either(id))
    assert found == Either(id)
    assert type(found.id) is type(id)


def test_a_class_without_equality_comes_back() -> None:
    """Its data are compared, and what isn't a number equals itself."""
    found = there_and_back(Unequal, Unequal(math.nan))
    assert type(found) is Unequal
    assert math.isnan(found.number)


def test_what_an_author_leaves_out_is_left_out() -> None:
    """Excluded fields, private attributes, cached properties."""
    value = Hiding(id=1, password="secret")
    assert value.twice == 2
    payload = CODEC.encode(value, "it", Shape(returning(Hiding)))
    assert b"secret" not in payload.data
    found = there_and_back(Hiding, value)
    assert (type(found), found.id, found.password) == (Hiding, 1, "")


def test_pickle_keeps_instances_itself() -> None:
    """Even those that a hint would change."""
    codec = CODEC.using("pickle", None)
    payload = codec.encode(Puppy("Rex"), "it", shape_of(returning(Dog)))
    assert payload.content_type == "application/x-python-serialize"
    assert codec.decode(payload, "it", shape_of(returning(Dog))) == Puppy("Rex")


def test_without_a_shape_it_is_plain_data() -> None:
    """For whoever lists steps and hasn't got their functions, and for a function that has lost its hint."""
    payload = CODEC.encode(Order(1, NOW), "it", shape_of(returning(Order)))
    assert payload.content_type == "application/json; shape=json"
    plain = {"id": 1, "at": "2025-01-02T03:04:05.000006Z", "price": "1.10"}
    assert CODEC.decode(payload, "it") == plain
    assert CODEC.decode(payload, "it", Shape(returning(int))) == plain


def test_what_was_stored_without_a_shape_stays_plain() -> None:
    """A hint that is added while a workflow runs changes nothing of what it has."""
    assert CODEC.decode(CODEC.encode({"id": 1}, "it"), "it", shape_of(returning(Order))) == {"id": 1}


def test_large_shaped_values_are_compressed() -> None:
    """Both are said by the content type."""
    codec = CODEC.using(None, "gzip")
    value = [Order(number, NOW) for number in range(100)]
    payload = codec.encode(value, "it", shape_of(returning(list[Order])))
    assert payload.content_type == "application/json; compression=application/x-gzip; shape=json"
    assert CODEC.decode(payload, "it", shape_of(returning(list[Order]))) == value


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (Order, {"id": 1}),
        (Model, {"id": 1}),
        (list[Order], [{"id": 1}]),
        (list[Order], {"id": 1}),
        (Order, "text"),
        (Order, None),
        (Order, [1, (2, 3), NOW, Decimal(1)]),
    ],
    ids=brief,
)
def test_a_value_that_does_not_fit_its_hint_is_kept_as_ever(hint: Any, value: Any) -> None:
    """Hints are no promises in Python: a task with a sloppy one still works."""
    payload = CODEC.encode(value, "it", shape_of(returning(hint)))
    assert payload == CODEC.encode(value, "it")
    assert there_and_back(hint, value) == CODEC.decode(payload, "it")


@pytest.mark.parametrize(
    ("hint", "value", "reason"),
    [
        (Dog, Puppy("Rex"), "it wouldn't come back as it is by the hint .*Dog"),
        (list[Dog], [Puppy("Rex")], "it wouldn't come back as it is"),
        (Cat | Dog, Dog("Rex"), "does a union have several classes with its fields"),
        (Order, Order("one"), "should be a valid integer"),  # type: ignore[arg-type]
        (Dog, Model(id=1), "it wouldn't come back|validation error"),
        (WithInit, WithInit(1), "validation error"),
        (WithLock, WithLock(object()), "object"),
        (Secret, Secret(password=SecretStr("x")), "it wouldn't come back"),
        (Odd, Odd(lock=object()), "object"),
        (Order, [Order(1)], "it wouldn't come back|validation error"),
    ],
    ids=brief,
)
def test_an_instance_that_would_come_back_otherwise_is_an_error(hint: Any, value: Any, reason: str) -> None:
    """Rather than losing fields or its class in silence; the reason is told."""
    with pytest.raises(SerializationError, match=f"The result of step 'x' can't be serialized as json.*({reason})"):
        CODEC.encode(value, "The result of step 'x'", shape_of(returning(hint)))


@dataclass
class Hooked:
    id: int

    def __json__(self) -> dict[str, int]:
        return {"hooked": self.id}


def test_a_class_of_its_own_json_is_kept_by_its_hint() -> None:
    """With the hint it comes back, without it is what kombu makes of it."""
    assert there_and_back(Hooked, Hooked(1)) == Hooked(1)
    assert there_and_back(Dog, Hooked(1)) == {"hooked": 1}


@pytest.mark.parametrize("data", [b'{"id": "one"}', b"{}", b"null", b"5", b'{"id": 1', b"\xff", b""])
@pytest.mark.parametrize("mode", ["json", "python"])
def test_what_no_longer_fits_is_an_error(data: bytes, mode: str) -> None:
    """A model that was changed under a running workflow: the error names what it is about."""
    with pytest.raises(SerializationError, match="The result of step 'x' can't be read back"):
        CODEC.decode(
            Payload(data, f"application/json; shape={mode}"), "The result of step 'x'", Shape(returning(Order))
        )


def test_a_shape_loads_what_it_dumps() -> None:
    """In both modes; that of JSON has plain data only."""
    shape = Shape(returning(Order))
    value = Order(1, NOW)
    assert shape.dump(value) == {"id": 1, "at": "2025-01-02T03:04:05.000006Z", "price": "1.10"}
    assert shape.dump(value, "python") == {"id": 1, "at": NOW, "price": Decimal("1.10")}
    for mode in shapes.MODES:
        assert shape.load(shape.dump(value, mode), mode) == value


# Where a shape is found.


def plain() -> int: ...


def unhinted():  # type: ignore[no-untyped-def]
    ...


def hinted() -> Order: ...


async def awaited() -> list[Order]: ...


def bound(self: Any) -> Model: ...


def of_types_only(order: OnlyForTypes) -> Order: ...


def unknown() -> OnlyForTypes: ...


def broken() -> Order[1 / 0]: ...  # type: ignore[name-defined]


def forward() -> Later: ...


class Service:
    timeout: Order

    def method(self) -> Order: ...

    @classmethod
    def of_class(cls) -> Order: ...

    @staticmethod
    def static() -> Order: ...

    def __call__(self) -> Order | None: ...


class Nothing:
    order: Order


def decorated(function: Callable[..., T]) -> Callable[..., T]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> T:
        return function(*args, **kwargs)

    return wrapper


@decorated
def wrapped() -> Order: ...


def cyclic() -> Order: ...


cyclic.__wrapped__ = cyclic  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("function", "hint"),
    [
        (hinted, Order),
        (awaited, list[Order]),
        (wrapped, Order),
        (of_types_only, Order),
        (functools.partial(hinted, 1), Order),
        (functools.partial(functools.partial(wrapped), 1), Order),
        (Service().method, Order),
        (Service.of_class, Order),
        (Service.static, Order),
        (Service(), Order | None),
        (functools.lru_cache(hinted), Order),
        (functools.partial(Service()), Order | None),
        (Order, Order),
        (Model, Model),
        (returning("dict[str, tuple[Order, ...]]"), dict[str, tuple[Order, ...]]),
    ],
    ids=brief,
)
def test_a_shape_is_found_by_the_return_hint(function: Any, hint: Any) -> None:
    """Of whatever can be called; only this hint has to be resolvable."""
    shape = shape_of(function)
    assert shape is not None
    assert shape.hint == hint


@pytest.mark.parametrize(
    "function",
    [plain, unhinted, lambda: Order(1), print, len, str, Nothing, Nothing().__init__, object(), int, sys, None]
    + [returning(hint) for hint in (None, Any, "None", list[int], dict[str, Any], T, Callable[[int], str], Color,
                                    typing.Literal["a"], typing.NamedTuple, typing.TypedDict, "Self", list["T"])],
    ids=brief,
)  # fmt: skip
def test_without_a_class_in_the_hint_there_is_no_shape(function: Any) -> None:
    """The serializer does it alone."""
    shape = shape_of(function)
    assert shape is None or shape.hint is None


@pytest.mark.parametrize("function", [unknown, broken, cyclic])
def test_a_hint_that_cannot_be_resolved_does_not_count(function: Any) -> None:
    """It is no error: until now nobody needed it."""
    shape = shape_of(function)
    assert shape is not None
    assert shape.hint is None
    assert CODEC.encode({"id": 1}, "it", shape) == CODEC.encode({"id": 1}, "it")


def test_a_class_may_be_defined_later() -> None:
    """The hint is looked up with the first result."""
    shape = shape_of(forward)
    assert shape is not None
    value = Later(5)
    assert CODEC.decode(CODEC.encode(value, "it", shape), "it", shape) == value


@dataclass
class Later:
    id: int


def test_celery_tasks_have_the_shape_of_their_function() -> None:
    """Bound, lazy, retried automatically."""
    app = Celery("shapes", set_as_current=False)
    for options in (
        {},
        {"bind": True, "name": "bound shape"},
        {"autoretry_for": (ValueError,), "name": "retried"},
    ):
        task: Any = app.task(**options)(bound if "bind" in options else hinted)
        shape = shape_of(task)
        assert shape is not None
        assert shape.hint is (Model if "bind" in options else Order)


@pytest.mark.skipif(VERSION < (5, 5), reason="pydantic=True is new in Celery 5.5")
def test_a_pydantic_task_gives_the_data_that_celery_makes() -> None:
    """What Celery has dumped stays dumped."""
    app = Celery("shapes", set_as_current=False)

    @app.task(pydantic=True)
    def model(id: int) -> Model:
        return Model(id=id)

    value = model(5)
    assert there_and_back(Model, value) == value == {"id": 5, "order": None, "nested": []}


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the type statement is new in Python 3.12")
def test_type_aliases_are_looked_through() -> None:
    """Recursive ones, too."""
    names: dict[str, Any] = {"Order": Order}
    exec("type Orders = list[Order]\ntype Tree = list[Tree] | str\ntype Forest = list[Forest] | Order", names)
    assert there_and_back(names["Orders"], [Order(1)]) == [Order(1)]
    assert there_and_back(names["Forest"], [[Order(1)], Order(2)]) == [[Order(1)], Order(2)]
    assert shape_of(returning(names["Tree"])) is None


def test_unions_of_another_order_have_their_own_adapter() -> None:
    """They are equal, but pydantic prefers the first of two classes that fit alike."""
    assert there_and_back(Cat | Dog, Cat("x")) == Cat("x")
    assert there_and_back(Dog | Cat, Dog("x")) == Dog("x")


def test_fields_are_what_an_author_compares() -> None:
    """And nothing that an instance has besides."""

    @dataclass
    class Timed:
        id: int
        at: float = field(default=0.0, compare=False)

    assert fields_of(Timed(1, 2.0)) == {"id": 1}
    assert fields_of(Open(id=1, more=2)) == {"id": 1, "more": 2}  # type: ignore[call-arg]
    assert fields_of(Hiding(id=1)) == {"id": 1}
    assert [fields_of(value) for value in (1, {"id": 1}, Order, Model, object(), None)] == [None] * 6


# pydantic is optional.


@pytest.fixture
def _without_pydantic(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes._cached_adapter.cache_clear()
    monkeypatch.setitem(sys.modules, "pydantic", None)


@pytest.mark.usefixtures("_without_pydantic")
def test_without_pydantic_the_error_says_what_to_install() -> None:
    """On both ways, and only for a value that needs it."""
    shape = shape_of(returning(list[Order]))
    with pytest.raises(SerializationError, match=r"the result can't be serialized.*install celery-durable\[pydantic\]"):
        CODEC.encode([Order(1)], "the result", shape)
    with pytest.raises(SerializationError, match=r"the result can't be read back.*install celery-durable\[pydantic\]"):
        CODEC.decode(Payload(b"[]", "application/json; shape=json"), "the result", shape)
    assert CODEC.decode(CODEC.encode([{"id": 1}], "it", shape), "it", shape) == [{"id": 1}]


def test_pydantic_is_not_imported_before_it_is_needed() -> None:
    """Neither by the package nor by looking for a shape."""
    code = """
import sys, dataclasses
import celery_durable
from celery_durable.shapes import shape_of
from celery_durable.serialization import Codec, fingerprint
@dataclasses.dataclass
class Order:
    id: int
def order() -> Order: ...
shape = shape_of(order)
fingerprint((Order(1),), {})
print("pydantic" in sys.modules)
Codec.of("json", ["json"], 100).encode(Order(1), "it", shape)
print("pydantic" in sys.modules)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (0, ["False", "True"]), done.stderr
