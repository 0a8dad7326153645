"""Measure in turns, and print what came out: ``python -m tests.benchmarks --help``."""

from __future__ import annotations

import argparse
import signal
import sys

from tests.benchmarks.contestants import missing
from tests.benchmarks.measures import MEASURES
from tests.benchmarks.measuring import Figures, take_turns
from tests.benchmarks.report import report
from tests.benchmarks.stage import opened


def main() -> None:
    options = _options()
    figures = Figures()
    # A SIGTERM ends the workers and servers, too, as a Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    for contestant, packages in missing().items():
        print(f"{contestant} is left out, as it isn't installed: {packages}", file=sys.stderr)
    with opened(options.quick) as stage:
        for measure in MEASURES:
            if not options.only or measure.name in options.only:
                print(f"{measure.name}: {measure.says}", file=sys.stderr)
                take_turns(measure, stage, options.rounds, figures)
    print(report(figures))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", choices=[measure.name for measure in MEASURES])
    parser.add_argument("--quick", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
