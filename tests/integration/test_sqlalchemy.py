"""SQLAlchemy: outboxes on its sessions and connections, and what its engines are as places for atomic steps."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from contextvars import Context
from typing import Any

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import InvalidRequestError, UnboundExecutionError
from sqlalchemy.ext.asyncio import AsyncSession, async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, scoped_session, sessionmaker

import celery_durable as durable
from celery_durable.exceptions import ConfigurationError, SerializationError, WorkflowConflict, WorkflowNotFound
from celery_durable.store.markers import script as script_of_markers
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.pages import CHECKOUT, blocks
from tests.integration.attempts import order

DRIVERS = ("psycopg", "psycopg2")
WAYS = ("session", "scoped_session", "connection")
ASYNC_DRIVERS = ("psycopg_async", "asyncpg")
ASYNC_WAYS = ("session", "scoped_session", "connection")


class Base(DeclarativeBase):
    """The caller's tables."""


class Sale(Base):
    """A row of the caller's own."""

    __tablename__ = "sale"
    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int]


class Caller:
    """Whoever has a transaction, by one of SQLAlchemy's ways."""

    def __init__(self, way: str, engine: Any) -> None:
        self.engine = engine
        self.make = {
            "session": sessionmaker(engine),
            "scoped_session": scoped_session(sessionmaker(engine)),
            "connection": engine.connect,
        }[way]

    @contextmanager
    def open(self) -> Iterator[Any]:
        """What is given to `durable.outbox`; closing it rolls back."""
        owner = self.make() if not isinstance(self.make, scoped_session) else self.make
        try:
            yield owner
        finally:
            owner.close()


@pytest.fixture
def database_url(emptied_database_url: str) -> str:
    """One database for all of these tests, which is cheaper."""
    return emptied_database_url


@pytest.fixture(autouse=True)
def _sales(sql: Sql) -> None:
    sql.execute("CREATE TABLE IF NOT EXISTS sale (id bigserial PRIMARY KEY, number integer NOT NULL)")
    sql.execute("TRUNCATE sale")


@pytest.fixture
def shop(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    with closing(Inprocess(database_url, broker_url)) as shop:
        yield shop


@pytest.fixture
def checkout(shop: Inprocess) -> Any:
    """A workflow that says its number."""

    @shop.workflow(name="checkout")
    def checkout(number: int = 0) -> int:
        return number

    return checkout


@pytest.fixture(params=DRIVERS)
def engine(request: pytest.FixtureRequest, database_url: str) -> Iterator[Any]:
    with engine_on(database_url, request.param) as engine:
        yield engine


@pytest.fixture(params=WAYS)
def caller(request: pytest.FixtureRequest, engine: Any) -> Caller:
    return Caller(request.param, engine)


@contextmanager
def engine_on(url: str, driver: str = "psycopg", **options: Any) -> Iterator[Any]:
    """An engine, without its connections at the end."""
    engine = create_engine(with_driver(url, driver), **options)
    yield engine
    engine.dispose()


def with_driver(url: str, driver: str) -> str:
    return url.replace("postgresql://", f"postgresql+{driver}://")


def sell(owner: Any, number: int = 1) -> None:
    """Write a row of the caller's own."""
    owner.execute(text("INSERT INTO sale (number) VALUES (:number)"), {"number": number})


def sold(sql: Sql) -> list[int]:
    return [row.number for row in sql.all("SELECT number FROM sale ORDER BY id")]


def started(sql: Sql) -> list[str]:
    """The ids of all workflows."""
    return [row.id for row in sql.all("SELECT id FROM celery_durable.workflow ORDER BY id")]


def messages(sql: Sql) -> int:
    return int(sql.value("SELECT count(*) FROM celery_durable.message"))


def cancellations(sql: Sql) -> int:
    return int(sql.value("SELECT count(*) FROM celery_durable.cancellation"))


def listen() -> Any:
    """A workflow that returns its first message."""
    return durable.recv("topic")


def test_a_commit_starts(shop: Inprocess, caller: Caller, checkout: Any, sql: Sql) -> None:
    """With what the caller has written; nobody sees either before. Nodes that listen hear of it then."""
    sql.execute("LISTEN celery_durable")
    with caller.open() as owner:
        sell(owner)
        with durable.outbox(owner):
            checkout.apply_async([42], task_id="w1")
        assert (started(sql), sold(sql)) == ([], [])
        assert list(sql.connection.notifies(timeout=0.05)) == []
        owner.commit()
    assert [each.channel for each in sql.connection.notifies(timeout=10, stop_after=1)] == ["celery_durable"]
    assert (started(sql), sold(sql)) == (["w1"], [1])
    assert shop.run("w1") == 42


def test_a_rollback_leaves_nothing(shop: Inprocess, caller: Caller, checkout: Any, sql: Sql) -> None:
    """No start, no message, no cancellation, no compensation."""
    order(shop, listen)
    with caller.open() as owner:
        with durable.outbox(owner):
            checkout.apply_async([1], on_cancel=checkout.s(2), workflow_timeout=60, countdown=5)
            durable.send("w1", "hello", "topic", app=shop.app)
            durable.cancel_workflow("w1", app=shop.app)
        owner.rollback()
    assert (started(sql), messages(sql), cancellations(sql)) == (["w1"], 0, 0)


def test_messages_cancellations_and_many_starts(shop: Inprocess, caller: Caller, checkout: Any, sql: Sql) -> None:
    """All by the commit, with every option of a start."""
    order(shop, listen)
    with caller.open() as owner:
        with durable.outbox(owner):
            durable.send("w1", {"said": "héllo % :x"}, "topic", idempotency_key="one", app=shop.app)
            durable.enqueue_many(checkout.s(n).set(task_id=f"many-{n}") for n in range(3))
            assert durable.cancel_workflow("many-1", app=shop.app)
            options = {"deduplication_id": "a", "on_cancel": checkout.s(2), "workflow_timeout": 60, "countdown": 5}
            first = checkout.apply_async([1], task_id="full", **options)
            assert checkout.apply_async([1], **options).id == first.id
        assert (started(sql), messages(sql), cancellations(sql)) == (["w1"], 0, 0)
        owner.commit()
    assert started(sql) == ["full", "many-0", "many-1", "many-2", "w1"]
    assert (messages(sql), cancellations(sql)) == (1, 1)
    assert shop.run("w1") == {"said": "héllo % :x"}
    assert sql.value("SELECT timeout = interval '60 s' FROM celery_durable.workflow WHERE id = 'full'")


def test_savepoints(caller: Caller, checkout: Any, sql: Sql) -> None:
    """One that is rolled back takes along what was started in it, and nothing else."""
    with caller.open() as owner:
        with durable.outbox(owner):
            with owner.begin_nested():
                checkout.apply_async(task_id="inner")
            with suppress(RuntimeError), owner.begin_nested():
                checkout.apply_async(task_id="undone")
                raise RuntimeError
            checkout.apply_async(task_id="outer")
        owner.commit()
    assert started(sql) == ["inner", "outer"]


def test_errors_of_ours_leave_the_transaction_alone(shop: Inprocess, caller: Caller, checkout: Any, sql: Sql) -> None:
    """An id that is taken, by anybody in any state of his transaction: the caller may go on."""
    order(shop, listen)
    with caller.open() as owner, caller.engine.connect() as other:
        with durable.outbox(other):
            checkout.apply_async(task_id="open")
        sell(owner, 1)
        with durable.outbox(owner):
            for act in (
                lambda: checkout.apply_async(task_id="w1"),
                lambda: checkout.apply_async(task_id="open"),
            ):
                with pytest.raises(WorkflowConflict):
                    act()
            with pytest.raises(WorkflowNotFound):
                durable.send("nobody", 1, app=shop.app)
        sell(owner, 2)
        owner.commit()
    assert sold(sql) == [1, 2]
    assert started(sql) == ["w1"]


def test_what_a_session_has_not_flushed_is_part_of_it(engine: Any, checkout: Any, sql: Sql) -> None:
    """Both go with the commit; the start itself flushes nothing."""
    with Session(engine) as session:
        sale = Sale(number=1)
        session.add(sale)
        with durable.outbox(session):
            checkout.apply_async(task_id="w1")
        assert sale in session.new
        session.commit()
    assert (sold(sql), started(sql)) == ([1], ["w1"])


def test_a_block_of_begin(engine: Any, checkout: Any, sql: Sql) -> None:
    """`with sessionmaker.begin()` commits at its end, and rolls back on an error."""
    make = sessionmaker(engine)
    with make.begin() as session, durable.outbox(session):
        checkout.apply_async(task_id="kept")
    with suppress(RuntimeError), make.begin() as session, durable.outbox(session):
        checkout.apply_async(task_id="lost")
        raise RuntimeError
    assert started(sql) == ["kept"]


def test_autocommit_is_an_error(shop: Inprocess, engine: Any, checkout: Any, sql: Sql) -> None:
    """An isolation level that commits each statement by itself, of an engine or of a connection."""
    alone = engine.execution_options(isolation_level="AUTOCOMMIT")
    with Session(alone) as session, alone.connect() as connection:
        for owner in (session, connection):
            with durable.outbox(owner), pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                checkout.delay()
    assert started(sql) == []


def test_another_database_is_an_error(
    shop: Inprocess, engine: Any, checkout: Any, sql: Sql, empty_database_url: str
) -> None:
    """SQLite; and a Postgres without our tables, where the caller's transaction goes on."""
    not_ours = pytest.raises(ConfigurationError, match=r"leads to sqlite: .*durable_database_url")
    with create_engine("sqlite://").connect() as lite, durable.outbox(lite), not_ours:
        checkout.delay()
    with engine_on(empty_database_url, engine.dialect.driver) as other, Session(other) as session:
        session.execute(text("CREATE TABLE sale (number integer)"))
        with durable.outbox(session):
            for act in (
                checkout.delay,
                lambda: durable.send("w1", 1, app=shop.app),
                lambda: durable.cancel_workflow("w1", app=shop.app),
            ):
                with pytest.raises(ConfigurationError, match="durable_database_url") as told:
                    act()
                assert "INSERT" not in str(told.value), "an error that doesn't show what it was called with"
        sell(session)
        session.commit()
        assert session.scalar(text("SELECT count(*) FROM sale")) == 1
    assert started(sql) == []


def test_a_session_without_an_engine(checkout: Any) -> None:
    """SQLAlchemy's own error says what it lacks."""
    with durable.outbox(Session()), pytest.raises(UnboundExecutionError):
        checkout.delay()


def test_a_closed_connection(engine: Any, checkout: Any) -> None:
    """SQLAlchemy's own error says so."""
    connection = engine.connect()
    connection.close()
    with durable.outbox(connection), pytest.raises(InvalidRequestError, match="closed"):
        checkout.delay()


@pytest.mark.parametrize("state", ["loaded", "expired", "detached"])
def test_a_row_is_no_argument_and_no_result(shop: Inprocess, engine: Any, checkout: Any, state: str) -> None:
    """Whatever its state, the error says to pass the key."""

    def find() -> Any:
        session = Session(engine)
        sale = Sale(number=1)
        session.add(sale)
        session.flush()
        if state == "expired":
            session.expire(sale)
        if state == "detached":
            session.expire(sale)
            session.expunge(sale)
        session.connection().detach()
        return sale

    advice = "Of Sale pass its key, and read it where it is needed"
    for argument in (find(), [find()], {"sale": find()}):
        with pytest.raises(SerializationError, match=advice):
            checkout.delay(argument)
    order(shop, durable.as_step(find, name="find"))
    assert advice in str(shop.run("w1"))
    shop.workflow(find, name="finds").apply_async(task_id="w2")
    assert advice in str(shop.run("w2"))


@pytest.mark.parametrize("schema", ["of :name", r"of \:signs::text", 'ünï "quoted"'])
def test_a_schema_of_any_name(database_url: str, broker_url: str, engine: Any, sql: Sql, schema: str) -> None:
    """What is special to SQLAlchemy, or to a driver, is not in our statements."""
    with closing(Inprocess(database_url, broker_url, schema=schema, auto_migrate=True)) as shop:
        task = shop.workflow(listen, name="listens")
        with engine.begin() as connection, durable.outbox(connection):
            handle = task.delay()
            durable.send(handle.id, "hello", "topic", app=shop.app)
        assert shop.run(handle.id) == "hello"


class AsyncCaller:
    """Whoever has a transaction, by one of SQLAlchemy's asynchronous ways."""

    def __init__(self, way: str, engine: Any) -> None:
        self.way = way
        self.engine = engine

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Any]:
        """What is given to `durable.outbox`; leaving it rolls back."""
        if self.way == "connection":
            async with self.engine.connect() as connection:
                yield connection
        else:
            make = async_sessionmaker(self.engine)
            async with make() as session:
                yield session if self.way == "session" else async_scoped_session(lambda: session, asyncio.current_task)


@pytest.fixture(params=ASYNC_DRIVERS)
def driver(request: pytest.FixtureRequest) -> str:
    """How an asynchronous engine speaks to Postgres."""
    return str(request.param)


@pytest.fixture(params=ASYNC_WAYS)
def run(request: pytest.FixtureRequest, database_url: str, driver: str) -> Callable[..., Any]:
    """Runs a coroutine function with an `AsyncCaller`, on an event loop and engine of its own."""

    def run(use: Callable[[AsyncCaller], Coroutine[Any, Any, Any]], **options: Any) -> Any:
        return asyncio.run(
            with_engine(database_url, driver, lambda engine: use(AsyncCaller(request.param, engine)), **options)
        )

    return run


async def with_engine(url: str, driver: str, use: Callable[[Any], Coroutine[Any, Any, Any]], **options: Any) -> Any:
    """Await something with an asynchronous engine, which can't outlive its loop."""
    engine = create_async_engine(with_driver(url, driver), **options)
    try:
        return await use(engine)
    finally:
        await engine.dispose()


class Meeting:
    """Where coroutines wait for one another, again and again."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._here = 0
        self._all = asyncio.Event()

    async def wait(self) -> None:
        """Go on when all are here."""
        self._here, everybody = self._here + 1, self._all
        if self._here == self._count:
            self._here, self._all = 0, asyncio.Event()
            everybody.set()
        await everybody.wait()


async def asell(owner: Any, number: int = 1) -> None:
    await owner.execute(text("INSERT INTO sale (number) VALUES (:number)"), {"number": number})


def test_an_awaited_commit_starts(shop: Inprocess, run: Any, checkout: Any, sql: Sql) -> None:
    """With what the caller has written; nobody sees either before. Nodes that listen hear of it then."""
    sql.execute("LISTEN celery_durable")

    async def use(caller: AsyncCaller) -> None:
        async with caller.open() as owner:
            await asell(owner)
            async with durable.outbox(owner):
                handle = await checkout.adelay(42)
            assert (started(sql), sold(sql)) == ([], [])
            assert list(sql.connection.notifies(timeout=0.05)) == []
            await owner.commit()
            assert started(sql) == [handle.id]

    run(use)
    assert [each.channel for each in sql.connection.notifies(timeout=10, stop_after=1)] == ["celery_durable"]
    assert sold(sql) == [1]
    assert shop.run(started(sql)[0]) == 42


def test_an_awaited_rollback_leaves_nothing(shop: Inprocess, run: Any, checkout: Any, sql: Sql) -> None:
    """No start, and no message."""
    order(shop, listen)

    async def use(caller: AsyncCaller) -> None:
        async with caller.open() as owner:
            async with durable.outbox(owner):
                await checkout.adelay(1)
                await durable.asend("w1", "hello", "topic", app=shop.app)
            await owner.rollback()

    run(use)
    assert (started(sql), messages(sql)) == (["w1"], 0)


def test_awaited_messages(shop: Inprocess, run: Any, sql: Sql) -> None:
    """Sent by the commit; to nobody is an error, and the caller may go on."""
    order(shop, listen)

    async def use(caller: AsyncCaller) -> None:
        async with caller.open() as owner:
            async with durable.outbox(owner):
                await durable.asend("w1", {"said": "héllo"}, "topic", idempotency_key="one", app=shop.app)
                await durable.asend("w1", {"said": "again"}, "topic", idempotency_key="one", app=shop.app)
                with pytest.raises(WorkflowNotFound):
                    await durable.asend("nobody", 1, app=shop.app)
            await asell(owner)
            await owner.commit()

    run(use)
    assert (messages(sql), sold(sql)) == (1, [1])
    assert shop.run("w1") == {"said": "héllo"}


def test_awaited_savepoints(run: Any, checkout: Any, sql: Sql) -> None:
    """One that is rolled back takes along what was started in it, and nothing else."""
    kept: list[str] = []

    async def use(caller: AsyncCaller) -> None:
        async with caller.open() as owner:
            async with durable.outbox(owner):
                with suppress(RuntimeError):
                    async with owner.begin_nested():
                        await checkout.adelay(1)
                        raise RuntimeError
                async with owner.begin_nested():
                    kept.append((await checkout.adelay(2)).id)
            await owner.commit()

    run(use)
    assert started(sql) == kept


def test_what_blocks_goes_by_run_sync(shop: Inprocess, run: Any, checkout: Any, sql: Sql) -> None:
    """All that has no awaitable of its own, options and errors included: `await session.run_sync(…)`."""
    order(shop, listen)

    def act(_: Any) -> None:
        with pytest.raises(WorkflowConflict):
            checkout.apply_async(task_id="w1")
        options = {"deduplication_id": "a", "on_cancel": checkout.s(2), "workflow_timeout": 60, "countdown": 5}
        first = checkout.apply_async([1], task_id="full", **options)
        assert checkout.apply_async([1], **options).id == first.id
        durable.enqueue_many(checkout.s(n).set(task_id=f"many-{n}") for n in range(3))
        assert durable.cancel_workflow("many-1", children=True, app=shop.app)

    async def use(caller: AsyncCaller) -> None:
        async with caller.open() as owner:
            async with durable.outbox(owner):
                await (owner() if isinstance(owner, async_scoped_session) else owner).run_sync(act)
            assert (started(sql), cancellations(sql)) == (["w1"], 0)
            await owner.commit()

    run(use)
    assert (started(sql), cancellations(sql)) == (["full", "many-0", "many-1", "many-2", "w1"], 1)


def test_what_only_waits_leaves_the_loop_alone(shop: Inprocess, run: Any) -> None:
    """An event is awaited in a thread, as ever, and other tasks of the loop go on."""
    order(shop, lambda: durable.set_event("stage", "packed"))

    async def publish() -> None:
        await asyncio.to_thread(Context().run, shop.run, "w1")

    async def use(caller: AsyncCaller) -> None:
        async with caller.open() as owner, durable.outbox(owner):
            stage, _ = await asyncio.gather(durable.aget_event("w1", "stage", timeout=10, app=shop.app), publish())
            assert stage == "packed"

    run(use)


def test_what_is_not_awaited_is_an_error(shop: Inprocess, run: Any, checkout: Any, sql: Sql) -> None:
    """`delay()` can't wait for such a connection, and `with` not either; the errors say what can."""

    async def use(caller: AsyncCaller) -> None:
        async with caller.open() as owner:
            async with durable.outbox(owner):
                for act in (
                    checkout.delay,
                    lambda: durable.send("w1", 1, app=shop.app),
                    lambda: durable.cancel_workflow("w1", app=shop.app),
                ):
                    with pytest.raises(ConfigurationError, match=r"await wf\.adelay"):
                        act()
            with pytest.raises(TypeError, match="`async with durable"), durable.outbox(owner):
                await checkout.adelay(1)
            await owner.commit()

    run(use)
    assert started(sql) == []


def test_a_blocking_connection_needs_no_async_with(engine: Any, checkout: Any, sql: Sql) -> None:
    """The error says so."""

    async def use(owner: Any) -> None:
        async with durable.outbox(owner):
            raise AssertionError("never")

    with Session(engine) as session, pytest.raises(TypeError, match="`with durable"):
        asyncio.run(use(session))


def test_awaited_autocommit_and_other_databases_are_errors(
    run: Any, driver: str, database_url: str, empty_database_url: str, checkout: Any, sql: Sql
) -> None:
    """As of a blocking connection."""

    async def alone(caller: AsyncCaller) -> None:
        async with caller.open() as owner, durable.outbox(owner):
            with pytest.raises(ConfigurationError, match="AUTOCOMMIT"):
                await checkout.adelay(1)

    async def elsewhere(engine: Any) -> None:
        async with AsyncSession(engine) as session:
            await session.execute(text("CREATE TABLE sale (number integer)"))
            async with durable.outbox(session):
                with pytest.raises(ConfigurationError, match="without our tables"):
                    await checkout.adelay(1)
            await asell(session)
            await session.commit()
            assert await session.scalar(text("SELECT count(*) FROM sale")) == 1

    run(alone, isolation_level="AUTOCOMMIT")
    asyncio.run(with_engine(empty_database_url, driver, elsewhere))
    assert started(sql) == []


def test_a_connection_that_was_not_opened(database_url: str, driver: str, checkout: Any) -> None:
    """The error says how it is."""

    async def use(engine: Any) -> None:
        with pytest.raises(ConfigurationError, match="async with"):
            async with durable.outbox(engine.connect()):
                await checkout.adelay(1)

    asyncio.run(with_engine(database_url, driver, use))


def test_tasks_of_one_loop(database_url: str, driver: str, checkout: Any, sql: Sql) -> None:
    """Each has its own outbox, or none: what one rolls back is no other's."""

    async def use(engine: Any) -> None:
        all_are_in = Meeting(3)

        async def one(commits: bool) -> str:
            async with AsyncSession(engine) as session:
                async with durable.outbox(session):
                    await all_are_in.wait()
                    handle = await checkout.adelay(1)
                    await all_are_in.wait()
                await (session.commit() if commits else session.rollback())
            return str(handle.id)

        async def without() -> str:
            await all_are_in.wait()
            handle = await checkout.adelay(1)
            assert started(sql) == [handle.id]
            await all_are_in.wait()
            return str(handle.id)

        kept, _, plain = await asyncio.gather(one(True), one(False), without())
        assert started(sql) == sorted([kept, plain])

    asyncio.run(with_engine(database_url, driver, use))


def test_a_task_that_outlives_its_outbox(database_url: str, driver: str, checkout: Any, sql: Sql) -> None:
    """It has inherited one whose block is over: what it starts then starts at once, as there."""

    async def use(engine: Any) -> None:
        is_over = asyncio.Event()

        async def later() -> str:
            await is_over.wait()
            return str((await checkout.adelay(1)).id)

        async with AsyncSession(engine) as session:
            async with durable.outbox(session):
                task = asyncio.create_task(later())
            await session.rollback()
        is_over.set()
        workflow_id = await task
        assert started(sql) == [workflow_id]

    asyncio.run(with_engine(database_url, driver, use))


@pytest.fixture
def maker(database_url: str, broker_url: str) -> Iterator[Inprocess]:
    """A shop that may make the table of markers."""
    with closing(Inprocess(database_url, broker_url, auto_migrate=True)) as shop:
        yield shop


def in_step(body: Callable[[], Any], atomic: Any) -> Any:
    return durable.as_step(body, name="sell", atomic=atomic)


@pytest.mark.parametrize("home", [True, False], ids=["home", "elsewhere"])
@pytest.mark.parametrize("way", ["engine", "sessionmaker"])
def test_rows_of_an_atomic_step(
    maker: Inprocess, database_url: str, empty_database_url: str, engine: Any, way: str, home: bool
) -> None:
    """What the body leaves in its session is flushed and committed with the checkpoint; an error leaves nothing."""
    with engine_on(database_url if home else empty_database_url, engine.dialect.driver) as there:
        Base.metadata.create_all(there)

        def body() -> int:
            session = durable.current.session
            assert session.connection() is durable.current.connection
            session.add(Sale(number=7))
            if durable.current.step.attempt == 1:
                raise ValueError("no")
            return 7

        place = there if way == "engine" else sessionmaker(there, autoflush=False)
        order(maker, durable.as_step(body, name="sell", atomic=place, max_retries=1, default_retry_delay=0))
        assert maker.run("w1") == 7
        with there.connect() as connection:
            assert connection.execute(text("SELECT number FROM sale")).scalars().all() == [7]


def test_a_session_of_the_apps_own_class(maker: Inprocess, engine: Any, sql: Sql) -> None:
    """A sessionmaker makes the session, with all that it is configured with."""

    class OurSession(Session):
        """With a habit of the app's."""

    def body() -> Any:
        session = durable.current.session
        return session.info if isinstance(session, OurSession) else None

    order(maker, in_step(body, sessionmaker(engine, class_=OurSession, info={"by": "us"})))
    assert maker.run("w1") == {"by": "us"}


def test_what_cannot_be_flushed(maker: Inprocess, engine: Any, sql: Sql) -> None:
    """The database's error is the step's outcome, and nothing is left."""

    def body() -> None:
        sell(durable.current.session, 1)
        durable.current.session.add(Sale(number=None))

    order(maker, in_step(body, engine))
    assert "null value" in str(maker.run("w1"))
    assert sold(sql) == []


def test_a_connection_that_breaks_before_the_commit(maker: Inprocess, engine: Any, sql: Sql) -> None:
    """The body runs again, on another connection: by any driver."""
    seen: list[int] = []

    def body() -> str:
        seen.append(durable.current.session.scalar(text("SELECT pg_backend_pid()")))
        sell(durable.current.session)
        if len(seen) == 1:
            sql.value("SELECT pg_terminate_backend(%s)", seen[0])
        return "sold"

    order(maker, in_step(body, engine))
    assert maker.run("w1") == "sold"
    assert (len(set(seen)), sold(sql)) == (2, [1])


def test_what_cannot_be_atomic() -> None:
    """Told where the step is declared, with what to do."""
    lite = create_engine("sqlite://")
    for place, told in (
        (create_async_engine("postgresql+asyncpg://localhost/shop"), "create_engine"),
        (async_sessionmaker(create_async_engine("postgresql+asyncpg://localhost/shop")), "create_engine"),
        (create_engine("postgresql+asyncpg://localhost/shop"), "create_engine"),
        (sessionmaker(), "bind=engine"),
        (scoped_session(sessionmaker(lite)), "sessionmaker"),
        (Session(), "sessionmaker"),
        (lite, "sqlite"),
        (sessionmaker(lite), "sqlite"),
        (object(), "Engine or sessionmaker"),
    ):
        with pytest.raises(ConfigurationError, match=told):
            in_step(lambda: None, place)


def test_an_engine_of_the_parents(maker: Inprocess, engine: Any, sql: Sql) -> None:
    """A child process leaves the connections of its parent alone, and makes its own."""
    with engine.connect() as connection:
        parents = connection.scalar(text("SELECT pg_backend_pid()"))
    step = in_step(lambda: durable.current.connection.scalar(text("SELECT pg_backend_pid()")), engine)
    order(maker, step)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if maker.run("w1") != parents else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    with engine.connect() as connection:
        assert connection.scalar(text("SELECT pg_backend_pid()")) == parents


FLASK = """
client = web.test_client()
asked = [client.post("/orders", json={"cents": cents}) for cents in (500, 1_000_000)]
assert [answer.status_code for answer in asked] == [201, 409], asked
print(asked[0].json["workflow"])
"""
FASTAPI = """
from starlette.testclient import TestClient
with TestClient(api) as client:
    asked = [client.post(f"/orders?cents={cents}") for cents in (500, 1_000_000)]
assert [answer.status_code for answer in asked] == [201, 409], asked
print(asked[0].json()["workflow"])
"""
CALL = """
order = buy(500)
(workflow,) = durable.list_workflows(app=app)
assert workflow.args == (order,)
print(workflow.id)
"""


@pytest.mark.parametrize("script", [FLASK, FASTAPI, CALL], ids=["flask", "fastapi", "call"])
def test_the_page(database_url: str, sql: Sql, script: str) -> None:
    """What docs/sqlalchemy.md shows: order and workflow, both or neither."""
    sql.execute("DROP TABLE IF EXISTS orders")
    code = "\n".join(block.text for block in blocks("python", page="docs/sqlalchemy.md"))
    for scheme in ("postgresql", "postgresql+psycopg", "postgresql+asyncpg"):
        code = code.replace(f"{scheme}://localhost/shop", database_url.replace("postgresql", scheme, 1))
    command = [sys.executable, "-c", f"{code}\nBase.metadata.create_all(engine)\n{script}"]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert [done.stdout.strip()] == started(sql)
    assert sql.value("SELECT array_agg(cents) FROM orders") == [500]


def test_the_page_has_the_table_of_markers() -> None:
    """As the command prints it, but for the comment."""
    (block,) = blocks("sql", page="docs/sqlalchemy.md")
    assert block.text.split() == script_of_markers("celery_durable").partition("COMMENT")[0].split()
