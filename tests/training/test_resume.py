"""Runs that are killed, torn or spread over processes: none of it may change the result."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from msvit.training import runs
from msvit.training.loop import train
from msvit.training.recipe import Recipe
from msvit.training.runs import RunWarning

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
ENV = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
RECIPE = Recipe(train_n=64, val_n=50, batch=16, epochs_dense=2, epochs=2, device="cpu")


def options(recipe: Recipe) -> list[str]:
    default = Recipe()
    return [f"--{name}={here}" for name, (here, _) in recipe.difference(default).items()] + ["--device=cpu", "--quiet"]


def torchrun(recipe: Recipe, folder: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "msvit.cli", "train", *options(recipe), f"--folder={folder}"]
    return subprocess.Popen(command, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An undisturbed run."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield train(RECIPE, tmp_path_factory.mktemp("runs") / "whole", progress=False)
    torch.set_num_threads(threads)


def lines(run) -> list[dict]:
    return [{k: v for k, v in line.items() if k not in runs.TIMINGS} for line in run.metrics]


def weights(run) -> bytes:
    return (run.folder / "model.safetensors").read_bytes()


def kill(kills, *options, program="kill_resume.py"):
    """Kill runs, or workers of a sweep, by a benchmark that exits with 1 on any difference."""
    command = [sys.executable, ROOT / "benchmarks" / program, f"--kills={kills}", *options]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"kills": kills, "runs_that_differ": 0}


def test_killed_runs_end_as_undisturbed_ones():
    """At random moments, and at operations on files: a few of those of `make test-slow`."""
    kill(4)
    kill(16, "--where=operations", "--recipes=plain")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kills", "options"),
    [
        (100, ["--where=time", "--recipes=all"]),
        (200, ["--where=operations", "--recipes=all"]),
        (20, ["--where=operations", "--recipes=plain,quota", "--processes=2"]),
    ],
)
def test_hundreds_of_kills_of_all_recipes(kills, options):
    kill(kills, *options)


@pytest.mark.slow
def test_workers_of_a_sweep_are_killed_and_others_stand_in():
    kill(40, program="kill_sweep.py")


@pytest.mark.parametrize("stop", [1, 2, 3])
@pytest.mark.parametrize("damage", ["none", "state", "metrics"])
def test_interrupted_damaged_and_continued(whole, tmp_path, stop, damage):
    """After an epoch of stage one, between the stages, and in stage two."""

    def watch(line):
        if line["epoch"] == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, tmp_path / "run", progress=False, watch=watch)
    if damage == "metrics":
        path = tmp_path / "run" / "metrics.jsonl"
        path.write_bytes(path.read_bytes()[:-30])
    newest = max((tmp_path / "run" / "state").iterdir())
    if damage == "state":
        newest.write_bytes(newest.read_bytes()[:1000])
    if damage == "none":
        run = train(RECIPE, tmp_path / "run", progress=False)
    else:
        name = newest.name if damage == "state" else "metrics.jsonl"
        with pytest.warns(RunWarning, match=f"{name}.* is damaged"):
            run = train(RECIPE, tmp_path / "run", progress=False)
    assert lines(run) == lines(whole)
    assert weights(run) == weights(whole)
    assert {k: v for k, v in run.summary.items() if k != "seconds"} == {
        k: v for k, v in whole.summary.items() if k != "seconds"
    }


def test_interrupted_within_and_after_frozen_epochs(tmp_path):
    recipe = RECIPE.replace(epochs_dense=0, epochs=3, freeze=2, lr_scale=0.01, gating="fine", reducer="dynamicvit")
    whole = train(recipe, tmp_path / "whole", progress=False)

    def watch(line):
        raise KeyboardInterrupt  # after each epoch

    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            train(recipe, tmp_path / "run", progress=False, watch=watch)
    run = train(recipe, tmp_path / "run", progress=False)
    assert lines(run) == lines(whole)
    assert weights(run) == weights(whole)


def test_two_processes_give_the_curve_of_one(tmp_path):
    """The gate starts with lost detail: utility, normalised by what masks cost a model that has learned nothing yet,
    makes differences of 1e-4 of those of rounding."""
    recipe = RECIPE.replace(gate_start="detail")
    whole = train(recipe, tmp_path / "whole", progress=False)
    process = torchrun(recipe, tmp_path / "two")
    output = process.communicate(timeout=240)[0]
    assert process.returncode == 0, output
    run = runs.read(tmp_path / "two")
    assert json.loads((run.folder / "environment.json").read_text())[0]["processes"] == 2
    for one, two in zip(whole.metrics, run.metrics, strict=True):
        assert two["curve"] == pytest.approx(one["curve"], abs=1e-4)
        for name in ("train_coarse", "train_macs", "val_loss", "val_macs", "val_tokens", "val_fine_object"):
            if name in one:
                assert two[name] == pytest.approx(one[name], abs=1e-4), name
        assert two["val_pictures"] == 50  # counted once each, though the last batch was evened out


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the worker's process in /proc")
def test_a_worker_that_dies_ends_the_run_which_can_be_continued(tmp_path):
    recipe, folder = RECIPE.replace(epochs=40), tmp_path / "run"
    process = torchrun(recipe, folder)
    deadline = time.monotonic() + 120
    while len(runs.read_metrics(folder)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(c) for c in children if b"msvit.cli" in Path(f"/proc/{c}/cmdline").read_bytes()]
    assert len(workers) == 2, process.communicate()[0]
    os.kill(workers[-1], signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode != 0, output
    done = len(runs.read_metrics(folder))
    assert 3 <= done < 42
    seen = []

    def watch(line):
        seen.append(line["epoch"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, folder, progress=False, watch=watch)
    assert seen == [done + 1]
