"""`python -m tests.chaos`: a run on each broker that there is. Exit status 1 if a promise was broken."""

from __future__ import annotations

import argparse
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.chaos import evidence
from tests.chaos.checker import Evidence, findings, recoveries
from tests.chaos.ledger import now
from tests.chaos.nemesis import Nemesis
from tests.chaos.stage import Stage, stage
from tests.fixtures import rabbit

#: Seconds until all has ended after the last fault. A message that was lost several times is sent again with doubling
#: distance.
SETTLING = 120
#: Seconds that a worker may need for a warm shutdown.
PATIENCE = 30
SHOWN = 20


def main() -> int:
    options = _options()
    seed = random.SystemRandom().randrange(1_000_000) if options.seed is None else options.seed
    brokers = options.broker or ["redis", *(["rabbitmq"] if rabbit.is_installed() else [])]
    runs = [run(broker, seed, options.duration / len(brokers), options.workflows) for broker in brokers]
    return 0 if all(runs) else 1


def run(broker: str, seed: int, duration: float, workflows: int) -> bool:
    """One run; whether every promise was kept."""
    home, began = Path(tempfile.mkdtemp(prefix="celery-durable-chaos-")), now()

    def say(text: str) -> None:
        print(f"{now() - began:7.1f} s  {text}", flush=True)

    print(f"Chaos on {broker}, SEED={seed}, {duration:g} s of faults", flush=True)
    with stage(home, seed, broker) as made:
        broken = list(_rage(made, seed, duration, workflows, say))
    for each in broken[:SHOWN]:
        print(f"BROKEN: {each}")
    if broken:
        again = f"python -m tests.chaos --seed={seed} --broker={broker} --duration={duration:g}"
        print(f"{len(broken)} promises were broken. The same faults again: {again}. Logs: {home}")
        return False
    shutil.rmtree(home, ignore_errors=True)
    print("Every promise was kept.", flush=True)
    return True


def _rage(made: Stage, seed: int, duration: float, workflows: int, say: Callable[[str], None]) -> Iterator[str]:
    # The app reads the stage's surroundings when it is imported; each run has its own.
    sys.modules.pop("tests.chaos.app", None)
    from tests.chaos.app import app
    from tests.chaos.load import Load

    load, nemesis = Load(made, app, seed, workflows), Nemesis(made, seed, say)
    nemesis.begin()
    load.begin()
    nemesis.rage(duration)
    load.end()
    say("the last fault is healed")
    nemesis.calm()
    _settle(made)
    say(f"all has ended but {len(evidence.unfinished(made))}")
    nemesis.stop()
    proof = evidence.collect(made, load, nemesis)
    _report(proof, nemesis, say)
    yield from [*load.errors, *nemesis.findings, *evidence.left_behind(made), *findings(proof)]
    yield from _leaks(made)
    yield from made.complaints


def _settle(made: Stage) -> None:
    give_up_at = now() + SETTLING
    while evidence.unfinished(made) and now() < give_up_at:
        time.sleep(0.2)


def _leaks(made: Stage) -> list[str]:
    """Stop all workers warm, and see what they leave open."""
    made.close()
    workers = [post.worker for post in made.posts if post.worker is not None and post.worker.running]
    for worker in workers:
        worker.stop("warm")
    signed_off = [worker.hostname for worker in workers if made.ends(worker, PATIENCE)]
    for beat in made.beats:
        if beat is not None:
            beat.kill()
    return list(evidence.left_open(made, evidence.own_backends(made), signed_off))


def _report(proof: Evidence, nemesis: Nemesis, say: Callable[[str], None]) -> None:
    states = Counter(row.state for row in proof.rows.values())
    what = Counter(entry.what for entry in proof.entries)
    faults = Counter(fault.name for fault in nemesis.journal)
    say(f"{len(proof.rows)} workflows, {len(proof.started)} of them started by users: {_counted(states)}")
    say(f"{what['begin']} bodies, {what['fail']} of them failed as they should; {what['rescue']} rescues")
    say(f"{len(nemesis.journal)} faults: {_counted(faults)}")
    say(f"{len(nemesis.calms)} calms: nothing was overdue {max(nemesis.calms):.1f} s after all workers were up")
    if seconds := [seconds for _, seconds in recoveries(proof)]:
        say(f"after an undisturbed kill a workflow was enqueued again in {statistics.median(seconds):.1f} s (median)")


def _counted(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counter.most_common())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument("--seed", type=int, help="the same faults in the same order as another run")
    parser.add_argument("--duration", type=float, default=120, help="seconds of faults, shared by the brokers (120)")
    parser.add_argument("--workflows", type=int, default=10_000, help="at most so many are started on each (10,000)")
    parser.add_argument("--broker", action="append", choices=["redis", "rabbitmq"], help="only this one")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
