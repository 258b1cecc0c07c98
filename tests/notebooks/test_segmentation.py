"""Segmentation, small."""

import pandas as pd
import pytest
from helpers import run_small

pytestmark = pytest.mark.notebook


def test_every_row_has_its_quality(tmp_path):
    small = {"train_n": 64, "val_n": 16, "size": 64, "epochs": 1, "epochs_dense": 1}
    out = run_small("segmentation", tmp_path, **small)
    summary = pd.read_csv(out / "summary.csv", index_col=0)
    assert list(summary.index) == ["dense", "all fine", "all coarse", "gate at 60%", "random at 60%"]
    assert summary["miou"].between(0, 1).all()
    assert summary.loc["all coarse", "coarse"] == 1
    for name in ("quality", "pictures"):
        assert (out / f"{name}.png").stat().st_size > 1000
