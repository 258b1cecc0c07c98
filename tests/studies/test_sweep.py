"""Sweeps: a study that several workers share, that survives failures and interruptions, scored on held-out pictures."""

import pandas as pd
import pytest

from msvit import plots
from msvit.plots import interactive
from msvit.studies import sweep
from msvit.training.files import RunError
from msvit.training.recipe import Recipe

TINY = Recipe(train_n=64, val_n=16, batch=16, holdout=0.25, epochs_dense=1, epochs=2)


@pytest.fixture
def storage(tmp_path):
    return str(tmp_path / "study.db")


@pytest.mark.long
def test_a_sweep_goes_on_where_it_was(storage, tmp_path):
    messages = []
    for trials in (2, 3):
        study = sweep.open_study("s", storage, "none")
        sweep.sweep(study, TINY, tmp_path / "runs", trials, message=messages.append)
    table = sweep.table(study)
    assert table["trial"].tolist() == [0, 1, 2]
    assert set(table["state"]) == {"complete"}
    assert table["target"].between(*sweep.SPACE["target"][:2]).all()
    assert (table["value"] - (table["accuracy"] - 0.1 * table["macs"])).abs().max() < 1e-9
    assert len(messages) == 3
    assert len(list((tmp_path / "runs").glob("*dense*/summary.json"))) == 1
    sweep.sweep(study, TINY, tmp_path / "runs", 3, message=messages.append)
    assert len(messages) == 3


@pytest.mark.long
def test_a_failed_trial_is_recorded_and_does_not_stop_the_rest(storage, tmp_path, monkeypatch):
    honest = sweep.train

    def train(recipe, folder, **options):
        if folder.name == "s-0000":
            raise RunError("no luck")
        return honest(recipe, folder, **options)

    monkeypatch.setattr(sweep, "train", train)
    study = sweep.open_study("s", storage, "none")
    sweep.sweep(study, TINY, tmp_path / "runs", 2, message=lambda line: None)
    assert sweep.table(study)["state"].tolist() == ["fail", "complete"]
    assert sweep.table(study)["front"].tolist() == [False, True]


@pytest.mark.long
def test_trials_that_fall_behind_are_pruned(storage, tmp_path, monkeypatch):
    study = sweep.open_study("s", storage, "median")
    monkeypatch.setattr(type(study.pruner), "prune", lambda self, study, trial: trial.number == 1)
    sweep.sweep(study, TINY, tmp_path / "runs", 3, message=lambda line: None)
    assert sweep.table(study)["state"].tolist() == ["complete", "pruned", "complete"]
    assert not (tmp_path / "runs" / "s-0001" / "summary.json").exists()


def test_the_validation_split_is_not_for_tuning(storage, tmp_path):
    with pytest.raises(ValueError, match="holdout=0 would tune on the validation split"):
        sweep.sweep(sweep.open_study("s", storage), TINY.replace(holdout=0.0), tmp_path, 1)
    with pytest.raises(ValueError, match="pruner='best'.*asha, median, none"):
        sweep.open_study("s", storage, "best")


def test_pareto_front_by_definition():
    trials = pd.DataFrame({"accuracy": [0.9, 0.8, 0.9, 0.95, None, 0.7], "macs": [0.5, 0.4, 0.6, 0.9, 0.1, 0.4]})
    assert sweep.pareto(trials["accuracy"], trials["macs"]).tolist() == [True, True, False, True, False, False]


def test_pictures_of_a_sweep():
    trials = pd.DataFrame(
        {"trial": [0, 1, 2], "state": "complete", "accuracy": [0.9, 0.8, None], "macs": [0.6, 0.5, None], "target": 0.5}
    )
    trials["front"] = sweep.pareto(trials["accuracy"], trials["macs"])
    assert "MACs" in plots.front(trials).axes[0].get_xlabel()
    assert len(interactive.front(trials).data[1].x) == 2
    lines = interactive.parallel(trials, ["target"]).data[0].dimensions
    assert [line.label for line in lines] == ["target", "macs", "accuracy"]
    bars = plots.importance({"target": 0.9, "loss_settings.sigma": 0.1}).axes[0]
    assert bars.get_yticklabels()[0].get_text() == "sigma"
