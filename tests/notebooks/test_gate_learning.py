"""What a gate has learned, small."""

import pandas as pd
import pytest
from helpers import run_small

pytestmark = pytest.mark.notebook


def test_two_starts_side_by_side(tmp_path):
    small = {"train_n": 256, "epochs": 1, "epochs_dense": 1, "pictures": 8, "draws": 10}
    out = run_small("gate_learning", tmp_path, **small)
    won = pd.read_csv(out / "winnings.csv", index_col=[0, 1])
    assert set(won.index.get_level_values(0)) == {"gate_start=none", "gate_start=utility"}
    chosen = ["all fine", "random", "gate", "entropy", "centre", "object", "best of 10 random", "greedy search"]
    assert list(won.loc["gate_start=utility"].index) == chosen
    for name in ("winnings", "agreement", "worth", "decided", "pulls"):
        assert (out / f"{name}.png").stat().st_size > 1000
