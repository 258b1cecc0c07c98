"""Runs of a study that are trained several at a time: the same runs, and nothing left behind."""

import multiprocessing
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from msvit.studies import jobs, study
from msvit.training import runs
from msvit.training.files import RunError, RunWarning
from msvit.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
SMALL = Recipe(train_n=32, val_n=20, batch=16, epochs_dense=1, epochs=1, device="cpu", gate_start="none")
ROWS = [study.StudyRow("MSViT", {}), study.StudyRow("random", {"gating": "random"})]


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.long
def test_runs_are_the_same_in_turn_and_together(tmp_path, one_thread, capsys):
    """Two seeds: a row waits for the dense model of its seed, and for no other."""
    found = [study.run_rows(SMALL, ROWS, [0, 1], tmp_path / str(n), jobs=n) for n in (1, 3)]
    lines = capsys.readouterr().out.splitlines()
    assert {line.split(",")[0] for line in lines[:6]} == {line.split(",")[0] for line in lines[6:]}
    assert found[0][["method", "seed", "run"]].equals(found[1][["method", "seed", "run"]])
    for name in found[0]["run"]:
        one, other = (runs.read_metrics(tmp_path / str(n) / name) for n in (1, 3))
        for a, b in zip(one, other, strict=True):
            assert {k: v for k, v in a.items() if k not in runs.TIMINGS} == {
                k: v for k, v in b.items() if k not in runs.TIMINGS
            }
        assert len({(tmp_path / str(n) / name / "model.safetensors").read_bytes() for n in (1, 3)}) == 1


def test_what_a_run_needs_is_trained_before_it():
    recipe = Recipe(model="run:one/dense", gate="run:two", epochs_dense=0, epochs=1)
    assert jobs.needs(recipe) == {"one", "two"}
    assert jobs.needs(Recipe()) == set()


def ended_job(said):
    """A job whose process has ended, with what it said before; None: it said nothing."""
    context = multiprocessing.get_context("spawn")
    answer, there = context.Pipe(duplex=False)
    process = context.Process(target=time.sleep, args=(0,))
    process.start()
    if said:
        there.send(said)
    there.close()
    return jobs.Job("2/3: MSViT, seed 0", process, answer)


@pytest.mark.long
def test_what_went_wrong_in_another_process_is_said_in_this_one():
    with pytest.raises(RunError, match="^2/3: MSViT, seed 0: its process was killed .* goes on from here"):
        ended_job(None).finish()
    with pytest.raises(RunError, match="OSError: no room"):
        ended_job({"warnings": [], "error": "OSError: no room"}).finish()
    with pytest.warns(RunWarning, match="seed 0: a line is damaged"):
        ended_job({"warnings": ["a line is damaged"], "error": ""}).finish()


@pytest.mark.long
def test_processes_end_with_the_one_that_started_them(tmp_path):
    code = "from msvit.studies import study; from msvit.training.recipe import Recipe\n"
    code += "base = Recipe(train_n=64, val_n=20, batch=16, epochs_dense=2000, epochs=1, device='cpu')\n"
    code += f"study.run_rows(base, [], [0, 1], {str(tmp_path)!r}, jobs=2)"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while len(list(tmp_path.glob("*/metrics.jsonl"))) < 2:
        assert parent.poll() is None
        time.sleep(0.2)
    others = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    assert len(others) >= 3  # the server of processes, and two runs
    assert not psutil.wait_procs(others, timeout=30)[1]
