"""`import msvit` and `msvit --help` are light: no torch, no timm; and nothing but notebooks needs notebook packages."""

import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest

import msvit

ROOT = Path(__file__).resolve().parent.parent
SECONDS = 0.2
HEAVY = {
    *("IPython", "anywidget", "ipykernel", "ipywidgets", "jupyter_client", "jupyter_core", "jupyterlab"),
    *("kaleido", "matplotlib", "nbclient", "nbconvert", "nbformat", "papermill", "plotly", "voila"),
    *("optuna", "psycopg", "scipy", "sklearn", "sqlalchemy", "tensorboard", "playwright", "pytest"),
}
CORE = {
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "pandas",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "PIL",
    "tqdm",
}
NOTEBOOK_SIDE = {"explorer", "plots", "studies"}  # rooms that may import HEAVY, no others

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
    costs = [import_cost("msvit") for _ in range(3)]
    assert "msvit" in costs[0].new
    assert not costs[0].new & (HEAVY | CORE)
    assert median(cost.seconds for cost in costs) < SECONDS


def test_what_the_door_offers_is_there():
    for name in msvit.__all__:
        assert getattr(msvit, name).__name__.startswith("msvit." if name in ("gbas", "zoo") else name)
    assert set(msvit.__all__) <= set(dir(msvit))
    with pytest.raises(AttributeError, match="'msvit' has no attribute 'MSVIT'"):
        msvit.MSVIT  # noqa: B018


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["bench", "--help"], ["train", "--target", "2"]])
def test_help_and_typing_errors_need_no_torch(words):
    """By the processor's time, which a busy machine does not stretch as it does the clock's."""
    code = "import sys\nfrom msvit.cli import main\ntry:\n    main(sys.argv[1:])\nfinally:\n"
    code += "    import json, resource\n    used = resource.getrusage(resource.RUSAGE_SELF)\n"
    code += "    print(json.dumps([used.ru_utime + used.ru_stime, sorted(sys.modules)]), file=sys.stderr)"
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == (2 if "2" in words else 0)
    seconds, modules = json.loads(next(line for line in done.stderr.splitlines() if line.startswith("[")))
    assert not {name.partition(".")[0] for name in modules} & (HEAVY | CORE)
    assert seconds < 0.3  # 0.12 here; with torch and timm it would be 4


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
