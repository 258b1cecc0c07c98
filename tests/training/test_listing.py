"""What runs are called, and the list that `msvit runs` prints."""

import json
import os
import time

import pytest

from msvit import cli
from msvit.training import listing
from msvit.training.names import short_name
from msvit.training.recipe import Recipe, RecipeError


def write(folder, accuracy, age, **settings):
    """A finished run as training leaves it, without the training, from so many seconds ago."""
    recipe = Recipe(**settings)
    path = folder / recipe.run_name
    path.mkdir(parents=True)
    (path / "settings.json").write_text(json.dumps(recipe.to_dict()))
    (path / "summary.json").write_text(json.dumps({"accuracy": accuracy, "macs": recipe.gating.target, "tokens": 30.0}))
    os.utime(path / "summary.json", (time.time() - age,) * 2)
    return path


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, 0.9, 100, seed=0)
    write(tmp_path, 0.8, 7200, seed=1, loss="l0", data="scenes:middle")
    write(tmp_path, 0.95, 10, epochs=0)
    very_long = "folder:/data/" + "x" * 90
    write(tmp_path, 0.7, 3 * 86400, data=very_long, gating="random", reducer="tome", control="bias", trim="batch")
    return tmp_path


def test_a_run_has_one_short_name():
    recipe = Recipe()
    assert short_name(recipe) == f"MSViT gbas · 58 % · seed 0 · {recipe.run_name[-6:]}"
    assert short_name(Recipe(epochs=0, seed=3)).startswith("dense · seed 3 · ")


def test_the_newest_comes_first_or_the_best(folder):
    assert listing.table(folder)["accuracy"].tolist() == [0.95, 0.9, 0.8, 0.7]
    assert listing.table(folder, sort="seed")["accuracy"].tolist()[-1] == 0.8
    by_accuracy = listing.table(folder, sort="accuracy")
    assert by_accuracy["method"].tolist() == ["dense", "MSViT gbas", "MSViT l0", "random mask + tome"]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (["data=scenes:easy"], [0.95, 0.9]),
        (["accuracy>0.75", "accuracy<=0.9"], [0.9, 0.8]),
        (["method=msvit L0"], [0.8]),
        (["seed=1"], [0.8]),
        (["epochs!=0", "data!=scenes:middle"], [0.9, 0.7]),
        (["accuracy>2"], []),
    ],
)
def test_conditions_choose(folder, where, expected):
    assert listing.table(folder, where)["accuracy"].tolist() == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--where", "acuracy>0.5"], "the nearest is 'accuracy'"),
        (["--where", "accuracy"], "expected NAME=VALUE"),
        (["--where", "accuracy>good"], "'good' is no number"),
        (["--sort", "macz"], "the nearest is 'macs'"),
    ],
)
def test_what_is_not_there_is_said_in_a_line(folder, capsys, words, said):
    assert cli.main(["runs", str(folder), *words]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert len(message.splitlines()) == 1


def test_the_list_fits_a_terminal(folder, capsys):
    assert cli.main(["runs", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert max(map(len, lines)) <= 100
    assert lines[0].split() == ["id", "method", "data", "budget", "seed", "acc.", "%", "MACs", "%", "age"]
    assert "2 h" in lines[3]
    assert "3 d" in lines[4]
    assert cli.main(["runs", str(folder), "--wide"]) == 0
    assert Recipe().run_name in capsys.readouterr().out


def test_runs_that_are_not_whole_are_listed_too(folder):
    (next(folder.iterdir()) / "settings.json").write_text("{")
    unfinished = write(folder, 0.5, 1, seed=7)
    (unfinished / "summary.json").unlink()
    assert len(listing.text(listing.table(folder)).splitlines()) == 6


def test_two_runs_are_told_apart(tmp_path, capsys):
    one, two = (write(tmp_path, 0.9 - seed / 10, 1, seed=seed) for seed in (0, 1))
    assert cli.main(["diff", str(one), str(two), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["what"], row["name"]) for row in rows] == [("setting", "seed"), ("result", "accuracy")]
    assert [rows[1][str(one)], rows[1][str(two)]] == [0.9, 0.8]
    assert cli.main(["diff", str(one), str(one)]) == 0
    assert "the same" in capsys.readouterr().out
    with pytest.raises(RecipeError, match="where='x'"):
        listing.table(tmp_path, ["x"])


@pytest.mark.parametrize("value", ["x", [1], {"a": 1}, 10**400], ids=["text", "list", "object", "beyond all numbers"])
def test_results_that_are_no_numbers_are_damage(folder, capsys, value):
    """A run may come from anywhere; one of them must not hide the others."""
    (folder / Recipe().run_name / "summary.json").write_text(json.dumps({"accuracy": value, "macs": 0.5}))
    for words in (["--wide"], ["--sort", "accuracy"], ["--where", "accuracy>0.1"], ["--json"]):
        assert cli.main(["runs", str(folder), *words]) == 0
    assert "0.95" in capsys.readouterr().out
    table = listing.table(folder)
    assert table["reason"].dropna().str.contains("summary.json is damaged").sum() == 1


def test_what_is_no_file_among_a_runs_files_is_damage(folder):
    """A pipe would be waited for."""
    os.remove(folder / Recipe().run_name / "summary.json")
    os.mkfifo(folder / Recipe().run_name / "summary.json")
    os.mkfifo(folder / Recipe(epochs=0).run_name / "metrics.jsonl")
    (folder / "no").mkdir()
    os.mkfifo(folder / "no/settings.json")
    table = listing.table(folder)
    assert (table["status"] == "damaged").sum() == 3
    assert table["reason"].dropna().str.contains("is no regular file").all()
    assert listing.text(table, wide=True)


def test_settings_of_runs_have_no_control_characters_in_the_list(tmp_path, capsys):
    write(tmp_path, None, 1, model="\x1b[31mred", loss="\x1b[32m", data="folder:\n\x1b[33m")
    write(tmp_path, True, 1)
    assert cli.main(["runs", str(tmp_path), "--wide"]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert len(said.splitlines()) == 3


def test_a_column_of_words_and_numbers_is_sorted_too(folder):
    (folder / Recipe().run_name / "summary.json").write_text('{"mine": 1}')
    (folder / Recipe(epochs=0).run_name / "summary.json").write_text('{"mine": "x"}')
    assert len(listing.table(folder, sort="mine")) == 4


def test_names_that_are_no_text_are_spelt_out(tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"\xff")
    write(folder, 0.9, 1)
    for words in (["--json"], ["--wide"], []):
        assert cli.main(["runs", str(folder.parent), *words]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n]")[0] + "]")[0]["run"].startswith("\\udcff/")


def test_runs_that_are_called_like_a_column_are_compared(tmp_path, capsys, monkeypatch):
    for seed, name in enumerate(("what", "name")):
        write(tmp_path, 0.9, 1, seed=seed).rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["diff", "what", "name", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == [{"what": "setting", "name": "seed", "first": 0, "second": 1}]
    assert cli.main(["diff", "what", "what", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
