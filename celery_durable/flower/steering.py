"""What the buttons ask for, and who may press them.

As with Flower's own buttons: nobody without authentication unless FLOWER_UNAUTHENTICATED_API is set, nobody with
``--read-only``, and no page of another site.
"""

from __future__ import annotations

import logging
import os
from base64 import b64decode
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlencode, urlsplit

from flower.api import BaseApiHandler
from tornado.web import HTTPError, RequestHandler, authenticated

from .. import management
from ..exceptions import DurableError
from .answers import in_thread, last_said, status_of

logger = logging.getLogger("celery_durable")

_OPEN_API = "FLOWER_UNAUTHENTICATED_API"
_TRUE = {"y", "yes", "t", "true", "on", "1"}


@dataclass(frozen=True, slots=True)
class Steering:
    """Whether a page has buttons, and why they can't be pressed."""

    is_shown: bool
    reason: str = ""

    @property
    def disabled(self) -> str:
        """The attribute of a button."""
        return "disabled" if self.reason else ""


class Steer(BaseApiHandler):
    """Does what a button asks for."""

    def prepare(self) -> None:
        """Refuse what another site has sent, also where Flower itself is open to all."""
        refuse_other_sites(self)
        super().prepare()

    @authenticated
    async def post(self, action: str) -> None:
        """Do it, and say what has been done."""
        if is_read_only(self):
            raise HTTPError(403, "Read only mode is enabled")
        try:
            workflow_id = self.said("id") or ""
            logger.info("%s asks in Flower: %s workflow %.300r", self.who(), action, workflow_id)
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
        """Return an argument of the body."""
        return last_said(self.request.body_arguments, name)

    def who(self) -> str:
        """Return who asks: who has signed in, or else from which address."""
        if isinstance(self.current_user, str):
            return self.current_user
        if self.application.options.basic_auth:
            credentials = self.request.headers["Authorization"].split()[1]
            return b64decode(credentials).decode().partition(":")[0]
        return f"somebody at {self.request.remote_ip}"


def steering_of(handler: RequestHandler) -> Steering:
    """Tell what the buttons are for whoever looks."""
    if is_read_only(handler):
        return Steering(is_shown=False)
    if is_closed(handler):
        return Steering(
            is_shown=True,
            reason="Flower lets nobody act who isn't authenticated: start it with --basic_auth=user:password or "
            f"--auth, or set {_OPEN_API}=true where only you can reach it.",
        )
    return Steering(is_shown=True)


def is_read_only(handler: RequestHandler) -> bool:
    """Tell whether Flower was started with --read-only, which one before 2.2 doesn't have."""
    return bool(getattr(handler.application.options, "read_only", False))  # type: ignore[attr-defined]


def is_closed(handler: RequestHandler) -> bool:
    """Tell whether Flower's API is closed, because nobody has to say who he is."""
    options = handler.application.options  # type: ignore[attr-defined]
    return not (options.basic_auth or options.auth or os.environ.get(_OPEN_API, "").lower() in _TRUE)


def refuse_other_sites(handler: RequestHandler) -> None:
    """Raise an error with status 403 for a request that a page of another site has made."""
    headers = handler.request.headers
    site, origin = headers.get("Sec-Fetch-Site"), headers.get("Origin")
    is_foreign = site != "same-origin" if site else origin and urlsplit(origin).netloc != handler.request.host
    if is_foreign:
        raise HTTPError(403, "Cross-site request forbidden")
