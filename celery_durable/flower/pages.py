"""The pages of the tab, and what their buttons ask for: thin, over what Flower's own handlers do for its pages.

Flower decides who may look (``--basic_auth``, ``--auth``) and who may act: as with its own buttons nobody may without
authentication unless FLOWER_UNAUTHENTICATED_API is set, nor with ``--read-only``, nor from another site.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone, tzinfo
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode, urlsplit

from flower.api import BaseApiHandler
from flower.views import BaseHandler
from tornado.web import HTTPError, RequestHandler, StaticFileHandler, authenticated, url

from .. import management, states
from ..exceptions import DurableError, WorkflowConflict, WorkflowNotFound
from . import shown
from .reads import MOST_COUNTED, Filters, is_final, read_health, read_list, read_workflow
from .story import Links, Story

logger = logging.getLogger("celery_durable")

T = TypeVar("T")

STATIC = Path(__file__).with_name("static")
#: Of our own, so that a database that hangs takes no thread from Flower.
_THREADS = ThreadPoolExecutor(5, thread_name_prefix="durable-flower")
#: Pages that "newer" leads back through, one by one.
_MOST_TRAIL = 20
_OPEN_API = "FLOWER_UNAUTHENTICATED_API"
_TRUE = {"y", "yes", "t", "true", "on", "1"}


@dataclass(frozen=True, slots=True)
class Steering:
    """Whether a page has buttons, and whether they may be used."""

    shown: bool
    reason: str = ""

    @property
    def disabled(self) -> str:
        """The attribute of a button."""
        return "disabled" if self.reason else ""


class _Page(BaseHandler):
    """A page, and its content alone for those that have it open."""

    page = ""
    heading = "This can't be shown."

    @authenticated
    async def get(self) -> None:
        """Answer with the page, or with what has changed of it."""
        try:
            facts = await in_thread(partial(self.read, self.capp))
            await self.answer(facts)
        except (DurableError, ValueError) as error:
            self.answer_trouble(error)

    def read(self, app: Any) -> Any:
        """Return what the page is about; runs in a thread."""
        raise NotImplementedError

    async def answer(self, facts: Any) -> None:
        """Answer with what was read."""
        raise NotImplementedError

    def answer_live(self, facts: dict[str, Any], *, over: bool) -> None:
        """Answer with a page that follows what happens; over: nothing will any more."""
        content = self.render_string(self.page.replace(".", "_content."), **facts, **self.helpers()).decode()
        version = blake2b(content.encode(), digest_size=12).hexdigest()
        seen = self.said("shown")
        if seen is None:
            self.render(self.page, content=content, version=version, over=over, **facts, **self.helpers())
        else:
            self.write({"version": version, "over": over, "content": None if seen == version else content})

    def answer_trouble(self, error: Exception) -> None:
        """Say why there is no page."""
        self.set_status(status_of(error))
        if self.said("shown") is not None:
            self.write({"message": str(error)})
        else:
            self.render("durable_trouble.html", heading=self.heading, message=str(error), **self.helpers())

    def helpers(self) -> dict[str, Any]:
        """Return what every template of ours may use."""
        return {
            "here": "", "asset": self.asset, "shown": shown, "zone": self.zone, "workflow_url": self.workflow_url,
            "worker_url": self.worker_url, "list_url": self.list_url,
        }  # fmt: skip

    def asset(self, name: str) -> str:
        """Return the URL of a static file, another one if that has changed."""
        return f"{self.reverse_url('durable-static', name)}?v={_version(name)}"

    def workflow_url(self, workflow_id: str, **more: Any) -> str:
        """Return the URL of a workflow's page; in a query any id stays what it is."""
        return f"{self.reverse_url('durable-workflow')}?{urlencode({'id': workflow_id, **more}, doseq=True)}"

    def list_url(self, **query: Any) -> str:
        """Return the URL of the list with these filters."""
        given = {name: value for name, value in query.items() if value}
        return self.reverse_url("durable-workflows") + (f"?{urlencode(given, doseq=True)}" if given else "")

    def task_url(self, task_id: str) -> str | None:
        """Return the URL of Flower's page of a task, if it has heard of it."""
        known = task_id in self.application.events.state.tasks
        return self.reverse_url("task", task_id) if known else None

    def worker_url(self, hostname: str | None) -> str | None:
        """Return the URL of Flower's page of a worker, if it has heard of it."""
        known = hostname is not None and hostname in self.application.events.state.workers
        return self.reverse_url("worker", hostname) if known else None

    @property
    def zone(self) -> tzinfo:
        """The app's time zone, which Flower's own pages show, too."""
        found: tzinfo = self.capp.timezone or timezone.utc
        return found

    def said(self, name: str) -> str | None:
        """Return the last of a query's arguments, exactly as it was sent."""
        return next(reversed(self.all_said(name)), None)

    def all_said(self, name: str) -> list[str]:
        """Return a query's arguments, which Flower's own way would escape and strip."""
        return _decoded(self.request.query_arguments.get(name, []), name)


class ListPage(_Page):
    """Workflows, the newest first."""

    heading = "The workflows can't be listed."

    def read(self, app: Any) -> Any:
        """Return a page of the list."""
        trail = self.all_said("after")
        return read_list(app, self.filters(), _cursor(trail[-1]) if trail else None)

    async def answer(self, facts: Any) -> None:
        """Show the list."""
        listing = facts
        self.render(
            "durable_list.html",
            listing=_Listed(listing),
            filters=_Said({name: self.said(name) or "" for name in Filters.__slots__}),
            filtered=bool(self.filters().given()),
            trail=self.all_said("after"),
            here_with=self.here_with,
            **{**self.helpers(), "here": "list"},
        )

    def filters(self) -> Filters:
        """Return what the list is asked for; raise ValueError."""
        given = {name: self.said(name) or None for name in Filters.__slots__}
        times = {name: self.time(name, given.pop(name)) for name in ("created_after", "created_before")}
        return Filters(**given, **times)  # type: ignore[arg-type]

    def time(self, name: str, text: str | None) -> datetime | None:
        """Return a point in time; without a zone it is in the app's."""
        if text is None:
            return None
        try:
            found = datetime.fromisoformat(text)
        except ValueError:
            raise ValueError(f"{name} must be a time such as 2026-11-28T09:30, not {text!r:.100}.") from None
        return found if found.tzinfo else found.replace(tzinfo=self.zone)

    def here_with(self, after: Iterable[str] = (), **changed: Any) -> str:
        """Return the URL of this list with something else in its filters, or of another page of it."""
        said = {name: self.said(name) for name in Filters.__slots__}
        return self.list_url(**{**said, **changed}, after=list(after)[-_MOST_TRAIL:])


class WorkflowPage(_Page):
    """One workflow."""

    page = "durable_workflow.html"
    heading = "This workflow can't be shown."

    def read(self, app: Any) -> Any:
        """Return all of the workflow."""
        return read_workflow(app, self.said("id") or "", self.opened)

    async def answer(self, facts: Any) -> None:
        """Show the workflow."""
        links = Links(self.workflow_url, self.unfolded, self.task_url, self.worker_url, self.list_url)
        story = Story(facts, self.opened, links, self.zone)
        self.answer_live({"story": story, "steering": self.steering()}, over=is_final(facts.status))

    @property
    def opened(self) -> set[str]:
        """The children whose steps are shown, too."""
        return set(self.all_said("open"))

    def unfolded(self, opened: Collection[str]) -> str:
        """Return the URL of this page with the steps of other children."""
        return self.workflow_url(self.said("id") or "", open=sorted(opened))

    def steering(self) -> Steering:
        """Tell what the buttons are for whoever looks."""
        if is_read_only(self):
            return Steering(shown=False)
        if is_open_to_all(self):
            return Steering(
                shown=True,
                reason="Flower lets nobody act who isn't authenticated: start it with --basic_auth=user:password or "
                f"--auth, or set {_OPEN_API}=true where only you can reach it.",
            )
        return Steering(shown=True)


class HealthPage(_Page):
    """Nodes, recovery and database."""

    page = "durable_health.html"
    heading = "The workflows' database can't be asked."

    def read(self, app: Any) -> Any:
        """Return the health."""
        return read_health(app)

    async def answer(self, facts: Any) -> None:
        """Show it."""
        self.answer_live({"health": facts}, over=False)

    def helpers(self) -> dict[str, Any]:
        """Say where this is."""
        return {**super().helpers(), "here": "health"}


class Steer(BaseApiHandler):
    """What a button asks for."""

    def prepare(self) -> None:
        """Refuse what another site has sent, also where Flower itself is open to all."""
        refuse_other_sites(self)
        super().prepare()

    @authenticated
    async def post(self, action: str) -> None:
        """Do it, and say what has been done."""
        if is_read_only(self):
            raise HTTPError(403, "Read only mode is enabled")
        workflow_id = self.said("id") or ""
        logger.info("Flower: %s of workflow %r", action, workflow_id)
        try:
            self.write(await in_thread(partial(getattr(self, action), workflow_id)))
        except (DurableError, ValueError) as error:
            self.set_status(status_of(error))
            self.set_header("Content-Type", "text/plain; charset=UTF-8")
            self.write(str(error))

    def cancel(self, workflow_id: str) -> dict[str, str]:
        """Cancel it, with its children if that is said."""
        done = management.cancel_workflow(workflow_id, children=self.said("children") is not None, app=self.capp)
        return {"message": "It is cancelled." if done else "It had ended before."}

    def resume(self, workflow_id: str) -> dict[str, str]:
        """Let it go on."""
        management.resume_workflow(workflow_id, app=self.capp)
        return {"message": "It goes on."}

    def fork(self, workflow_id: str) -> dict[str, str]:
        """Start a new one, from a step if that is said."""
        forked = management.fork_workflow(workflow_id, from_step=self.said("step"), app=self.capp)
        page = f"{self.reverse_url('durable-workflow')}?{urlencode({'id': forked.id})}"
        return {"message": f"It is forked as {forked.id}.", "url": page}

    def said(self, name: str) -> str | None:
        """Return an argument of the body, exactly as it was sent."""
        return next(reversed(_decoded(self.request.body_arguments.get(name, []), name)), None)


@dataclass(frozen=True, slots=True)
class _Said:
    """The filters as they were typed."""

    texts: dict[str, str]

    def __getattr__(self, name: str) -> str:
        return self.texts[name]


class _Listed:
    """A page of the list as its template has it."""

    def __init__(self, listing: Any) -> None:
        self.workflows = listing.workflows
        self.names = listing.names
        self.last = f"{listing.older.created_at.isoformat()} {listing.older.id}" if listing.older else None
        self.counts = list(_counted(listing.counts))


def _counted(counts: Mapping[str, int] | None) -> Iterator[tuple[str, str]]:
    """Return how many there are of all states, and of each."""
    found = {state: (counts or {}).get(state, 0) for state in _STATES}
    total = sum(found.values())
    # Of a state that wasn't counted to its end the sum isn't known either.
    for state, count, most in [
        ("", total, total if max(found.values()) >= MOST_COUNTED else total + 1),
        *((state, count, MOST_COUNTED) for state, count in found.items()),
    ]:
        yield state, "" if counts is None else shown.number(count, most)


_STATES = (
    states.ENQUEUED, states.RUNNING, states.SUSPENDED, states.SUCCESS, states.FAILURE, states.CANCELLED, states.DEAD,
)  # fmt: skip


async def in_thread(function: Callable[[], T]) -> T:
    """Run what reads or writes the database beside Flower's loop."""
    return await asyncio.get_running_loop().run_in_executor(_THREADS, function)


def status_of(error: Exception) -> int:
    """Return the HTTP status of an error that a page tells."""
    if isinstance(error, WorkflowNotFound):
        return 404
    if isinstance(error, WorkflowConflict):
        return 409
    if isinstance(error, ValueError) and not isinstance(error, DurableError):
        return 400
    logger.warning("Flower's pages of workflows: %s", error)
    return 503


def is_read_only(handler: RequestHandler) -> bool:
    """Tell whether Flower was started with --read-only, which one before 2.2 doesn't have."""
    return bool(getattr(handler.application.options, "read_only", False))  # type: ignore[attr-defined]


def is_open_to_all(handler: RequestHandler) -> bool:
    """Tell whether nobody has to say who he is, and Flower's API is therefore closed."""
    options = handler.application.options  # type: ignore[attr-defined]
    return not (options.basic_auth or options.auth or os.environ.get(_OPEN_API, "").lower() in _TRUE)


def refuse_other_sites(handler: RequestHandler) -> None:
    """Raise an error with status 403 for a request that a page of another site has made."""
    headers = handler.request.headers
    site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin")
    if site != "same-origin" if site else origin and urlsplit(origin).netloc != handler.request.host:
        raise HTTPError(403, "Cross-site request forbidden")


def _cursor(text: str) -> tuple[datetime, str]:
    time, _, workflow_id = text.partition(" ")
    try:
        return datetime.fromisoformat(time), workflow_id
    except ValueError:
        raise ValueError(f"There is no such page: {text!r:.100}.") from None


def _decoded(values: Iterable[bytes], name: str) -> list[str]:
    try:
        return [value.decode() for value in values]
    except UnicodeDecodeError:
        raise ValueError(f"{name} isn't UTF-8.") from None


@cache
def _version(name: str) -> str:
    return blake2b((STATIC / name).read_bytes(), digest_size=6).hexdigest()


ROUTES = [
    url(r"/workflows", ListPage, name="durable-workflows"),
    url(r"/workflows/health", HealthPage, name="durable-health"),
    url(r"/workflows/static/(.*)", StaticFileHandler, {"path": str(STATIC)}, name="durable-static"),
    url(r"/workflow", WorkflowPage, name="durable-workflow"),
    url(r"/workflow/(cancel|resume|fork)", Steer, name="durable-steer"),
]
