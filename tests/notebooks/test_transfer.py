"""A gate on another backbone."""

import pandas as pd
import pytest
from helpers import run_small

pytestmark = pytest.mark.notebook


def test_a_gate_is_carried_over(tmp_path):
    small = {"train_n": 256, "epochs": 1, "epochs_dense": 1, "second": "vit_slim_patch8_64"}
    table = pd.read_json(run_small("transfer", tmp_path, **small) / "transfer.json")
    assert list(table["method"]) == [
        "dense",
        "own gate",
        "gate of the first, frozen",
        "gate of the first, trained on",
        "random mask",
    ]
    assert table.loc[1:, "macs"].between(0.3, 0.9).all()
    assert (tmp_path / "out" / "gate_maps.png").stat().st_size > 1000
