"""Token Pooling's baselines: importance sampling has the probabilities it says, strided convolution is one."""

from collections import Counter
from itertools import permutations

import pytest
import torch
import torch.nn.functional as F

import msvit
from msvit.core.attention import Layout
from msvit.core.tokens import Tokens
from msvit.gating.rules import make_rule
from msvit.reducers.registry import make_reducer


def one_picture(x, where, area):
    return Tokens(x, None, area, where, Layout([len(x)], x.device))


def test_importance_sampling_draws_without_replacement(make_vit):
    """P(set) = sum over the orders of prod w_i / (what is left): 30,000 pictures, each set within five sigma."""
    weight, pictures, k = torch.tensor([0.1, 0.2, 0.5, 1.2, 2.0], dtype=torch.float64), 30_000, 2
    vit = make_vit(img_size=16)  # 4 patch tokens; a fifth is only here
    reducer = make_reducer("importance_sampling", vit, keep=k / 5, layers=[1]).train()
    n = len(weight) + 1
    where = torch.arange(pictures)[:, None] * n + torch.arange(1, n)
    layout = Layout([n] * pictures, torch.device("cpu"))
    x = torch.arange(n, dtype=torch.float64).repeat(pictures)[:, None]
    area = torch.tensor([0.0] + [1.0] * 5).repeat(pictures)
    seen = torch.cat([torch.tensor([9.0]), weight]).repeat(pictures)
    drawn = reducer.reduce(1, Tokens(x, None, area, where[:, None], layout), seen).x.view(pictures, k + 1)
    assert (drawn[:, 0] == 0).all()  # the class token stays
    counts = Counter(map(tuple, drawn[:, 1:].int().tolist()))
    expected = Counter()
    for order in permutations(range(5), k):
        left, chance = float(weight.sum()), 1.0
        for i in order:
            chance *= float(weight[i]) / left
            left -= float(weight[i])
        expected[tuple(sorted(i + 1 for i in order))] += chance
    assert sum(expected.values()) == pytest.approx(1)
    for chosen, chance in expected.items():
        sigma = (pictures * chance * (1 - chance)) ** 0.5
        assert abs(counts[chosen] - pictures * chance) <= 5 * sigma


@torch.no_grad()
def test_importance_sampling_can_be_had_twice(make_vit):
    vit = make_vit()
    images = torch.randn(2, 3, 64, 64)

    def kept(seed, training=False):
        reducer = make_reducer("importance_sampling", vit, keep=0.5, seed=seed)
        model = msvit.MSViT(vit, gate=make_rule("fine"), reducer=reducer)
        return model.train(training).run(images).final.where >= 0

    assert torch.equal(kept(0), kept(0))
    assert not torch.equal(kept(0), kept(1))
    assert not torch.equal(kept(0, training=True), kept(0, training=True))


@pytest.mark.parametrize("stride", [2, 4])
@torch.no_grad()
def test_strided_convolution_is_a_convolution_on_fine_tokens(make_vit, stride):
    vit = make_vit()
    reducer = make_reducer("strided_convolution", vit, stride=stride, layers=[1]).double()
    for p in reducer.parameters():
        p.add_(torch.randn_like(p))
    x, where = torch.randn(65, 64).double(), torch.arange(1, 65).view(1, 8, 8)
    tokens = one_picture(x, where, torch.cat([torch.zeros(1), torch.ones(64)]))
    reduced = reducer.reduce(1, tokens, None)
    kernel = reducer.weight["1"].unflatten(0, (stride, stride)).permute(2, 3, 0, 1) / stride**2
    expected = F.conv2d(x[1:].T.view(1, 64, 8, 8), kernel, reducer.bias["1"], stride)[0].flatten(1).T
    assert (reduced.x[1:] - expected).abs().max() <= 1e-9
    assert torch.equal(reduced.x[0], x[0])


@pytest.mark.parametrize("settings", [{"stride": 2, "layers": [0, 1]}, {"stride": 3}, {"stride": 4}])
@torch.no_grad()
def test_strided_convolution_begins_as_the_average(make_vit, settings):
    """On mixed-scale tokens too, whatever covers a cell."""
    vit = make_vit()
    images, mask = torch.randn(3, 3, 64, 64), torch.rand(3, 4, 4) < 0.4
    models = [
        msvit.MSViT(vit, reducer=make_reducer(n, vit, **settings)).eval() for n in ("grid", "strided_convolution")
    ]
    grid, convolution = (model.run(images, mask) for model in models)
    assert (grid.logits - convolution.logits).abs().max() <= 1e-5
    assert torch.equal(grid.counts, convolution.counts)


@torch.no_grad()
def test_a_coarse_token_is_in_all_places_of_its_cell(make_vit):
    """What the convolution makes of it is what it makes of the fine tokens that would all be like it."""
    vit = make_vit(img_size=16)
    reducer = make_reducer("strided_convolution", vit, layers=[1]).double()
    for p in reducer.parameters():
        p.add_(torch.randn_like(p))
    x = torch.randn(2, 64).double()
    coarse = one_picture(x, torch.ones(1, 2, 2, dtype=torch.long), torch.tensor([0.0, 4.0]))
    fine = one_picture(
        torch.cat([x[:1], x[1:].expand(4, -1)]), torch.arange(1, 5).view(1, 2, 2), torch.tensor([0.0, 1, 1, 1, 1])
    )
    first, second = (reducer.reduce(1, tokens, None) for tokens in (coarse, fine))
    assert (first.x - second.x).abs().max() <= 1e-12
    assert torch.equal(first.where, second.where)
