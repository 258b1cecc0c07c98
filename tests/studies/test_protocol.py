"""The rows of the protocol for real pictures, and what its figures and tables say of a gated model."""

import json

import pandas as pd
import pytest
import torch

from msvit import MSViT, plots
from msvit.core.macs import vit_macs
from msvit.gating.rules import make_rule
from msvit.studies import protocol
from msvit.studies.inspect import Inspection
from msvit.training.build import build
from msvit.training.recipe import Recipe, RecipeError

BASE = Recipe(model="tiny", target=0.6, epochs_dense=2, epochs=1)


@pytest.fixture
def inspection(make_vit):
    """A gated model whose threshold is in the middle, and pictures of which it gets every third right."""
    model, images = MSViT(make_vit()).eval(), torch.randn(9, 3, 64, 64)
    model.threshold = model.run(images).gates.median().item()
    result = model.run(images)
    predicted = result.logits.argmax(1)
    targets = (predicted + (torch.arange(9) % 3 > 0)) % 5
    decisions = (result.gates, result.coarse, result.tokens)
    return Inspection(model, images, *decisions, predicted, targets, (0.5,) * 3, (0.2,) * 3)


def test_all_rows_start_alike():
    full, reduced = protocol.rows(BASE, True, 5e-4), protocol.rows(BASE, False, 5e-4)
    assert {row.label for row in reduced} == set(protocol.REDUCED)
    assert len({row.label for row in full}) == len(full)
    assert all(row.changes["lr"] == 5e-4 for row in full if row.dense)
    assert [row.label for row in full if not row.dense] == [f"dense at {protocol.smaller(BASE)} px"]


def test_more_than_two_scales_are_refused_before_anything_is_trained(tmp_path):
    with pytest.raises(RecipeError, match=r"scales=\[1, 2, 4\]: the protocol, .* use scales=\[1, 2\]"):
        protocol.run_protocol(BASE.replace(scales=[1, 2, 4]), False, 1e-3, [0], tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_smaller_pictures_cost_about_the_target():
    """No other size that is a whole number of coarse patches comes nearer."""
    side, vit = protocol.smaller(BASE), build(BASE, None).vit
    tokens = {s: torch.tensor([vit.num_prefix_tokens + (s // 8) ** 2]) for s in (16, 32, 48, 64)}
    shares = {s: (vit_macs(vit, n) / vit_macs(vit, tokens[64])).item() for s, n in tokens.items()}
    assert side == min(shares, key=lambda s: abs(shares[s] - 0.6))


def test_other_decisions_than_its_own(inspection):
    table = protocol.compare_decisions(inspection, batch=4).set_index("decisions")
    assert table.loc["as the gate decides", "accuracy"] == pytest.approx(1 / 3)
    model, size = inspection.model, (64, 64)
    dense, n = model.dense_macs(size), round(inspection.coarse.flatten(1).sum(1).double().mean().item())
    rule = MSViT(model.vit, gate=make_rule("fine")).macs_of
    for name, macs in table["macs"].items():
        if "as many" in name:
            assert macs * dense == pytest.approx(rule(torch.tensor([n]), size).item())
    assert table.loc["all fine", "macs"] == 1
    assert table["macs"].idxmin() == "all coarse"
    fine = model.run(inspection.images, torch.zeros(inspection.coarse.shape[1:], dtype=torch.bool)).logits.argmax(1)
    assert table.loc["all fine", "accuracy"] == (fine == inspection.targets).double().mean().item()
    first = inspection.gates.flatten(1).argsort(1, descending=True) < 0  # shape and type
    for row, order in zip(first, inspection.gates.flatten(1).argsort(1, descending=True), strict=True):
        row[order[:n]] = True
    right = model.run(inspection.images, first.view_as(inspection.coarse)).logits.argmax(1) == inspection.targets
    (name,) = (name for name in table.index if "first" in name)
    assert table.loc[name, "accuracy"] == right.double().mean().item()


@pytest.mark.parametrize("lost", [0, 5, 9])
def test_lost_pictures_are_counted_and_shown(inspection, lost):
    dense = Inspection(**{**vars(inspection), "predicted": inspection.targets.clone()})
    gated = Inspection(**{**vars(inspection), "predicted": (inspection.targets + (torch.arange(9) < lost)) % 5})
    figure = protocol.lost_pictures(dense, gated, list("abcde"))
    assert figure.get_suptitle().startswith(f"{lost} of 9 pictures are lost, 0 won")
    assert sum(axes.get_visible() for axes in figure.axes) == 2 * lost


def test_decisions_of_several_methods_stand_side_by_side_in_per_cent(inspection):
    own = protocol.compare_decisions(inspection).set_index("decisions")
    table = protocol.decisions_table({"a": inspection, "b": inspection})
    assert list(table) == [f"{name}: {value} (%)" for value in ("accuracy", "macs") for name in "ab"]
    assert list(table.index) == list(own.index)
    for name in "ab":
        assert (table[f"{name}: macs (%)"] - own["macs"] * 100).abs().max() <= 0.05 + 1e-9


def test_gated_rows_are_those_that_a_learned_gate_decides_alone(tmp_path):
    changes = {
        "gate": {},
        "dense": {"epochs": 0},
        "mask": {"gating": "random"},
        "both": {"reducer": "tome"},
        "other": {"loss": "l0"},
    }
    for name, settings in changes.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "settings.json").write_text(json.dumps(BASE.replace(**settings).to_dict()))
    found = protocol.gated_rows(tmp_path, pd.DataFrame({"run": list(changes)}))
    assert found["run"].tolist() == ["gate", "other"]


def test_positions_are_means_over_pictures(inspection):
    figure = plots.positions({"a": inspection.coarse})
    shown = torch.as_tensor(figure.axes[0].images[0].get_array().data)
    torch.testing.assert_close(shown, 100 * (~inspection.coarse).double().mean(0))
