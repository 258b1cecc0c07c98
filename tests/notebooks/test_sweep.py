"""The sweep of the loss, small."""

import pandas as pd
import pytest
from helpers import run_small

pytestmark = pytest.mark.notebook


def test_as_many_trials_as_were_asked_for(tmp_path):
    small = {"trials": 2, "train_n": 256, "epochs": 1, "epochs_dense": 1, "storage": tmp_path / "study.db"}
    out = run_small("gbas_sweep", tmp_path, **small, pruner="none")
    table = pd.read_csv(out / "trials.csv")
    assert list(table["state"]) == ["complete"] * 2
    assert table["macs"].between(0.3, 1).all()
    assert (out / "front.png").stat().st_size > 1000
