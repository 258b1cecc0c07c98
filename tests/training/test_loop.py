"""Training: what a run leaves, what it refuses, and how it fails. Killing and continuing is in test_resume.py."""

import copy
import errno
import json
import os
import pickle
import shutil
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import timm
import torch
from helpers import write_folder
from safetensors.torch import save_file
from timm.optim import muon

import msvit
from msvit.checks import in_interval
from msvit.data.holdout import Subset
from msvit.data.loaders import set_epoch
from msvit.evaluation.evaluate import evaluate
from msvit.training import runs
from msvit.training.budget import Budget
from msvit.training.build import build, fit_head, load_data
from msvit.training.evaluate_run import evaluate_run
from msvit.training.files import RunError, RunWarning
from msvit.training.loop import Trainer, _accelerator, train
from msvit.training.objectives import TRIMS, Gated, Objective
from msvit.training.recipe import Recipe, RecipeError
from msvit.training.stage import Stage, make_descent

# Four steps an epoch of a few milliseconds each.
SMALL = Recipe(train_n=64, val_n=48, batch=16, epochs_dense=1, epochs=2, device="cpu")


def weights(folder):
    return msvit.MSViT.from_pretrained(str(folder)).state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run that several tests look at."""
    torch.manual_seed(0)
    return train(SMALL, tmp_path_factory.mktemp("runs") / "small", progress=False)


@pytest.mark.long
def test_a_run_leaves_all_that_was_promised(finished):
    assert [(line["epoch"], line["stage"]) for line in finished.metrics] == [(1, "dense"), (2, "gated"), (3, "gated")]
    assert all(len(line["curve"]) == 4 for line in finished.metrics)
    names = {p.name for p in finished.folder.iterdir()}
    promised = {
        "settings.json",
        "environment.json",
        "metrics.jsonl",
        "summary.json",
        "model.safetensors",
        "dense",
    }
    assert promised <= names
    assert "state" not in names, "a finished run holds nothing that only training needs"
    assert not [name for name in names if name.endswith(".tmp")]
    assert runs.read(finished.folder) == finished
    assert finished.recipe == SMALL
    assert finished.summary["accuracy"] == finished.metrics[-1]["val_accuracy"]
    assert finished.summary["dense_accuracy"] == finished.metrics[0]["val_accuracy"]
    assert finished.summary["classes"][0] == "rows"


def test_the_saved_model_is_the_one_that_was_evaluated(finished):
    found = evaluate_run(finished.folder)
    assert {name: finished.summary[name] for name in found} == found
    assert not same(weights(finished.folder), weights(finished.folder / "dense"))


def test_a_finished_run_is_only_read(finished, monkeypatch):
    monkeypatch.setattr("msvit.training.loop.Trainer", None)
    assert train(SMALL, finished.folder) == finished


def test_other_settings_change_nothing(finished):
    before = (finished.folder / "settings.json").stat().st_mtime_ns
    with pytest.raises(RunError, match=r"other settings \(seed is 0, not 7\)"):
        train(SMALL.replace(seed=7), finished.folder)
    assert (finished.folder / "settings.json").stat().st_mtime_ns == before


@pytest.mark.long
def test_the_same_recipe_gives_the_same_run_and_another_seed_another(finished, tmp_path):
    again = train(SMALL.replace(workers=2), tmp_path / "again", progress=False)
    assert same(weights(again.folder), weights(finished.folder))
    other = train(SMALL.replace(seed=1), tmp_path / "other", progress=False)
    assert not same(weights(other.folder), weights(finished.folder))


@pytest.mark.long
def test_a_stage_alone_starts_from_the_run_beside(finished):
    """Dense and gated in one run, or in two with the second starting from the first."""
    second = SMALL.replace(epochs_dense=0, epochs=1, model=f"run:{finished.folder.name}/dense", lr=0.0, gate_lr=1e-3)
    run = train(second, finished.folder.parent / "second", progress=False)
    dense, now = weights(finished.folder / "dense"), weights(run.folder)
    assert all(torch.equal(now[k], dense[k]) for k in now if k.startswith("vit."))
    assert not all(torch.equal(now[k], dense[k]) for k in now if k.startswith("gate.mlp"))


@pytest.mark.long
def test_a_frozen_gate_stays_and_decides_without_noise(finished):
    frozen = SMALL.replace(epochs_dense=0, epochs=1, gate=str(finished.folder), gate_lr=0.0)
    run = train(frozen, finished.folder.parent / "frozen", progress=False)
    old, new = weights(finished.folder), weights(run.folder)
    assert all(torch.equal(new[k], old[k]) for k in new if k.startswith("gate."))
    assert not torch.equal(new["vit.head.weight"], old["vit.head.weight"])
    assert "train_gate" not in run.metrics[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"data": "scnes:easy"}, "the nearest is 'scenes:easy'"),
        ({"data": "folder:/no/such/place"}, "there is no folder '/no/such/place'"),
        ({"model": "deit_tiny_patch16_223"}, "did you mean deit_tiny_patch16_224"),
        ({"model": "resnet18"}, "use a plain vision transformer"),
        ({"model": "run:nothing"}, "'run:nothing' is no model of timm, no folder and no hub id"),
        ({"loss": "gbs"}, "the nearest is 'gbas'"),
        ({"loss_settings": {"sigm": 0.1}}, "the nearest is 'sigma'"),
        ({"reducer": "dynamicvi"}, "nearest is 'dynamicvit'"),
        ({"target": 0.2}, "target=0.2 cannot be met.*with all regions coarse"),
        ({"size": 60}, "whole number of coarse patches of 16 px; use 48"),
        ({"checkpoint": "no.safetensors"}, "there is no such file"),
        ({"gate": "no/such/folder"}, "'no/such/folder' is no model"),
    ],
)
def test_what_is_wrong_comes_out_before_anything_is_written(tmp_path, settings, words):
    with pytest.raises(RecipeError, match=words):
        train(SMALL.replace(**settings), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, monkeypatch):
    recipe = SMALL.replace(epochs_dense=3, epochs=0)
    real = Stage.step

    def step(self, epoch, step, images, targets, indices):
        if (epoch, step) == (1, 2):
            images[3, 0, 5, 5] = float("inf")
        return real(self, epoch, step, images, targets, indices)

    monkeypatch.setattr(Stage, "step", step)
    with pytest.raises(RunError) as caught:
        train(recipe, tmp_path / "run", progress=False)
    said = str(caught.value)
    assert "loss is nan" in said
    assert "step 3 of epoch 2 (dense)" in said
    assert "scenes:easy seed 0 train #" in said
    assert "state/00001-" in said
    failure = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert len(failure["pictures"]) == 16
    assert len(failure["not_finite"]) == 1
    assert failure["not_finite"][0] in said
    assert len(runs.read_metrics(tmp_path / "run")) == 1
    monkeypatch.undo()  # the pictures are mended: the run goes on from the last good state
    assert len(train(recipe, tmp_path / "run", progress=False).metrics) == 3


def test_gates_that_are_no_numbers_stop_it_too(tmp_path, monkeypatch):
    """A gate whose weights grew beyond all measure; the loss refuses it before it has a value."""
    monkeypatch.setattr(Stage, "step", lambda *a: in_interval("gates", torch.tensor([0.5, float("nan")]), "[0, 1]"))
    with pytest.raises(RunError, match=r"^gates has NaN, outside \[0, 1\] at step 1 of epoch 1 .*smaller lr") as caught:
        train(SMALL, tmp_path / "run", progress=False)
    assert len(str(caught.value).splitlines()) == 1


def test_a_gradient_that_is_no_number_stops_it_too(tmp_path, monkeypatch):
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad * float("nan")

    scored = Objective.scored

    def spoiled(self, result, targets):
        out = scored(self, result, targets)
        return out._replace(loss=Bad.apply(out.loss))

    monkeypatch.setattr(Objective, "scored", spoiled)
    with pytest.raises(RunError, match=r"gradient is nan at step 1 of epoch 1 .* pictures: scenes:easy"):
        train(SMALL, tmp_path / "run", progress=False)


@pytest.mark.long
def test_a_full_disk_ends_the_run_after_the_last_saved_epoch(tmp_path, monkeypatch):
    real, calls = os.fsync, []

    def fsync(handle):
        calls.append(handle)
        if len(runs.read_metrics(tmp_path / "run")) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(RunError, match=r"could not be written \(No space left on device\).*00001-.*same command again"):
        train(SMALL, tmp_path / "run", progress=False)
    monkeypatch.undo()
    run = train(SMALL, tmp_path / "run", progress=False)
    assert len(run.metrics) == 3


@pytest.mark.long
def test_watch_sees_each_epoch_and_may_stop_the_run(tmp_path):
    seen = []

    def watch(line):
        seen.append(line["epoch"])
        assert len(runs.read_metrics(tmp_path / "run")) == line["epoch"]
        if line["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(SMALL, tmp_path / "run", progress=False, watch=watch)
    assert seen == [1, 2]
    assert runs.load(tmp_path)["status"].tolist() == ["unfinished"]
    with pytest.raises(RunError, match="is not finished and has no model yet"):
        evaluate_run(tmp_path / "run")


@pytest.mark.parametrize(
    "settings",
    [
        {"gating": "random"},
        {"gating": "coarse"},
        {"gating": "oracle"},
        {"gating": "entropy"},
        {"gating": "quota", "precision": "bf16", "ema": 0.9, "distill": 1.0, "temperature_end": 0.1},
        {"gating": "pattern", "loss": "bas", "ema": 0.9, "reducer": "tome", "target": 0.5},
        {"gating": "apt", "coarse_lr": 1e-2, "rule_settings": {"thresholds": [5.5, 5.0]}},
        {"coarse_embed": "apt", "lr": 0.0},
        {"gating": "fine", "reducer": "dynamicvit", "reducer_settings": {"keep": 0.5}},
        {"reducer": "diffrate", "freeze": 1, "reducer_lr": 0.01, "reducer_settings": {"layers": [0, 1, 2]}},
        {"loss": "l0", "trim": "none", "distill": 1.0, "layer_decay": 0.8},
        {"mixup": 0.5, "cutmix": 0.5, "smoothing": 0.1, "ema": 0.9, "accumulate": 3, "schedule": "poly"},
        {"precision": "bf16", "budget": "coarse", "control": "none", "calibrate": True, "temperature_end": 0.1},
        {"holdout": 0.25, "val_n": 1, "optimizer": "sgd", "drop_path": 0.2, "clip": 0.0},
    ],
    ids=lambda s: "-".join(map(str, s)),
)
@pytest.mark.long
def test_every_setting_trains(tmp_path, settings):
    recipe = SMALL.replace(epochs_dense=0, epochs=1, **settings)
    run = train(recipe, tmp_path / "run", progress=False)
    assert len(run.metrics) == 1
    assert all(np.isfinite(v) for v in run.summary.values() if isinstance(v, float))
    found = evaluate_run(run.folder)
    assert found["coarse"] == run.summary["coarse"], "decisions do not depend on the precision"
    if recipe.reducer.name:
        assert all(0 < found[f"reconstruction_error_{layer}"] < 2 for layer in (0, 1, 2))
    if recipe.training.precision == "fp32":  # on a GPU or under autocast the last digits may differ
        assert found["accuracy"] == run.summary["accuracy"]
        assert found["macs"] == run.summary["macs"]
    if recipe.gating.by == "coarse":
        assert run.summary["coarse"] == 1
    if recipe.gating.by == "oracle":
        assert run.summary["fine_object"] == 1
        assert run.summary["fine_rest"] == 0
    if recipe.data.holdout:
        assert run.summary["pictures"] == 16


def test_the_table_has_a_row_of_settings_and_results(finished):
    table = runs.load(finished.folder.parent).set_index("run")
    row = table.loc["small"]
    assert (row["status"], row["epoch"], row["batch"]) == ("finished", 3, 16)
    assert row["accuracy"] == finished.summary["accuracy"]
    assert pd.isna(row["loss_weight"])


def objective(recipe, kind=Gated):
    model = build(recipe, None)
    return kind(model, recipe, Budget(model, (64, 64), recipe.gating))


def test_the_budget_is_inverted_exactly():
    recipe = Recipe(budget="macs", target=0.6)
    budget = objective(recipe).budget
    assert np.interp(budget.rate * 16, range(17), budget.shares.numpy()) == pytest.approx(0.6, abs=1e-12)
    assert budget.macs == pytest.approx(0.6)
    coarse = objective(Recipe(budget="coarse", target=0.75)).budget
    assert coarse.rate == 0.75
    assert coarse.macs == pytest.approx(coarse.shares[12].item())


def test_parts_have_their_own_rates_and_matrices_alone_decay():
    this = objective(Recipe(lr=1e-4, gate_lr=1e-3, prior_lr=1e-2, weight_decay=0.1, reducer="dynamicvit"))
    groups = this.groups()
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert {rate[id(p)] for p in this.model.vit.parameters()} == {1e-4}
    assert {rate[id(p)] for p in this.model.gate.parameters()} == {1e-3}
    assert rate[id(this.loss.logits)] == 1e-2
    assert decay[id(this.loss.logits)] == 0
    assert decay[id(this.model.vit.pos_embed)] == 0
    assert decay[id(this.model.vit.blocks[0].mlp.fc1.weight)] == 0.1
    assert decay[id(this.model.vit.blocks[0].mlp.fc1.bias)] == 0
    frozen = objective(Recipe(lr=0.0))
    assert not [p for group in frozen.groups() for p in group["params"] if p is frozen.model.vit.pos_embed]
    assert not frozen.model.vit.pos_embed.requires_grad


def test_muon_orthogonalizes_in_single_precision_on_a_cpu():
    """A step follows the gradient with all singular values near one; bfloat16 would be 1e-2 away from float64."""
    this = objective(Recipe(optimizer="muon", weight_decay=0.0, schedule="constant", warmup=0.0), Objective)
    optimizer, _ = make_descent(this, epochs=1, updates=1)
    (group,) = (g for g in optimizer.param_groups if g["params"][0].ndim > 1)
    weight = this.model.vit.blocks[0].mlp.fc1.weight
    before = weight.detach().double()
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    step = (before - weight.detach()) / (group["lr"] * 0.2 * max(weight.shape) ** 0.5)
    exact = muon.zeropower_via_newtonschulz(
        weight.grad.double(), group["ns_steps"], muon._COEFFICIENTS[group["ns_coefficients"]], dtype=torch.float64
    )
    assert (step - exact).abs().max() < 1e-3 * exact.abs().max()
    assert torch.linalg.svdvals(step).sub(1).abs().max() < 0.4


def test_stage_two_may_have_another_rate_of_the_backbone():
    this = objective(Recipe(lr=1e-3, lr_scale=0.01, coarse_embed="own"))
    rate = {id(p): group["lr"] for group in this.groups() for p in group["params"]}
    for part in (this.model.vit, this.model.coarse_embed):
        assert {rate[id(p)] for p in part.parameters()} == {1e-5}
    assert {rate[id(p)] for p in this.model.gate.parameters()} == {1e-3}
    dense = objective(Recipe(lr=1e-3, lr_scale=0.01, freeze=2), Objective).groups()
    assert {(group["lr"], group["freeze"]) for group in dense} == {(1e-3, 0)}


@pytest.mark.parametrize("settings", [{"optimizer": "sgd", "warmup": 0.0}, {"accumulate": 3}], ids=str)
@pytest.mark.long
def test_a_frozen_backbone_stays_as_it_is(tmp_path, settings):
    """In the first epoch of stage two only the gate and the predictors move; no weight decay either."""
    recipe = SMALL.replace(freeze=1, reducer="dynamicvit", weight_decay=10.0, **settings)
    trainer = Trainer(recipe, runs.RunFolder(tmp_path), _accelerator(recipe, tmp_path, False), False, None)
    stage = Stage(
        "gated", 0, 2, trainer.loaders.steps, Gated(trainer.model, recipe, trainer.budget), trainer.accelerator
    )
    states = [copy.deepcopy(trainer.model.state_dict())]
    for epoch in range(2):
        trainer._train(stage, epoch)
        states.append(copy.deepcopy(trainer.model.state_dict()))
    assert len(stage.optimizer.param_groups) == len(stage.objective.groups())
    for name, _ in trainer.model.named_parameters():
        frozen = name.startswith("vit.")
        assert torch.equal(states[0][name], states[1][name]) == frozen, name
        assert not torch.equal(states[1][name], states[2][name]), name


def test_lower_blocks_have_smaller_rates():
    this = objective(Recipe(layer_decay=0.5), Objective)
    scale = {id(p): group["lr_scale"] for group in this.groups() for p in group["params"]}
    weights = [scale[id(block.attn.qkv.weight)] for block in this.model.vit.blocks]
    assert weights == [weights[2] / 4, weights[2] / 2, weights[2]]
    assert scale[id(this.model.vit.head.weight)] == 1


def test_the_loss_is_the_sum_of_its_terms():
    this = objective(Recipe(distill=0.5, loss_weight=7.0)).train()
    images, targets = torch.randn(8, 3, 64, 64), torch.arange(8)
    torch.manual_seed(1)
    out = this(images, targets, targets)
    torch.manual_seed(1)
    result = this.model.run(images)
    teacher = this.teacher(images).log_softmax(1)
    student = result.logits.log_softmax(1)
    terms = [
        -student[range(8), targets].mean(),
        7 * this.loss(result.gates),
        0.5 * (teacher.exp() * (teacher - student)).sum(1).mean(),
    ]
    assert out.loss.item() == pytest.approx(sum(t.item() for t in terms), abs=1e-5)
    n = (result.scores > 0).sum((1, 2))
    macs = this.model.macs_of(n, (64, 64)) / this.model.dense_macs((64, 64))
    assert out.scalars["macs"].item() == pytest.approx(macs.mean().item())


def test_the_temperature_moves_geometrically():
    this = objective(Recipe(temperature=1.0, temperature_end=0.25))
    found = []
    for progress in (0.0, 0.5, 1.0):
        this.begin(progress)
        found.append(this.model.gate.temperature)
    assert found == pytest.approx([1.0, 0.5, 0.25])


def test_a_reducer_knows_how_much_of_the_stage_is_over():
    settings = {"keep": 0.5, "layers": [1], "warmup": 0.2, "ramp_end": 0.6}
    this = objective(Recipe(gating="fine", reducer="evit", reducer_settings=settings)).train()
    images, fine, found = torch.randn(2, 3, 64, 64), torch.zeros(4, 4, dtype=torch.bool), []
    for progress in (0.1, 0.4, 0.8):
        this.begin(progress)
        found.append(this.model.run(images, fine).counts[1, 1].tolist())
    assert found == [[65] * 2, [1 + 48 + 1] * 2, [1 + 32 + 1] * 2]
    this.begin(0.0)
    assert this.eval().model.run(images, fine).counts[1, 1].tolist() == [34] * 2


def test_evaluation_is_a_plain_loop_over_pictures():
    recipe = Recipe(val_n=30, train_n=64, batch=8)
    model = build(recipe, None)
    model.threshold = 0.4
    loaders = load_data(recipe.data, recipe.training.seed, model)
    found = evaluate(model.train(), loaders.val)
    assert model.training
    model.eval()
    rows = []
    for i in range(30):
        image, label = loaders.val.dataset.scenes[i]
        with torch.no_grad():
            result = model.run(image[None])
        objects = torch.from_numpy(loaders.val.dataset.scenes.object_regions(i, 16))
        fine = ~result.coarse[0]
        rows.append(
            {
                "accuracy": float(result.logits.argmax() == label),
                "macs": result.macs.item() / model.dense_macs((64, 64)),
                "tokens": result.tokens.item(),
                "there": (fine & objects).sum().item(),
                "elsewhere": (fine & ~objects).sum().item(),
                "objects": objects.sum().item(),
            }
        )
    table = pd.DataFrame(rows)
    assert found["pictures"] == 30
    for name in ("accuracy", "macs", "tokens"):
        assert found[name] == pytest.approx(table[name].mean())
    assert found["tokens_sd"] == pytest.approx(table["tokens"].std(ddof=0))
    assert found["fine_object"] == pytest.approx(table["there"].sum() / table["objects"].sum())
    assert found["fine_rest"] == pytest.approx(table["elsewhere"].sum() / (30 * 16 - table["objects"].sum()))


def test_unreadable_pictures_are_in_no_figure():
    model = build(Recipe(), None)
    images, targets = torch.randn(4, 3, 64, 64), torch.arange(4)
    batch = (images, targets, torch.tensor([0, ~1, 2, 3]))
    found = evaluate(model, [batch])
    kept = [0, 2, 3]
    without = evaluate(model, [(images[kept], targets[kept], torch.tensor(kept))])
    assert found.pop("unreadable") == 1
    assert found == pytest.approx(without)


def test_a_part_keeps_numbers_and_pictures():
    recipe = Recipe(train_n=40, val_n=8, batch=4, holdout=0.25)
    loaders = load_data(recipe.data, recipe.training.seed, build(recipe, None))
    seen = {}
    for name, loader in (("train", loaders.train), ("val", loaders.val)):
        set_epoch(loader, 2)
        batches = list(loader)
        seen[name] = torch.cat([b.indices for b in batches]).tolist()
        for batch in batches:
            expected, labels = loaders.train.dataset.scenes.batch(batch.indices)
            assert torch.equal(batch.images, expected)
            assert torch.equal(batch.targets, labels)
    assert isinstance(loaders.train.dataset, Subset)
    assert len(seen["val"]) == 10
    assert not set(seen["train"]) & set(seen["val"])
    assert len(set(seen["train"])) == 28  # 30 less the incomplete batch


@pytest.mark.long
def test_a_folder_of_pictures_with_a_broken_one(tmp_path):
    write_folder(tmp_path / "data", train=9, val=4)
    (tmp_path / "data" / "train" / "cat" / "3.png").write_text("not a picture")
    recipe = Recipe(
        data=f"folder:{tmp_path}/data",
        size=32,
        batch=6,
        epochs_dense=1,
        epochs=1,
        target=0.7,
        device="cpu",
        augment="light",
    )
    run = train(recipe, tmp_path / "run", progress=False)
    assert run.summary["classes"] == ["cat", "dog"]
    assert run.summary["pictures"] == 8
    bad = json.loads((tmp_path / "run" / "unreadable.json").read_text())
    assert [name for name, _ in bad] == [f"{tmp_path}/data/train/cat/3.png"]
    assert msvit.MSViT.from_pretrained(str(run.folder)).vit.num_classes == 2


@pytest.mark.long
def test_broken_validation_files_are_named_and_counted(tmp_path):
    write_folder(tmp_path / "data", train=6, val=4)
    for name in ("train/cat/3.png", "val/cat/1.png", "val/dog/0.png", "val/dog/2.png"):
        (tmp_path / "data" / name).write_text("not a picture")
    recipe = Recipe(data=f"folder:{tmp_path}/data", size=32, batch=6, epochs_dense=1, epochs=0, device="cpu")
    run = train(recipe, tmp_path / "run", progress=False)
    assert (run.summary["pictures"], run.summary["unreadable"]) == (5, 3)
    bad = json.loads((run.folder / "unreadable.json").read_text())
    assert sorted(os.path.relpath(name, tmp_path / "data") for name, _ in bad) == [
        *("train/cat/3.png", "val/cat/1.png", "val/dog/0.png", "val/dog/2.png")
    ]
    with pytest.warns(RunWarning, match=r"3 validation files cannot be read and are in no figure: .*val/"):
        assert evaluate_run(run.folder)["unreadable"] == 3


def test_a_run_that_another_process_finished_meanwhile_is_read(finished, tmp_path, monkeypatch):
    folder, summary = tmp_path / "run", finished.folder / "summary.json"
    shutil.copytree(finished.folder, folder)
    (folder / "summary.json").unlink()

    class Late:
        def __init__(self, *_):
            shutil.copy(summary, folder)  # the other process is through while this one builds its model

        def run(self):
            pytest.fail("trained it again")

    monkeypatch.setattr("msvit.training.loop.Trainer", Late)
    before = (folder / "metrics.jsonl").read_bytes()
    assert train(SMALL, folder, progress=False).summary == finished.summary
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_states_that_a_crash_has_left_in_a_finished_run_go(finished, tmp_path):
    shutil.copytree(finished.folder, tmp_path / "run")
    (tmp_path / "run/state").mkdir()
    (tmp_path / "run/state/00003-x.pt").touch()
    train(SMALL, tmp_path / "run", progress=False)
    assert not (tmp_path / "run/state").exists()


@pytest.mark.parametrize("part", ["history", "model", "optimizer", "objective"])
def test_a_state_of_another_version_is_said_in_a_line(tmp_path, part):
    def watch(line):
        raise KeyboardInterrupt

    recipe = SMALL.replace(epochs_dense=2, epochs=0)
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "run", progress=False, watch=watch)
    records = runs.RunFolder(tmp_path / "run")
    state = records.load_state()
    state[part] = {"weights_of_another_time": torch.zeros(2)}
    records.save_state(2, state)
    with pytest.raises(RunError, match="00002.* is of another version .*; go on with that, or delete") as caught:
        train(recipe, tmp_path / "run", progress=False)
    assert len(str(caught.value).splitlines()) == 1


def test_checkpoints_are_weights_and_nothing_else(tmp_path):
    vit = timm.create_model("vit_mini_patch8_64")
    save_file(vit.state_dict(), tmp_path / "good.safetensors")
    torch.save(vit.state_dict(), tmp_path / "good.pth")
    for name in ("good.safetensors", "good.pth"):
        built = build(Recipe(checkpoint=str(tmp_path / name)), None)
        assert same(built.vit.state_dict(), vit.state_dict())
    other = timm.create_model("vit_mini_patch8_64", num_classes=3)
    torch.save(other.state_dict(), tmp_path / "head.pth")
    built = build(Recipe(checkpoint=str(tmp_path / "head.pth")), None)
    assert torch.equal(built.vit.pos_embed, other.pos_embed)
    assert built.vit.num_classes == 8
    (tmp_path / "bad.pth").write_bytes(pickle.dumps({"x": SimpleNamespace()}, protocol=2))
    with pytest.raises(RecipeError, match="is refused"):
        build(Recipe(checkpoint=str(tmp_path / "bad.pth")), None)
    torch.save({"a": torch.zeros(1)}, tmp_path / "alien.pth")
    with pytest.raises(RecipeError, match="is of another model"):
        build(Recipe(checkpoint=str(tmp_path / "alien.pth")), None)


def test_a_trimmed_step_costs_less_and_gives_the_masked_loss():
    """The loss of the untrimmed step exactly, on shorter sequences."""
    recipe = Recipe(gate_lr=1e-3)
    this = objective(recipe).train()
    masked = Gated(copy.deepcopy(this.model), recipe.replace(trim="none"), this.budget).train()
    images, targets = torch.randn(8, 3, 64, 64), torch.arange(8)
    with torch.no_grad():
        this.model.gate.mlp[-1].bias += 2.0
        masked.model.gate.mlp[-1].bias += 2.0
    losses = []
    for objective_ in (this, masked):
        torch.manual_seed(3)
        losses.append(objective_(images, targets, targets).loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    lengths = []
    for objective_ in (this, masked):
        torch.manual_seed(3)
        model = objective_.model
        execution = TRIMS[objective_.recipe.gating.trim]
        lengths.append(max(model.tokenize(images, model.decide(images), execution).layout.lengths))
    assert lengths[0] < lengths[1] == 65 + 16


def test_settings_are_checked_with_all_gates_before_stage_one(tmp_path, monkeypatch):
    """Nobody wants to hear after hours of dense training that the gate's loss has a typo."""
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail("trained"))
    with pytest.raises(RecipeError, match="the gate loss 'gbas' has no setting 'sigmas'; the nearest is 'sigma'"):
        train(SMALL.replace(loss_settings={"sigmas": 1}), tmp_path / "run", progress=False)


@pytest.mark.parametrize("task", ["classify", "segment"])
def test_gradients_are_the_same_in_every_run(task):
    """With several threads and without PyTorch's deterministic mode: positions are read by many tokens at once."""
    this = objective(Recipe(task=task, decoder="mask"))
    if task == "segment":
        fit_head(this.model, list("abcd"), task, this.recipe.model)
    images, targets = torch.randn(32, 3, 64, 64), torch.randint(4, (32, 64, 64) if task == "segment" else (32,))
    found, threads = [], torch.get_num_threads()
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(2)
    try:
        for _ in range(4):
            this.zero_grad(set_to_none=True)
            torch.manual_seed(0)
            this.train()(images, targets, targets[:, 0, 0] if task == "segment" else targets).loss.backward()
            found.append({name: p.grad.clone() for name, p in this.named_parameters() if p.grad is not None})
    finally:
        torch.use_deterministic_algorithms(not torch.cuda.is_available())
        torch.set_num_threads(threads)
    assert all(same(found[0], other) for other in found[1:])
