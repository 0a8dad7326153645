"""The limit: pgbench with nothing but one INSERT of a row like a checkpoint's in each transaction."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from celery_durable.testing.servers import _postgres_binaries
from tests.benchmarks.stage import Stage

_TABLE = """
CREATE TABLE IF NOT EXISTS row_of_a_step (
    workflow text, key text, seq integer, attempt integer, tries integer, ok boolean, value bytea, content_type text,
    args text, fingerprint bytea, started_at timestamptz, at timestamptz, PRIMARY KEY (workflow, key)
)
"""
_SCRIPT = """
\\set number random(1, 1000000000)
INSERT INTO row_of_a_step VALUES ('00000000-0000-0000-0000-00000000000' || :client_id, 'step#' || :number, :number, 1, 1,
    true, '1', 'application/json', '[1]', '\\x0123456789abcdef', clock_timestamp(), clock_timestamp());
"""
_RATE = re.compile(r"tps = ([\d.]+)")


class Limit:
    """pgbench, with prepared statements."""

    name = "pgbench"
    needs: tuple[str, ...] = ()

    def __init__(self, stage: Stage, concurrency: int) -> None:
        self.stage, self.database, self._clients = stage, stage.database(self.name), concurrency

    def __enter__(self) -> Limit:
        self.stage.execute(_TABLE, self.database)
        self._script = Path(self.stage.home, "insert.sql")
        self._script.write_text(_SCRIPT)
        return self

    def __exit__(self, *exc_info: object) -> None:
        """Nothing of it is left running."""

    def empty(self) -> None:
        """Forget all rows."""
        self.stage.execute("TRUNCATE row_of_a_step", self.database)

    def rate(self, transactions: int) -> float:
        """Transactions in a second, of all clients; each makes so many."""
        command = [
            str(_postgres_binaries(18) / "pgbench"),
            "--no-vacuum",
            "--protocol=prepared",
            f"--file={self._script}",
        ]
        clients = [f"--client={self._clients}", f"--jobs={self._clients}", f"--transactions={transactions}"]
        done = subprocess.run([*command, *clients, self.database], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"pgbench failed:\n{done.stderr}")
        return float(_RATE.search(done.stdout)[1])
