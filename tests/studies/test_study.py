"""Which runs a study is made of, and how their results become tables."""

import numpy as np
import pandas as pd
import pytest
from helpers import plotted, write_run
from plotly.offline import get_plotlyjs

from msvit.plots.style import as_the_model_sees
from msvit.studies import report, study
from msvit.studies.jobs import epochs_left
from msvit.training.recipe import Recipe, RecipeError

GATINGS = ("learned", "pattern", "quota", "random", "fine")
ON = dict.fromkeys(study.PARTS, True)


def labels(**settings):
    switches = ON | {k: v for k, v in settings.items() if k in ON}
    rest = {"losses": ["gbas"], "masks": ["random"]} | {k: v for k, v in settings.items() if k not in ON}
    return [row.label for row in study.ablation(switches, **rest)]


def test_rows_of_an_ablation():
    assert labels() == ["MSViT", "random mask"]
    assert labels(trim=False) == ["MSViT", "without trim", "random mask"]
    assert labels(trim=False, calibrate=False)[1] == "without trim, calibrate"
    assert labels(losses=["gbas", "l0", "bas"], masks=[]) == ["MSViT", "MSViT, l0", "MSViT, bas"]
    every = labels(one_by_one=True, masks=[])
    assert every == ["MSViT", *(f"without {part.replace('_', ' ')}" for part in study.PARTS)]


def test_controllers_stand_alone_and_beside_the_losses_they_leave_something_of():
    found = labels(losses=["gbas", "l0"], masks=[], controllers=["bias", "projection"])
    alone = ["MSViT, controller only (bias)", "MSViT, controller only (projection)"]
    beside = ["MSViT, gbas + bias", "MSViT, l0 + bias", "MSViT, gbas + projection"]
    assert sorted(found) == sorted(["MSViT", "MSViT, l0", *alone, *beside])
    assert not [label for label in labels(gbas=False, controllers=["bias"]) if "gbas +" in label]


def test_gbas_and_its_absence_differ_in_the_loss_alone():
    with_it, without = (study.ablation(ON | {"gbas": on}, ["gbas"], [])[0] for on in (True, False))
    base = Recipe(control="none")
    assert base.replace(**with_it.changes).difference(base.replace(**without.changes)) == {"loss": ("gbas", "l0")}


def test_rows_of_ones_own():
    rows = study.typed_rows(["control=bias gate_lr=1e-2", "loss_settings=sigma=0.2"])
    assert rows[0] == study.StudyRow("control=bias gate_lr=1e-2", {"control": "bias", "gate_lr": 0.01})
    assert rows[1].changes == {"loss_settings": {"sigma": 0.2}}
    (named,) = study.typed_rows(["oracle (1, 2): gating=oracle scales=1,2"])
    assert named == study.StudyRow("oracle (1, 2)", {"gating": "oracle", "scales": [1, 2]})
    with pytest.raises(RecipeError, match="no setting is called 'contrl'; the nearest is 'control'"):
        study.typed_rows(["contrl=bias"])


def test_a_part_left_out_twice_is_one_row():
    assert labels(gbas=False, losses=["l0"], masks=[]) == ["without gbas"]


@pytest.mark.parametrize("one_by_one", [False, True])
def test_without_gbas_no_row_is_trained_with_it(one_by_one):
    base, dense = Recipe(), Recipe(epochs=0)
    rows = study.ablation(ON | {"gbas": False}, ["gbas", "bas"], ["random"], one_by_one)
    recipes = [study.recipe_of(base, row, dense, 0) for row in rows]
    assert recipes
    assert all(r.gating.loss != "gbas" for r in recipes if r.gating.learned)


def test_rows_start_from_the_dense_run_of_their_seed_or_train_as_long():
    base, dense = Recipe(epochs_dense=3, epochs=2), Recipe(epochs_dense=3, epochs=0)
    full = study.recipe_of(base, study.StudyRow("MSViT", {}), dense, 5)
    assert (full.model.name, full.training.seed) == (f"run:{dense.run_name}", 5)
    assert (full.training.epochs_dense, full.training.epochs) == (0, 2)
    scratch = study.recipe_of(base, study.without(["pretrained_dense"]), dense, 5)
    assert (scratch.model.name, scratch.training.epochs_dense, scratch.training.epochs) == ("tiny", 0, 5)


def test_the_controller_of_a_study_is_for_its_learned_gates():
    base, dense = Recipe(control="bias"), Recipe(epochs_dense=3, epochs=0)
    held = {by: study.recipe_of(base, study.StudyRow(by, {"gating": by}), dense, 0).gating.control for by in GATINGS}
    assert held == {"learned": "bias", "pattern": "bias", "quota": "none", "random": "none", "fine": "none"}


def test_what_is_left_to_train(tmp_path):
    recipe = Recipe(epochs_dense=3, epochs=2)
    assert epochs_left(recipe, tmp_path) == 5
    path = write_run(tmp_path, epochs_dense=3, epochs=2)
    assert epochs_left(recipe, tmp_path) == 0
    (path / "summary.json").unlink()
    (path / "metrics.jsonl").write_text("{}\n{}\n")
    assert epochs_left(recipe, tmp_path) == 3


def test_maps_are_of_those_that_decide_in_another_way():
    every = labels(one_by_one=True, masks=["coarse", "centre"])
    assert study.who_decides(every) == ["MSViT", "without learned gate", "coarse mask", "centre mask"]
    assert study.who_decides(labels(gbas=False)) == ["without gbas", "random mask"]


def results(seeds=(0, 1, 2)):
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        [
            {
                "run": f"{label}-{seed}", "label": label, "seed": seed, "accuracy": rng.uniform(0.8, 0.9),
                "macs": rng.uniform(0.5, 0.6), "tokens": 35.0, "coarse": 0.6, "seconds": 3.0,
            }
            for label in ("dense_a", "MSViT & co")
            for seed in seeds
        ]
    )  # fmt: skip


def test_means_and_spreads_over_seeds():
    table = results()
    summary = study.summarise(table, "label")
    mine = table[table["label"] == "dense_a"]["accuracy"]
    assert summary.loc["dense_a", "accuracy"] == pytest.approx(mine.mean())
    assert summary.loc["dense_a", "accuracy ±"] == pytest.approx(mine.std(ddof=1))
    assert list(summary.index) == ["dense_a", "MSViT & co"]
    assert not [c for c in study.summarise(results([0]), "label") if "±" in c]


def test_tables_say_the_same_in_three_forms(tmp_path):
    shown = report.write_tables(results(), tmp_path, "t", by="label")
    value = shown.loc["dense_a", "accuracy (%)"]
    assert value in (tmp_path / "t.md").read_text()
    latex = (tmp_path / "t.tex").read_text()
    assert value.replace("±", r"$\pm$") in latex
    assert r"dense\_a" in latex
    assert r"MSViT \& co" in latex
    assert r"accuracy (\%)" in latex
    exact = pd.read_csv(tmp_path / "t.csv", index_col=0).loc["dense_a", "accuracy"]
    assert f"{100 * exact:.1f}" == value.split(" ± ")[0]


def test_the_first_seed_without_its_dense_model():
    table = results().assign(method=lambda t: t["label"].replace({"dense_a": "dense"}))
    assert study.first_seed(table)["run"].tolist() == ["MSViT & co-0"]


@pytest.mark.long
def test_a_report_reads_finished_runs_and_is_the_same_every_time(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "runs", seed=seed)
        write_run(tmp_path / "runs", seed=seed, loss="l0", control="none", trim="none")
    killed = write_run(tmp_path / "runs", seed=9, loss="bas")
    (killed / "summary.json").unlink()
    pages = []
    for out in ("one", "two"):
        page = report.report(tmp_path / "runs", tmp_path / out)
        pages.append({p.relative_to(tmp_path / out): p.read_bytes() for p in sorted((tmp_path / out).rglob("*.*"))})
    assert pages[0] == pages[1]
    text = page.read_text()
    assert "MSViT L0, untrimmed at 0.58" in text
    assert "BaS at" not in text.replace("GBaS at", "")
    own = text.replace(get_plotlyjs(), "")
    assert "http" not in own, "nothing is fetched; what plotly names in its own code is no request"
    assert "4 finished runs" in text
    assert "MSViT GBaS at 0.58" in text, "as people read it"
    points = plotted(text)[0]
    assert sum(len(trace["customdata"]) for trace in points if "customdata" in trace) == 4
    assert "aria-label='Accuracy against MACs, scenes:easy, 64 px'" in text
    assert "settings that differ" in text
    assert "href" not in own


def test_reports_and_choices_without_runs_say_so(tmp_path):
    (tmp_path / "runs").mkdir()
    with pytest.raises(ValueError, match="no finished run"):
        report.report(tmp_path / "runs", tmp_path / "out")
    write_run(tmp_path / "runs")
    found = report.groups(study.finished(tmp_path / "runs"))
    assert study.choose(found) == "scenes:easy, 64 px"
    with pytest.raises(ValueError, match="scenes:hard.*there are scenes:easy, 64 px"):
        study.choose(found, "scenes:hard")


def test_the_pixels_that_the_model_sees():
    import torch

    image, coarse = torch.randn(3, 32, 32), torch.tensor([[True, False], [False, False]])
    seen = as_the_model_sees(image, coarse, 2)
    assert torch.equal(seen[:, 16:], image[:, 16:])
    assert torch.equal(seen[:, :16, 16:], image[:, :16, 16:])
    for y in range(0, 16, 2):
        for x in range(0, 16, 2):
            block = image[:, y : y + 2, x : x + 2].mean((1, 2))
            torch.testing.assert_close(seen[:, y : y + 2, x : x + 2], block[:, None, None].expand(3, 2, 2))
