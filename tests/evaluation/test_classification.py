"""What is reported of a classifier on a data set, against plain loops over single pictures."""

import pytest
import torch

import msvit
from msvit.data.loaders import make_loaders
from msvit.evaluation.evaluate import evaluate


def test_a_gate_is_decided_where_its_m_is_near_0_or_1(tiny_vit):
    model, loaders = msvit.MSViT(tiny_vit).eval(), make_loaders(val_n=40, val_batch=16)
    model.gate.mlp[-1].weight.data *= 8
    found = evaluate(model, loaders.val)
    sure = []
    with torch.no_grad():
        for images, _, _ in loaders.val:
            m = (model.gate(images) / model.gate.temperature).sigmoid()
            sure += [not 0.25 <= value <= 0.75 for value in m.flatten().tolist()]
    assert found["decided"] == pytest.approx(sum(sure) / len(sure))
    assert 0 < found["decided"] < 1


def test_rules_and_masks_are_not_asked_whether_they_are_sure(tiny_vit):
    loaders = make_loaders(val_n=20)
    assert "decided" not in evaluate(msvit.MSViT(tiny_vit, gate=msvit.make_rule("centre")), loaders.val)
    masked = msvit.MSViT(tiny_vit)
    fine = torch.zeros(4, 4, dtype=torch.bool)
    assert "decided" not in evaluate(masked, loaders.val, lambda images, indices: masked.run(images, fine))
