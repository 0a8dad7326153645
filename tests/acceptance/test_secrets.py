"""What a running worker, and Celery's own commands, say at their loudest."""

from __future__ import annotations

from urllib.parse import urlsplit

import pytest

from tests.fixtures.brokers import Broker
from tests.fixtures.fix_wait import wait_until
from tests.fixtures.ledger import Ledger
from tests.fixtures.site import Site, shop_env

SECRET = "hush-7f3Kq9"


def with_password(url: str, user: str) -> str:
    """A URL with a password, which a server that trusts everybody doesn't look at."""
    parts = urlsplit(url)
    return parts._replace(netloc=f"{user}:{SECRET}@{parts.netloc.rpartition('@')[2]}").geturl()


@pytest.fixture
def worker_env(database_url: str, broker: Broker, ledger: Ledger) -> dict[str, str]:
    """The shop with passwords in all of its URLs."""
    broker_url = with_password(broker.url, "default") if broker.url.startswith("redis") else broker.url
    env = shop_env(with_password(database_url, "postgres"), broker_url, broker.queue, ledger)
    return {
        **env,
        "CELERY_SETTINGS": f'{{"durable_database_url": "{env["DATABASE_URL"]}", "some_api_key": "{SECRET}"}}',
    }


def test_a_worker_tells_no_password(site: Site) -> None:
    """Neither while all goes well, nor while the database fails it, nor when it is asked for its settings."""
    worker = site.workers.start(args=("--events", "--loglevel=DEBUG"))
    shop = site.shop
    assert site.finished(shop.order.delay("a").id).result == [0, 10, 20]
    assert site.finished(shop.refused.delay("a").id).state == "FAILURE"
    assert site.finished(shop.flaky_order.delay("a", 1).id).state == "SUCCESS"
    asked = shop.app.control.inspect(timeout=5, limit=1)
    answers = {
        "conf": repr(asked.conf(with_defaults=True)),
        "stats": repr(asked.stats()),
        "report": repr(asked.report()),
    }
    assert "durable_database_url" in answers["conf"]
    assert "durable_database_url" in answers["report"]
    site.sql.execute("ALTER TABLE celery_durable.checkpoint RENAME TO gone")
    site.sql.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE pid <> pg_backend_pid() AND datname = current_database()"
    )
    lost = shop.order.delay("b")
    wait_until(lambda: "UndefinedTable" in worker.log, message="a statement fails for good")
    site.sql.execute("ALTER TABLE celery_durable.gone RENAME TO checkpoint")
    assert site.finished(lost.id).state == "SUCCESS"
    worker.stop()
    worker.wait_exit()
    assert "DEBUG" in worker.log
    for what, text in {**answers, "bugreport": shop.app.bugreport(), "log": worker.log}.items():
        assert SECRET not in text, what
