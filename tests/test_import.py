"""`import msvit` stays light: little time over torch and timm, nothing that only notebooks or sweeps need."""

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 0.2
HEAVY = {
    *("IPython", "anywidget", "ipykernel", "ipywidgets", "jupyter_client", "jupyter_core", "jupyterlab"),
    *("kaleido", "matplotlib", "nbclient", "nbconvert", "nbformat", "papermill", "plotly", "voila"),
    *("optuna", "psycopg", "scipy", "sklearn", "sqlalchemy", "tensorboard", "playwright", "pytest"),
}
LATE = {
    "accelerate",
    "pandas",
}  # the core's own, but slow to import: whoever trains or reads runs waits for them
NOTEBOOK_SIDE = {
    "explorer",
    "figures",
    "interactive",
    "looks",
    "plots",
    "protocol",
    "report",
    "segstudy",
    "sweep",
}  # rooms that may import HEAVY, no others

PROBE = """
import importlib, json, sys, time
base, package = json.loads(sys.argv[1])
for name in base:
    importlib.import_module(name)
before, start = set(sys.modules), time.perf_counter()
importlib.import_module(package)
print(json.dumps([time.perf_counter() - start, sorted(set(sys.modules) - before)]))
"""

BLOCKED = """
import importlib, json, sys
heavy, names = json.loads(sys.argv[1])
sys.modules.update(dict.fromkeys(heavy))  # None there makes an import of it fail
for name in names:
    importlib.import_module(name)
"""


class Import(NamedTuple):
    """What one `import package` in a fresh interpreter cost."""

    seconds: float
    new: set[str]  # top-level names of the modules it brought in


def python(code, arguments, path):
    environment = os.environ | {"PYTHONPATH": str(path)}
    command = [sys.executable, "-c", code, json.dumps(arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def import_cost(package, base=(), path=ROOT):
    """Imports `base`, then measures the import of `package`, which is found in the folder `path`."""
    seconds, modules = json.loads(python(PROBE, [base, package], path))
    return Import(seconds, {name.partition(".")[0] for name in modules})


def rooms():
    return [
        module.name
        for module in pkgutil.walk_packages([str(ROOT / "msvit")], "msvit.")
        if module.name.split(".")[1] not in NOTEBOOK_SIDE and not module.name.endswith("__main__")
    ]


@pytest.mark.long
def test_import_is_light():
    costs = [import_cost("msvit", ["torch", "timm"]) for _ in range(3)]
    assert "msvit" in costs[0].new
    assert not costs[0].new & (HEAVY | LATE)
    assert median(cost.seconds for cost in costs) < SECONDS


@pytest.mark.long
def test_core_runs_without_notebook_packages():
    python(BLOCKED, [sorted(HEAVY), rooms()], ROOT)


def test_a_heavy_import_is_seen(tmp_path):
    """The two tests above can fail: a package that imports matplotlib, and slowly, is found out by both."""
    (tmp_path / "matplotlib.py").write_text("import time; time.sleep(0.25)")
    (tmp_path / "stub").mkdir()
    (tmp_path / "stub/__init__.py").write_text("from . import inner")
    (tmp_path / "stub/inner.py").write_text("import matplotlib")
    cost = import_cost("stub", path=tmp_path)
    assert cost.new & HEAVY == {"matplotlib"}
    assert cost.seconds > SECONDS
    with pytest.raises(AssertionError, match="import of matplotlib halted"):
        python(BLOCKED, [sorted(HEAVY), ["stub"]], tmp_path)


def test_what_was_there_before_is_not_charged(tmp_path):
    (tmp_path / "matplotlib.py").write_text("")
    (tmp_path / "light.py").write_text("import matplotlib")
    cost = import_cost("light", ["matplotlib"], tmp_path)
    assert cost.new == {"light"}
    assert cost.seconds < SECONDS
