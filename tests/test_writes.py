"""No function writes outside of the folders that it was given: Python tells of every file that is opened or moved."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from msvit import cli

pytestmark = pytest.mark.long
ROOT = Path(__file__).parent.parent

WATCH = """
import os, sys
from pathlib import Path

HOME, OUTSIDE = sys.argv[1], []
DEVICES = ("/dev/", "/proc/", "/sys/")


def watch(event, arguments):
    written = []
    if event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
        mode, flags = arguments[1] or "", arguments[2] or 0
        if set(mode) & set("wax+") or flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND):
            written = arguments[:1]
    elif event in ("os.mkdir", "os.rmdir", "os.remove", "shutil.rmtree", "os.truncate", "os.chmod", "sqlite3.connect"):
        written = arguments[:1]
    elif event in ("os.rename", "os.link", "os.symlink", "shutil.move", "shutil.copyfile"):
        written = arguments[:2]
    for path in written:
        path = os.path.abspath(os.fsdecode(path))
        if not path.startswith((HOME, *DEVICES)):
            OUTSIDE.append(f"{event} {path}")


sys.addaudithook(watch)
"""

WORK = """
import warnings
import matplotlib
matplotlib.use("Agg")
import timm
import msvit
from msvit import cli
from msvit.studies import report

def run(*words, code=0):
    assert cli.main([str(word) for word in words]) == code, words

home = Path(HOME)
small = ["--train-n=32", "--val-n=16", "--batch=8", "--epochs-dense=1", "--epochs=1", "--device=cpu", "--quiet"]
given = home / "given"
run("train", *small, "--folder", given / "runs/one", "--tensorboard")
run("train", *small, "--folder", given / "runs/one")
run("train", *small, "--task=segment", "--folder", given / "runs/two")
run("train", *small, "--optimizer=adamww", "--folder", given / "runs/none", code=2)
run("eval", given / "runs/one", "--macs=0.6")
run("eval", given / "runs/one", "--gating=entropy")
run("runs", given / "runs", "--json")
run("diff", given / "runs/one", given / "runs/two")
run("methods")
run("models", "vit_tiny_patch16_224")
run("fit-gate", "--model", given / "runs/one/dense", "--val-n=16", "--batch=64", "--by=detail", "--quiet",
    "--device=cpu", "--folder", given / "fitted")
run("sweep", *small[:-1], "--trials=1", "--pruner=none", "--storage", given / "study.db", "--runs", given / "sweep")
report.report(given / "runs", given / "report")
model = msvit.MSViT.from_pretrained(given / "runs/one")
model.save_pretrained(given / "saved")
"""

MORE = """
import torch
from msvit import cli
from msvit.explorer import Explorer

home = Path(HOME)
given = home / "given"

def run(*words):
    assert cli.main([str(word) for word in words]) == 0, words

run("train", "--train-n=32", "--val-n=16", "--batch=8", "--epochs-dense=0", "--epochs=1", "--gate-start=none",
    "--device=cpu", "--quiet", "--folder", given / "run")
for form in ("torch", "onnx"):
    run("export", given / "run", "--format", form, "--out", given / form)
run("bench", "--models=vit_mini_patch8_64", "--batch=2", "--repeats=1", "--rows=packed", "--out", given / "bench")
Explorer(str(given / "run"), runs=given, out=given / "explorer").save()
"""

TELL = """
print("OUTSIDE", *dict.fromkeys(OUTSIDE), sep="\\n")
"""


def test_every_command_is_watched():
    named = set(re.findall(r'^ *run\("([a-z-]+)"', WORK + MORE, re.MULTILINE))
    (commands,) = (action for action in cli._parser()._actions if action.choices and "train" in action.choices)
    assert named == set(commands.choices)


def watched(tmp_path, work):
    (tmp_path / "home/cwd").mkdir(parents=True)
    names = ("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR")
    caches = dict.fromkeys(names, str(tmp_path / "home/caches"))
    (tmp_path / "home/caches").mkdir()
    environment = (
        os.environ | caches | {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    )
    done = subprocess.run(
        [sys.executable, "-c", WATCH + work + TELL, str(tmp_path / "home")],
        capture_output=True, text=True, env=environment, cwd=tmp_path / "home/cwd", timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    left = {path.name for path in (tmp_path / "home/cwd").iterdir()}
    return done.stdout.partition("OUTSIDE\n")[2].splitlines(), left


def test_nothing_is_written_but_where_one_was_told(tmp_path):
    """The caches of other packages are given a folder too; the folder that one works in gets nothing."""
    outside, left = watched(tmp_path, WORK)
    assert not outside
    assert not left
    assert {path.name for path in (tmp_path / "home").iterdir()} == {"caches", "cwd", "given"}
    assert not (tmp_path / "home/given/runs/none").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_exports_timings_and_the_explorer_write_where_they_were_told(tmp_path):
    outside, left = watched(tmp_path, MORE)
    assert not outside
    assert not left
    folders = {path.name for path in (tmp_path / "home/given").iterdir()}
    assert folders == {"run", "torch", "onnx", "bench", "explorer"}


def test_the_watch_sees_what_is_written_elsewhere(tmp_path):
    target = tmp_path / "elsewhere.txt"
    outside, left = watched(tmp_path, f"open({str(target)!r}, 'w')")
    assert outside == [f"open {target}"]
    assert not left
