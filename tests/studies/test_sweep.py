"""Sweeps: a study that several workers share, that survives failures and interruptions, scored on held-out pictures."""

from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import sqlalchemy

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


def test_a_study_is_of_one_recipe_space_and_price(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "train", lambda *a, **k: pytest.fail("trained"))
    study = sweep.open_study("s", storage)
    study.set_user_attr(sweep.SETTINGS, sweep._settings(study, TINY, sweep.SPACE, 0.1))

    def refused(words, base=TINY, **how):
        with pytest.raises(ValueError, match=words):
            sweep.sweep(sweep.open_study("s", storage), base, tmp_path, 1, **how)

    refused(r"epochs is 2, not 3, price is 0.1, not 0.5\); name another study", TINY.replace(epochs=3), price=0.5)
    refused("data is 'scenes:easy', not 'scenes:hard'", TINY.replace(data="scenes:hard"))
    other = sweep.SPACE | {"target": sweep.Range(0.5, 0.6)}
    refused(r"space of target is \[0.45, 0.8, False\], not \[0.5, 0.6, False\]", space=other)
    with pytest.raises(pytest.fail.Exception, match="trained"):
        sweep.sweep(sweep.open_study("s", storage), TINY.replace(workers=2), tmp_path, 1)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"price": float("nan")}, "price=nan lies outside"),
        ({"trials": 0}, "trials=0 lies outside"),
        ({"space": {"target": sweep.Range(0.8, 0.4)}}, "target is searched from 0.8 to 0.4; the first must not"),
    ],
)
def test_what_a_sweep_cannot_search(storage, tmp_path, how, words):
    with pytest.raises(ValueError, match=words):
        sweep.sweep(sweep.open_study("s", storage), TINY, tmp_path, **{"trials": 1} | how)


def killed(study, number_of_trials=1):
    """Trials whose worker died an hour ago, as the database then shows them."""
    for _ in range(number_of_trials):
        with pytest.warns(UserWarning, match="Heartbeat of storage is supposed"):
            trial = study.ask()
        with study._storage._backend.engine.begin() as connection:
            connection.execute(sqlalchemy.text(
                f"INSERT INTO trial_heartbeats (trial_id, heartbeat) VALUES ({trial._trial_id}, '2020-01-01 00:00:00')"
            ))  # fmt: skip


def test_killed_trials_do_not_stay_running_and_others_stand_in(storage, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "prepare", lambda *a: None)
    monkeypatch.setattr(sweep, "from_dense", lambda base, folder: base)
    run = SimpleNamespace(summary={"accuracy": 0.5, "macs": 0.5, "coarse": 0.5})
    monkeypatch.setattr(sweep, "train", lambda *a, **k: run)
    study = sweep.open_study("s", storage, "none")
    killed(study, 2)
    sweep.sweep(study, TINY, tmp_path, 2, message=lambda line: None)
    assert sweep.table(study)["state"].tolist() == ["fail", "fail", "complete", "complete"]
    killed(study)
    sweep.sweep(sweep.open_study("s", storage), TINY, tmp_path, 2, message=lambda line: None)
    assert sweep.table(study)["state"].tolist()[-1] == "fail", "also where there is no work"
    sweep.sweep(study, TINY, tmp_path, 3, message=lambda line: None)
    assert sorted(sweep.table(study)["state"]) == ["complete"] * 3 + ["fail"] * 3


def test_all_trials_failing_is_a_failure(storage, tmp_path, monkeypatch):
    def train(*_, **__):
        raise RunError("no luck\nat all")

    monkeypatch.setattr(sweep, "prepare", lambda *a: None)
    monkeypatch.setattr(sweep, "from_dense", lambda base, folder: base)
    monkeypatch.setattr(sweep, "train", train)
    study, said = sweep.open_study("s", storage), []
    with pytest.raises(RunError, match="all trials of the study failed, the first by: no luck"):
        sweep.sweep(study, TINY, tmp_path, 2, message=said.append)
    assert sweep.table(study)["error"].tolist() == ["no luck", "no luck"]
    assert said == ["trial 0: no luck", "trial 1: no luck"]


@pytest.mark.parametrize(
    "storage",
    [
        "postgresql+psycopg://me:secret@127.0.0.1:1/base",
        "nosuch://me:secret@host/base",
        "sqlite:////no/such/folder/study.db",
        "://",
        "file/study.db",
    ],
)
def test_a_database_that_is_down_is_said_in_a_line(monkeypatch, tmp_path, storage):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be used") as caught:
        sweep.open_study("s", storage)
    assert "secret" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


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


@pytest.mark.parametrize("name", ["", "a/b", "../../x", "x" * 300])
def test_a_study_is_called_by_what_can_name_its_trials_folders(storage, tmp_path, name):
    with pytest.raises(ValueError, match="is to name folders too; use 1 to 200 letters, and no /"):
        sweep.open_study(name, storage)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 0}, "epochs=0 trains no gate whose settings could be searched"),
        ({"loss": "l0"}, "the gate loss 'l0' has no setting 'sigma'"),
    ],
)
def test_what_no_trial_could_have_is_known_before_the_dense_stage(storage, tmp_path, monkeypatch, changes, words):
    monkeypatch.setattr(sweep, "train", lambda *a, **k: pytest.fail("trained"))
    with pytest.raises(ValueError, match=words):
        sweep.sweep(sweep.open_study("s", storage), TINY.replace(**changes), tmp_path, 1)


def test_a_storage_that_fails_while_trials_run_is_said_in_a_line(storage, tmp_path, monkeypatch, capfd):
    def train(*_, **__):
        Path(storage).write_bytes(b"no database any more")
        return SimpleNamespace(summary={"accuracy": 0.5, "macs": 0.5, "coarse": 0.5})

    monkeypatch.setattr(sweep, "prepare", lambda *a: None)
    monkeypatch.setattr(sweep, "from_dense", lambda base, folder: base)
    monkeypatch.setattr(sweep, "train", train)
    study = sweep.open_study("s", storage, "none")
    capfd.readouterr()
    with pytest.raises(RunError, match="the storage of the study 's' cannot be used .*; is the database up") as caught:
        sweep.sweep(study, TINY, tmp_path, 1, message=print)
    assert len(str(caught.value).splitlines()) == 1
    assert "Traceback" not in "".join(capfd.readouterr())


def test_failures_of_trials_print_no_traceback(storage, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sweep, "prepare", lambda *a: None)
    monkeypatch.setattr(sweep, "from_dense", lambda base, folder: base)
    monkeypatch.setattr(sweep, "train", lambda *a, **k: 1 / 0)
    with pytest.raises(RunError, match="division by zero"):
        sweep.sweep(sweep.open_study("s", storage, "none"), TINY, tmp_path, 1)
    said = "".join(capfd.readouterr())
    assert "trial 0: division by zero" in said
    assert "Traceback" not in said
