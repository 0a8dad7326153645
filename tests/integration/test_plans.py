"""Claims and sweeps cost what is active: with many finished workflows no plan reads all of them."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from typing import Any

import psycopg
import pytest

from celery_durable.store.executing import Direct
from celery_durable.store.migrate import migrate
from celery_durable.store.queries import Queries
from tests.fixtures.fix_postgres import Sql, _new_database
from tests.fixtures.inprocess import Inprocess
from tests.fixtures.proxy import PostgresProxy

pytestmark = pytest.mark.matrix

FINISHED, ACTIVE = 50_000, 500
NODE = uuid.UUID(int=1)
LARGE = ("workflow", "checkpoint", "input", "output", "message", "event")
FILL = f"""
INSERT INTO celery_durable.node
SELECT ('00000000-0000-0000-0000-' || lpad(n::text, 12, '0'))::uuid, 'worker', n, clock_timestamp(), '15 s',
    clock_timestamp(), clock_timestamp() - interval '1 h', clock_timestamp(), '{{}}', '{{}}', false, true
FROM generate_series(1, 20) n;
INSERT INTO celery_durable.workflow
    (id, name, queue, state, max_crashes, finished_at, dispatched, parent_id, deadline, attempt)
SELECT 'done-' || n, 'order', 'celery', CASE WHEN n % 10 = 0 THEN 'FAILURE' ELSE 'SUCCESS' END, 3,
    clock_timestamp() - make_interval(secs => n), true, CASE WHEN n % 5 = 0 THEN 'done-' || n + 1 END,
    CASE WHEN n % 3 = 0 THEN clock_timestamp() END, 1
FROM generate_series(1, {FINISHED}) n;
INSERT INTO celery_durable.workflow
    (id, name, queue, state, max_crashes, attempt, node, token, claimed_at, publish_at, published_at, wake_at, deadline)
SELECT s.state || n, 'order', 'celery', s.state, 3, 1,
    CASE WHEN s.state = 'RUNNING' THEN ('00000000-0000-0000-0000-' || lpad((n % 20 + 1)::text, 12, '0'))::uuid END,
    CASE WHEN s.state = 'RUNNING' THEN gen_random_uuid() END, clock_timestamp(),
    CASE WHEN s.state = 'ENQUEUED' THEN clock_timestamp() + make_interval(secs => n - 100) END,
    CASE WHEN s.state = 'ENQUEUED' AND n % 2 = 0 THEN clock_timestamp() END,
    CASE WHEN s.state = 'SUSPENDED' THEN clock_timestamp() + make_interval(secs => n - 50) END,
    CASE WHEN n % 4 = 0 THEN clock_timestamp() + make_interval(secs => n) END
FROM generate_series(1, {ACTIVE} / 3) n, (VALUES ('ENQUEUED'), ('RUNNING'), ('SUSPENDED')) s (state);
INSERT INTO celery_durable.checkpoint (workflow, key, seq, attempt, tries, ok, value, started_at, at)
SELECT id, 'step-' || n, n, 1, 1, true, '1', clock_timestamp(), clock_timestamp()
FROM celery_durable.workflow, generate_series(1, 3) n;
INSERT INTO celery_durable.input SELECT id, '{{}}', '[]', 'application/json', 'utf-8' FROM celery_durable.workflow;
INSERT INTO celery_durable.output SELECT id, true, '1' FROM celery_durable.workflow WHERE finished_at IS NOT NULL;
INSERT INTO celery_durable.message (workflow, topic, idempotency_key, body, taken_by, told)
SELECT id, 'topic', n::text, '1', CASE WHEN finished_at IS NOT NULL THEN 'recv' END, n > 1 OR finished_at IS NOT NULL
FROM celery_durable.workflow, generate_series(1, 3) n;
INSERT INTO celery_durable.event SELECT id, 'key', '1', NULL, clock_timestamp() FROM celery_durable.workflow;
INSERT INTO celery_durable.awaiting
SELECT CASE WHEN n % 50 = 0 THEN 'done-' || n ELSE 'RUNNING' || n END, '', 'SUSPENDED' || n, 'wait'
FROM generate_series(1, {ACTIVE} / 3) n;
INSERT INTO celery_durable.on_cancel
SELECT id, 'refund-' || id, 'refund', 'celery', 3, NULL, '{{}}', '[]', 'application/json', 'utf-8'
FROM celery_durable.workflow WHERE id LIKE '%%5';
INSERT INTO celery_durable.cancellation (workflow, children) SELECT 'RUNNING' || n, true FROM generate_series(1, 10) n;
"""
FENCE = {"id": "RUNNING7", "attempt": 1, "token": uuid.uuid4(), "node": NODE}
STEP = {
    "key": "step", "seq": 4, "tries": 1, "ok": True, "value": b"1", "content_type": None, "args": "", "took": 0.1,
    "fingerprint": b"", "errors": None, "delay": 1.0, "spent": False, "kill_in": None,
}  # fmt: skip
ALL_FINISHED = f"""
INSERT INTO celery_durable.workflow (id, name, queue, state, max_crashes, finished_at, dispatched)
SELECT 'done-' || n, 'order', 'celery', 'SUCCESS', 3, clock_timestamp() - make_interval(secs => n), true
FROM generate_series(1, {FINISHED}) n
"""
#: FAILURE is kept for ever.
AGES = {"states": ["SUCCESS", "CANCELLED", "DEAD"], "ages": [14 * 86400.0] * 3}
SWEEP = {"limit": 100, "verdict": b"{}", "lease": 15.0, "republish_after": 60.0, **AGES}
BIRTH = {
    "id": "new", "name": "order", "queue": "celery", "max_crashes": 3, "timeout": None, "retries": 0, "parent_id": None,
    "root_id": "new", "deduplication_id": "42", "delay": None, "republish_after": 60.0, "envelope": "{}", "body": b"[]",
    "content_type": "application/json", "content_encoding": "utf-8", "on_cancel": None,
}  # fmt: skip
BIRTHS = {
    "ids": ["new", "done-2"], "names": ["order"] * 2, "queues": ["celery"] * 2, "max_crashess": [3] * 2,
    "timeouts": [None] * 2, "parent_ids": [None] * 2, "root_ids": ["new", "done-2"], "delays": [None] * 2,
    "envelopes": ["{}"] * 2, "bodys": [b"[]"] * 2, "content_types": ["application/json"] * 2,
    "content_encodings": ["utf-8"] * 2, "republish_after": 60.0,
}  # fmt: skip
FORK = {
    **BIRTHS, "ids": ["new", "newer"], "sources": ["done-5", "done-6"], "cuts": [3] * 2, "hooks": ["hook", None],
    "hook_envelopes": ["{}", None], "hook_bodys": [b"[]", None],
}  # fmt: skip
STEPS = {
    "keys": ["one", "two"], "seqs": [4, 5], "triess": [1] * 2, "oks": [True] * 2, "values": [b"1"] * 2,
    "content_types": [None] * 2, "argss": [""] * 2, "fingerprints": [b""] * 2, "errorss": [None] * 2,
    "tooks": [0.1] * 2,
}  # fmt: skip
PULSE = {
    "id": NODE, "hostname": "worker", "pid": 1, "lease": 15.0, "as_of": None, "active": ["RUNNING7"], "accepted": "{}",
    "draining": False, "able": True,
}  # fmt: skip
LETTER = {"workflow": "SUSPENDED7", "topic": "topic", "idempotency_key": "new", "body": b"1", "content_type": None}
STATEMENTS: dict[tuple[str, str], dict[str, Any]] = {
    ("workflows", "claim"): {**FENCE, "id": "ENQUEUED7", "name": "order", "retries": 0},
    ("workflows", "look"): FENCE,
    ("workflows", "finish"): {**FENCE, **STEP, "state": "SUCCESS", "dispatched": True, "error": None},
    ("workflows", "suspend"): {
        **FENCE,
        "seconds": 1.0,
        "reason": "sleep",
        "waits": ["wait"],
        "spares": [0],
        "topics": ["topic"],
        "republish_after": 60.0,
    },
    ("workflows", "publish"): BIRTH,
    ("workflows", "bear"): {**FENCE, **STEP, **BIRTH, "parent": "RUNNING7", "value_type": None},
    ("workflows", "publish_many"): BIRTHS,
    ("workflows", "births_of"): {"ids": ["done-1", "RUNNING7"]},
    ("workflows", "message_of"): {"ids": ["done-1", "RUNNING7"]},
    ("workflows", "again"): {**FENCE, **BIRTH, "seconds": 1.0},
    ("workflows", "fork"): FORK,
    ("workflows", "expired"): {"ids": ["ENQUEUED7"], "verdict": b"{}"},
    ("workflows", "ask_to_cancel"): {"ids": ["RUNNING7"], "children": True},
    ("workflows", "forget_cancellations"): {"seqs": [1, 2]},
    ("workflows", "names_of"): {"ids": ["done-1", "RUNNING7"]},
    ("workflows", "cancel"): {"ids": ["RUNNING7", "SUSPENDED7"], "verdict": b"{}"},
    ("workflows", "family"): {"ids": ["done-1", "RUNNING7"]},
    ("workflows", "hooks_of"): {"ids": ["done-5", "RUNNING7"]},
    ("workflows", "resume"): {"ids": ["done-10"], "republish_after": 60.0},
    ("workflows", "asked_to_cancel"): SWEEP,
    ("messages", "send"): {**LETTER, "republish_after": 60.0},
    ("messages", "send_as_step"): {**FENCE, **STEP, **LETTER, "value_type": None},
    ("messages", "put"): LETTER,
    ("messages", "of_workflow"): {"workflow": "done-1", "limit": 100, "most": 0},
    ("messages", "tell"): {"workflow": None, **SWEEP},
    ("messages", "receive"): {**FENCE, **STEP, "topic": "topic", "timeout": None, "value_type": None},
    ("events", "set"): {**FENCE, **STEP, "event": "key", "body": b"1", "value_type": None},
    ("events", "receive"): {
        **FENCE,
        **STEP,
        "event": "key",
        "target": "RUNNING8",
        "timeout": None,
        "value_type": None,
    },
    ("events", "get"): {"event": "key", "workflow": "done-1"},
    ("events", "of_workflow"): {"workflow": "done-1", "most": 0},
    ("awaits", "forget"): {"id": "SUSPENDED7", "wait": "wait"},
    ("awaits", "register"): {**FENCE, "event": "", "targets": ["RUNNING8"], "waits": ["wait"]},
    ("awaits", "settle"): {
        **FENCE,
        "timeout": None,
        "value": None,
        "value_type": None,
        "keys": ["one", "two"],
        "seqs": [4, 5],
        "targets": ["done-1", "RUNNING8"],
        "argss": ["", ""],
        "fingerprints": [b"", b""],
    },
    ("awaits", "sleep"): {**FENCE, **STEP, "seconds": 1.0, "until": None, "value_type": None},
    ("awaits", "first"): {"targets": ["done-1", "RUNNING8"]},
    ("awaits", "notify"): {"targets": ["done-50"], "republish_after": 60.0},
    ("awaits", "come"): SWEEP,
    ("workflows", "release"): {**FENCE, "republish_after": 60.0},
    ("workflows", "rescue"): {**SWEEP, "node": None, "lost": [], "error": "WorkflowDead"},
    ("workflows", "hand_over"): {"node": NODE, "ids": ["RUNNING7", "RUNNING8"]},
    ("workflows", "wake"): SWEEP,
    ("workflows", "expire"): SWEEP,
    ("workflows", "republish"): SWEEP,
    ("workflows", "redispatch"): SWEEP,
    ("workflows", "confirm"): {"node": NODE, "ids": ["done-1", "done-2"]},
    ("workflows", "adopt"): {"id": "done-1", "name": "order", "node": NODE},
    ("workflows", "prune"): SWEEP,
    ("workflows", "count_old"): {**AGES, "most": 100},
    ("workflows", "next_due"): {},
    ("workflows", "unsent"): {"ids": ["ENQUEUED7"]},
    ("workflows", "leave_to_others"): {"ids": ["ENQUEUED7"], "delays": [3.0]},
    ("workflows", "by_id"): {"id": "done-1", "most": 0},
    ("checkpoints", "save"): {**FENCE, **STEP},
    ("checkpoints", "save_many"): {**FENCE, **STEPS},
    ("checkpoints", "save_slow"): {**FENCE, **STEP},
    ("checkpoints", "save_try"): {**FENCE, **STEP},
    ("checkpoints", "of_workflow"): {"id": "done-1", "most": 0},
    ("lists", "names"): {},
    ("lists", "attempts"): {"id": "done-1"},
    ("lists", "standings"): {"lease": 15.0, "most": 100},
    ("lists", "live"): {"most": 100_000},
    ("lists", "nodes"): {},
    ("lists", "sweeps"): {},
    ("nodes", "beat"): PULSE,
    ("nodes", "swept"): {"sweeper": "node", "node": NODE, "found": "{}"},
    ("nodes", "leave"): {"id": NODE},
    ("nodes", "forget"): {},
}
FILES = ("workflows", "checkpoints", "messages", "events", "awaits", "lists", "nodes")
#: Lists are planned for their very filters (`test_lists.py`); the last one reads no table.
ELSEWHERE = {("lists", "matching"), ("lists", "count"), ("checkpoints", "bound")}
#: What a sweep and the thread that makes it ask.
OF_A_SWEEP = {
    ("workflows", "rescue"), ("workflows", "expire"), ("workflows", "asked_to_cancel"), ("messages", "tell"),
    ("awaits", "come"), ("workflows", "wake"), ("workflows", "redispatch"), ("workflows", "republish"),
    ("workflows", "prune"), ("workflows", "next_due"), ("nodes", "swept"), ("nodes", "forget"),
}  # fmt: skip


@pytest.fixture(scope="module")
def full(postgres_server: str) -> Iterator[Sql]:
    """A database with a long past."""
    with _new_database(postgres_server, "template0") as url, filled(url) as sql:
        yield sql


@contextmanager
def filled(url: str) -> Iterator[Sql]:
    """An empty database with a long past."""
    migrate(url)
    with closing(Sql(url)) as sql:
        for statement in FILL.split(";\n"):
            sql.execute(statement)
        # The fence holds, so that what stands behind it is executed, too.
        sql.execute("UPDATE celery_durable.workflow SET token = %s WHERE id = %s", FENCE["token"], FENCE["id"])
        sql.execute("VACUUM ANALYZE")
        yield sql


def nodes_of(plan: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield plan
    for child in plan.get("Plans", []):
        yield from nodes_of(child)


def explain(sql: Sql, table: str, name: str, params: dict[str, Any], uses: int = 1) -> list[dict[str, Any]]:
    """The plan's nodes at a prepared statement's nth use, with what they really read; nothing is kept of it."""
    ((plan,),) = explained(sql, table, name, params, "ANALYZE, FORMAT JSON", uses)
    return list(nodes_of(plan[0]["Plan"]))


def explained(
    sql: Sql, table: str, name: str, params: dict[str, Any], options: str, uses: int = 1
) -> list[tuple[Any, ...]]:
    """What EXPLAIN with these options says at a prepared statement's nth use; nothing is kept of it."""
    text = Queries(f"{table}.sql", "celery_durable")[name].text
    used = [each for each in params if f"%({each})s" in text]
    numbered = re.sub(r"%\((\w+)\)s", lambda match: f"${used.index(match[1]) + 1}", text)
    arguments = ", ".join(psycopg.sql.Literal(params[each]).as_string(sql.connection) for each in used)
    with psycopg.connect(sql.connection.info.dsn) as connection:
        connection.execute(f"PREPARE statement AS {numbered}".encode())
        execute = f"EXECUTE statement ({arguments})" if used else "EXECUTE statement"
        for _ in range(uses - 1):
            connection.execute(f"EXPLAIN {execute}".encode())
        rows = connection.execute(f"EXPLAIN ({options}) {execute}".encode()).fetchall()
        connection.rollback()
    return rows


def test_every_statement_is_here() -> None:
    """None is left out by an oversight."""
    written = {(file, query.name.split(".")[1]) for file in FILES for query in Queries(f"{file}.sql", "any")}
    assert written == STATEMENTS.keys() | ELSEWHERE
    assert not STATEMENTS.keys() & ELSEWHERE


def test_every_statement_of_a_sweep_is_here(proxy: PostgresProxy, broker_url: str) -> None:
    """What a real sweep, and its thread, send: what is tested here with a long past, and nothing else."""
    texts = {key: Queries(f"{key[0]}.sql", "celery_durable")[key[1]].numbered.decode() for key in STATEMENTS}
    with closing(Inprocess(proxy.url, broker_url)) as shop:
        recovery = shop.installation.recovery(lambda messages: (), patience=0)
        proxy.reset()
        recovery.sweep()
        recovery.next_due()
        shop.installation.store.nodes.forget(patience=0)
        sent = proxy.statements()
    assert {key for key, text in texts.items() if text in sent} == OF_A_SWEEP
    assert len(sent) == len(OF_A_SWEEP)


@pytest.mark.parametrize("uses", [1, 10])
@pytest.mark.parametrize(("table", "name"), STATEMENTS, ids=lambda part: part)
def test_no_plan_reads_the_finished_workflows(full: Sql, table: str, name: str, uses: int) -> None:
    """Large tables are read by index only, and few rows of them: at once, and with the plan of many uses."""
    for node in explain(full, table, name, STATEMENTS[table, name], uses):
        if node.get("Relation Name") in LARGE and "Scan" in node["Node Type"]:
            read = (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
            assert node["Node Type"] != "Seq Scan", f"{name} reads all of {node['Relation Name']}"
            assert read <= 10 * ACTIVE, f"{name} reads {read} rows of {node['Relation Name']}"


@pytest.mark.parametrize("name", ["wake", "expire", "prune"])
def test_a_sweep_reads_only_what_is_due(full: Sql, name: str) -> None:
    """Its time is a condition of the index, not a filter of all that it holds."""
    for node in explain(full, "workflows", name, SWEEP):
        if node.get("Relation Name") == "workflow":
            assert node.get("Rows Removed by Filter", 0) == 0


#: Statements about one workflow, which every workflow makes.
OF_ONE = [
    ("workflows", "publish"), ("workflows", "claim"), ("checkpoints", "save"), ("checkpoints", "save_many"),
    ("checkpoints", "save_slow"), ("checkpoints", "save_try"), ("awaits", "register"), ("awaits", "settle"),
    ("awaits", "sleep"), ("awaits", "notify"), ("workflows", "suspend"), ("workflows", "release"),
    ("workflows", "again"), ("workflows", "finish"), ("workflows", "unsent"), ("workflows", "expired"),
]  # fmt: skip
OF_ALL = [each for each in OF_ONE if each[1] in ("publish", "claim", "save", "finish", "notify")]
#: What the planner doesn't know of yet.
BURST = f"""
INSERT INTO celery_durable.node SELECT '{NODE}', 'worker', 1, clock_timestamp(), '15 s', clock_timestamp(),
    clock_timestamp() - interval '1 h', clock_timestamp(), '{{}}', '{{}}', false, true;
INSERT INTO celery_durable.workflow
    (id, name, queue, state, max_crashes, attempt, node, token, claimed_at, publish_at, published_at)
SELECT s.state || n, 'order', 'celery', s.state, 3, 1, CASE WHEN s.state = 'RUNNING' THEN '{NODE}'::uuid END,
    CASE WHEN s.state = 'RUNNING' THEN '{FENCE["token"]}'::uuid END, clock_timestamp(),
    CASE WHEN s.state = 'ENQUEUED' THEN clock_timestamp() END, clock_timestamp()
FROM generate_series(1, {ACTIVE}) n, (VALUES ('ENQUEUED'), ('RUNNING')) s (state)
"""


@pytest.fixture(scope="module", params=["a long past", "no past"])
def burst(request: pytest.FixtureRequest, postgres_server: str) -> Iterator[Sql]:
    """Workflows that have come since the statistics were made: then nothing was active, or there was nothing at all."""
    with _new_database(postgres_server, "template0") as url:
        migrate(url)
        with psycopg.connect(url, autocommit=True) as connection:
            # As every session of ours has it.
            connection.execute(f"ALTER DATABASE {connection.info.dbname} SET enable_seqscan = off".encode())
        with closing(Sql(url)) as sql:
            sql.execute("ALTER TABLE celery_durable.workflow SET (autovacuum_enabled = false)")
            if request.param == "a long past":
                sql.execute(ALL_FINISHED)
            sql.execute("VACUUM ANALYZE celery_durable.workflow")
            for statement in BURST.split(";\n"):
                sql.execute(statement)
            yield sql


@pytest.mark.parametrize(("table", "name"), OF_ONE, ids=lambda part: part)
def test_a_statement_of_one_workflow_reads_no_others(burst: Sql, table: str, name: str) -> None:
    """However many are enqueued or run, and however few that were when the plan was made."""
    params = {**STATEMENTS[table, name]} if name != "notify" else {"targets": ["RUNNING7"], "republish_after": 60.0}
    for node in explain(burst, table, name, params, uses=10):
        if node.get("Relation Name") == "workflow" and "Scan" in node["Node Type"]:
            read = (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
            assert read <= 2, f"{name} reads {read} workflows"


@pytest.mark.parametrize(("table", "name"), OF_ALL, ids=lambda part: part)
def test_what_every_workflow_needs_is_planned_once(burst: Sql, table: str, name: str) -> None:
    """To plan it takes longer than to execute it."""
    with psycopg.connect(burst.connection.info.dsn) as connection:
        executor = Direct(connection)
        for _ in range(20):
            with suppress(psycopg.errors.UniqueViolation):
                executor.run(Queries(f"{table}.sql", "celery_durable")[name], STATEMENTS[table, name])
            connection.rollback()
        ((planned,),) = connection.execute("SELECT custom_plans FROM pg_prepared_statements").fetchall()
    assert planned <= 5


def test_pruning_asks_for_each_parent(postgres_server: str) -> None:
    """Where hardly any workflow lives and none has a parent, a planner would read them all once to find those."""
    with _new_database(postgres_server, "template0") as url:
        migrate(url)
        with closing(Sql(url)) as sql:
            sql.execute(ALL_FINISHED)
            sql.execute("VACUUM ANALYZE celery_durable.workflow")
            nodes = explain(sql, "workflows", "prune", {**SWEEP, "ages": [0.0] * 3}, uses=10)
    scans = {
        node["Node Type"] for node in nodes if node.get("Relation Name") == "workflow" and "Scan" in node["Node Type"]
    }
    assert "Seq Scan" not in scans
    assert scans


def test_pruning_passes_over_what_is_kept_for_ever(full: Sql) -> None:
    """The oldest are of a state that isn't pruned: they aren't read."""
    ages = {**SWEEP, "ages": [float(FINISHED - 1000)] * 3}
    for node in explain(full, "workflows", "prune", ages, uses=10):
        if node.get("Index Name") == "workflow_kept":
            assert node["Actual Rows"] * node["Actual Loops"] <= SWEEP["limit"]
            assert node.get("Rows Removed by Filter", 0) == 0


def test_pruning_reads_what_it_deletes(full: Sql) -> None:
    """Its limit bounds the work, also when everything is old."""
    nodes = explain(full, "workflows", "prune", {**SWEEP, "ages": [0.0] * 3})
    (deleted,) = [node for node in nodes if node["Node Type"] == "ModifyTable" and node["Relation Name"] == "workflow"]
    assert deleted["Actual Rows"] == SWEEP["limit"]
    for node in nodes:
        if "Scan" in node["Node Type"] and node.get("Relation Name") in LARGE:
            read = (node["Actual Rows"] + node.get("Rows Removed by Filter", 0)) * node["Actual Loops"]
            assert node["Node Type"] != "Seq Scan", f"prune reads all of {node['Relation Name']}"
            assert read <= 10 * ACTIVE
