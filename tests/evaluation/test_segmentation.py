"""The figures of merit against plain loops over pixels."""

import math

import numpy as np
import pytest
import torch
from helpers import segmenting

import msvit
from msvit.data.loaders import Batch
from msvit.evaluation.segmentation import class_table, confusion, evaluate_pixels, fine_pixels, near_edges


def oracle_iou(prediction, target, classes):
    """IoU of each class by counting pixels one after the other; None for a class that is nowhere."""
    table = [[0] * classes for _ in range(classes)]
    for p, t in zip(prediction.flatten().tolist(), target.flatten().tolist(), strict=True):
        if t != 255:
            table[t][p] += 1
    out = []
    for k in range(classes):
        union = sum(table[k]) + sum(row[k] for row in table) - table[k][k]
        out.append(table[k][k] / union if union else None)
    return out


@pytest.mark.parametrize("seed", range(20))
def test_iou_equals_the_oracle(seed):
    """Some classes absent, some only predicted, some pixels ignored."""
    draw = np.random.default_rng(seed)
    classes = int(draw.integers(2, 9))
    b, h, w = (int(n) for n in draw.integers(1, 9, 3))
    target = draw.integers(0, int(draw.integers(1, classes + 1)), (b, h, w))
    target[draw.random((b, h, w)) < 0.3 * draw.random()] = 255
    prediction = draw.integers(0, int(draw.integers(1, classes + 1)), (b, h, w))
    prediction, target = torch.from_numpy(prediction), torch.from_numpy(target)
    matrix = confusion(prediction, target, classes)
    assert matrix.sum((1, 2)).tolist() == (target != 255).sum((1, 2)).tolist()
    found = class_table(matrix.sum(0), list("abcdefgh"[:classes]))["iou"]
    expected = oracle_iou(prediction, target, classes)
    assert [None if math.isnan(x) else x for x in found] == pytest.approx(expected)
    for picture in range(b):
        alone = class_table(matrix[picture], list("abcdefgh"[:classes]))["iou"]
        expected = oracle_iou(prediction[picture], target[picture], classes)
        assert [None if math.isnan(x) else x for x in alone] == pytest.approx(expected)


def test_iou_by_hand():
    target = torch.tensor([[[0, 0, 1, 255]]])
    prediction = torch.tensor([[[0, 1, 1, 2]]])
    table = class_table(confusion(prediction, target, 4)[0], list("abcd"))
    assert table["iou"].tolist()[:2] == [0.5, 0.5]
    assert table["iou"].isna().tolist() == [False, False, True, True]
    assert table["iou"].mean() == 0.5
    assert table["recall"].tolist()[:2] == [0.5, 1.0]
    assert table["precision"].tolist()[:2] == [1.0, 0.5]
    table = class_table(confusion(torch.tensor([[[0, 1, 1, 3]]]), torch.tensor([[[0, 0, 1, 1]]]), 4)[0], list("abcd"))
    assert table["iou"].tolist()[3] == 0  # predicted, but nowhere: it counts


def test_label_values_out_of_range():
    with pytest.raises(ValueError, match=r"label values \[7\]; expected 0\.\.4, and 255"):
        confusion(torch.zeros(1, 2, 2, dtype=torch.long), torch.tensor([[[0, 255], [7, 1]]]), 5)


@pytest.mark.parametrize("radius", [1, 2, 4])
@pytest.mark.parametrize("size", [(9, 13), (1, 7), (3, 2)])
def test_the_band_against_a_loop(radius, size):
    target = torch.from_numpy(np.random.default_rng(0).choice([0, 0, 0, 0, 0, 1, 2, 255], (2, *size)))
    target = target.repeat_interleave(2, 1).repeat_interleave(2, 2)
    found = near_edges(target, radius).tolist()
    b, h, w = target.shape
    labels = target.tolist()
    for i in range(b):
        for y in range(h):
            for x in range(w):
                own, near = labels[i][y][x], False
                for v in range(h):
                    for u in range(w):
                        if (y - v) ** 2 + (x - u) ** 2 <= radius**2 and 255 not in (own, labels[i][v][u]):
                            near = near or own != labels[i][v][u]
                assert found[i][y][x] == near


def test_fine_pixels():
    coarse = torch.tensor([[[True, False], [False, True]]])
    fine = fine_pixels(coarse, 4, (7, 6))
    assert fine.shape == (1, 7, 6)
    for y in range(7):
        for x in range(6):
            assert fine[0, y, x] == (not coarse[0, y // 4, x // 4])


@torch.no_grad()
def test_evaluate_counts_what_was_predicted(make_vit):
    """Two batches of unlike size, an unreadable picture, ignored pixels: the whole against one count of all pixels."""
    model = segmenting(msvit.MSViT(make_vit()), list("abcd")).train()
    draw = torch.Generator().manual_seed(0)
    batches = []
    for b, indices in ((2, [0, 1]), (3, [2, ~3, 4])):
        target = torch.randint(4, (b, 5, 6), generator=draw).repeat_interleave(10, 1).repeat_interleave(10, 2)
        target[0, :20] = 255
        batches.append(Batch(torch.randn(b, 3, 50, 60, generator=draw), target, torch.tensor(indices)))
    model.eval()
    model.threshold = model.run(batches[0].images).gates.median().item()
    model.train()
    found = evaluate_pixels(model, batches)
    assert model.training
    model.eval()
    results = [model.run(batch.images) for batch in batches]
    keep = torch.tensor([True, True, True, False, True])
    prediction = torch.cat([r.logits.argmax(1) for r in results])[keep]
    target = torch.cat([batch.targets for batch in batches])[keep]
    fine = torch.cat([fine_pixels(r.coarse, 16, (50, 60)) for r in results])[keep]
    known = target != 255
    band, boundary = near_edges(target, 4), near_edges(target, 1)
    expected = oracle_iou(prediction, target, 4)
    numbers = found.numbers
    assert found.classes["iou"].tolist() == pytest.approx(expected)
    assert numbers["iou"] == pytest.approx(dict(zip("abcd", expected, strict=True)))
    assert numbers["miou"] == pytest.approx(sum(expected) / 4)
    assert numbers["accuracy"] == pytest.approx((prediction == target)[known].double().mean().item())
    assert numbers["band_accuracy"] == pytest.approx((prediction == target)[band].double().mean().item())
    assert numbers["fine"] == pytest.approx(fine[known].double().mean().item())
    assert 0 < numbers["fine"] < 1
    assert numbers["boundary_fine"] == pytest.approx(fine[boundary].double().mean().item())
    macs = torch.cat([r.macs for r in results])[keep]
    assert numbers["gmacs"] == pytest.approx(macs.mean().item() / 1e9)
    assert numbers["gmacs_sd"] == pytest.approx(macs.std(correction=0).item() / 1e9)
    assert numbers["macs"] == pytest.approx(macs.mean().item() / model.dense_macs((50, 60)))
    assert (numbers["pictures"], numbers["unreadable"]) == (4, 1)
    with pytest.raises(ValueError, match="no pictures"):
        evaluate_pixels(model, [])
