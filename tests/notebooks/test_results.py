"""The results' protocol, small."""

import pandas as pd
import pytest
from helpers import run_small

pytestmark = pytest.mark.notebook


def test_the_smallest_effort(tmp_path):
    small = {"train_n": 256, "batch": 64, "epochs": 1, "epochs_dense": 1, "pictures": 32}
    out = run_small("results", tmp_path, **small)
    table = pd.read_json(out / "results-smoke.json")
    rows = ["dense", "dense, trained on", "dense, all coarse", "dense, smaller pictures at 48 px"]
    rows += [f"{name} at 0.6" for name in ("MSViT", "MSViT, l0", "random mask", "dynamicvit", "tome")]
    assert list(table["method"]) == rows
    for name in ("accuracy_macs", "accuracy_speed", "gate_maps-0", "gate_maps-10", "positions", "lost-MSViT-at-0.6"):
        assert (out / f"{name}.png").stat().st_size > 1000
