"""What a module costs that declares one workflow, in a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from statistics import median

from tests.benchmarks.contestants import Durable, Plain
from tests.benchmarks.crew import Crew
from tests.benchmarks.measuring import Measure, Turn, Turns
from tests.benchmarks.stage import Stage

FIGURE = "import of a module with one task"
_PLAIN = """
import time
began = time.process_time()
from celery import Celery
app = Celery("shop", broker="memory://")
@app.task
def fulfil(): pass
app.finalize()
print(time.process_time() - began)
"""
_DURABLE = """
import time
began = time.process_time()
from celery import Celery
import celery_durable as durable
app = Celery("shop", broker="memory://")
durable.install(app, database_url="postgresql://localhost/shop")
@app.task(base=durable.Workflow)
def fulfil(): pass
app.finalize()
print(time.process_time() - began)
"""
CODE = {Durable.name: _DURABLE, Plain.name: _PLAIN}


def _turns(stage: Stage, crew: Crew) -> Turns:
    crew.call(1)
    return {name: Turn(partial(_run, stage.size(5, 1), code)) for name, code in CODE.items()}


def _run(times: int, code: str) -> dict[str, float]:
    return {FIGURE: 1_000 * median(_imported(code) for _ in range(times))}


def _imported(code: str) -> float:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


IMPORTS = Measure(
    "imports", "processor time of a fresh interpreter, files in the system's cache", {FIGURE: "ms"}, _turns
)
