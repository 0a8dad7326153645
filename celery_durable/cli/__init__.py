"""``celery -A proj durable …``. Every celery command imports this: what a command needs, it imports when it runs."""

from __future__ import annotations

import click

from .looking import list_, show
from .operating import advise, health, migrate, prune, recover
from .steering import cancel, fork, resume, send


@click.group()
def durable() -> None:
    """Look at durable workflows, steer them, and keep them running."""


for command in (list_, show, cancel, resume, fork, send, recover, health, prune, migrate, advise):
    durable.add_command(command)
