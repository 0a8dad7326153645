"""Workflows in Django's admin."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import closing
from html import unescape
from typing import Any
from weakref import WeakSet

import pytest
from celery import _state
from django.db import connections, transaction
from django.test import Client, override_settings
from django.test.utils import CaptureQueriesContext

import celery_durable as durable
from celery_durable import installation
from tests.fixtures.fix_django import configure_django, enter
from tests.fixtures.fix_postgres import Sql
from tests.fixtures.inprocess import Inprocess

configure_django()

LIST = "/admin/celery_durable/workflow/"
HTML = "<script>alert(1)</script>"


def ship(*args: Any, **kwargs: Any) -> Any:
    weighed = durable.as_step(lambda: {"grams": 7}, name=f"weigh {HTML}")()
    durable.as_step(lambda: f"said {HTML}", name="say")()
    return weighed, HTML


def sink() -> None:
    raise ValueError(HTML)


@pytest.fixture
def shop(site: str, broker_url: str) -> Iterator[Inprocess]:
    with closing(Inprocess(site, broker_url, database="default")) as shop:
        shop.workflow(ship, name="ship")
        shop.workflow(sink, name="sink")
        shop.app.set_current()
        yield shop
        _state._tls.current_app = None


@pytest.fixture
def sql(site: str) -> Iterator[Sql]:
    with closing(Sql(site)) as sql:
        yield sql


def visitor(*permissions: str) -> Client:
    """The admin as somebody of the staff with these permissions."""
    from django.contrib.auth.models import Permission, User

    user, _ = User.objects.get_or_create(username="-".join(permissions) or "nobody", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=[f"{each}_workflow" for each in permissions]))
    client = Client()
    client.force_login(user)
    return client


def start(shop: Inprocess, name: str, workflow_id: str, *args: Any, **kwargs: Any) -> None:
    shop.app.tasks[name].apply_async(args, kwargs, task_id=workflow_id)


def page(client: Client, path: str = "") -> str:
    """What a page shows."""
    response = client.get(LIST + path)
    assert response.status_code == 200
    return str(response.content.decode())


def outcome(source: str) -> str:
    """What a workflow's page shows as its outcome."""
    match = re.search(r'field-outcome.*?class="readonly">(.*?)</div>', source, re.DOTALL)
    assert match is not None
    return unescape(match[1])


def act(client: Client, action: str, *ids: str) -> str:
    """Choose workflows in the list and an action, and go; the list afterwards."""
    response = client.post(LIST, {"action": action, "_selected_action": ids}, follow=True)
    assert response.status_code == 200
    return unescape(response.content.decode())


def states(sql: Sql) -> dict[str, str]:
    return {row.id: row.state for row in sql.all("SELECT id, state FROM celery_durable.workflow ORDER BY id")}


def test_the_list(shop: Inprocess) -> None:
    """All workflows, filtered by state and queue, and found by id or a part of the name."""
    for name, workflow_id in (("ship", "w1"), ("ship", "w2"), ("sink", "w3")):
        start(shop, name, workflow_id)
    shop.run("w2")
    client = visitor("view")

    def shown(query: str = "") -> list[str]:
        return [each for each in ("w1", "w2", "w3") if f"/workflow/{each}/change/" in page(client, query)]

    assert shown() == ["w1", "w2", "w3"]
    assert shown("?state__exact=SUCCESS") == ["w2"]
    assert shown("?queue=nowhere") == []
    assert shown("?q=w3") == ["w3"]
    assert shown("?q=shi") == ["w1", "w2"]
    assert shown("?q=w") == []


def test_a_workflow(shop: Inprocess) -> None:
    """Its arguments, outcome and steps; whatever they contain, it is text."""
    start(shop, "ship", "w1", 42, HTML, note=HTML)
    shop.run("w1")
    source = page(visitor("view"), "w1/change/")
    assert HTML not in source
    text = unescape(source)
    assert f'42, "{HTML}", note="{HTML}"' in text
    assert f'[{{"grams": 7}}, "{HTML}"]' in text
    assert f"<td>weigh {HTML}</td><td>SUCCESS</td><td>1</td>" in text
    assert f'"said {HTML}"' in text


def test_a_failed_workflow(shop: Inprocess) -> None:
    """Its error, as text."""
    start(shop, "sink", "w1")
    shop.run("w1")
    source = page(visitor("view"), "w1/change/")
    assert HTML not in source
    assert f"ValueError: {HTML}" in unescape(source)


def test_a_workflow_that_has_not_ended(shop: Inprocess, sql: Sql) -> None:
    """There is no outcome yet; then it is that somebody has cancelled it."""
    start(shop, "ship", "w1")
    assert outcome(page(visitor("view"), "w1/change/")) == "-"
    durable.cancel_workflow("w1")
    assert outcome(page(visitor("view"), "w1/change/")).startswith("WorkflowCancelledError")


def test_payloads_that_cannot_be_read(shop: Inprocess, sql: Sql) -> None:
    """Of arguments, result and steps: the page says so, and shows the rest."""
    for name, workflow_id in (("ship", "w1"), ("sink", "w2")):
        start(shop, name, workflow_id)
        shop.run(workflow_id)
    for table, column in (("input", "body"), ("output", "value"), ("checkpoint", "value")):
        assert sql.execute(f"UPDATE celery_durable.{table} SET {column} = 'garbage'")
    text = unescape(page(visitor("view"), "w1/change/"))
    assert text.count("can't be read") == 4
    assert "can't be read" in outcome(page(visitor("view"), "w2/change/"))


def test_an_id_with_every_character(shop: Inprocess) -> None:
    """Ids are the callers' own."""
    start(shop, "ship", "order/1 ?&#%_<b>")
    client = visitor("view")
    link = page(client).partition('<a href="/admin/celery_durable/workflow/')[2].partition('"')[0]
    assert "order/1 ?&#%_<b>" in unescape(page(client, unescape(link)))


def test_a_workflow_that_is_gone(shop: Inprocess) -> None:
    """Django's own message, as for any object."""
    response = visitor("view").get(f"{LIST}gone/change/", follow=True)
    assert "exist. Perhaps it was deleted?" in response.content.decode()


def test_a_page_reads_its_workflow_once(shop: Inprocess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once for arguments and outcome, and once before the steps."""
    start(shop, "ship", "w1")
    reads: list[Any] = []
    table = type(shop.installation.store.workflows)
    by_id = table.by_id
    monkeypatch.setattr(table, "by_id", lambda *args, **kwargs: reads.append(args) or by_id(*args, **kwargs))
    page(visitor("view"), "w1/change/")
    assert len(reads) == 2


def test_actions(shop: Inprocess, sql: Sql) -> None:
    """Cancel, resume and fork, by whoever may change workflows; the page says how many."""
    client = visitor("view", "change")
    start(shop, "ship", "w1")
    start(shop, "ship", "w2")
    assert "2 workflow(s) cancelled." in act(client, "cancel", "w1", "w2")
    assert "0 workflow(s) cancelled." in act(client, "cancel", "w1")
    assert "1 workflow(s) resumed." in act(client, "resume", "w1")
    assert states(sql) == {"w1": "ENQUEUED", "w2": "CANCELLED"}
    shop.run("w1")
    assert "1 workflow(s) started again." in act(client, "fork", "w1")
    assert sql.value("SELECT state FROM celery_durable.workflow WHERE forked_from = 'w1'") == "ENQUEUED"


def test_what_cannot_be_done_is_a_message(shop: Inprocess, sql: Sql) -> None:
    """And nothing is done to any of those that were chosen."""
    start(shop, "ship", "w1")
    start(shop, "ship", "w2")
    durable.cancel_workflow("w2")
    assert "w1 is ENQUEUED: none was resumed" in act(visitor("change"), "resume", "w1", "w2")
    assert states(sql) == {"w1": "ENQUEUED", "w2": "CANCELLED"}


@pytest.mark.parametrize("action", ["cancel", "resume", "fork"])
def test_whoever_may_only_look(shop: Inprocess, sql: Sql, action: str) -> None:
    """Is offered no action, and refused the one that is sent nevertheless."""
    start(shop, "ship", "w1")
    client = visitor("view")
    assert f'value="{action}"' not in page(client)
    act(client, action, "w1")
    assert states(sql) == {"w1": "ENQUEUED"}
    assert f'value="{action}"' in page(visitor("change"))


def test_whoever_has_no_permission(shop: Inprocess, sql: Sql) -> None:
    """Sees neither list nor page, and does nothing."""
    start(shop, "ship", "w1")
    client = visitor()
    assert [client.get(LIST + path).status_code for path in ("", "w1/change/")] == [403, 403]
    assert client.post(LIST, {"action": "cancel", "_selected_action": ["w1"]}).status_code == 403
    assert Client().get(LIST).status_code == 302
    assert states(sql) == {"w1": "ENQUEUED"}


def test_nothing_is_added_saved_or_deleted(shop: Inprocess, sql: Sql) -> None:
    """By nobody, not by a superuser."""
    from django.contrib.auth.models import User

    start(shop, "ship", "w1")
    user, _ = User.objects.get_or_create(username="root", is_staff=True, is_superuser=True)
    client = Client()
    client.force_login(user)
    assert client.get(f"{LIST}add/").status_code == 403
    assert client.post(f"{LIST}w1/delete/", {"post": "yes"}).status_code == 403
    assert client.post(f"{LIST}w1/change/", {"state": "SUCCESS"}).status_code == 403
    act(client, "delete_selected", "w1")
    assert states(sql) == {"w1": "ENQUEUED"}
    source = page(client, "w1/change/")
    assert 'name="_save"' not in source
    assert 'name="_continue"' not in source
    assert f"{LIST}add/" not in page(client)


def test_requests_in_transactions(shop: Inprocess, sql: Sql, site: str) -> None:
    """A cancellation belongs to the request's transaction: its commit asks for it, and no rollback does."""
    client = visitor("change")
    start(shop, "ship", "w1")
    asked = "SELECT count(*) FROM celery_durable.cancellation"
    enter("default", site, ATOMIC_REQUESTS=True)
    try:
        with transaction.atomic():
            act(client, "cancel", "w1")
            transaction.set_rollback(True)
        assert sql.value(asked) == 0
        assert "1 workflow(s) cancelled." in act(client, "cancel", "w1")
    finally:
        enter("default", site, ATOMIC_REQUESTS=False)
    assert sql.value(asked) == 1


def test_where_a_router_sends_all_elsewhere(shop: Inprocess) -> None:
    """The admin reads where the workflows are."""
    start(shop, "ship", "w1")
    client = visitor("view")
    with override_settings(DATABASE_ROUTERS=[Lite()]), CaptureQueriesContext(connections["lite"]) as queries:
        client.get(LIST)
    assert not [each for each in queries if "workflow" in each["sql"]]


class Lite:
    """Sends our models to the wrong database."""

    def db_for_read(self, model: Any, **hints: Any) -> str | None:
        return "lite" if model._meta.app_label == "celery_durable" else None

    db_for_write = db_for_read


def test_without_an_app(site: str, sql: Sql, shop: Inprocess, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no Celery app is imported, rows are still shown, and a message says what is missing."""
    start(shop, "ship", "w1")
    monkeypatch.setattr(installation, "_apps", WeakSet())
    _state._tls.current_app = None
    text = unescape(page(visitor("view"), "w1/change/"))
    assert "durable.install" in text
    assert "ENQUEUED" in text
