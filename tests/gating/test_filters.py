"""A gate that sees a region through a few filters: what they find, what that costs, and who is given such a gate."""

import json

import pytest
import timm
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from msvit import Gate, MSViT
from msvit.core import macs as measure
from msvit.gating.filters import FilterBank
from msvit.gating.gate import NETWORKS, Quadtree
from msvit.training import build, runs
from msvit.training.recipe import FIELDS, Recipe


@pytest.mark.parametrize(
    ("patch", "channels", "cell"), [(16, 3, 4), (32, 1, 4), (28, 3, 4), (12, 2, 4), (10, 3, 5), (7, 3, 7)]
)
def test_the_bank_is_a_convolution_averaged_over_a_region(patch, channels, cell):
    bank, image = FilterBank(patch, channels), torch.randn(channels, patch, patch)
    assert bank.cell == cell
    weight = bank.weight.view(8, channels, cell, cell)
    expected = F.gelu(F.conv2d(image, weight, bank.bias, stride=cell)).mean((1, 2))
    torch.testing.assert_close(bank(image.flatten()), expected)


def test_where_in_a_region_a_pattern_lies_does_not_matter():
    bank, image = FilterBank(16), torch.randn(3, 16, 16)
    torch.testing.assert_close(bank(image.roll((4, 8), (1, 2)).flatten()), bank(image.flatten()))


def test_a_region_is_judged_by_those_around_it_too():
    """By a plain loop; nothing is found beyond the border."""
    gate, images = Gate(8, network="filters").eval(), torch.randn(1, 3, 24, 32)
    found = gate(images)
    seen = {
        (y, x): gate.see(images[0, :, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8].flatten())
        for y in range(3)
        for x in range(4)
    }
    for y in range(3):
        for x in range(4):
            around = [seen.get((y + i, x + j), torch.zeros(8)) for i in (-1, 0, 1) for j in (-1, 0, 1)]
            torch.testing.assert_close(found[0, y, x], gate.mlp(torch.cat(around))[0])
    where = torch.rand(1, 3, 4) > 0.5
    assert torch.equal(gate(images, where), found.masked_fill(~where, -torch.inf))


def test_a_quadtree_pays_for_all_regions_that_its_gates_look_at():
    vit, counts = timm.create_model("vit_mini_patch8_64", img_size=128), [torch.tensor([40]), torch.tensor([6])]
    model = MSViT(vit, gate=Quadtree(16, 2, network="filters"))
    small, large = model.gate.levels
    assert model.gate_macs(counts, (128, 128)) == measure.gate_macs(small, 64) + measure.gate_macs(large, 16)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("patch", [12, 16])
def test_macs_are_those_that_are_counted(network, patch):
    gate, images = Gate(patch, network=network), torch.randn(2, 3, 3 * patch, 2 * patch)
    with FlopCounterMode(display=False) as counter:
        gate(images)
    assert counter.get_total_flops() == 2 * 2 * measure.gate_macs(gate, 6)


@pytest.mark.parametrize("name", ["vit_mini_patch8_64", "vit_photo_narrow_patch8_128", "deit_tiny_patch16_224"])
def test_costs_less_than_a_hundredth_of_any_backbone(name):
    with torch.device("meta"):
        vit = timm.create_model(name)
    side, patch = vit.patch_embed.img_size[0], vit.patch_embed.patch_size[0]
    dense = measure.vit_macs(vit, torch.tensor([(side // patch) ** 2 + 1])).item()
    assert measure.gate_macs(Gate(2 * patch, network="filters"), (side // patch // 2) ** 2) < 0.01 * dense


def test_a_recipe_gives_a_new_gate_its_network_and_leaves_a_trained_one(tmp_path):
    assert set(FIELDS["gate_network"].field.metadata["choices"]) == set(NETWORKS)
    for network in NETWORKS:
        recipe = Recipe(gate_network=network)
        assert build.build(recipe, tmp_path).gate.network == network
        gates = build.build(recipe.replace(size=128, scales=[1, 2, 4]), tmp_path).gate
        assert isinstance(gates, Quadtree)
        assert [gate.network for gate in gates.levels] == [network] * 2
    MSViT(timm.create_model("vit_mini_patch8_64"), gate=Gate(16)).save_pretrained(tmp_path / "trained")
    assert build.build(Recipe(model=str(tmp_path / "trained")), tmp_path).gate.network == "pixels"


def test_runs_from_before_there_were_filters_have_gates_on_pixels(tmp_path):
    settings = Recipe().to_dict()
    del settings["gate_network"]
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    assert runs.read_recipe(tmp_path) == Recipe(gate_network="pixels")


def test_an_unknown_network_is_named():
    with pytest.raises(ValueError, match="network='filter'.*filters"):
        Gate(16, network="filter")
