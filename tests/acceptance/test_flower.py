"""The Workflows tab of live Flowers, in a real browser: what it shows, how it steers, and whom it obeys."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import psutil
import pytest
from tornado.web import create_signed_value

import celery_durable as durable
from tests.fixtures.brokers import isolated
from tests.fixtures.browser import Browser
from tests.fixtures.fix_postgres import _new_database
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.flowers import OPEN_API, Flower
from tests.fixtures.ledger import Ledger
from tests.fixtures.site import Site, opened, shop_env
from tests.fixtures.workers import Workers

pytestmark = pytest.mark.slow

#: What would run if anything of it were taken for HTML, wherever it is put.
EVIL = "\"'`</script></title></textarea><img src=x onerror='window.pwned=1'><svg onload='window.pwned=1'>${1}{{1+1}}é✓"
USER = "ann:secret"
EMAIL = "ann@shop.example"
SECRET = "a-secret-of-cookies"
NOBODYS = "nobodys"


class Flowers:
    """One Flower for each way to be started; each is started when it is first needed."""

    def __init__(self, env: dict[str, str], directory: Path) -> None:
        self._env = env
        self._directory = directory
        self.started: list[Flower] = []

    @cached_property
    def open(self) -> Flower:
        """Anybody may look and act."""
        return self._start(OPEN_API)

    @cached_property
    def closed(self) -> Flower:
        """Anybody may look, and nobody may act."""
        return self._start({})

    @cached_property
    def read_only(self) -> Flower:
        """A user with a password may look, and not act."""
        return self._start({}, f"--basic_auth={USER}", "--read_only")

    @cached_property
    def signed_in(self) -> Flower:
        """Who has signed in elsewhere may look and act, behind a prefix."""
        elsewhere = ["key=key", "secret=secret", "redirect_uri=http://127.0.0.1/login"]
        return self._start(
            {}, f"--auth={EMAIL}", f"--cookie_secret={SECRET}", *(f"--oauth2_{each}" for each in elsewhere),
            "--auth_provider=flower.views.auth.GoogleAuth2LoginHandler", prefix="ops/flower",
        )  # fmt: skip

    @cached_property
    def adrift(self) -> Flower:
        """Its database isn't there."""
        return self._start({**OPEN_API, "DATABASE_URL": "postgresql://nobody:hush@127.0.0.1:1/none"})

    def _start(self, env: dict[str, str], *args: str, prefix: str = "") -> Flower:
        log = self._directory / f"flower{len(self.started)}.log"
        flower = Flower({**self._env, **env}, log, args, prefix)
        self.started.append(flower)
        flower.wait_ready()
        return flower


@pytest.fixture(scope="module")
def site(postgres_server: str, template_database: str, broker_server: str, tmp_path_factory: Any) -> Iterator[Site]:
    """A shop with one worker that sends events."""
    directory = tmp_path_factory.mktemp("site")
    ledger = Ledger(directory / "ledger")
    with _new_database(postgres_server, template_database) as url, isolated(broker_server) as broker:
        workers = Workers(shop_env(url, broker.url, broker.queue, ledger), directory)
        with opened(workers, ledger, url) as site:
            workers.start(hostname="w1@test", args=["-E"], wait=False)
            yield site
            workers.kill_all()
            print(workers.logs())


@pytest.fixture(scope="module")
def flowers(site: Site, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flowers]:
    flowers = Flowers(site.workers.env, tmp_path_factory.mktemp("flowers"))
    yield flowers
    for each in flowers.started:
        each.kill()
        print(each.log)


@pytest.fixture
def flower(flowers: Flowers) -> Flower:
    """The one in which anybody may act."""
    return flowers.open


@pytest.fixture
def name(request: pytest.FixtureRequest) -> str:
    """A name that no other test uses."""
    return str(request.node.name)


def page_of(workflow_id: str, **more: str) -> str:
    """The path of a workflow's page."""
    return f"/workflow?{urlencode({'id': workflow_id, **more})}"


def in_state(site: Site, workflow_id: str, state: str) -> None:
    """Wait until a workflow is so."""
    wait_until(lambda: site.status(workflow_id).state == state, message=f"{workflow_id} is {state}")


def confirm(browser: Browser, button: str) -> str:
    """Click a button and what its dialog asks; the question."""
    is_open = "document.getElementById('durable-dialog').open"
    # What has just been replaced, or pushed aside by something that came above it, isn't where the click was aimed at.
    wait_until(lambda: browser.evaluate(is_open) or browser.click(button) or browser.evaluate(is_open), message=button)
    question = browser.text("#durable-question")
    browser.click("#durable-yes")
    return question


# What is shown


def test_the_tab_is_on_every_page(site: Site, flower: Flower, browser: Browser, name: str) -> None:
    """Nothing was configured; it leads to the list, and that to the workflow."""
    site.finished(site.shop.order.apply_async([name], task_id=name).id)
    for path in ("/", "/tasks", "/broker", "/no-such-page"):
        assert 'href="/workflows"' in flower.answer(path).text
    browser.open(f"{flower.url}/tasks")
    browser.click(".app-nav a[href='/workflows']")
    browser.wait_for(".app-nav a.active", "Workflows")
    browser.click(f"#durable-workflows a[title='{name}']")
    browser.wait_for("h1", "tests.fixtures.apps.shop.order")
    browser.wait_for("#durable-arguments", f'"{name}"')
    assert browser.text("#durable-outcome") == "[0, 10, 20]"
    assert browser.evaluate("document.querySelectorAll('.durable-chart .try.success').length") == 3
    assert browser.evaluate("document.querySelectorAll('.durable-labels li').length") == 4
    with urlopen(flower.url + page_of(name)) as page:
        assert "default-src 'self'" in page.headers["Content-Security-Policy"]


def test_links_to_flowers_own_pages(site: Site, flower: Flower, browser: Browser, name: str) -> None:
    """Of a task and a worker that Flower has heard of; they are there."""
    wait_until(lambda: flower.hears("w1@test"), message="Flower hears the worker")
    site.finished(site.shop.order.apply_async([name, 1], task_id=name).id)
    wait_until(lambda: flower.knows(name), message="Flower has heard of the task")
    browser.open(flower.url + page_of(name))
    for link, text in (("/task/", name), ("/worker/", "w1@test")):
        path = browser.until(f"document.querySelector('.durable-facts a[href^={json.dumps(link)}]')?.pathname")
        assert text in flower.page(path)


def test_the_list_is_filtered_and_paged(site: Site, flower: Flower, browser: Browser) -> None:
    """By what is typed and clicked, page by page and back, with counts of each state."""
    signatures = [site.shop.quick.s(number).set(queue=NOBODYS) for number in range(120)]
    ids = [handle.id for handle in durable.enqueue_many(signatures)]
    listed = "document.querySelectorAll('#durable-workflows .durable-id').length"
    first = "document.querySelector('#durable-workflows .durable-id')?.innerText"
    browser.open(f"{flower.url}/workflows")
    browser.fill("[name=queue]", NOBODYS)
    browser.click(".durable-filters button")
    browser.until(f"location.search.includes({NOBODYS!r}) && {listed} === 50")
    assert browser.text("[data-state=ENQUEUED]").split() == ["Enqueued", "120"]
    assert browser.text("[data-state='']").split() == ["All", "120"]
    seen = [browser.evaluate(first)]
    for count in (50, 20):
        browser.click("[rel=next]")
        browser.until(f"{first} !== {json.dumps(seen[-1])} && {listed} === {count}")
        seen.append(browser.evaluate(first))
    assert len(set(seen)) == 3
    assert not browser.evaluate("document.querySelector('[rel=next]')")
    for expected in reversed(seen[:2]):
        browser.click("[rel=prev]")
        browser.until(f"{first} === {json.dumps(expected)}")
    assert not browser.evaluate("document.querySelector('[rel=prev]')")
    browser.click("[data-state=SUCCESS]")
    browser.wait_for("#durable-workflows", "No workflow matches these filters.")
    browser.open(f"{flower.url}/workflows?search={ids[7]}")
    browser.wait_for("#durable-workflows", ids[7])
    assert browser.evaluate(listed) == 1


@pytest.mark.parametrize(
    ("query", "status", "text"),
    [
        ("state=BOGUS", 400, "There is no state"),
        ("created_after=yesterday", 400, "created_after must be a time such as"),
        ("after=nothing", 400, "There is no such page"),
        ("name=%00", 400, "name must be text"),
        ("id=%ff", 400, "id isn&#x27;t UTF-8"),
        ("created_before=2001-01-01T00:00", 200, "No workflow matches"),
        ("created_after=2001-01-01T00:00:00%2B02:00&error=&name=", 200, "durable-id"),
        ("search=%25&error=_", 200, "No workflow matches"),
    ],
)
def test_any_filter_is_answered(flower: Flower, query: str, status: int, text: str) -> None:
    """One that can't be is told, with status 400; one that fits nothing or everything is a list."""
    durable_list = flower.answer(f"/workflows?{query}")
    assert durable_list.status == status
    assert text.replace("&#x27;", "'") in durable_list.text.replace("&#x27;", "'").replace("&#39;", "'")


@pytest.mark.crash
def test_a_page_follows_its_workflow(site: Site, flower: Flower, browser: Browser, name: str) -> None:
    """While it is open: steps, a crash of the worker process, the end; then it asks no more."""
    site.gates.close(f"{name}-1")
    site.shop.order.apply_async([name], task_id=name)
    site.reaches("work", name, 1)
    browser.open(flower.url + page_of(name))
    browser.wait_for(".durable-identity", "RUNNING")
    browser.wait_for("#durable-refresh", "Live")
    browser.evaluate("window.kept = true")
    browser.click("#step-0 summary")
    psutil.Process(site.ledger.lines()[-1].pid).kill()
    browser.wait_for("#durable-attempts", "crashed")
    browser.until("document.querySelector('.mark.crash title').textContent.includes('crashed')")
    site.gates.open(f"{name}-1")
    browser.wait_for(".durable-identity", "SUCCESS")
    browser.wait_for("#durable-outcome", "[0, 10, 20]")
    assert browser.evaluate("window.kept && document.getElementById('step-0').open")
    assert browser.evaluate("document.getElementById('durable-refresh').hidden")
    assert browser.evaluate("document.getElementById('durable-live').dataset.over") == "yes"


def test_tries_and_tracebacks(site: Site, flower: Flower, browser: Browser, name: str) -> None:
    """Each failed try has its bar, its error and its traceback."""
    site.finished(site.shop.flaky_order.apply_async([name, 2], task_id=name).id)
    browser.open(f"{flower.url}{page_of(name)}#step-0")
    browser.wait_for("#step-0[open] .durable-error:nth-of-type(2)", "in flaky")
    assert "Refused" in browser.text("#step-0 h3")
    assert browser.evaluate("document.querySelectorAll('.durable-chart .try.retry').length") == 2
    assert browser.evaluate("document.querySelectorAll('.durable-chart .try.success').length") == 1
    assert "tried again" in browser.text(".durable-legend")


def test_children_are_nested_and_linked(site: Site, flower: Flower, browser: Browser, name: str) -> None:
    """A child's bars are in its lane; unfolded, its steps are below; its name leads to its page."""
    parent = site.shop.deep.apply_async([2], task_id=name)
    site.finished(parent.id)
    child = next(each for each in durable.list_workflows(parent_id=name, app=site.shop.app))
    browser.open(flower.url + page_of(name))
    browser.wait_for(".durable-label", "deep")
    assert browser.evaluate("document.querySelectorAll('.durable-depth-2').length") == 0
    browser.click(".durable-depth-1 .durable-toggle")
    browser.wait_for(".durable-depth-2")
    browser.click(".durable-depth-1 a.durable-label")
    browser.wait_for(".durable-identity code", child.id)
    assert name in browser.text(".durable-facts")


def test_health(site: Site, flower: Flower, browser: Browser) -> None:
    """Nodes, sweep and lags; the number of the dead leads to them."""
    browser.open(f"{flower.url}/workflows/health")
    browser.wait_for("#durable-nodes", "w1@test")
    browser.wait_for("#durable-nodes", "ALIVE")
    browser.wait_for(".durable-verdict", "All is well.")
    assert "ago" in browser.text(".durable-figures")
    browser.click(".durable-figures a")
    browser.until("location.search === '?state=DEAD'")


# What is done


def test_cancel_and_resume(site: Site, flower: Flower, browser: Browser, name: str) -> None:
    """By a button and its confirmation, without which nothing happens."""
    site.shop.receiver.apply_async([name], task_id=name)
    in_state(site, name, "SUSPENDED")
    browser.open(flower.url + page_of(name))
    browser.click("[data-action=cancel]")
    browser.wait_for("#durable-question", "Cancel this workflow?")
    browser.click("#durable-dialog button[value='']")
    browser.until("!document.getElementById('durable-dialog').open")
    assert site.status(name).state == "SUSPENDED"
    assert confirm(browser, "[data-action=cancel]") == "Cancel this workflow?"
    browser.wait_for("#durable-notice", "It is cancelled.")
    browser.wait_for(".durable-identity", "CANCELLED")
    assert site.status(name).state == "CANCELLED"
    confirm(browser, "[data-action=resume]")
    browser.wait_for(".durable-identity", "SUSPENDED")
    assert browser.text("#durable-refresh-text") == "Live"


def test_cancel_with_children(site: Site, flower: Flower, browser: Browser, name: str) -> None:
    """If that is ticked."""
    site.shop.has_a_child.apply_async([name], task_id=name)
    wait_until(lambda: durable.list_workflows(parent_id=name, state="SUSPENDED", app=site.shop.app), message="it waits")
    (child,) = durable.list_workflows(parent_id=name, app=site.shop.app)
    browser.open(flower.url + page_of(name))
    browser.click("[data-action=cancel]")
    browser.click("#durable-children input")
    browser.click("#durable-yes")
    browser.wait_for(".durable-identity", "CANCELLED")
    in_state(site, child.id, "CANCELLED")


def test_fork_from_a_step(site: Site, flower: Flower, browser: Browser, name: str) -> None:
    """A new workflow with what was done before that step; its page is shown."""
    site.finished(site.shop.order.apply_async([name], task_id=name).id)
    browser.open(f"{flower.url}{page_of(name)}#step-2")
    question = confirm(browser, "#step-2 [data-action=fork]")
    assert "tests.fixtures.apps.shop.work#3" in question
    browser.until(f"location.search !== '?id={name}'")
    browser.wait_for(".durable-facts", f"Forked from\n{name}")
    browser.wait_for(".durable-identity", "SUCCESS")
    assert site.work_of(name) == [1, 1, 2]


def test_what_can_not_be_done_is_told(site: Site, flower: Flower, browser: Browser, name: str) -> None:
    """Such as to resume what somebody else has resumed meanwhile."""
    site.shop.receiver.apply_async([name], task_id=name)
    in_state(site, name, "SUSPENDED")
    durable.cancel_workflow(name, app=site.shop.app)
    browser.open(flower.url + page_of(name))
    browser.wait_for("[data-action=resume]")
    durable.resume_workflow(name, app=site.shop.app)
    confirm(browser, "[data-action=resume]")
    browser.wait_for("#durable-notice", "Only workflows that have ended without success can be resumed")
    assert flower.answer("/workflow/fork", {"id": name, "step": "nothing"}).status == 400
    assert flower.answer("/workflow/cancel", {"id": "nobody"}).status == 404


# Who may


def test_actions_of_other_sites_are_refused(site: Site, flowers: Flowers, name: str) -> None:
    """Also where Flower itself is open to all, and whoever is signed in."""
    site.shop.receiver.apply_async([name], task_id=name)
    in_state(site, name, "SUSPENDED")
    form = {"id": name}
    for headers in (
        {"Sec_Fetch_Site": "cross-site"},
        {"Sec_Fetch_Site": "same-site"},
        {"Origin": "http://evil.example"},
    ):
        assert flowers.open.answer("/workflow/cancel", form, **headers).status == 403
        assert flowers.read_only.answer("/workflow/cancel", form, USER, **headers).status == 403
    assert flowers.open.answer(f"/workflow/cancel?id={name}").status == 405
    assert site.status(name).state == "SUSPENDED"
    assert flowers.open.answer("/workflow/cancel", form, Origin=flowers.open.origin).status == 200


def test_without_authentication_nobody_acts(site: Site, flowers: Flowers, browser: Browser, name: str) -> None:
    """As with Flower's own buttons; the page says what to set."""
    site.shop.receiver.apply_async([name], task_id=name)
    in_state(site, name, "SUSPENDED")
    browser.open(flowers.closed.url + page_of(name))
    browser.wait_for("[data-region=head]", "FLOWER_UNAUTHENTICATED_API")
    assert browser.evaluate("document.querySelector('[data-action=cancel]').disabled")
    assert flowers.closed.answer("/workflow/cancel", {"id": name}).status == 401
    assert site.status(name).state == "SUSPENDED"


def test_basic_auth_and_read_only(site: Site, flowers: Flowers, browser: Browser, name: str) -> None:
    """Nothing is told without the password, and nothing is done with it: there are no buttons."""
    site.shop.receiver.apply_async([name], task_id=name)
    in_state(site, name, "SUSPENDED")
    flower, page = flowers.read_only, page_of(name)
    for path in (page, f"{page}&shown=", "/workflows", "/workflows/health"):
        assert flower.answer(path) == (401, "Access denied")
        assert flower.answer(path, user="ann:wrong").status == 401
        assert flower.answer(path, user=USER).status == 200
    assert flower.answer("/workflow/cancel", {"id": name}).status == 401
    for action in ("cancel", "resume", "fork"):
        assert flower.answer(f"/workflow/{action}", {"id": name}, USER) == (403, "Read only mode is enabled")
    browser.open(flower.url.replace("//", f"//{USER}@") + page)
    browser.wait_for(".durable-identity", "SUSPENDED")
    assert not browser.evaluate("document.querySelector('[data-action]')")
    assert site.status(name).state == "SUSPENDED"


def test_signed_in_behind_a_prefix(site: Site, flowers: Flowers, browser: Browser, name: str) -> None:
    """Pages, files, live updates and actions are below the prefix; an action needs the token of its page."""
    site.shop.receiver.apply_async([name], task_id=name)
    in_state(site, name, "SUSPENDED")
    flower = flowers.signed_in
    cookie = create_signed_value(SECRET, "user", EMAIL).decode()
    assert flower.answer("/workflow/cancel", {"id": name}).status == 403
    assert flower.answer("/workflow/cancel", {"id": name}, Cookie=f"user={cookie}").status == 403
    assert site.status(name).state == "SUSPENDED"
    browser.open(f"{flower.origin}/")
    browser.set_cookie(flower.url, "user", cookie)
    browser.open(f"{flower.url}/workflows?id={name}")
    browser.click(".durable-id a")
    browser.wait_for("#durable-refresh", "Live")
    confirm(browser, "[data-action=cancel]")
    browser.wait_for(".durable-identity", "CANCELLED")
    assert browser.url.startswith(f"{flower.url}/workflow?")
    assert f"{EMAIL} asks in Flower: cancel workflow {name!r}" in flower.log
    assert browser.evaluate("getComputedStyle(document.querySelector('.durable-card')).overflow") == "hidden"


def test_signed_out_while_a_page_is_open(site: Site, flowers: Flowers, browser: Browser, name: str) -> None:
    """The page says so, and doesn't ask for more, though signing in is another site's."""
    site.shop.receiver.apply_async([name], task_id=name)
    in_state(site, name, "SUSPENDED")
    flower = flowers.signed_in
    browser.open(f"{flower.origin}/")
    browser.set_cookie(flower.url, "user", create_signed_value(SECRET, "user", EMAIL).decode())
    browser.open(flower.url + page_of(name))
    browser.wait_for("#durable-refresh", "Live")
    browser.set_cookie(flower.url, "user", "nobody")
    browser.wait_for("#durable-notice", "You aren't signed in any more")
    assert browser.evaluate("document.getElementById('durable-live').dataset.over") == "yes"


# What is hostile, large, broken or gone


def test_any_id_and_any_text(site: Site, flower: Flower, browser: Browser, name: str) -> None:
    """Markup in ids, arguments, messages, topics, events, errors and tracebacks is text, in lists and live pages."""
    evil = f"{EVIL}//../{name}?&#%2F"
    site.shop.publishes.apply_async([evil, {evil: [evil]}], task_id=evil)
    in_state(site, evil, "SUSPENDED")
    browser.open(f"{flower.url}/workflows?{urlencode({'search': evil})}")
    browser.wait_for("#durable-workflows", EVIL)
    browser.click("#durable-workflows .durable-id a")
    browser.wait_for(".durable-identity", evil)
    browser.wait_for("#durable-events", evil)
    browser.wait_for(".durable-facts", f"message {evil}")
    durable.send(evil, evil, topic=evil, idempotency_key=evil, app=site.shop.app)
    browser.wait_for(".durable-identity", "SUCCESS")
    browser.wait_for("#durable-messages", evil)
    browser.wait_for("#durable-outcome", evil.replace('"', '\\"'))
    confirm(browser, "[data-action=fork]")
    browser.wait_for(".durable-facts", f"Forked from\n{evil}")
    failed = site.shop.order.delay(evil)
    site.finished(failed.id)
    browser.open(f"{flower.url}{page_of(failed.id)}#step-0")
    browser.wait_for("#step-0 .durable-error", "onerror")
    assert browser.evaluate("[window.pwned, document.querySelector('main img')]") == [None, None]


@pytest.mark.parametrize("odd", ["..", "/", ".", " x ", "a/b?c#d", "%2e%2e", "\x01\t\n", "\u202e\u200bé", "a" * 200])
def test_odd_ids_have_pages(site: Site, flower: Flower, odd: str) -> None:
    """A query carries what no path can."""
    site.shop.quick.apply_async([odd], task_id=odd, queue=NOBODYS)
    assert flower.answer(page_of(odd)).status == 200
    news = json.loads(flower.answer(page_of(odd, shown="")).text)
    assert not news["over"]
    assert flower.answer("/workflow/cancel", {"id": odd}) == (200, json.dumps({"message": "It is cancelled."}))
    assert site.status(odd).state == "CANCELLED"


def test_ids_that_can_not_be(flower: Flower) -> None:
    """They are unknown, in a sentence."""
    for query in ("", "id=", "id=%00", "id=%ED%A0%80", "id=%ff"):
        answer = flower.answer(f"/workflow?{query}")
        assert answer.status in (400, 404)
        assert "This workflow can" in answer.text


def test_without_its_database(flowers: Flowers, browser: Browser) -> None:
    """The pages say so with status 503, quickly, and without the password; Flower itself lives on."""
    flower = flowers.adrift
    for path in ("/workflows", page_of("x"), page_of("x", shown=""), "/workflows/health"):
        answer = flower.answer(path)
        assert answer.status == 503
        assert "be reached at" in answer.text
        assert "hush" not in answer.text
    assert flower.answer("/workflow/cancel", {"id": "x"}).status == 503
    assert "hush" not in flower.log
    browser.open(f"{flower.url}/workflows")
    browser.wait_for(".durable-trouble", "can't")
    browser.click(".app-nav a[href='/tasks']")
    browser.wait_for("#tasks-table")


def test_deleted_while_its_page_is_open(site: Site, flower: Flower, browser: Browser, name: str) -> None:
    """The page says so, keeps what it shows, and offers nothing any more."""
    site.shop.quick.apply_async([name], task_id=name, queue=NOBODYS)
    browser.open(flower.url + page_of(name))
    browser.wait_for(".durable-identity", "ENQUEUED")
    site.sql.execute("DELETE FROM celery_durable.workflow WHERE id = %s", name)
    browser.wait_for("#durable-notice", "This workflow isn't there any more")
    assert browser.text("#durable-arguments") == f'"{name}"'
    assert browser.evaluate("[...document.querySelectorAll('[data-action]')].every(each => each.disabled)")
    assert browser.evaluate("document.getElementById('durable-live').dataset.over") == "yes"
    assert flower.answer(page_of(name)).status == 404


def test_large_values_are_not_loaded(site: Site, flower: Flower, name: str) -> None:
    """Of 16 MiB only the size is shown, in no more time than usual."""
    size = 2**24 - 100
    site.finished(site.shop.big_order.apply_async([size], task_id=name).id)
    site.shop.quick.apply_async(["x" * size], task_id=f"{name}-args", queue=NOBODYS)
    began = time.monotonic()
    page = flower.answer(page_of(name)).text
    assert page.count("16.0 MiB: too large for this page.") >= 2
    assert "16.0 MiB" in flower.answer(page_of(f"{name}-args")).text
    assert time.monotonic() - began < 5
    assert len(page) < 200_000


def test_values_that_can_not_be_read(site: Site, flower: Flower, name: str) -> None:
    """Of a serializer that nobody knows here, or broken: the page says so, and shows the rest."""
    site.finished(site.shop.order.apply_async([name, 2], task_id=name).id)
    of_it = "SET content_type = 'application/x-unknown' WHERE workflow = %s"
    for table in ("input", "output"):
        site.sql.execute(f"UPDATE celery_durable.{table} {of_it}", name)
    site.sql.execute(r"UPDATE celery_durable.checkpoint SET value = '\xff00' WHERE workflow = %s AND seq = 1", name)
    page = flower.answer(page_of(name))
    assert page.status == 200
    assert "They can&#x27;t be read here" in page.text.replace("&#39;", "&#x27;")
    assert "can&#x27;t be read back" in page.text.replace("&#39;", "&#x27;")
    assert name in flower.answer(f"/workflows?{urlencode({'id': name})}").text
