"""The ablation: its default rows and others, small."""

import json

import pandas as pd
import pytest
from helpers import run_small

from msvit.studies.study import PARTS

pytestmark = pytest.mark.notebook
SMALL = {"size": 32, "train_n": 128, "batch": 32, "epochs": 1, "epochs_dense": 1}
PRIORS = ("cdf_fit.png", "prior_map.svg", "hyperprior_fit.png")


def methods(out):
    return pd.read_json(out / "ablation.json").groupby("method", sort=False).size().to_dict()


def outputs(path):
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]


def test_every_part_has_a_row_and_without_gbas_nothing_of_it_stays(tmp_path):
    more = ("-y", "{more: {val_n: 64}}")
    out = run_small("ablation", tmp_path, *more, **SMALL)
    parts = [f"without {part.replace('_', ' ')}" for part in PARTS]  # random decisions are those of no learned gate
    assert methods(out) == dict.fromkeys(["dense", "MSViT", *parts, "coarse mask", "centre mask"], 1)
    for name in ("tradeoff.png", "ranking.png", "gate_maps.svg", "token_counts.png", "ablation.tex", *PRIORS):
        assert (out / name).stat().st_size > 100

    trains = next(cell for cell in outputs(tmp_path / "out.ipynb") if "study.run_rows" in "".join(cell["source"]))
    shown = [output for output in trains["outputs"] if output["output_type"] == "display_data"]
    assert len(shown) == 2, "all bars are one output, the curves another"
    assert "".join(shown[0]["data"]["text/plain"]).startswith(
        f"run 11/11: centre mask, seed 0: {3 + len(PARTS) + 2} of"
    )

    losses = ("-y", "losses: [gbas, bas]", "-y", "{masks: [random], more: {val_n: 64}}")
    out = run_small("ablation", tmp_path, *losses, **SMALL, gbas="false", one_by_one="false", seeds=2)
    assert methods(out) == dict.fromkeys(["dense", "without gbas", "MSViT, bas", "random mask"], 2)
    table = pd.read_json(out / "ablation.json")
    recipes = [json.loads((tmp_path / "runs" / run / "settings.json").read_text()) for run in table["run"]]
    learned = [r["loss"] for r in recipes if r["epochs"] and r["gating"] == "learned"]
    assert sorted(learned) == ["bas", "bas", "l0", "l0"]
    assert (out / "tradeoff.png").exists()
    assert not [name for name in PRIORS if (out / name).exists()], "figures of the run before"
