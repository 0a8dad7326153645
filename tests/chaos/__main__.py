"""`python -m tests.chaos`: one run on each broker that there is. Exit status 1 if a promise was broken."""

from __future__ import annotations

import argparse
import collections
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

from tests.chaos import evidence
from tests.chaos.checker import findings
from tests.chaos.ledger import now, read
from tests.chaos.nemesis import Nemesis
from tests.chaos.stage import Stage, stage
from tests.fixtures import rabbit

#: Seconds until everything has ended after the last fault: what was sent in vain several times is sent again with
#: doubling distance.
SETTLING = 90
SHOWN = 20


def main() -> int:
    options = _options()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1_000_000)
    brokers = options.broker or ["redis", *(["rabbitmq"] if rabbit.is_installed() else [])]
    broken = 0
    for broker in brokers:
        broken += run(broker, seed, options.duration / len(brokers), options.workflows)
    return 1 if broken else 0


def run(broker: str, seed: int, duration: float, workflows: int) -> int:
    """One run; the number of broken promises."""
    home = Path(tempfile.mkdtemp(prefix="celery-durable-chaos-"))
    began = now()

    def say(text: str) -> None:
        print(f"{now() - began:7.1f} s  {text}", flush=True)

    print(f"Chaos on {broker}: SEED={seed}, {duration:g} s", flush=True)
    with stage(home, seed, broker) as made:
        found = _rage(made, seed, duration, workflows, say)
    for each in found[:SHOWN]:
        print(f"BROKEN: {each}")
    if found:
        print(f"{len(found)} promises broken. Again: make chaos SEED={seed} BROKER={broker}; logs in {home}")
    else:
        shutil.rmtree(home, ignore_errors=True)
        print("Every promise was kept.")
    return len(found)


def _rage(made: Stage, seed: int, duration: float, workflows: int, say) -> list[str]:  # type: ignore[no-untyped-def]
    # The app reads its surroundings when it is imported.
    for name in [name for name in sys.modules if name == "tests.chaos.app"]:
        del sys.modules[name]
    from tests.chaos.app import app
    from tests.chaos.load import Load

    load, nemesis = Load(made, app, seed, workflows), Nemesis(made, seed, say)
    nemesis.calm()
    load.begin()
    nemesis.rage(duration)
    load.end()
    say("the last fault is healed")
    nemesis.calm()
    settled = _settle(made)
    say("all has ended" if settled else "not all has ended")
    if not settled:
        print(*evidence.unfinished(made)[:10], sep="\n", flush=True)
    nemesis.stop()
    proof = evidence.collect(made, load, nemesis)
    found = [*load.errors, *nemesis.findings, *evidence.left_behind(made), *findings(proof)]
    found += _close(made)
    _report(proof, nemesis, say)
    return found


def _settle(made: Stage) -> bool:
    give_up_at = now() + SETTLING
    while now() < give_up_at:
        if not evidence.unfinished(made):
            return True
        time.sleep(0.2)
    return False


def _close(made: Stage) -> list[str]:
    """Stop all workers warm, and see what they leave open."""
    made.close()
    workers = [post.worker for post in made.posts if post.worker is not None and post.worker.running]
    for worker in workers:
        worker.stop("warm")
    for worker in workers:
        worker.wait_exit(60)
    for beat in made.beats:
        if beat is not None:
            beat.kill()
    return list(evidence.left_open(made, evidence.own_backends(made), [worker.hostname for worker in workers]))


def _report(proof, nemesis: Nemesis, say) -> None:  # type: ignore[no-untyped-def]
    states = collections.Counter(row.state for row in proof.rows.values())
    faults = collections.Counter(fault.name for fault in nemesis.journal)
    bodies = collections.Counter(entry.what for entry in proof.entries)
    say(f"workflows: {dict(states)}, started by users: {len(proof.started)}")
    say(f"bodies: {bodies['begin']}, failed as they should: {bodies['fail']}, rescues: {bodies['rescue']}")
    say(f"faults: {sum(faults.values())}: " + ", ".join(f"{count} × {name}" for name, count in faults.most_common()))
    if nemesis.calms:
        say(f"{len(nemesis.calms)} calms, nothing overdue after {statistics.median(nemesis.calms):.1f} s (median)")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="the same faults in the same order as another run")
    parser.add_argument("--duration", type=float, default=120, help="seconds of faults, shared by the brokers (120)")
    parser.add_argument("--workflows", type=int, default=10_000, help="at most so many are started on each (10,000)")
    parser.add_argument("--broker", action="append", choices=["redis", "rabbitmq"], help="only this one")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
