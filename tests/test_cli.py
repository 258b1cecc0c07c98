"""The command line: what it prints, what it refuses, and its exit codes."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import write_run

from msvit import __version__, cli, commands
from msvit.reducers.registry import METHODS
from msvit.studies import report
from msvit.training import runs
from msvit.training.evaluate_run import evaluate_run
from msvit.training.files import RunWarning
from msvit.training.recipe import FIELDS, Recipe

SIZES = {"train-n": 32, "val-n": 24, "batch": 16, "epochs-dense": 1, "epochs": 1, "device": "cpu"}
SMALL = [*(f"--{name}={value}" for name, value in SIZES.items()), "--quiet"]


def run(capsys, *words):
    code = cli.main([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli") / "runs"
    assert cli.main(["train", *SMALL, "--runs", str(folder)]) == 0
    return folder


def test_help_names_every_setting_with_its_default(capsys):
    for words in (
        ["--help"],
        ["train", "--help"],
        ["eval", "--help"],
        ["runs", "--help"],
        ["methods", "--help"],
        ["models", "--help"],
        ["bench", "--help"],
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert len(shown.splitlines()) > 4
        if words[0] == "train":
            for name, (_, field) in FIELDS.items():
                assert f"--{name.replace('_', '-')} " in shown
                assert field.metadata["about"].split()[0] in shown
            assert "(default: scenes:easy)" in " ".join(shown.split())


def test_train_prints_what_came_of_it(capsys, tmp_path):
    code, out, err = run(capsys, "train", *SMALL, "--folder", tmp_path / "run")
    assert (code, err) == (0, "")
    assert f"{tmp_path / 'run'}: 2 epochs in" in out
    assert "dense   accuracy" in out
    assert "gbas    accuracy" in out
    assert "of the object's regions" in out
    code, out, err = run(capsys, "train", *SMALL, "--folder", tmp_path / "run", "--json")
    assert code == 0
    assert "is finished already" in err
    result = json.loads(out)
    assert result["finished_before"] is True
    assert result["trained_epochs"] == 2


def test_a_log_gets_a_line_for_each_epoch_and_no_bars(capsys, tmp_path):
    code, _, err = run(capsys, "train", *SMALL[:-1], "--gate-start", "none", "--folder", tmp_path / "run")
    dense, gated = err.splitlines()
    assert code == 0
    assert re.fullmatch(r"epoch 1/2 \(dense\): loss \d\.\d{3}, accuracy [\d.]+ %, MACs 100\.0 %, \d+ s", dense)
    assert gated.startswith("epoch 2/2 (gated): loss ")


def test_the_folder_is_named_by_the_settings(folder):
    name = Recipe(train_n=32, val_n=24, batch=16, epochs_dense=1, epochs=1).run_name
    assert [p.name for p in folder.iterdir()] == [name]


def test_runs_is_a_table(folder, capsys):
    code, out, _ = run(capsys, "runs", folder)
    assert code == 0
    assert out.split()[:4] == ["id", "method", "data", "budget"]
    assert "MSViT gbas" in out
    assert "finished" in run(capsys, "runs", folder, "--wide")[1]
    code, out, _ = run(capsys, "runs", folder, "--json")
    rows = json.loads(out)
    assert (rows[0]["status"], rows[0]["batch"], rows[0]["loss_weight"]) == ("finished", 16, None)


def test_eval_gives_the_figures_of_the_run_and_others(folder, capsys):
    path = next(folder.iterdir())
    summary = json.loads((path / "summary.json").read_text())
    code, out, _ = run(capsys, "eval", path, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["accuracy"] == summary["accuracy"]
    assert found["macs"] == summary["macs"]
    fine = json.loads(run(capsys, "eval", path, "--json", "--threshold", "1")[1])
    assert fine["coarse"] == 0
    coarse = json.loads(run(capsys, "eval", path, "--json", "--gating", "coarse", "--val-n", "10")[1])
    assert (coarse["coarse"], coarse["pictures"]) == (1, 10)
    half = json.loads(run(capsys, "eval", path, "--json", "--macs", "0.5", "--val_n=24")[1])
    assert abs(half["macs"] - 0.5) < 0.1
    assert "accuracy" in run(capsys, "eval", path)[1]
    code, _, err = run(capsys, "eval", path, "--aspect", "keep")
    assert (code, "aspect='keep' is for pictures in files" in err) == (2, True)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_export_writes_graphs_and_compares_them(folder, tmp_path, capsys):
    path = next(folder.iterdir())
    code, out, _ = run(capsys, "export", path, "--format", "torch", "--out", tmp_path, "--json")
    lines = json.loads(out)
    assert code == 0
    assert [line["part"] for line in lines] == ["gate", "masked", "packed"]
    assert all(line["difference"] < 1e-4 and Path(line["file"]).parent == tmp_path for line in lines)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gate.pt2", "masked.pt2", "packed.pt2"]
    code, _, err = run(capsys, "export", tmp_path)
    assert code == 1


def test_models_are_listed(capsys):
    code, out, _ = run(capsys, "models", "*small*dinov3")
    assert code == 0
    assert out.splitlines()[0].split() == ["name", "patch", "size", "tokens", "positions"]
    assert out.splitlines()[-1] == "2 of 2 names work"
    assert "vit_small_patch16_dinov3" in out
    found = {row["name"]: row for row in json.loads(run(capsys, "models", "vit_small_patch16_18x2*", "--json")[1])}
    assert found["vit_small_patch16_18x2_224"]["refused"].startswith("VisionTransformer has ['ParallelThingsBlock']")
    code, _, err = run(capsys, "models", "swin_tiny*")
    assert code == 2
    assert "none is a plain vision transformer" in err


def test_methods_are_listed(capsys):
    code, out, _ = run(capsys, "methods")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["method", *METHODS]
    assert json.loads(run(capsys, "methods", "--json")[1])[0]["method"] == "gate"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["train", "--epoch", "3"], 2, "--epoch is unknown here; the nearest is --epochs"),
        (["train", "--data", "scnes:easy"], 2, "the nearest is 'scenes:easy'"),
        (["train", "--lr", "0", "--gate-lr", "0"], 2, "leave nothing to train"),
        (["train", "--target", "0.1"], 2, "target=0.1 cannot be met"),
        (["runs", "no/such/folder"], 1, "there is no folder no/such/folder"),
        (["eval", "no/such/run"], 1, "is no run: it has no settings.json"),
    ],
)
def test_mistakes_are_said_in_a_line(capsys, monkeypatch, tmp_path, words, code, said):
    monkeypatch.chdir(tmp_path)
    got, out, err = run(capsys, *words)
    assert (got, out) == (code, "")
    assert said in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--target", "1.5"], r"target=1.5: expected a number in (0, 1)"),
        (["train", "--trim", "maybe"], r"trim='maybe': expected margin or batch or none"),
        (["train", "--gating", "lerned"], r"the nearest is 'learned'"),
        (["train", "--loss-settings", "sigma"], r"'sigma' is no name=value"),
        (["trian"], "invalid choice: 'trian'"),
        ([], "the following arguments are required: COMMAND"),
        (["eval", "x", "--macs", "0.5", "--threshold", "0.5"], "not allowed with"),
    ],
)
def test_argparse_ends_with_two(capsys, words, said):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("typed", "code", "said"),
    [
        (["--macs", "0.01"], 2, "macs=0.01 cannot be met"),
        (["--macs", "1.5"], 2, "macs=1.5 cannot be met"),
        (["--threshold", "2"], 2, "threshold=2.0: m lies in"),
        (["--threshold", "nan"], 2, "threshold=nan"),
        (["--macs", "0.5", "--gating", "random"], 2, "random"),
        (["--macs", "0.5", "--gating", "oracle"], 2, "'oracle', which has no budget"),
    ],
)
def test_eval_refuses_what_it_would_ignore(folder, capsys, typed, code, said):
    got, _, err = run(capsys, "eval", next(folder.iterdir()), *typed)
    assert got == code
    assert said in err
    assert len(err.splitlines()) == 1


def test_published_weights_without_a_network(capsys, monkeypatch, tmp_path):
    """The tests have none, see `conftest`; here nothing was downloaded before either."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    words = ["--model", "vit_tiny_patch16_224", "--size", "64", "--pretrained"]
    code, out, err = run(capsys, "train", *SMALL, *words, "--folder", tmp_path / "run")
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "the published weights of model='vit_tiny_patch16_224' cannot be had" in err
    assert "is there a network?" in err
    assert not (tmp_path / "run").exists()


def test_a_reader_that_goes_is_no_error(folder, capsys, monkeypatch):
    """As of `msvit runs --json | head`."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert cli.main(["runs", str(folder), "--json"]) == 141
    assert capsys.readouterr().err == ""


def test_standard_output_may_be_full_closed_or_of_few_letters(tmp_path):
    """In a fresh interpreter, whose last flush counts too; the command is one that imports nothing."""
    code = (
        "import sys; from msvit import cli, commands; "
        "commands.methods = lambda _: print(chr(0x2026) * 99, chr(0xDC80)); sys.exit(cli.main(['methods']))"
    )

    def started(how, **environment):
        command = f'exec "{sys.executable}" -c "{code}" {how}'
        return subprocess.run(["sh", "-c", command], capture_output=True, text=True, env=os.environ | environment)

    full = started(">/dev/full")
    assert full.returncode == 1
    remedy = "make room there, or name a place that can be read and written"
    assert full.stderr == f"msvit: No space left on device; {remedy}\n"
    closed = started(">&-")
    assert (closed.returncode, closed.stderr) == (0, "")
    few = started("", PYTHONIOENCODING="ascii")
    assert (few.returncode, few.stderr) == (0, "")
    assert few.stdout == r"\u2026" * 99 + r" \udc80" + "\n"


def test_classes_of_other_names_are_not_compared_in_silence(folder, tmp_path):
    path = shutil.copytree(next(folder.iterdir()), tmp_path / "run")
    summary = json.loads((path / "summary.json").read_text())
    assert evaluate_run(path)["accuracy"] == summary["accuracy"]
    first = summary["classes"][0]
    (path / "summary.json").write_text(json.dumps(summary | {"classes": ["cat", *summary["classes"][1:]]}))
    with pytest.warns(RunWarning, match=f"have other names .'{first}' is 'cat' there.; answers are compared by number"):
        evaluate_run(path)


def test_what_the_system_refuses_is_one_line(capsys, monkeypatch, tmp_path):
    def refuse(arguments):
        (tmp_path / "no/such/file").read_bytes()

    monkeypatch.setattr(commands, "methods", refuse)
    code, _, err = run(capsys, "methods")
    assert code == 1
    assert err.startswith(f"msvit: {tmp_path}/no/such/file: No such file or directory; ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("words", [["export"], ["export", "--out", "new"], ["eval"], ["bench", "--run"]])
def test_a_run_without_its_model_is_said_in_a_line(tmp_path, monkeypatch, capsys, words):
    monkeypatch.chdir(tmp_path)
    path = write_run(tmp_path / "runs")
    code, _, err = run(capsys, *words, path)
    assert code == 1
    assert err.endswith("; train again, or name another run\n")
    assert len(err.splitlines()) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["runs"]


def test_a_message_is_one_line_whatever_names_are_in_it(capsys):
    assert commands.print_error("a\nb\x1b[31m", 3) == 3
    assert capsys.readouterr().err == "msvit: a b [31m\n"


def test_the_table_of_runs_shows_no_control_characters(tmp_path, capsys):
    (tmp_path / "a\nb\x1b[31m").mkdir()
    (tmp_path / "a\nb\x1b[31m" / "settings.json").write_text("{")
    code, out, _ = run(capsys, "runs", tmp_path)
    assert (code, len(out.splitlines())) == (0, 2)
    assert "\x1b" not in out


def test_typed_values_become_settings():
    arguments = cli._parser().parse_args(
        [
            "train",
            "--trim",
            "none",
            "--pretrained",
            "--loss-weight",
            "none",
            "--loss-settings",
            "sigma=0.2",
            "prior=beta",
        ]
    )
    settings = Recipe.from_dict(commands.typed_settings(arguments))
    assert settings == Recipe(trim="none", pretrained=True, loss_settings={"sigma": 0.2, "prior": "beta"})


def test_interrupted_says_how_to_go_on(capsys, monkeypatch, tmp_path):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("msvit.training.loop.train", stop)
    code, _, err = run(capsys, "train", "--runs", tmp_path)
    assert code == 130
    assert "the same command continues" in err


@pytest.mark.long
def test_the_program_runs_without_notebook_packages():
    """In a fresh interpreter in which importing one of them fails."""
    code = """
import sys
from pathlib import Path
for name in ("IPython", "ipywidgets", "matplotlib", "plotly", "papermill", "optuna", "anywidget", "jupyterlab"):
    sys.modules[name] = None
from msvit.cli import main
import msvit.training.loop
sys.exit(main(["--version"]))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"msvit {__version__}"


def test_a_run_is_called_by_its_settings_in_reports(folder):
    """The summary has a loss too, that on the validation pictures."""
    table = runs.load(folder)
    assert table["loss"].tolist() == ["gbas"]
    assert 0 < table["val_loss"][0] < 10
    (found,) = report.groups(table).values()
    assert found["method"].tolist() == ["MSViT gbas"]
