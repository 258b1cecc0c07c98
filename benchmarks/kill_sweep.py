"""Kill the worker of a sweep right before operations on files, start others in its place, and show that none is lost.

    python benchmarks/kill_sweep.py --kills 20

After some kills a worker is left alone. The study must then have as many finished trials as were asked for, none that
waits or runs for good, the values of the trials' own runs, and a dense run as that of a study that nobody disturbed.
"""

import argparse
import json
import os
import random
import sqlite3
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so that importing starts no threads, and forking is safe

import optuna
from kill_resume import BASE, WEIGHTS, Killer

from msvit.studies import sweep
from msvit.training import runs

RECIPE = BASE.replace(epochs_dense=1, epochs=1, holdout=0.25, gate_start="none", calibrate=False)
TRIALS = 2


def start(folder: Path, moment: int = 0) -> int:
    """Let a worker do its part in a process of its own, which ends before its n-th file operation; return its status.

    An hour has gone by since the last one ended: a dead worker is known by its heartbeat.
    """
    if pid := os.fork():
        return os.waitpid(pid, 0)[1]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    optuna.logging.disable_default_handler()
    with sqlite3.connect(folder / "study.db") as base:
        if base.execute("select 1 from sqlite_master where name = 'trial_heartbeats'").fetchone():
            base.execute("update trial_heartbeats set heartbeat = '2020-01-01 00:00:00'")
    if moment:
        Killer(folder, moment)
    try:
        study = sweep.open_study("s", str(folder / "study.db"), "none")
        sweep.sweep(study, RECIPE, folder / "runs", TRIALS, message=lambda line: None)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)
    os._exit(0)


def dense_weights(folder: Path) -> bytes:
    """Return the weights of the dense run that all trials start from."""
    (made,) = {path.parent for path in (folder / "runs").glob("*_dense_*/summary.json")}
    return (made / WEIGHTS[0]).read_bytes()


def faults(folder: Path, expected: bytes) -> list[str]:
    """Return what a study that was continued to its end has wrong."""
    study = sweep.open_study("s", str(folder / "study.db"), "none")
    trials, found = study.get_trials(), []
    complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
    if len(complete) != TRIALS:
        found.append(f"{len(complete)} trials are complete")
    found += [f"trial {t.number} is {t.state.name.lower()} for good" for t in trials if not t.state.is_finished()]
    for trial in complete:
        summary = runs.read_finished(folder / "runs" / f"s-{trial.number:04d}").summary
        if trial.value != summary["accuracy"] - 0.1 * summary["macs"]:
            found.append(f"trial {trial.number} has another value than its run")
    return found + (["the dense run differs"] if dense_weights(folder) != expected else [])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator, bad, left = random.Random(arguments.seed), 0, arguments.kills
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        whole.mkdir()
        if start(whole):
            raise SystemExit("the undisturbed sweep failed")
        while left:
            folder, count = Path(scratch) / f"killed{left}", min(left, generator.randint(1, 3))
            folder.mkdir()
            left -= count
            moments = [generator.randint(1, 90) for _ in range(count)]
            for moment in moments:
                start(folder, moment)
            wrong = faults(folder, dense_weights(whole)) if not start(folder) else ["the sweep could not go on"]
            bad += bool(wrong)
            print(f"killed after operations {moments}: {'; '.join(wrong) or 'the same'}", flush=True)
    print(json.dumps({"kills": arguments.kills, "runs_that_differ": bad}))
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
