"""The papers' tables and figures: all of them small, and one alone."""

import pandas as pd
import pytest
from helpers import run_small

from msvit.reducers.registry import REDUCERS
from msvit.studies.outputs import MADE

pytestmark = pytest.mark.notebook
SMALL = {"train_n": 128, "val_n": 32, "batch": 32, "epochs_dense": 1, "pictures": 16}


def test_every_section(tmp_path):
    lists = "{cost_models: [tiny], cost_sizes: [64], budgets: [0.6], fronts_models: [tiny], sizes_models: [tiny]}"
    out = run_small("methods", tmp_path, "-y", lists, **SMALL)
    for name in ("cost", "smoothing", "reconstruction", "clustering", "fronts", "losses", "dynamic", "sizes"):
        assert (out / f"{name}.png").stat().st_size > 1000
    lost = pd.read_csv(out / "reconstruction.csv")
    assert set(lost["method"]) <= set(REDUCERS)
    assert len(set(lost["method"])) > 5


def test_a_section_alone_makes_what_is_its_own(tmp_path):
    out = run_small("methods", tmp_path, "-y", "{sections: [cost], cost_models: [tiny], cost_sizes: [64, 128]}")
    assert sorted(path.name for path in out.iterdir() if path.name != MADE) == ["cost.csv", "cost.png", "cost.svg"]
    assert not (tmp_path / "runs").exists()
