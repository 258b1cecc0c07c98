"""The report: which runs are averaged, and names that may come from anywhere."""

import json
from xml.etree import ElementTree

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from helpers import write_run

from msvit import plots
from msvit.studies import examples, report, segmentation, study
from msvit.studies.params import in_repo
from msvit.training.files import RunBusy, RunError
from msvit.training.recipe import Recipe


def labels(folder):
    """Label -> seeds of the runs that are averaged under it."""
    (found,) = report.groups(study.finished(folder)).values()
    return found.groupby("label", sort=False)["seed"].apply(list).to_dict()


def test_runs_that_differ_in_more_than_the_seed_are_not_averaged(tmp_path):
    for changes in ({}, {"lr": 0.01, "epochs_dense": 9}, {"model": "vit_slim_patch8_64"}, {"train_n": 64}):
        write_run(tmp_path, epochs=0, **changes)
    write_run(tmp_path, epochs=0, seed=1)
    found = labels(tmp_path)
    assert sorted(found.values()) == [[0], [0], [0], [0, 1]]
    told = {"train_n=0", "model=tiny", "epochs_dense=3", "lr=0.001"}
    (both,) = (label for label, seeds in found.items() if len(seeds) == 2)
    assert both.startswith("dense, ")
    assert set(both.split(", ")[1:]) == told
    assert any("lr=0.01" in label for label in found)


def test_the_seed_alone_may_differ_through_the_run_that_was_before(tmp_path):
    """A gated run starts from its seed's dense run, whose name is another for each seed."""
    for lr in (1e-3, 1e-2):
        for seed in (0, 1):
            dense = Recipe(seed=seed, epochs=0, lr=lr)
            write_run(tmp_path, seed=seed, epochs=0, lr=lr)
            write_run(tmp_path, seed=seed, epochs_dense=0, model=f"run:{dense.run_name}")
    found = {label: seeds for label, seeds in labels(tmp_path).items() if label.startswith("MSViT")}
    assert found == {f"MSViT gbas at 0.58, start.lr={lr:g}": [0, 1] for lr in (1e-3, 1e-2)}


def test_lists_and_loss_settings_tell_runs_apart(tmp_path):
    for bits in (5.5, 5.0):
        write_run(tmp_path, gating="apt", rule_settings={"thresholds": [bits, 4.0]})
    write_run(tmp_path, loss_settings={"sigma": 0.2})
    write_run(tmp_path)
    assert len(labels(tmp_path)) == 4


def test_workers_and_device_tell_nothing_apart(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b", seed=1, workers=3, device="cpu")
    assert labels(tmp_path) == {"MSViT gbas at 0.58": [0, 1]}


def test_budgets_of_segmentation_have_names_of_their_own():
    names = [row.label for row in segmentation.rows(Recipe(), [0.6, 0.604, 0.596, 0.58, 0.6])]
    assert names[2::2] == ["gate at 60%", "gate at 60.4%", "gate at 59.6%", "gate at 58%"]


def test_segmentation_compares_with_masks_quotas_and_reducers_at_the_budget():
    found = segmentation.rows(Recipe(task="segment"), [0.5, 0.8], ["entropy", "quota", "algm"])
    assert [row.label for row in found[3:6]] == ["entropy at 50%", "quota at 50%", "algm at 50%"]
    assert [row.changes["gating"] for row in found[3:6]] == ["entropy", "quota", "fine"]
    assert {row.changes["target"] for row in found[2:6]} == {0.5}
    thresholds = [found[k].changes["reducer_settings"]["threshold"] for k in (5, 9)]
    assert thresholds[0] < thresholds[1], "more tokens are merged where less may be spent"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")  # in figures; the font has no Chinese
def test_names_from_anywhere_do_no_harm(tmp_path, monkeypatch):
    odd = ("folder:<b>x</b>\n\x1b[31m", f"folder:{'y' * 240}", "folder:x' onmouseover='alert(1)", "folder:" + "界" * 99)
    for data in ("folder:a-b", "folder:a_b", *odd):
        write_run(tmp_path / "runs", data=data)
    monkeypatch.setattr(report, "method_name", lambda run: "=HYPERLINK(1)\x08\n|x")
    page = report.report(tmp_path / "runs", tmp_path / "out")
    assert "<b>x" not in page.read_text()
    assert "' onmouseover" not in page.read_text()
    tables = sorted((tmp_path / "out/tables").glob("*.csv"))
    assert len(tables) == 6, "a-b and a_b are two"
    for path in tables:
        assert pd.read_csv(path)["label"].tolist() == ["'=HYPERLINK(1)  |x at 0.58"]
        assert len(path.with_suffix(".md").read_text().splitlines()) == 3
    for path in (tmp_path / "out/figures").glob("*.svg"):
        ElementTree.parse(path)


def test_a_picture_with_control_characters_can_be_read(tmp_path):
    figure, axes = plt.subplots()
    axes.set_title("a\x00b\x1b[31m\ud800\nc")
    plots.save(figure, tmp_path, "x", ("svg",))
    ElementTree.parse(tmp_path / "x.svg")
    assert axes.get_title() == "a b [31m \nc"
    plt.close(figure)


def test_csv_holds_no_formulas(tmp_path):
    table = pd.DataFrame({"=a": ["=1+1", "-2", "@x", "+3", "plain", 4.0, -5.0]}, index=["=r", *"bcdefg"])
    report.write_csv(table, tmp_path / "t.csv", index=True)
    lines = (tmp_path / "t.csv").read_text().splitlines()
    assert lines[:3] == [",'=a", "'=r,'=1+1", "b,'-2"]
    assert lines[-1] == "g,-5.0"


def test_a_mistyped_folder_of_runs_is_not_made(tmp_path):
    with pytest.raises(RunError, match="there is no folder .*typo"):
        examples.examples(tmp_path / "typo")
    assert not (tmp_path / "typo").exists()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no finished run under .*empty"):
        examples.examples(tmp_path / "empty")
    path = write_run(tmp_path / "runs")
    examples.examples(tmp_path / "runs")
    assert json.loads((path / "settings.json").read_text())["epochs"] == 5


def test_examples_that_another_process_trains_are_waited_for(tmp_path, monkeypatch):
    monkeypatch.setenv("MSVIT_HOME", str(tmp_path))
    asked = []

    def run_rows(base, rows, seeds, folder):
        asked.append(folder)
        if len(asked) < 3:
            raise RunBusy("another process is training")

    monkeypatch.setattr(examples, "run_rows", run_rows)
    monkeypatch.setattr(examples.time, "sleep", lambda seconds: None)
    examples.examples(in_repo("runs"))
    assert asked == [tmp_path / "runs/examples"] * 3
    write_run(tmp_path / "runs")
    examples.examples(in_repo("runs"))
    assert len(asked) == 3
