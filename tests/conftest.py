"""The fixtures live in `tests/fixtures/`, one noun a file."""

pytest_plugins = [
    "tests.fixtures.fix_bakery",
    "tests.fixtures.fix_broker",
    "tests.fixtures.fix_celery",
    "tests.fixtures.fix_browser",
    "tests.fixtures.fix_ledger",
    "tests.fixtures.fix_pgbouncer",
    "tests.fixtures.fix_postgres",
    "tests.fixtures.fix_django",
    "tests.fixtures.fix_proxy",
    "tests.fixtures.fix_replication",
    "tests.fixtures.fix_reports",
    "tests.fixtures.fix_rig",
    "tests.fixtures.fix_worker",
]
