"""The pages of the tab: thin, over what Flower's own handlers do for its pages, which also decide who may look."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from datetime import datetime, timezone, tzinfo
from functools import cache, partial
from hashlib import blake2b
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from flower.views import BaseHandler
from tornado.web import StaticFileHandler, authenticated, url

from .. import states
from ..client import WorkflowStatus
from ..exceptions import DurableError
from ..health import Health
from . import shown
from .answers import in_thread, last_said, said, status_of
from .parts import Links
from .reads import MOST_COUNTED, Filters, Listing, Seen, read_health, read_list, read_workflow
from .steering import Steer, steering_of
from .story import Story

STATIC = Path(__file__).with_name("static")
#: Nothing of another site, no script in a page, and no frame of another site around it.
_POLICY = "default-src 'self'; img-src 'self' data:; style-src 'self' 'unsafe-inline'; frame-ancestors 'self'"
#: Pages that "newer" leads back through, one by one.
_MOST_TRAIL = 20
_STATES = (
    states.ENQUEUED, states.RUNNING, states.SUSPENDED, states.SUCCESS, states.FAILURE, states.CANCELLED, states.DEAD,
)  # fmt: skip


class _Page(BaseHandler):
    """A page, and its content alone for those that have it open."""

    page = ""
    heading = ""

    def set_default_headers(self) -> None:
        """Add to Flower's headers what our pages bear."""
        super().set_default_headers()
        self.set_header("Content-Security-Policy", _POLICY)

    @authenticated
    async def get(self) -> None:
        """Answer with the page, or with what has changed of it."""
        try:
            self.answer(await in_thread(partial(self.read, self.capp)))
        except (DurableError, ValueError) as error:
            self.answer_trouble(error)

    def read(self, app: Any) -> Any:
        """Return what the page is about; runs in a thread."""
        raise NotImplementedError

    def answer(self, found: Any) -> None:
        """Answer with what was read."""
        raise NotImplementedError

    def answer_live(self, *, over: bool, **facts: Any) -> None:
        """Answer with a page that follows what happens; over: nothing will any more."""
        content = self.render_string(self.page.replace(".", "_content."), **facts, **self.helpers()).decode()
        version = blake2b(content.encode(), digest_size=12).hexdigest()
        if not self.is_open:
            self.render(self.page, content=content, version=version, over=over, **facts, **self.helpers())
            return
        has_changed = self.said("shown") != version
        self.write({"version": version, "over": over, "content": content if has_changed else None})

    def answer_trouble(self, error: Exception) -> None:
        """Say why there is no page."""
        self.set_status(status_of(error))
        if self.is_open:
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

    @property
    def is_open(self) -> bool:
        """Whether somebody has the page open, and asks what is new."""
        return "shown" in self.request.query_arguments

    def said(self, name: str) -> str | None:
        """Return an argument of the query."""
        return last_said(self.request.query_arguments, name)


class ListPage(_Page):
    """Workflows, the newest first."""

    heading = "The workflows can't be listed."

    def read(self, app: Any) -> Listing:
        """Return a page of the list."""
        trail = self.trail
        return read_list(app, self.filters(), _place_of(trail[-1]) if trail else None)

    def answer(self, found: Listing) -> None:
        """Show the list."""
        self.render(
            "durable_list.html",
            workflows=found.workflows,
            names=found.names,
            counts=list(_counted(found.counts)),
            typed=self.typed,
            is_filtered=bool(self.filters().given()),
            trail=self.trail,
            older=None if found.older is None else _place(found.older),
            here_with=self.here_with,
            **{**self.helpers(), "here": "list"},
        )

    @property
    def typed(self) -> dict[str, str]:
        """The filters as they were typed."""
        return {name: self.said(name) or "" for name in Filters.__slots__}

    @property
    def trail(self) -> list[str]:
        """After which workflow this page begins, and those that were looked at before it."""
        return said(self.request.query_arguments, "after")

    def filters(self) -> Filters:
        """Return what the list is asked for; raise ValueError."""
        given: dict[str, Any] = {name: text for name, text in self.typed.items() if text}
        for name in given.keys() & {"created_after", "created_before"}:
            given[name] = self.time(name, given[name])
        return Filters(**given)

    def time(self, name: str, text: str) -> datetime:
        """Return a point in time; without a zone it is in the app's."""
        try:
            found = datetime.fromisoformat(text)
        except ValueError:
            raise ValueError(f"{name} must be a time such as 2026-11-28T09:30, not {text!r:.100}.") from None
        return found if found.tzinfo else found.replace(tzinfo=self.zone)

    def here_with(self, after: Iterable[str] = (), **changed: Any) -> str:
        """Return the URL of this list with something else in its filters, or of another page of it."""
        return self.list_url(**{**self.typed, **changed}, after=list(after)[-_MOST_TRAIL:])


class WorkflowPage(_Page):
    """One workflow."""

    page = "durable_workflow.html"
    heading = "This workflow can't be shown."

    def read(self, app: Any) -> Seen:
        """Return all of the workflow."""
        return read_workflow(app, self.said("id") or "", self.opened)

    def answer(self, found: Seen) -> None:
        """Show the workflow."""
        links = Links(self.workflow_url, self.unfolded, self.task_url, self.worker_url, self.list_url)
        story = Story(found, self.opened, links, self.zone)
        self.answer_live(story=story, steering=steering_of(self), over=not story.is_live)

    @property
    def opened(self) -> set[str]:
        """The children whose steps are shown, too."""
        return set(said(self.request.query_arguments, "open"))

    def unfolded(self, opened: Collection[str]) -> str:
        """Return the URL of this page with the steps of other children."""
        return self.workflow_url(self.said("id") or "", open=sorted(opened))


class HealthPage(_Page):
    """Nodes, recovery and database."""

    page = "durable_health.html"
    heading = "The workflows' database can't be asked."

    def read(self, app: Any) -> Health:
        """Return the health."""
        return read_health(app)

    def answer(self, found: Health) -> None:
        """Show it."""
        self.answer_live(health=found, over=False)

    def helpers(self) -> dict[str, Any]:
        """Say where this is."""
        return {**super().helpers(), "here": "health"}


def _counted(counts: Mapping[str, int] | None) -> Iterator[tuple[str, str]]:
    """Return how many there are of all states (the empty name), and of each."""
    if counts is None:
        yield from ((state, "") for state in ("", *_STATES))
        return
    found = {state: counts.get(state, 0) for state in _STATES}
    total = sum(found.values())
    # Where a state wasn't counted to its end, neither is the sum.
    yield "", shown.number(total, total if max(found.values()) >= MOST_COUNTED else total + 1)
    yield from ((state, shown.number(count, MOST_COUNTED)) for state, count in found.items())


def _place(workflow: WorkflowStatus) -> str:
    """Return a workflow's place in the list, as a page's address has it."""
    return f"{workflow.created_at.isoformat()} {workflow.id}"


def _place_of(text: str) -> tuple[datetime, str]:
    time, _, workflow_id = text.partition(" ")
    try:
        return datetime.fromisoformat(time), workflow_id
    except ValueError:
        raise ValueError(f"There is no such page: {text!r:.100}.") from None


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
