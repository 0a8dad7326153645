"""What is checked of declared steps when a worker starts."""

from __future__ import annotations

import pytest
from celery import Celery

import celery_durable as durable
from celery_durable.exceptions import ConfigurationError
from celery_durable.installation import installed_on
from celery_durable.task import check_serializers


@pytest.fixture
def app() -> Celery:
    app = Celery("shop", broker="memory://", set_as_current=False)
    durable.install(app, database_url="postgresql://user@host/database")
    return app


def fetch(url: str = "") -> str:
    return url


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"serializer": "protobuf"}, "protobuf"),
        ({"serializer": "pickle"}, "accept_content"),
        ({"compression": "brotli"}, "brotli"),
    ],
    ids=repr,
)
def test_a_serializer_that_cannot_be_used_is_told_when_the_worker_starts(
    app: Celery, options: dict[str, str], told: str
) -> None:
    """Not when the first order has been charged; libraries may register theirs until then."""
    app.task(base=durable.Step, shared=False, name="charge", **options)(fetch)
    with pytest.raises(ConfigurationError, match=f"The step charge can't keep its results: .*{told}"):
        check_serializers(installed_on(app))


def test_serializers_that_can_be_used(app: Celery) -> None:
    """No error without a reason."""
    app.conf.accept_content = ["json", "yaml"]
    for number, options in enumerate([{}, {"serializer": "yaml"}, {"compression": "gzip"}]):
        app.task(base=durable.Step, shared=False, name=f"step{number}", **options)(fetch)
    check_serializers(installed_on(app))
