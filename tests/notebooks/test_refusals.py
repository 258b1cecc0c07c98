"""What cannot be meant stops a notebook before anything is trained."""

import ast
import json
import re
from pathlib import Path

import pytest
from helpers import NOTEBOOKS, cells_of, papermill
from papermill import inspect_notebook

from msvit.studies.methods import SECTIONS
from msvit.training.files import RunError


@pytest.mark.parametrize(
    ("name", "parameters", "expected"),
    [
        ("ablation", {"typo": 1}, "no setting 'typo'"),
        ("ablation", {"gbas": "maybe"}, "gbas='maybe': expected true or false"),
        ("ablation", {"target": 1.5}, r"target=1.5 lies outside \(0, 1\)"),
        ("ablation", {"losses": ["gbas", "l1"]}, "the nearest is 'l0'"),
        ("ablation", {"methods": ["gate+tme"]}, "the nearest is 'gate.tome'"),
        ("methods", {"sections": ["cost", "smooth"]}, "the nearest is 'smoothing'"),
        ("methods", {"reducers": ["tme"]}, "the nearest is 'tome'"),
        ("methods", {"fronts_methods": ["gates"]}, "the nearest is 'gate'"),
        ("methods", {"anchors": "maybe"}, "There are: auto, always, never"),
        ("transfer", {"second_task": "detect"}, "There are: classify, segment"),
        ("segmentation", {"decoder": "linaer"}, "the nearest is 'linear'"),
        ("gbas_sweep", {"pruner": "ashe"}, "the nearest is 'asha'"),
        ("results", {"effort": "long"}, "There are: smoke, cores, accelerator"),
        ("report", {}, "there is no folder .*runs"),
        ("tradeoff", {}, "there is no folder .*runs"),
        ("gate_learning", {"more": {"scales": [1, 2, 4]}}, r"what a region is worth is for one .*use scales=\[1, 2\]"),
    ],
)
def test_before_anything_is_trained(tmp_path, name, parameters, expected):
    typed = parameters | {"runs": str(tmp_path / "runs"), "out": str(tmp_path / "out")}
    names = {"In": ["# Parameters\n" + "\n".join(f"{key} = {value!r}" for key, value in typed.items())]}
    with pytest.raises((ValueError, RunError), match=expected):
        run_cells(name, names, typed)
    assert not (tmp_path / "runs").exists()


def run_cells(name, names, typed):
    for source, is_parameters in cells_of(name):
        exec(source, names)
        if is_parameters:
            names.update(typed)


def test_papermill_reads_every_parameter(caplog):
    """`papermill --help-notebook` lists them from the source; it warns, in every run, of a line that it cannot read."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        source = next((source for source, parameters in cells_of(path.stem) if parameters), "")
        assert set(inspect_notebook(path)) == {node.target.id for node in ast.parse(source).body}, path
    assert not caplog.records


@pytest.mark.notebook
def test_papermill_fails_with_the_sentence(tmp_path):
    folders = {"runs": tmp_path / "runs", "out": tmp_path / "out"}
    done = papermill("ablation", tmp_path / "out.ipynb", "-p", "gbas", "maybe", **folders)
    assert done.returncode != 0
    assert re.search("gbas='maybe': expected true or false", done.stderr)
    assert not (tmp_path / "runs").exists()


def test_every_section_is_made_unless_it_is_left_out():
    cells = list(cells_of("methods"))
    made = re.findall(r'^if "(\w+)" in sections', "\n".join(source for source, _ in cells), re.MULTILINE)
    assert tuple(made) == SECTIONS
    (defaults,) = (source for source, is_parameters in cells if is_parameters)
    assert f"sections: list[str] = {json.dumps(list(SECTIONS))}" in defaults


def test_every_notebook_is_run():
    """By nbval at its defaults (see the Makefile), or here with small parameters."""
    by_nbval = re.search(r"addsuffix .ipynb,([\w ]+)\)", (NOTEBOOKS.parent / "Makefile").read_text())[1].split()
    here = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for path in (path for path in NOTEBOOKS.glob("*.ipynb") if any(cells_of(path.stem))):
        assert path.stem in by_nbval or f'run_small("{path.stem}"' in here, path.name
