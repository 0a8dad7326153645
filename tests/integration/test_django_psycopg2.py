"""psycopg2 as Django's driver, and psycopg 3 as ours, in one process."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.fixtures.workers import ROOT

#: Django takes psycopg 3 wherever it can be imported. Here it can't while Django chooses, and afterwards it can.
ON_PSYCOPG2 = """
import sys

sys.modules["psycopg"] = None
from django.db.backends.postgresql import base, psycopg_any

del sys.modules["psycopg"]
assert base.Database.__name__ == "psycopg2" and not psycopg_any.is_psycopg3

import pytest

sys.exit(pytest.main(sys.argv[1:]))
"""


def test_on_psycopg2(postgres_server: str) -> None:
    """Transactions and atomic steps are the same."""
    env = {**os.environ, "DATABASE_URL": postgres_server}
    modules = ["tests/integration/test_django.py", "tests/integration/test_foreign_atomic.py"]
    # Of the second module what is about aliases, and not about SQLAlchemy's engines.
    options = ["-q", "-n0", "-p", "no:cacheprovider", "-k", "test_django or alias"]
    command = [sys.executable, "-c", ON_PSYCOPG2, *options, *modules]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
