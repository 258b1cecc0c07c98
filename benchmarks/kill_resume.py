"""Kill training at random moments or at file operations, continue it, and show that nothing is lost.

    python benchmarks/kill_resume.py --kills 20
    python benchmarks/kill_resume.py --kills 200 --where operations --recipes all --processes 2

One run of a recipe is left alone. Others of the same recipe are killed (SIGKILL) a few times each and continued: at
random moments, or right before the n-th operation on a file of the run's folder, a write being cut in half. On the same
number of threads, every one must end with bitwise the same weights, metrics and summary, and no epoch that was recorded
may vanish on the way; the exit code is 1 otherwise. Takes about two seconds a kill on one core.
"""

import argparse
import builtins
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # so that importing starts no threads, and forking is safe

from msvit.training import runs
from msvit.training.loop import train
from msvit.training.recipe import Recipe

BASE = Recipe(train_n=64, val_n=32, batch=16, epochs_dense=2, epochs=3, device="cpu", calibrate=True)
RECIPES = {
    "all at once": BASE.replace(ema=0.9, mixup=0.2, drop_path=0.1, distill=0.5),
    "plain": BASE.replace(epochs_dense=1, epochs=1),
    "dense": BASE.replace(epochs=0),
    "oracle": BASE.replace(epochs_dense=1, epochs=1, gating="oracle"),
    "quadtree": BASE.replace(epochs_dense=1, epochs=1, scales=[1, 2, 4], gate_start="detail"),
    "gate alone": BASE.replace(epochs_dense=0, gate_start="detail", loss="l0", control="bias"),
    "quota": BASE.replace(epochs_dense=1, epochs=2, gating="quota"),
    "pattern": BASE.replace(epochs_dense=1, epochs=2, gating="pattern", optimizer="sgd"),
    "reducer": BASE.replace(epochs_dense=0, gating="fine", reducer="dynamicvit", freeze=1),
    "merging": BASE.replace(epochs_dense=0, reducer="tome", target=0.5, accumulate=2),
    "held out": BASE.replace(epochs_dense=1, epochs=1, holdout=0.25, workers=1),
    "segmentation": BASE.replace(task="segment", epochs_dense=1, epochs=1, decoder="mask"),
}
TIMED = (*runs.TIMINGS, "seconds")
WEIGHTS = ("model.safetensors", "dense/model.safetensors")
WATCHED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree")  # audit events that name a file


class Killer:
    """Kills this process before its n-th operation on a file of a folder; what is written then is cut in half."""

    def __init__(self, folder: Path, moment: int):
        self.folder, self.left, self.open = str(folder), moment, builtins.open
        sys.addaudithook(self.watch)
        builtins.open = self.torn

    def watch(self, event: str, arguments: tuple):
        if event in WATCHED and any(str(part).startswith(self.folder) for part in arguments):
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)

    def torn(self, file, mode="r", *rest, **options):
        opened = self.open(file, mode, *rest, **options)
        if self.left == 1 and set(mode) & set("wa") and str(file).startswith(self.folder):
            opened.write = self.half(opened.raw) if "b" in mode and hasattr(opened, "raw") else opened.write
        return opened

    @staticmethod
    def half(raw):
        def write(data):
            raw.write(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

        return write


def work(recipe: Recipe, folder: Path, moment: int) -> int:
    """Train in this process, which ends before its n-th file operation, should it get there; return its exit code."""
    if moment:
        Killer(folder, moment)
    try:
        train(recipe, folder, progress=False)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        return 1
    return 0


def start(name: str, folder: Path, moment: int = 0, processes: int = 1) -> int:
    """Return the id of a child process that trains; forked, since importing takes longer than the run."""
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [__file__, "--work", name, str(folder), str(moment)]
        return subprocess.Popen(command, stderr=subprocess.DEVNULL).pid
    if pid := os.fork():
        return pid
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os._exit(work(RECIPES[name], folder, moment))


def result(folder: Path) -> dict:
    """Return all that must not depend on what happened on the way."""
    run = runs.read(folder)
    lines = [{k: v for k, v in line.items() if k not in TIMED} for line in run.metrics]
    summary = {k: v for k, v in run.summary.items() if k not in TIMED}
    whole = {name: (folder / name).read_bytes() for name in WEIGHTS if (folder / name).exists()}
    return {"metrics": lines, "summary": summary, "state": (folder / "state").exists()} | whole


def recorded(folder: Path) -> int:
    """Return how many whole lines of metrics there are: the epochs that a user has seen finished."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def disturbed(name: str, folder: Path, moments: list[float], processes: int) -> list[str]:
    """Train with a kill at each moment, a number of seconds or of operations; return how many epochs were on record."""
    story, before = [], 0
    for moment in moments:
        pid = start(name, folder, moment if isinstance(moment, int) else 0, processes)
        if isinstance(moment, float):
            time.sleep(moment)
            os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        after = recorded(folder)
        if after < before:
            raise SystemExit(f"{folder}: {before} epochs were recorded, after a kill {after}")
        before = after
        story.append(f"{moment:.2f}s:{after}" if isinstance(moment, float) else f"#{moment}:{after}")
    if os.waitpid(start(name, folder, 0, processes), 0)[1]:
        raise SystemExit(f"{folder}: the run could not be continued after {story}")
    return story


def try_recipe(name: str, kills: int, where: str, processes: int, generator: random.Random) -> int:
    """Kill runs of a recipe so many times; return how many of them ended otherwise than the undisturbed one."""
    bad = 0
    with tempfile.TemporaryDirectory() as scratch:
        whole, begun = Path(scratch) / "whole", time.perf_counter()
        if os.waitpid(start(name, whole, 0, processes), 0)[1]:
            raise SystemExit(f"{name}: the undisturbed run failed")
        seconds, expected = time.perf_counter() - begun, result(whole)
        print(f"{name}, undisturbed: {recorded(whole)} epochs in {seconds:.1f} s", flush=True)
        while kills:
            count = min(kills, generator.randint(1, 4))
            kills -= count
            by_time = where == "time"
            moments = [generator.uniform(0, seconds) if by_time else generator.randint(1, 60) for _ in range(count)]
            folder = Path(scratch) / f"killed{kills}"
            story, found = disturbed(name, folder, moments, processes), result(folder)
            differ = [part for part in expected if found[part] != expected[part]]
            bad += bool(differ)
            ending = f"differs in {', '.join(differ)}" if differ else "the same"
            print(f"killed after {', '.join(story)} epochs: {ending}", flush=True)
    return bad


def main() -> int:
    if sys.argv[1:2] == ["--work"]:
        name, folder, moment = sys.argv[2:]
        first = os.environ.get("LOCAL_RANK", "0") == "0"  # the one that writes
        return work(RECIPES[name], Path(folder), int(moment) if first else 0)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--where", choices=("time", "operations"), default="time")
    parser.add_argument("--recipes", default="all at once", help=f"all, or some of {', '.join(RECIPES)}, with commas")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.processes > 1 and arguments.where == "time":
        parser.error("several processes are killed at operations: one of them knows when")
    names = list(RECIPES) if arguments.recipes == "all" else arguments.recipes.split(",")
    generator, bad, done = random.Random(arguments.seed), 0, 0
    for place, name in enumerate(names):
        kills = arguments.kills * (place + 1) // len(names) - done
        done += kills
        bad += try_recipe(name, kills, arguments.where, arguments.processes, generator) if kills else 0
    print(json.dumps({"kills": arguments.kills, "runs_that_differ": bad}))
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
