"""The gate: its noise, its straight-through gradient, its file."""

import pytest
import timm
import torch

from msvit import Gate
from msvit.core import macs as measure
from msvit.core.sampling import straight_through


def test_evaluation_is_deterministic_and_training_is_not():
    gate, images = Gate(16), torch.randn(2, 3, 32, 48)
    logits = gate(images)
    assert logits.shape == (2, 2, 3)
    gate.eval()
    assert torch.equal(gate.soften(logits), torch.sigmoid(logits / 0.3))
    gate.train()
    assert not torch.equal(gate.soften(logits), gate.soften(logits))


@pytest.mark.parametrize("settings", [{"patch": 0}, {"patch": False}, {"channels": -3}, {"width": -1}, {"patch": 8.0}])
@pytest.mark.parametrize("network", ["pixels", "filters"])
def test_a_gate_of_no_pixels_is_refused(settings, network):
    with pytest.raises((ValueError, TypeError), match=f"{next(iter(settings))}=|float"):
        Gate(**settings, network=network)


@pytest.mark.parametrize("temperature", [0.1, 0.3, 2.0])
def test_samples_are_coarse_as_often_as_the_logit_says(temperature):
    """P(m > 0.5) = sigmoid(logit), whatever the temperature."""
    gate = Gate(8, temperature=temperature)
    logits = torch.tensor([-2.0, 0.0, 1.0]).expand(200_000, 3)
    rate = (gate.soften(logits) > 0.5).double().mean(0)
    torch.testing.assert_close(rate, logits[0].double().sigmoid(), rtol=0, atol=0.005)


def test_a_region_is_judged_by_its_own_pixels_alone():
    gate, images = Gate(16).eval(), torch.randn(1, 3, 32, 32)
    other = images.clone()
    other[:, :, :16, :16] += 1
    changed = gate(images) != gate(other)
    assert changed.flatten().tolist() == [True, False, False, False]


def test_straight_through_is_hard_with_a_soft_gradient():
    soft = torch.tensor([0.2, 0.5, 0.51, 1.0], requires_grad=True)
    hard = straight_through(soft)
    assert hard.tolist() == [0, 0, 1, 1]
    hard.backward(torch.tensor([1.0, 2, 3, 4]))
    assert soft.grad.tolist() == [1, 2, 3, 4]


def test_saves_and_loads_alone(tmp_path):
    gate = Gate(16, width=32)
    gate.temperature = 0.123
    gate.save_pretrained(tmp_path)
    again = Gate.from_pretrained(tmp_path)
    assert again.patch == 16
    assert again.temperature == pytest.approx(0.123)
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(again.eval()(images), gate.eval()(images))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_224", "vit_base_patch16_224"])
@pytest.mark.long
def test_costs_less_than_a_hundredth_of_the_backbone(name):
    vit = timm.create_model(name)
    dense = measure.vit_macs(vit, torch.tensor([197])).item()
    assert measure.gate_macs(Gate(32), 49) < 0.01 * dense


def test_decisions_are_exactly_0_or_1_with_a_gradient_too():
    """A weight of 1e-8 in place of 0 is a key that counts where it should be hidden."""
    soft = torch.rand(100_000, requires_grad=True)
    hard = straight_through(soft, 0.5)
    assert hard.unique().tolist() == [0, 1]
    hard.sum().backward()
    assert torch.equal(soft.grad, torch.ones_like(soft))


def test_autocast_changes_no_decision():
    """Scores lie so close together that bfloat16 would tell few of them apart."""
    gate, images = Gate(8).eval(), torch.randn(4, 3, 64, 64)
    gate.mlp[-1].weight.data *= 1e-3
    plain = gate(images)
    assert plain.bfloat16().unique().numel() < plain.numel() / 2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(gate(images), plain)
    gate.bfloat16()
    assert gate(images.bfloat16()).dtype == torch.bfloat16
