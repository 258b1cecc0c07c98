"""What is reported of pictures of different sizes in lists, against single calls."""

import json

import numpy as np
import pytest
import torch
from helpers import segmenter_of, write_folder
from PIL import Image

import msvit
from msvit.data.aspect import whole_pictures
from msvit.data.loaders import make_loaders
from msvit.data.segmentation import make_seg_loaders
from msvit.evaluation.evaluate import evaluate
from msvit.evaluation.segmentation import evaluate_pixels


@pytest.mark.parametrize("scales", [(1, 2), (1, 2, 4)])
@torch.no_grad()
def test_a_classifier_is_evaluated_as_picture_by_picture(tmp_path, make_eva, scales):
    write_folder(tmp_path)
    for i, size in enumerate([(64, 64), (90, 40), (40, 90)]):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (*size, 3), np.uint8)).save(
            tmp_path / f"val/dog/more{i}.png"
        )
    loaders = make_loaders(f"folder:{tmp_path}", size=64, val_batch=4)
    model = msvit.MSViT(make_eva(num_classes=2, rope_type="dinov3"), scales=scales).eval()
    found, right, macs, tokens, coarse = evaluate(model, whole_pictures(loaders)), [], [], [], []
    for images, targets, _ in whole_pictures(loaders):
        for image, target in zip(images, targets.tolist(), strict=True):
            result = model.run(image[None])
            right.append(result.logits.argmax().item() == target)
            macs.append(result.macs.item() / model.dense_macs(image.shape[-2:]))
            tokens.append(result.tokens.item())
            coarse.append(result.coarse.double().mean().item())
    assert found["pictures"] == len(right) == 9
    for name, values in {"accuracy": right, "macs": macs, "tokens": tokens, "coarse": coarse}.items():
        assert found[name] == pytest.approx(sum(values) / len(values))


def test_a_segmenter_sees_no_padding_to_the_largest_of_a_batch(tmp_path):
    """In lists of four, whole pictures give what they give one by one."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for part in ("images", "labels"):
            (tmp_path / split / part).mkdir(parents=True)
        for i, (height, width) in enumerate([(64, 64), (64, 96), (41, 71), (80, 64), (50, 64)]):
            picture, labels = rng.integers(0, 255, (height, width, 3), np.uint8), rng.integers(0, 3, (height, width))
            Image.fromarray(picture).save(tmp_path / split / "images" / f"{i}.png")
            Image.fromarray(labels.astype(np.uint8)).save(tmp_path / split / "labels" / f"{i}.png")
    (tmp_path / "classes.json").write_text(json.dumps({"names": ["a", "b", "c"]}))
    model = segmenter_of(classes=["a", "b", "c"])
    one, four = (make_seg_loaders(f"folder:{tmp_path}", 32, batch=2, val_batch=n) for n in (1, 4))
    expected, found = (evaluate_pixels(model, loader).numbers for loader in (one.val, whole_pictures(four)))
    assert found.keys() == expected.keys()
    for name in ("accuracy", "miou", "loss", "boundary_fine", "fine", "macs", "gmacs", "tokens", "coarse", "pictures"):
        assert found[name] == pytest.approx(expected[name], rel=1e-5)
    padded = evaluate_pixels(model, four.val).numbers
    assert padded["gmacs"] > found["gmacs"]
