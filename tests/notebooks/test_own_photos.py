"""Photographs of one's own, few and small."""

import pandas as pd
import pytest
from helpers import run_small, write_folder

pytestmark = pytest.mark.notebook


def test_a_folder_of_photographs_gets_a_model_with_a_gate(tmp_path):
    write_folder(tmp_path / "photos", train=16, val=8, classes=("cats", "dogs", "owls"))
    small = {"data": f"folder:{tmp_path}/photos", "model": "scenes", "epochs_dense": 1, "epochs": 1, "batch": 16}
    out = run_small("own_photos", tmp_path, **small)
    summary = pd.read_csv(out / "own.csv", index_col=0)
    assert list(summary.index) == ["dense", "MSViT"]
    assert set(pd.read_csv(out / "classes.csv", index_col=0).index) == {"cats", "dogs", "owls", "all"}
    for name in ("gate_maps", "lost"):
        assert (out / f"{name}.png").stat().st_size > 1000
