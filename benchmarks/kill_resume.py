"""Kill training at random moments, continue it, and show that nothing is lost.

    python benchmarks/kill_resume.py --kills 20

One run is left alone. Others of the same recipe are killed (SIGKILL) at random moments, a few times each, and
continued. Every one must end with bitwise the same weights, metrics and summary, and no epoch that was recorded may
vanish on the way; the exit code is 1 otherwise. Takes about two seconds a kill on one core.
"""

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so that importing starts no threads, and forking is safe

from msvit.training import runs
from msvit.training.loop import train
from msvit.training.recipe import Recipe

RECIPE = Recipe(
    train_n=64, val_n=32, batch=16, epochs_dense=2, epochs=3, ema=0.9, mixup=0.2, drop_path=0.1, distill=0.5,
    device="cpu", calibrate=True,
)  # fmt: skip
TIMED = (*runs.TIMINGS, "seconds")
WEIGHTS = ("model.safetensors", "dense/model.safetensors")


def start(folder: Path) -> int:
    """Return the id of a child process that trains; forked, since importing takes longer than the run."""
    if pid := os.fork():
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    try:
        train(RECIPE, folder, progress=False)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        os._exit(1)
    os._exit(0)


def result(folder: Path) -> dict:
    """Return all that must not depend on what happened on the way."""
    run = runs.read(folder)
    lines = [{k: v for k, v in line.items() if k not in TIMED} for line in run.metrics]
    summary = {k: v for k, v in run.summary.items() if k not in TIMED}
    return {"metrics": lines, "summary": summary} | {name: (folder / name).read_bytes() for name in WEIGHTS}


def recorded(folder: Path) -> int:
    """Return how many whole lines of metrics there are: the epochs that a user has seen finished."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def disturbed(folder: Path, kills: int, seconds: float, generator: random.Random) -> list[str]:
    """Train with so many kills, and return when each came and how many epochs were on record."""
    story, before = [], 0
    for _ in range(kills):
        pid, moment = start(folder), generator.uniform(0, seconds)
        time.sleep(moment)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        after = recorded(folder)
        if after < before:
            raise SystemExit(f"{folder}: {before} epochs were recorded, after a kill {after}")
        before = after
        story.append(f"{moment:.2f}s:{after}")
    _, status = os.waitpid(start(folder), 0)
    if status:
        raise SystemExit(f"{folder}: the run could not be continued after {story}")
    return story


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    generator, left, bad = random.Random(arguments.seed), arguments.kills, 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        begun = time.perf_counter()
        _, status = os.waitpid(start(whole), 0)
        seconds = time.perf_counter() - begun
        if status:
            raise SystemExit("the undisturbed run failed")
        expected = result(whole)
        print(f"undisturbed: {recorded(whole)} epochs in {seconds:.1f} s")
        while left:
            kills = min(left, generator.randint(1, 4))
            left -= kills
            folder = Path(scratch) / f"killed{left}"
            story = disturbed(folder, kills, seconds, generator)
            found = result(folder)
            differ = [name for name in expected if found[name] != expected[name]]
            bad += bool(differ)
            print(
                f"killed after {', '.join(story)} epochs: {'differs in ' + ', '.join(differ) if differ else 'the same'}"
            )
    print(json.dumps({"kills": arguments.kills, "runs_that_differ": bad}))
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
