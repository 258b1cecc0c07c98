"""Runs on disk: whole files or none, damage noticed and named, and all runs as one table."""

import contextlib
import errno
import json
import os
import pickle
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch

import msvit
from msvit.training import runs
from msvit.training.environment import environment
from msvit.training.files import RunError, RunWarning, digest
from msvit.training.recipe import Recipe
from msvit.training.runs import RunFolder

LINE = {"epoch": 1, "stage": "dense", "train_loss": 0.5, "curve": [1.0, 0.5]}


@pytest.fixture
def folder(tmp_path):
    records = RunFolder(tmp_path / "run")
    records.open(Recipe())
    yield records
    records.close()


def state(epoch):
    return {"history": [LINE] * epoch, "weights": torch.full((3,), float(epoch))}


def files(folder):
    return sorted(p.name for p in (folder.path / "state").iterdir())


def test_open_refuses_another_run_and_another_folder(folder, tmp_path):
    folder.append(LINE)
    settings = (folder.path / "settings.json").read_bytes()
    folder.close()
    with pytest.raises(
        RunError, match=r"other settings \(lr is 0.001, not 0.01, seed is 0, not 1\); nothing was changed"
    ):
        RunFolder(folder.path).open(Recipe(lr=0.01, seed=1))
    assert (folder.path / "settings.json").read_bytes() == settings
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    with pytest.raises(RunError, match=r"is no run but has 'chapter.tex' in it; choose a new or an empty folder"):
        RunFolder(tmp_path / "thesis").open(Recipe())
    assert os.listdir(tmp_path / "thesis") == ["chapter.tex"]


def test_a_run_that_never_made_an_epoch_gives_its_folder_up(folder):
    folder.note({"started": "now"})
    folder.close()
    other = RunFolder(folder.path)
    assert not other.check(Recipe(seed=1))
    assert not other.open(Recipe(seed=1))
    assert runs.read_recipe(folder.path) == Recipe(seed=1)
    assert not (folder.path / "environment.json").exists(), "it was another run's"
    other.save_state(1, state(1))
    other.close()
    with pytest.raises(RunError, match="other settings"):
        RunFolder(folder.path).check(Recipe())


def test_what_another_process_finished_meanwhile_is_seen_behind_the_lock(folder):
    assert not RunFolder(folder.path).check(Recipe())
    folder.append(LINE)
    folder.finish({"accuracy": 0.5})
    folder.close()
    late = RunFolder(folder.path)
    assert late.open(Recipe()) is True
    late.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*use of fork.*:DeprecationWarning")
def test_what_was_forked_does_not_hold_the_lock(folder):
    """As loaders are, which live on for seconds when the process that trained is killed."""
    child = os.fork()
    if not child:
        time.sleep(60)
        os._exit(0)
    try:
        folder.close()  # as the kernel does for a process that is killed
        again, deadline = RunFolder(folder.path), time.monotonic() + 5
        while time.monotonic() < deadline:  # the child needs a moment to come to life
            with contextlib.suppress(RunError):
                again.open(Recipe())
                break
            time.sleep(0.05)
        assert again._lock is not None
        again.close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_workers_may_change_and_one_process_writes(folder):
    with pytest.raises(RunError, match="another process is training in"):
        RunFolder(folder.path).open(Recipe())
    folder.close()
    again = RunFolder(folder.path)
    again.open(Recipe(workers=2))
    again.close()


def test_a_start_that_died_early_is_no_obstacle(tmp_path):
    (tmp_path / ".lock").touch()
    (tmp_path / "settings.json.tmp").write_text('{"lr"')
    records = RunFolder(tmp_path)
    records.open(Recipe())
    assert runs.read(tmp_path).recipe == Recipe()
    records.close()


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match=r"file/run cannot be written \(Not a directory\); choose another folder"):
        RunFolder(tmp_path / "file" / "run").open(Recipe())


def test_the_last_two_states_are_kept(folder):
    assert folder.load_state() is None
    for epoch in (1, 2, 3):
        folder.save_state(epoch, state(epoch))
    assert [name[:5] for name in files(folder)] == ["00002", "00003"]
    assert torch.equal(folder.load_state()["weights"], state(3)["weights"])


@pytest.mark.parametrize("damage", ["torn", "flipped", "empty"])
def test_a_damaged_state_is_named_and_the_one_before_used(folder, damage):
    for epoch in (1, 2):
        folder.save_state(epoch, state(epoch))
    path = folder.path / "state" / files(folder)[-1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes({"torn": data[: len(data) // 2], "flipped": data, "empty": b""}[damage])
    with pytest.warns(RunWarning, match=f"{path.name} is damaged .*; the state before it is used"):
        assert torch.equal(folder.load_state()["weights"], state(1)["weights"])
    assert folder.last_state().endswith(files(folder)[0])
    folder.save_state(2, state(2))
    assert torch.equal(folder.load_state()["weights"], state(2)["weights"])
    assert len(files(folder)) == 2


def test_what_is_lost_and_what_is_used_instead_is_said(folder):
    folder.save_state(1, state(1))
    (path,) = (folder.path / "state").iterdir()
    path.write_bytes(b"torn")
    with pytest.warns(RunWarning, match="is damaged .*; the run starts from zero"):
        assert folder.load_state() is None
    path.unlink()
    folder.append(LINE)
    with pytest.warns(RunWarning, match="1 epochs on record, but no state to go on from; the run starts from zero"):
        assert folder.load_state() is None


class Evil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


def test_a_foreign_pickle_is_refused(folder, tmp_path, monkeypatch):
    """Even one whose name holds the right hash; and its code does not run."""
    monkeypatch.chdir(tmp_path)
    folder.save_state(1, state(1))
    data = pickle.dumps({"weights": Evil()}, protocol=2)
    (folder.path / "state" / f"00002-{digest(data)}.pt").write_bytes(data)
    with pytest.warns(RunWarning, match="00002.*is damaged"):
        assert torch.equal(folder.load_state()["weights"], state(1)["weights"])
    assert not (tmp_path / "pwned").exists()


def test_metrics_are_mended_from_the_state(folder):
    lines = [LINE | {"epoch": e} for e in (1, 2)]
    for line in lines:
        folder.append(line)
    assert runs.read_metrics(folder.path) == lines
    path = folder.path / "metrics.jsonl"
    whole = path.read_bytes()
    for torn in (whole[:-20], whole[:-1], whole + b'{"epo', b""):
        path.write_bytes(torn)
        if torn[-1:] not in (b"", b"}"):
            with pytest.warns(RunWarning, match=r"metrics.jsonl: line \d is damaged"):
                folder.restore(lines)
        else:
            folder.restore(lines)
        assert path.read_bytes() == whole
    folder.restore(lines[:1])  # the state of epoch 2 was damaged: it will be trained, and recorded, again
    assert runs.read_metrics(folder.path) == lines[:1]


def contents(folder):
    """All files but the metrics, which may keep a torn line: it is mended before the next epoch."""
    return {p: p.read_bytes() for p in folder.path.rglob("*") if p.is_file() and p.name != "metrics.jsonl"}


@pytest.mark.parametrize("what", ["state", "metrics", "model"])
def test_a_full_disk_leaves_what_was_there(folder, monkeypatch, what):
    folder.save_state(1, state(1))
    folder.append(LINE)
    model = msvit.MSViT(timm.create_model("vit_mini_patch8_64"))
    before = contents(folder)

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    act = {
        "state": lambda: folder.save_state(2, state(2)),
        "metrics": lambda: folder.append(LINE),
        "model": lambda: folder.save_model(model),
    }[what]
    with pytest.raises(
        RunError, match=r"could not be written \(No space left on device\). The last good state is .*00001"
    ):
        act()
    monkeypatch.undo()
    assert contents(folder) == before
    assert torch.equal(folder.load_state()["weights"], state(1)["weights"])


@pytest.mark.long
def test_a_file_limit_of_the_system_is_such_an_error(tmp_path):
    """The real thing: the kernel refuses the write half-way."""
    pytest.importorskip("resource")
    code = """
import resource, sys, torch
from msvit.training.recipe import Recipe
from msvit.training.files import RunError
from msvit.training.runs import RunFolder
folder = RunFolder(sys.argv[1])
folder.open(Recipe())
folder.save_state(1, {"x": torch.zeros(10)})
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
try:
    folder.save_state(2, {"x": torch.zeros(100000)})
except RunError as error:
    print(error)
print(sorted(p.name[:5] for p in (folder.path / "state").iterdir()))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, check=True
    )
    assert "could not be written (File too large)" in done.stdout
    assert done.stdout.splitlines()[-1] == "['00001']"


def finish(folder, **summary):
    folder.write_json("summary.json", summary)


def test_load_makes_one_table(tmp_path):
    recipes = {"a": Recipe(loss_settings={"sigma": 0.2}), "b/c": Recipe(seed=1), "d": Recipe(seed=2), "e": Recipe()}
    for name, recipe in recipes.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        records = RunFolder(tmp_path / name)
        records.open(recipe)
        records.append(LINE)
        if name != "d":
            finish(records, accuracy=0.9, macs=0.5, curve=[1, 2])
        records.close()
    (tmp_path / "e" / "settings.json").write_text('{"lr": 0.')
    table = runs.load(tmp_path).set_index("run")
    assert dict(table["status"]) == {"a": "finished", "b/c": "finished", "d": "unfinished", "e": "damaged"}
    assert "settings.json is damaged" in table.loc["e", "reason"]
    assert table.loc["a", "loss_settings.sigma"] == 0.2
    assert table.loc["a", "accuracy"] == 0.9
    assert table.loc["d", "train_loss"] == 0.5
    assert "curve" not in table
    assert list(table.loc[["a", "b/c", "d"], "seed"]) == [0, 1, 2]


def test_load_of_nothing(tmp_path):
    assert list(runs.load(tmp_path)) == ["run", "status"]
    with pytest.raises(RunError, match="there is no folder"):
        runs.load(tmp_path / "no")
    with pytest.raises(RunError, match="is no run: it has no settings.json"):
        runs.read(tmp_path)


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "[" * 100_000])
@pytest.mark.parametrize("name", ["settings.json", "summary.json"])
def test_json_that_is_no_object_is_damage(folder, name, text):
    (folder.path / name).write_text(text)
    with pytest.raises(RunError, match=f"{name} is damaged"):
        runs.read(folder.path)
    assert runs.load(folder.path.parent)["status"].tolist() == ["damaged"]


def test_lists_among_settings_are_in_the_table(folder):
    folder.close()
    other = RunFolder(folder.path)
    other.open(Recipe(gating="apt", rule_settings={"thresholds": [5.5, 5.0]}))
    other.close()
    assert runs.load(folder.path.parent)["rule_settings.thresholds"].tolist() == ["[5.5, 5.0]"]


def test_names_that_no_file_can_have(tmp_path):
    long = tmp_path / ("x" * 300)
    with pytest.raises(RunError, match="there is no folder"):
        runs.load(long)
    with pytest.raises(RunError, match="is no run"):
        runs.read(long)
    with pytest.raises(RunError, match="cannot be written .File name too long."):
        RunFolder(long).open(Recipe())
    assert len(Recipe(data=f"folder:/{'x' * 300}").run_name) < 200


def test_a_model_needs_no_temporary_folder(folder, monkeypatch):
    monkeypatch.setattr("tempfile.mkdtemp", lambda *a, **k: pytest.fail("asked for a temporary folder"))
    folder.save_model(msvit.MSViT(timm.create_model("vit_mini_patch8_64")), "dense")
    assert sorted(p.name for p in (folder.path / "dense").iterdir()) == ["config.json", "model.safetensors"]


def test_a_damaged_summary_is_named(folder):
    (folder.path / "summary.json").write_text("{")
    with pytest.raises(RunError, match="summary.json is damaged"):
        runs.read(folder.path)


def test_the_environment_is_json_and_names_versions(folder):
    folder.note(environment(torch.device("cpu"), 1))
    folder.note(environment(torch.device("cpu"), 2))
    starts = json.loads((folder.path / "environment.json").read_text())
    assert [start["processes"] for start in starts] == [1, 2]
    assert starts[0]["torch"].split("+")[0] == torch.__version__.split("+")[0]
