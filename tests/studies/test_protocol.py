"""The rows of the protocol for real pictures, and what its figures and tables say of a gated model."""

import pytest
import torch

from msvit import MSViT
from msvit.core import macs as measure
from msvit.gating.rules import make_rule
from msvit.studies import protocol
from msvit.studies.inspect import Look
from msvit.training.build import build
from msvit.training.recipe import Recipe

BASE = Recipe(model="tiny", target=0.6, epochs_dense=2, epochs=1)


@pytest.fixture
def look(make_vit):
    """A gated model whose threshold is in the middle, and pictures of which it names every third."""
    model, images = MSViT(make_vit()).eval(), torch.randn(9, 3, 64, 64)
    model.threshold = model.run(images).gates.median().item()
    result = model.run(images)
    predicted = result.logits.argmax(1)
    targets = (predicted + (torch.arange(9) % 3 > 0)) % 5
    return Look(model, images, result.gates, result.coarse, result.tokens, predicted, targets, (0.5,) * 3, (0.2,) * 3)


def test_all_rows_start_alike():
    full, reduced = protocol.rows(BASE, True, 5e-4), protocol.rows(BASE, False, 5e-4)
    assert {row.label for row in reduced} == set(protocol.REDUCED)
    assert len({row.label for row in full}) == len(full)
    assert all(row.changes["lr"] == 5e-4 for row in full if row.dense)
    assert [row.label for row in full if not row.dense] == [f"dense at {protocol.smaller(BASE)} px"]


def test_the_smaller_pictures_cost_about_the_target():
    """No other size that is a whole number of coarse patches comes nearer."""
    side, vit = protocol.smaller(BASE), build(BASE, None).vit
    tokens = {s: torch.tensor([vit.num_prefix_tokens + (s // 8) ** 2]) for s in (16, 32, 48, 64)}
    shares = {s: (measure.vit_macs(vit, n) / measure.vit_macs(vit, tokens[64])).item() for s, n in tokens.items()}
    assert side == min(shares, key=lambda s: abs(shares[s] - 0.6))


def test_other_decisions_than_its_own(look):
    table = protocol.otherwise(look, batch=4).set_index("decisions")
    assert table.loc["as the gate decides", "accuracy"] == pytest.approx(1 / 3)
    model, size = look.model, (64, 64)
    dense, n = model.dense_macs(size), round(look.coarse.flatten(1).sum(1).double().mean().item())
    rule = MSViT(model.vit, gate=make_rule("fine")).macs_of
    for name, macs in table["macs"].items():
        if "as many" in name:
            assert macs * dense == pytest.approx(rule(torch.tensor([n]), size).item())
    assert table.loc["all fine", "macs"] == 1
    assert table["macs"].idxmin() == "all coarse"
    fine = model.run(look.images, torch.zeros(look.coarse.shape[1:], dtype=torch.bool)).logits.argmax(1)
    assert table.loc["all fine", "accuracy"] == (fine == look.targets).double().mean().item()
    first = look.gates.flatten(1).argsort(1, descending=True) < 0  # shape and type
    for row, order in zip(first, look.gates.flatten(1).argsort(1, descending=True), strict=True):
        row[order[:n]] = True
    right = model.run(look.images, first.view_as(look.coarse)).logits.argmax(1) == look.targets
    (name,) = (name for name in table.index if "first" in name)
    assert table.loc[name, "accuracy"] == right.double().mean().item()


@pytest.mark.parametrize("lost", [0, 5, 9])
def test_lost_pictures_are_counted_and_shown(look, lost):
    dense = Look(**{**vars(look), "predicted": look.targets.clone()})
    gated = Look(**{**vars(look), "predicted": (look.targets + (torch.arange(9) < lost)) % 5})
    figure = protocol.lost(dense, gated, list("abcde"))
    assert figure.get_suptitle().startswith(f"{lost} of 9 pictures are lost, 0 won")
    assert sum(axes.get_visible() for axes in figure.axes) == 2 * lost


def test_positions_are_means_over_pictures(look):
    figure = protocol.positions({"a": look})
    shown = torch.as_tensor(figure.axes[0].images[0].get_array().data)
    torch.testing.assert_close(shown, 100 * (~look.coarse).double().mean(0))
