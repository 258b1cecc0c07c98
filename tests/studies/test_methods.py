"""The tables of the methods' papers: closed forms, plain loops, and rows that start alike."""

from types import SimpleNamespace

import pytest
import torch
from helpers import shake

from msvit import MSViT
from msvit.gating.rules import make_rule
from msvit.reducers.registry import REDUCERS, make_reducer
from msvit.studies import jobs, methods, study
from msvit.studies.inspect import Inspection
from msvit.studies.study import StudyRow
from msvit.training.build import build
from msvit.training.recipe import Recipe

BASE = Recipe(model="tiny", target=0.6, epochs_dense=2, epochs=1)


@pytest.fixture
def trained(monkeypatch):
    """The recipes that would be trained, by the names of their runs; nothing is."""
    seen = {}

    def train(recipe, folder, progress, watch):
        seen[folder.name] = recipe
        return SimpleNamespace(summary={"accuracy": 0.5, "macs": recipe.gating.target, "dense_macs": 1000})

    monkeypatch.setattr(jobs, "train", train)
    return seen


def test_shares_of_macs_sum_to_one_and_are_those_of_the_model():
    table = methods.mac_shares(["tiny", "deit_small_patch16_224"], [64, 128])
    torch.testing.assert_close(torch.tensor(table.iloc[:, 3:].sum(axis=1)), torch.ones(4, dtype=torch.float64))
    for row in table.itertuples():
        model = build(Recipe(model=row.model, size=row.size), None)
        assert row.macs == model.dense_macs((row.size, row.size))
        tokens = 1 + (row.size // (model.coarse_patch // 2)) ** 2
        products = 2 * len(model.vit.blocks) * tokens**2 * model.vit.embed_dim
        assert table.loc[row.Index, "attention's products"] == pytest.approx(products / row.macs)
    small = methods.mac_shares(["deit_small_patch16_224"], [224])
    assert small["macs"].item() == pytest.approx(4.6e9, rel=0.01)
    assert small["attention's products"].item() < 0.2  # Token Pooling's first argument


def test_tokens_per_patch_by_hand():
    where = torch.tensor([[[1, 1, 2], [-1, 3, 1]], [[5, 6, 7], [8, 9, 10]]])
    third = torch.tensor(1 / 3)
    expected = torch.tensor([[[third, third, 1], [0, 1, third]], [[1, 1, 1], [1, 1, 1]]])
    torch.testing.assert_close(methods.tokens_per_patch(where), expected)
    assert not methods.tokens_per_patch(torch.full((1, 2, 2), -1)).any()


@pytest.mark.parametrize("name", REDUCERS)
def test_tokens_per_patch_sum_to_the_tokens_that_cover_something(name, tiny_vit):
    model = MSViT(shake(tiny_vit), gate=make_rule("fine"), reducer=make_reducer(name, tiny_vit)).eval()
    for stage in model.run(torch.randn(3, 3, 64, 64)).stages:
        for picture, share in zip(stage.where, methods.tokens_per_patch(stage.where), strict=True):
            assert share.sum().item() == pytest.approx(len(picture[picture >= 0].unique()), abs=1e-3)


@pytest.mark.parametrize(("name", "expected"), [("grid", False), ("random_pruning", False), ("power_bert", True)])
def test_what_is_dynamic_is_seen(name, expected, tiny_vit):
    model = MSViT(shake(tiny_vit), gate=make_rule("fine"), reducer=make_reducer(name, tiny_vit)).eval()
    assert methods.differs(model.run(torch.randn(4, 3, 64, 64)).stages) == expected


def test_decisions_of_a_gate_are_dynamic_too(tiny_vit):
    model = MSViT(tiny_vit).eval()
    images = torch.randn(4, 3, 64, 64)
    model.threshold = model.run(images).gates.median().item()
    assert methods.differs(model.run(images).stages)
    assert not methods.differs(model.run(images, torch.zeros(4, 4, dtype=torch.bool)).stages)


def test_variants_cost_the_same():
    for rows in (methods.loss_rows(BASE), methods.variant_rows("token_pooling", methods.CLUSTERINGS, BASE)):
        vit = build(BASE, None).vit
        for row in rows:
            reducer = make_reducer(row.changes["reducer"], vit, **row.changes["reducer_settings"])
            model = MSViT(vit, gate=make_rule("fine"), reducer=reducer)
            share = model.macs_of(torch.zeros(1), (64, 64)).item() / model.dense_macs((64, 64))
            assert share == pytest.approx(0.6, abs=0.01), row.label
    assert len({repr(row.changes) for row in methods.loss_rows(BASE)}) == len(methods.DYNAMICVIT_LOSSES) + 1


def test_method_rows_are_gates_masks_and_reducers():
    rows = methods.method_rows(["gate", "random", "tome", "gate+tome"], BASE)
    assert [row.label for row in rows] == ["MSViT", "random mask", "tome", "MSViT + tome"]
    with pytest.raises(ValueError, match="method='tme' is not known; the nearest is 'tome'"):
        methods.method_rows(["tme"], BASE)


def test_fronts_share_the_dense_model_of_all_budgets(trained, tmp_path):
    names = ["tiny", "vit_small_patch8_64"]
    table = methods.run_fronts(BASE, names, ["gate", "tome"], [0.5, 0.75], [0], tmp_path)
    assert len(table) == len(trained) == 2 * (1 + 2 * 2)
    assert table.loc[table["series"] == "dense", "point"].tolist() == names
    assert set(table["series"]) == {"dense"} | {f"{method}, {name}" for method in ("MSViT", "tome") for name in names}
    for row in table.itertuples():
        recipe = trained[row.run]
        assert row.macs == pytest.approx(row.share * row.dense_macs)
        assert row.series == "dense" or f"{recipe.gating.target:.0%}" == row.point
        assert row.series == "dense" or recipe.model.name.startswith("run:")


def test_small_pictures_are_loaded_or_averaged_and_trained_as_long(trained, tmp_path):
    table = methods.run_sizes(BASE, ["tiny"], [64, 128], [1, 2], [0, 1], tmp_path)
    assert len(table) == len(trained) == 8
    assert table["point"].unique().tolist() == ["64 px", "32 px", "128 px"]
    for row in table.itertuples():
        recipe = trained[row.run]
        training, shrunk = recipe.training, recipe.gating.by == "coarse"
        assert training.epochs_dense + training.epochs == 3
        assert f"{recipe.data.size // (recipe.model.scale if shrunk else 1)} px" == row.point


def test_pictures_averaged_down_cost_what_small_pictures_cost(tiny_vit):
    coarse = MSViT(tiny_vit, scale=2, gate=make_rule("coarse"))
    assert coarse.run(torch.zeros(1, 3, 64, 64)).macs.item() == coarse.dense_macs((32, 32))


def test_reconstruction_of_what_loses_nothing_and_of_what_loses_most(tiny_vit):
    model, images = MSViT(shake(tiny_vit)).eval(), torch.randn(5, 3, 64, 64)
    fine = torch.zeros(4, 4, dtype=torch.bool)
    result = model.run(images, fine)
    predicted = result.logits.argmax(1)
    decisions = (result.gates, result.coarse, result.tokens)
    dense = Inspection(model, images, *decisions, predicted, predicted, (0.5,) * 3, (0.2,) * 3)
    shares = {"token_pooling": 0.5, "random_pruning": 0.5, "power_bert": 1}
    rows = [StudyRow(name, {"reducer": name, "reducer_settings": {"keep": keep}}) for name, keep in shares.items()]
    table = methods.compare_reconstruction(dense, rows)
    error = table.groupby("method")["error"].sum()
    assert error["power_bert"] == 0
    assert 0 < error["token_pooling"] < error["random_pruning"]
    whole = table[table["method"] == "power_bert"].iloc[0]
    assert whole["accuracy"] == 1
    assert whole["macs"] == 1
    assert (table.groupby("method")["layer"].count() == 3).all()


def test_a_gate_is_taken_to_another_model_task_and_data(trained, tmp_path):
    second = {"model": "vit_small_patch8_64", "data": "scenes:middle", "task": "segment"}
    table = study.transfer(BASE, second, [0], tmp_path).set_index("method")
    first = {name for name, recipe in trained.items() if recipe.data.source == BASE.data.source}
    assert len(first) == 2
    for name, row in table.iterrows():
        recipe = trained[row["run"]]
        assert (recipe.data.source, recipe.data.task) == ("scenes:middle", "segment")
        assert recipe.model.name == (second["model"] if name == "dense" else f"run:{table.loc['dense', 'run']}")
        assert (recipe.model.gate.removeprefix("run:") in first) == name.startswith("gate of the first")
        assert (recipe.training.epochs_dense, recipe.training.epochs) == ((2, 0) if name == "dense" else (0, 1))
    assert trained[table.loc["gate of the first, frozen", "run"]].training.gate_lr == 0
