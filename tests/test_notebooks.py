"""The notebooks as papermill runs them, with other parameters than their defaults."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from msvit.studies.methods import SECTIONS

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.notebook
SMALL = {"train_n": 256, "epochs": 1, "epochs_dense": 1}


def papermill(name, to, /, *typed, **parameters):
    words = [word for key, value in parameters.items() for word in ("-p", key, str(value))]
    command = [
        sys.executable,
        "-m",
        "papermill",
        "--no-progress-bar",
        str(ROOT / "notebooks" / f"{name}.ipynb"),
        str(to),
    ]
    return subprocess.run([*command, *words, *typed], capture_output=True, text=True, timeout=400, cwd=to.parent)


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (("-p", "typo", "1"), "no setting 'typo'"),
        (("-p", "gbas", "maybe"), "gbas='maybe': expected true or false"),
        (("-p", "target", "1.5"), r"target=1.5 lies outside \(0, 1\)"),
        (("-y", "losses: [gbas, l1]"), "the nearest is 'l0'"),
        (("-y", "methods: [gate+tme]"), "the nearest is 'gate.tome'"),
    ],
)
def test_what_cannot_be_meant_fails_before_anything_is_trained(tmp_path, typed, expected):
    done = papermill("ablation", tmp_path / "out.ipynb", *typed, runs=tmp_path / "runs", out=tmp_path / "out")
    assert done.returncode != 0
    assert re.search(expected, done.stderr)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        (("-y", "sections: [cost, smooth]"), "the nearest is 'smoothing'"),
        (("-y", "reducers: [tme]"), "the nearest is 'tome'"),
        (("-y", "fronts_methods: [gates]"), "the nearest is 'gate'"),
        (("-p", "anchors", "maybe"), "There are: auto, always, never"),
    ],
)
def test_the_methods_refuse_what_they_do_not_know(tmp_path, typed, expected):
    done = papermill("methods", tmp_path / "out.ipynb", *typed, runs=tmp_path / "runs", out=tmp_path / "out")
    assert done.returncode != 0
    assert expected in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_section_alone_makes_what_is_its_own(tmp_path):
    folders = {"runs": tmp_path / "runs", "out": tmp_path / "out"}
    typed = ("-y", "{sections: [cost], cost_models: [tiny], cost_sizes: [64, 128]}")
    done = papermill("methods", tmp_path / "out.ipynb", *typed, **folders)
    assert done.returncode == 0, done.stderr[-2000:]
    assert sorted(path.name for path in folders["out"].iterdir()) == ["cost.csv", "cost.png", "cost.svg"]
    assert not folders["runs"].exists()


def test_every_section_is_made_unless_it_is_left_out():
    cells = json.loads((ROOT / "notebooks" / "methods.ipynb").read_text())["cells"]
    made = re.findall(r'^if "(\w+)" in sections', "\n".join("".join(cell["source"]) for cell in cells), re.MULTILINE)
    assert tuple(made) == SECTIONS
    (defaults,) = ("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", ()))
    assert f"sections: list[str] = {json.dumps(list(SECTIONS))}" in defaults


def test_the_ablation_without_gbas_is_really_without(tmp_path):
    losses = ("-y", "losses: [gbas, bas]", "-y", "masks: [random]")
    folders = {"runs": tmp_path / "runs", "out": tmp_path / "out"}
    done = papermill("ablation", tmp_path / "out.ipynb", *losses, gbas="false", seeds=2, **SMALL, **folders)
    assert done.returncode == 0, done.stderr[-2000:]
    recipes = [json.loads(p.read_text()) for p in (tmp_path / "runs").rglob("settings.json")]
    learned = [r["loss"] for r in recipes if r["epochs"] and r["gating"] == "learned"]
    assert sorted(learned) == ["bas", "bas", "l0", "l0"]
    table = pd.read_json(tmp_path / "out" / "ablation.json")
    assert table.groupby("method", sort=False).size().to_dict() == dict.fromkeys(
        ["dense", "without gbas", "MSViT, bas", "random mask"], 2
    )
    for name in ("tradeoff.png", "gate_maps.svg", "token_counts.png", "ablation.csv", "ablation.tex"):
        assert (tmp_path / "out" / name).stat().st_size > 100
