"""Runs whose decisions are learned by a quota or a pattern: budgets, resuming, folders, and what is refused."""

import pytest
import torch

import msvit
from msvit.cli import main
from msvit.gating.learned import Pattern, Quota, sharing_loss
from msvit.gating.losses import GBaS
from msvit.studies.study import MASKS
from msvit.training import runs
from msvit.training.budget import Budget, choose_gate
from msvit.training.build import build, fit_head, load_data
from msvit.training.evaluate_run import evaluate_run
from msvit.training.loop import train
from msvit.training.names import method_name
from msvit.training.objectives import Gated
from msvit.training.recipe import GATINGS, LEARNED, Recipe, RecipeError

# Four steps an epoch of a few milliseconds each.
SMALL = Recipe(train_n=64, val_n=48, batch=16, epochs_dense=1, epochs=2, device="cpu")
SEGMENTS = SMALL.replace(task="segment", size=32, epochs=1)
KINDS = {"quota": Quota, "pattern": Pattern}


def weights(run):
    return msvit.MSViT.from_pretrained(str(run.folder)).state_dict()


@pytest.fixture(scope="module", params=list(KINDS))
def finished(request, tmp_path_factory):
    """A finished run of each."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("runs") / request.param
    return train(SMALL.replace(gating=request.param), folder, progress=False)


def objective_of(recipe):
    model = build(recipe, None)
    loaders = load_data(recipe.data, 0, model)
    fit_head(model, loaders.classes, recipe.data.task, recipe.model)
    return Gated(model, recipe, choose_gate(model, recipe, loaders)), next(iter(loaders.train))


def test_who_learns_what():
    assert set(LEARNED) <= set(GATINGS)
    assert not set(LEARNED) & set(MASKS)
    learned = {by: (Recipe(gating=by).gating.learned, Recipe(gating=by).gating.shaped) for by in GATINGS}
    assert {by for by, found in learned.items() if found[0]} == set(LEARNED)
    assert {by for by, found in learned.items() if found[1]} == {"learned", "pattern"}
    methods = [Recipe(gating=by, loss="l0").method for by in LEARNED]
    assert methods == ["l0", "quota", "pattern-l0"]
    table = [{**Recipe(gating=by).to_dict(), "epochs": 1} for by in ("quota", "pattern", "random")]
    assert [method_name(run) for run in table] == ["quota", "pattern gbas", "random mask"]


def test_runs_meet_their_budget_and_load(finished):
    by = finished.recipe.gating.by
    model = msvit.MSViT.from_pretrained(finished.folder)
    assert type(model.gate) is KINDS[by]
    shares = model.macs_of(torch.arange(17), (64, 64)) / model.dense_macs((64, 64))
    target = finished.recipe.gating.target
    assert finished.summary["macs"] == pytest.approx(min(shares.tolist(), key=lambda share: abs(share - target)))
    assert finished.summary["macs_sd"] == pytest.approx(0, abs=1e-9)
    found = evaluate_run(finished.folder)
    assert {name: finished.summary[name] for name in found} == found
    half = evaluate_run(finished.folder, macs=0.5)["macs"]
    assert half == pytest.approx(min(shares.tolist(), key=lambda share: abs(share - 0.5)))
    line = finished.metrics[-1]
    assert ("train_gate" in line) == (by == "pattern")
    assert (finished.folder / "gate_loss.safetensors").exists() == (by == "pattern")
    if by == "quota":
        assert line["train_coarse"] == finished.summary["coarse"]
        assert line["train_macs"] == pytest.approx(finished.summary["macs"])
    assert type(msvit.MSViT.from_pretrained(finished.folder / "dense").gate) is KINDS[by]


@pytest.mark.parametrize("stop", [1, 2])
@pytest.mark.long
def test_a_stopped_run_ends_with_the_same_weights(finished, tmp_path, stop):
    def watch(line):
        if line["epoch"] == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(finished.recipe, tmp_path / "run", progress=False, watch=watch)
    again = train(finished.recipe, tmp_path / "run", progress=False)
    ours, theirs = weights(finished), weights(again)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert [line["curve"] for line in again.metrics] == [line["curve"] for line in finished.metrics]


@pytest.mark.long
def test_a_gate_goes_only_where_its_kind_trains(finished, tmp_path):
    by, folder = finished.recipe.gating.by, str(finished.folder)
    start = SMALL.replace(gating=by, gate=folder, epochs_dense=0, epochs=1, gate_lr=0.0)
    frozen = train(start, tmp_path / "frozen", progress=False)
    ours, theirs = weights(finished), weights(frozen)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours if key.startswith("gate."))
    assert not torch.equal(ours["vit.head.weight"], theirs["vit.head.weight"])
    with pytest.raises(RecipeError, match=rf"has {KINDS[by].__name__}\(.*gating='learned' trains a Gate for 4 x 4"):
        train(start.replace(gating="learned"), tmp_path / "other", progress=False)
    if by == "pattern":
        with pytest.raises(RecipeError, match=r"has Pattern\(grid=\(4, 4\).*trains a Pattern for 6 x 6 regions"):
            train(start.replace(size=96), tmp_path / "other", progress=False)
    model = build(SMALL.replace(gating="random", gate=folder), tmp_path)
    assert type(model.gate) is msvit.Gate, "a rule comes in its place"
    model = build(SMALL.replace(model=folder, gating="learned"), tmp_path)
    assert type(model.gate) is msvit.Gate
    assert torch.equal(model.vit.norm.weight, ours["vit.norm.weight"])


def test_evaluating_by_other_decisions(finished, capsys):
    by = finished.recipe.gating.by
    other = ({*KINDS} - {by}).pop()
    with pytest.raises(RecipeError, match=rf"gating='{other}': .* was trained with '{by}' and has no such gate"):
        evaluate_run(finished.folder, gating=other)
    assert evaluate_run(finished.folder, gating="coarse")["coarse"] == 1
    assert evaluate_run(finished.folder, gating=by)["macs"] == finished.summary["macs"]
    if by == "quota":
        assert main(["eval", str(finished.folder), "--threshold", "0.3"]) == 2
        assert "a quota has no threshold" in capsys.readouterr().err
    else:
        assert evaluate_run(finished.folder, threshold=0.0)["coarse"] == 1


def test_a_quota_has_no_loss_and_no_controller_and_its_gate_learns_from_the_task_alone():
    this, batch = objective_of(SMALL.replace(gating="quota", loss="gbas"))
    assert this.loss is None
    assert not this.controllers
    out = this.train()(*batch)
    assert "gate" not in out.scalars
    out.loss.backward()
    assert all(p.grad.abs().sum() > 0 for n, p in this.model.gate.named_parameters() if n != "mlp.9.bias")
    groups = this.groups()
    assert {group["lr"] for group in groups} == {SMALL.training.lr}
    assert out.scalars["coarse"].item() * 16 == pytest.approx(this.model.gate.count(16).item())


def test_a_pattern_has_the_gates_loss_and_controller():
    this, batch = objective_of(SMALL.replace(gating="pattern", control="bias"))
    assert isinstance(this.loss, GBaS)
    this.train()(*batch).loss.backward()
    assert this.model.gate.weight.grad.abs().min() > 0
    decay = {id(p): group["weight_decay"] for group in this.groups() for p in group["params"]}
    assert decay[id(this.model.gate.weight)] == 0
    before = this.model.gate.bias.item()
    this.update([1.0])
    assert this.model.gate.bias.item() == pytest.approx(before - this.controllers[0].STEP)


def test_in_segmentation_a_quota_learns_from_the_label_maps_alone():
    this, (images, labels, indices) = objective_of(SEGMENTS.replace(gating="quota", loss_weight=3.0))
    assert this.model.gate.supervised
    out = this.train()(images, labels, indices)
    found = torch.autograd.grad(out.loss, list(this.model.gate.parameters()))
    loss = sharing_loss(this.model.gate(images), labels)
    assert out.scalars["gate"].item() == pytest.approx(3 * loss.item())
    assert out.loss.item() == pytest.approx(out.scalars["task"].item() + 3 * loss.item())
    expected = torch.autograd.grad(3 * loss, list(this.model.gate.parameters()))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("by", KINDS)
@pytest.mark.long
def test_segmentation_runs(by, tmp_path):
    run = train(SEGMENTS.replace(gating=by), tmp_path / "run", progress=False)
    model = msvit.MSViT.from_pretrained(run.folder)
    assert isinstance(model.gate, KINDS[by])
    found = evaluate_run(run.folder)
    assert found["miou"] == pytest.approx(run.summary["miou"])
    assert found["coarse"] == run.summary["coarse"]
    if by == "quota":
        assert run.metrics[-1]["train_gate"] > 0
        classify = SMALL.replace(gating="quota", gate=str(run.folder))
        assert not build(classify, tmp_path).gate.supervised


@pytest.mark.parametrize("budget", ["macs", "coarse"])
def test_training_and_calibration_agree_on_the_quota(budget):
    recipe = SMALL.replace(gating="quota", budget=budget, target=0.55)
    model = build(recipe, None)
    loaders = load_data(recipe.data, 0, model)
    found = choose_gate(model, recipe, loaders)
    rate = model.gate.rate
    assert model.calibrate(loaders.first_pictures(), found.macs) == pytest.approx(found.shares[round(16 * rate)].item())
    assert model.gate.rate == rate
    assert Budget(model, (64, 64), recipe.gating).rate == found.rate


def test_records_name_them(finished):
    row = runs.load(finished.folder.parent).iloc[0]
    assert row["gating"] == finished.recipe.gating.by
    assert finished.recipe.method in finished.recipe.run_name
