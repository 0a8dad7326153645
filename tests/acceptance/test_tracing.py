"""Traces of live workers: one over a SIGKILL, a hand-over and a wait, whatever pool, beside whose instrumentation."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest

import celery_durable as durable
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.pages import CHECKOUT
from tests.fixtures.site import SHOP, Site

TRACED = "tests.fixtures.apps.traced"
START = """
import sys
from opentelemetry import trace
from tests.fixtures.apps import traced
traced.trace_here()
with trace.get_tracer("web").start_as_current_span("POST /orders"):
    getattr(traced, sys.argv[1]).apply_async(sys.argv[2:], task_id=sys.argv[2])
"""
POOLS = {
    "prefork": {},
    "threads": {"POOL": "threads"},
    "solo": {},
    "gevent": {"POOL": "gevent"},
    "eventlet": {"POOL": "eventlet", "PSYCOPG_WAIT_FUNC": "wait_select"},
}

Span = dict[str, Any]


@pytest.fixture(params=["alone", "beside"])
def env(request: pytest.FixtureRequest) -> dict[str, str]:
    """Whether OpenTelemetry's own instrumentation of Celery is active as well."""
    return {"BESIDE": "yes" if request.param == "beside" else ""}


def start(site: Site, env: dict[str, str], workflow: str, workflow_id: str) -> None:
    """Start a workflow in a process of its own, as a web server does."""
    command = [sys.executable, "-c", START, workflow, workflow_id]
    subprocess.run(command, cwd=CHECKOUT, env={**os.environ, **site.workers.env, **env}, check=True, timeout=90)


def spans(site: Site) -> list[Span]:
    """All that have ended, in the order in which they did."""
    return [entry.args[0] for entry in site.ledger.lines() if entry.name == "span"]


def named(site: Site, name: str) -> list[Span]:
    """Those with this name."""
    return [span for span in spans(site) if span["name"] == name]


def ended(site: Site, name: str, ending: str) -> None:
    """Wait until the span of the attempt has ended that ended so."""
    wait_until(
        lambda: any(span["facts"].get("celery_durable.attempt.ending") == ending for span in named(site, name)),
        message=lambda: str(spans(site)),
    )


def endings_of(site: Site, name: str, env: dict[str, str]) -> list[str]:
    """How the attempts of this name have ended.

    OpenTelemetry's own instrumentation has spans of messages, too, with which there was nothing to do: one that a
    worker had taken when it was stopped is put back, and comes late.
    """
    endings = [span["facts"].get("celery_durable.attempt.ending") for span in named(site, name)]
    assert all(endings) or env["BESIDE"]
    return list(filter(None, endings))


def outline(site: Site) -> dict[str, list[str]]:
    """The names of all spans by the name of the span in which they are; those of one that never ended by `?`."""
    by_id = {span["id"]: span["name"] for span in spans(site)}
    found: dict[str, list[str]] = {}
    for span in spans(site):
        found.setdefault(by_id.get(span["parent"], "?") if span["parent"] else "", []).append(span["name"])
    return {name: sorted(within) for name, within in found.items()}


def test_one_trace_over_a_kill(site: Site, env: dict[str, str]) -> None:
    """The span of the attempt that was killed never ends; its first step's does, and what runs again is beside it."""
    workers = site.start(2, app=f"{TRACED}:app", concurrency=1, env=env)
    site.gates.close("w1-1")
    start(site, env, "order", "w1")
    site.reaches("work", "w1", 1)
    site.owner(*workers).kill()
    site.gates.open("w1-1")
    status = site.finished("w1")
    assert (status.result, status.attempt, status.crashes) == ([0, 10, 20], 2, 1)
    ended(site, f"run/{SHOP}.order", "SUCCESS")
    assert len({span["trace"] for span in spans(site)}) == 1
    work = f"step/{SHOP}.work"
    assert outline(site) == {
        "": ["POST /orders"],
        "POST /orders": [f"apply_async/{SHOP}.order"],
        f"apply_async/{SHOP}.order": [f"run/{SHOP}.order"],
        "?": [work],
        f"run/{SHOP}.order": [work, work],
    }
    (run,) = named(site, f"run/{SHOP}.order")
    assert run["events"] == ["recovered"]
    assert run["facts"]["celery_durable.attempt.number"] == 2
    steps = [(each["facts"]["celery_durable.step.key"], each["facts"]["celery_durable.attempt.number"])
             for each in named(site, work)]  # fmt: skip
    assert steps == [(f"{SHOP}.work", 1), (f"{SHOP}.work#2", 2), (f"{SHOP}.work#3", 2)]
    assert {span["status"] for span in spans(site)} == {"UNSET"}


def test_one_trace_over_a_hand_over_a_wait_and_a_child(site: Site, env: dict[str, str]) -> None:
    """Wherever each part of it runs."""
    first = site.workers.start(app=f"{TRACED}:app", concurrency=1, env=env)
    site.gates.close("w1-0")
    start(site, env, "parent", "w1")
    site.reaches("work", "w1", 0)
    second = site.workers.start(app=f"{TRACED}:app", env=env)
    first.stop("warm")
    wait_until(lambda: site.sql.value("SELECT count(*) FROM celery_durable.node WHERE draining") == 1)
    site.gates.open("w1-0")
    first.wait_exit()
    wait_until(lambda: site.status("w1").state == "SUSPENDED")
    durable.send("w1", None, "go", app=site.shop.app)
    assert site.finished("w1").result == 10
    ended(site, f"run/{TRACED}.parent", "SUCCESS")
    ended(site, f"run/{SHOP}.order", "SUCCESS")
    assert second.running
    assert len({span["trace"] for span in spans(site)}) == 1
    endings = endings_of(site, f"run/{TRACED}.parent", env)
    assert endings[0] == "handed over"
    assert set(endings[1:-1]) <= {"suspended"}
    assert endings[-1] == "SUCCESS"
    assert endings_of(site, f"run/{SHOP}.order", env) == ["SUCCESS"]
    within = outline(site)
    for task in (f"{TRACED}.parent", f"{SHOP}.order"):
        assert within[f"apply_async/{task}"] == [f"run/{task}"] * len(named(site, f"run/{task}"))
    assert within[f"run/{TRACED}.parent"] == [f"apply_async/{SHOP}.order", *[f"step/{SHOP}.work"] * 2]
    assert within[f"run/{SHOP}.order"] == [f"step/{SHOP}.work"]


@pytest.mark.parametrize("pool", POOLS)
def test_what_a_body_does_is_in_the_span_of_its_step(site: Site, pool: str) -> None:
    """In every pool: in threads of a gather, on the event loop, and beside it."""
    env = POOLS[pool]
    site.workers.start(app=f"{TRACED}:app", pool=pool, concurrency=2, env=env)
    for name in ("gathers", "agathers"):
        start(site, {}, name, name)
        assert site.finished(name).state == "SUCCESS"
        ended(site, f"run/{TRACED}.{name}", "SUCCESS")
    by_id = {span["id"]: span for span in spans(site)}
    assert len({span["trace"] for span in spans(site)}) == 2
    for name in ("gathers", "agathers"):
        gets = [span for span in spans(site) if span["name"].startswith(f"GET /{name}/")]
        assert len(gets) == 4
        steps = [by_id[span["parent"]] for span in gets]
        assert {step["name"] for step in steps} <= {f"step/{TRACED}.looks", f"step/{TRACED}.alooks"}
        assert len({step["id"] for step in steps}) == 4
        assert {by_id[step["parent"]]["name"] for step in steps} == {f"run/{TRACED}.{name}"}
