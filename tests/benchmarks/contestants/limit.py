"""The limit: pgbench with nothing but one INSERT of a row like a checkpoint's in each transaction."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from celery_durable.testing.servers import _postgres_binaries
from tests.benchmarks.contestants.contestant import Contestant

_TABLE = """
CREATE TABLE IF NOT EXISTS row_of_a_step (
    workflow text, key text, seq integer, attempt integer, tries integer, ok boolean, value bytea, content_type text,
    args text, fingerprint bytea, started_at timestamptz, at timestamptz, PRIMARY KEY (workflow, key)
)
"""
_SCRIPT = r"""
\set number random(1, 1000000000)
INSERT INTO row_of_a_step
VALUES ('00000000-0000-0000-0000-00000000000' || :client_id, 'shop.charge#' || :number, :number, 1, 1, true, '1',
    'application/json', '[1]', '\x0123456789abcdef', clock_timestamp(), clock_timestamp());
"""
_RATE = re.compile(r"tps = ([\d.]+)")


class Limit(Contestant):
    """pgbench, with prepared statements."""

    name = "pgbench"
    emptying = "TRUNCATE row_of_a_step"

    def start(self) -> None:
        self.stage.execute(_TABLE, database=self.database)
        self._script = Path(self.stage.home, "insert.sql")
        self._script.write_text(_SCRIPT)

    def rate(self, transactions: int) -> float:
        """Transactions in a second, of all clients; each makes so many."""
        command = [str(_postgres_binaries(18) / "pgbench"), "--no-vacuum", "--protocol=prepared"]
        clients = [f"--client={self.concurrency}", f"--jobs={self.concurrency}", f"--transactions={transactions}"]
        script = [f"--file={self._script}", self.database]
        done = subprocess.run([*command, *clients, *script], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pgbench failed:\n{done.stderr}")
        return float(_RATE.search(done.stdout)[1])
