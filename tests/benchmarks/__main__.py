"""Measure in turns, and print what came out: ``python -m tests.benchmarks --help``."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
from contextlib import closing
from pathlib import Path

from tests.benchmarks.costs import costs
from tests.benchmarks.crew import Crew, absent
from tests.benchmarks.machine import machine, packages
from tests.benchmarks.measures import MEASURES
from tests.benchmarks.measuring import Figures, take_turns
from tests.benchmarks.report import as_json, report, table
from tests.benchmarks.stage import Stage, opened


def main() -> None:
    """Measure what the command line asks for."""
    signal.signal(signal.SIGTERM, _end_all)
    options = _options()
    figures = Figures()
    for contestant, modules in absent().items():
        _tell(f"{contestant} is left out, as this isn't installed: {modules}")
    with opened(options.quick) as stage:
        facts = machine(stage)
        _measure(stage, options, figures)
    print(report(figures, facts))
    if options.costs:
        print("\n" + table(("operation", "statements", "round trips", "bytes of WAL"), costs()))
    if options.json:
        options.json.write_text(json.dumps(as_json(figures, facts, packages(), options.rounds), indent=2))


def _measure(stage: Stage, options: argparse.Namespace, figures: Figures) -> None:
    with closing(Crew(stage)) as crew:
        for measure in MEASURES:
            if not options.only or measure.name in options.only:
                began = time.monotonic()
                take_turns(measure, stage, crew, options.rounds, figures)
                _tell(f"{measure.name}: {measure.says} ({time.monotonic() - began:.0f} s)")


def _end_all(*_: object) -> None:
    """End workers and servers, too, as a Ctrl-C does; a second signal doesn't disturb that."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit("The benchmark was stopped.")


def _tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _options() -> argparse.Namespace:
    names = [measure.name for measure in MEASURES]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description="Measure in turns.")
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count (5)")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, help=f"some of: {', '.join(names)}")
    parser.add_argument("--quick", action="store_true", help="small counts, to see that it runs")
    parser.add_argument("--costs", action="store_true", help="statements and bytes of each operation, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all values there")
    return parser.parse_args()


if __name__ == "__main__":
    main()
