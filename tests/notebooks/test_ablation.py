"""The ablation, with other rows than its defaults."""

import json

import pandas as pd
import pytest
from helpers import run_small

pytestmark = pytest.mark.notebook


def test_without_gbas_it_is_really_without(tmp_path):
    losses = ("-y", "losses: [gbas, bas]", "-y", "{masks: [random], more: {val_n: 256}}")
    out = run_small("ablation", tmp_path, *losses, gbas="false", seeds=2, train_n=256, epochs=1, epochs_dense=1)
    recipes = [json.loads(p.read_text()) for p in (tmp_path / "runs").rglob("settings.json")]
    learned = [r["loss"] for r in recipes if r["epochs"] and r["gating"] == "learned"]
    assert sorted(learned) == ["bas", "bas", "l0", "l0"]
    table = pd.read_json(out / "ablation.json")
    assert table.groupby("method", sort=False).size().to_dict() == dict.fromkeys(
        ["dense", "without gbas", "MSViT, bas", "random mask"], 2
    )
    for name in ("tradeoff.png", "gate_maps.svg", "token_counts.png", "ablation.csv", "ablation.tex"):
        assert (out / name).stat().st_size > 100
