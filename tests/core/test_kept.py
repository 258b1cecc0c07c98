"""What is kept between calls: few results, and none that no longer holds."""

import copy
import gc
import pickle

import pytest
import torch
from helpers import shake
from torch._subclasses.fake_tensor import FakeTensorMode

import msvit
from msvit.core import backbone
from msvit.core.candidates import GEOMETRIES, KEPT_GEOMETRIES, Candidates
from msvit.core.kept import Kept

CPU, MASK = torch.device("cpu"), torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.5


def test_the_oldest_goes():
    kept, made = Kept(2), []
    for key in "aabcab":
        kept.get(key, lambda key=key: made.append(key) or key)
    assert "".join(made) == "abcab"
    assert len(kept) == 2


def test_what_no_longer_holds_is_made_again():
    kept = Kept(2)
    assert kept.get("a", lambda: 1) == 1
    assert kept.get("a", lambda: 2, holds=lambda found: found == 1) == 1
    assert kept.get("a", lambda: 2, holds=lambda found: found != 1) == 2
    assert len(kept) == 1


class TestGeometry:
    def test_one_for_a_size_and_a_device(self):
        found = Candidates((3, 4), (1, 2), 1).geometry(CPU)
        assert Candidates((3, 4), (1, 2), 1).geometry(CPU) is found
        assert Candidates((3, 4), (1, 2), 1, (5, 8)).geometry(CPU) is not found
        assert Candidates((3, 4), (1, 2), 1).geometry(torch.device("meta")).places.is_meta
        for rows in range(1, KEPT_GEOMETRIES + 9):
            Candidates((rows, 4), (1, 2), 1).geometry(CPU)
        assert len(GEOMETRIES) == KEPT_GEOMETRIES

    def test_found_in_inference_it_serves_training(self, make_vit):
        model, images = msvit.MSViT(make_vit(img_size=56)), torch.randn(2, 3, 56, 56)
        with torch.inference_mode():
            model.eval()(images)
        model.train()(images).sum().backward()
        assert model.gate.bias.grad.isfinite().all()

    def test_tensors_without_values_are_not_kept(self):
        candidates = Candidates((3, 7), (1, 2), 1)
        with FakeTensorMode():
            candidates.geometry(CPU)
        assert type(candidates.geometry(CPU).places) is torch.Tensor


class TestBases:
    """Positions are those of the weights as they are, however these were changed."""

    @pytest.fixture
    def model(self, make_vit):
        return msvit.MSViT(shake(make_vit(img_size=128, reg_tokens=2))).eval()

    @staticmethod
    @torch.no_grad()
    def check(model, size=128):
        """Tokens of packed execution, which keeps them, against those of masked execution, which does not."""
        images = torch.zeros(2, 3, size, size).to(model.vit.pos_embed)
        gating = model.decide(images, MASK[: size // 16, : size // 16])
        packed, masked = (model.tokenize(images, gating, execution) for execution in ("packed", "masked"))
        assert torch.equal(packed.x, masked.x[masked.activity > 0.5])
        assert model.vit in backbone.KEPT_BASES
        return packed.x

    @pytest.mark.parametrize("name", ["pos_embed", "cls_token", "reg_token"])
    def test_weights_that_change(self, model, name):
        before = self.check(model)
        weight = getattr(model.vit, name)
        with torch.no_grad():
            weight.add_(1.0)
        self.check(model)
        weight.data.mul_(-1.0)
        self.check(model)
        model.load_state_dict(model.state_dict() | {f"vit.{name}": torch.randn_like(weight)})
        self.check(model)
        setattr(model.vit, name, torch.nn.Parameter(torch.randn_like(weight)))
        assert (self.check(model) - before).abs().max() > 0.1

    def test_other_precisions(self, model):
        for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float32):
            assert self.check(model.to(dtype)).dtype == dtype

    def test_copies_and_pickles_have_their_own(self, model):
        before = self.check(model)
        assert before.isfinite().all()
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert other.vit not in backbone.KEPT_BASES
            other.vit.pos_embed.data.add_(1.0)
            self.check(other)
        self.check(model)

    def test_few_sizes_and_none_of_a_backbone_that_is_gone(self, make_vit):
        model = msvit.MSViT(make_vit()).eval()
        for size in range(16, 16 * (backbone.KEPT_SIZES + 3), 16):
            self.check(model, size=size)
        assert len(backbone.KEPT_BASES[model.vit]) == backbone.KEPT_SIZES
        before = len(backbone.KEPT_BASES)
        del model
        gc.collect()
        assert len(backbone.KEPT_BASES) < before

    def test_a_gradient_finds_the_weights(self, model):
        self.check(model)
        model.run(torch.randn(1, 3, 128, 128), MASK, "packed").logits.sum().backward()
        assert model.vit.pos_embed.grad.abs().sum() > 0
