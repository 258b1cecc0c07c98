"""Where tokens stand after reducers have dropped or merged them, and rotary backbones behind every one of them."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import check_slopes

import msvit
from msvit.core.backbone import pooled_logits
from msvit.core.blocks import run_blocks
from msvit.gating.rules import make_rule
from msvit.models.msvit import EXECUTIONS
from msvit.reducers.registry import REDUCERS, make_reducer

# What a method's merged token is the mean of: fine patches all alike, rows of the block before all alike, or weighted
# rows; "kept" tokens are those that were there.
RULES = {
    "dynamicvit": ("kept", {"keep": 0.6}),
    "token_pooling": ("weighted", {"keep": 0.5}),
    "power_bert": ("kept", {"keep": 0.6}),
    "grid": ("patches", {"stride": 2}),
    "strided_convolution": ("patches", {"stride": 2}),
    "random_pruning": ("kept", {"keep": 0.6}),
    "importance_sampling": ("kept", {"keep": 0.6}),
    "evit": ("weighted", {"keep": 0.6}),
    "tome": ("sizes", {"r": 12}),
    "diffrate": ("rows", {"target": 0.6}),
    "algm": ("patches", {"threshold": 0.1}),
    "pitome": ("sizes", {"keep": 0.7}),
}
KINDS = [{"rope_type": "dinov3", "num_reg_tokens": 1}, {"rope_type": "mixed", "use_abs_pos_emb": False}]


def reducing(vit, name):
    torch.manual_seed(1)
    with torch.no_grad():
        for p in vit.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return msvit.MSViT(vit, reducer=make_reducer(name, vit, **RULES[name][1])).eval()


def test_every_reducer_has_a_rule():
    assert RULES.keys() == REDUCERS.keys()


def members(before, after, b):
    """Rows after -> rows before that went into them, by the maps of a picture; those that cover something."""
    found = {}
    for old, new in zip(before.where[b].flatten().tolist(), after.where[b].flatten().tolist(), strict=True):
        if new >= 0:
            found.setdefault(new, set()).add(old)
    return found


def weights_of(kind, tokens, rows):
    if kind == "rows":
        return torch.ones(len(rows))
    if kind == "sizes":
        return tokens.sizes[rows]
    return tokens.area[rows]


@pytest.mark.parametrize("name", REDUCERS)
@torch.no_grad()
def test_merged_tokens_stand_at_the_mean_of_their_members(make_eva, name):
    kind, steps = RULES[name][0], []
    model = reducing(make_eva(**KINDS[0]), name)
    images, mask = torch.randn(2, 3, 64, 64), torch.rand(2, 4, 4) < 0.4
    tokens = model.tokenize(images, model.decide(images, mask), "packed")
    run_blocks(model.vit, tokens, model.reducer, watch=lambda layer, before, after: steps.append((before, after)))
    merged = 0
    for before, after in steps:
        for b in range(2):
            for new, olds in members(before, after, b).items():
                rows = torch.tensor(sorted(olds))
                box = torch.cat([before.box[rows, :2].amin(0), before.box[rows, 2:].amax(0)])
                torch.testing.assert_close(after.box[new], box, rtol=0, atol=1e-5)
                merged += len(olds) > 1
                if kind == "weighted":
                    inside = (after.centre[new] >= box[:2] - 1e-4) & (after.centre[new] <= box[2:] + 1e-4)
                    assert inside.all()
                    continue
                weight = weights_of(kind, before, rows)[:, None]
                expected = (before.centre[rows] * weight).sum(0) / weight.sum()
                torch.testing.assert_close(after.centre[new], expected, rtol=0, atol=1e-4)
        lead = after.layout.position < model.vit.num_prefix_tokens
        assert not after.box[lead].any()
        assert not after.centre[lead].any()
        assert (after.extent[~lead] > 0).all()
    assert steps
    assert (merged > 0) == (kind != "kept")


@torch.no_grad()
def test_weighted_means_are_those_of_the_embeddings(make_eva):
    """A cluster of Token Pooling is where its tokens are in the mean, by their significance; a medoid where it is."""
    x = torch.randn(2 * 66, 64)
    for method in ("kmeans", "kmedoids"):
        vit = make_eva(**KINDS[0])
        model = msvit.MSViT(vit).eval()
        images = torch.randn(2, 3, 64, 64)
        tokens = model.tokenize(images, model.decide(images, torch.zeros(4, 4, dtype=torch.bool)), "packed")
        tokens = replace(tokens, x=torch.cat([x, tokens.centre], 1)[:, 2:])  # the embedding says where it stands
        reducer = make_reducer("token_pooling", vit, keep=0.3, layers=[1], method=method)
        after = reducer.reduce(1, tokens, torch.rand(len(tokens.x)))
        rows = after.layout.position >= 2
        torch.testing.assert_close(after.centre[rows], after.x[rows, -2:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", REDUCERS)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@torch.no_grad()
def test_executions_agree_behind_every_reducer(make_eva, name, kind):
    model = reducing(make_eva(**kind), name)
    images, mask = torch.randn(3, 3, 64, 96), torch.rand(3, 4, 6) < 0.5
    masked, *others = (model.run(images, mask, e) for e in EXECUTIONS)
    assert masked.tokens.sum() > masked.counts[-1, 1].sum()
    for other in others:
        assert (masked.logits - other.logits).abs().max() <= 1e-4
        assert torch.equal(masked.macs, other.macs)


@torch.no_grad()
def test_diffrate_hides_while_training_what_it_merges_in_evaluation(make_eva):
    """The two compute one function, positions included."""
    model = reducing(make_eva(**KINDS[0]), "diffrate")
    images, mask = torch.randn(3, 3, 64, 64), torch.rand(3, 4, 4) < 0.4
    expected = model.run(images, mask, "packed").logits
    model.reducer.train()
    assert model.reducer.learning
    assert (model.run(images, mask, "masked").logits - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", ["tome", "grid", "evit"])
def test_the_gradient_by_the_activity_goes_through_positions(make_eva, name):
    """Finite differences of a token's activity, which weighs it, and where it stands, in what it is merged into."""
    vit = make_eva(img_size=32, depth=2, use_abs_pos_emb=False, rope_temperature=10.0).double()
    with torch.no_grad():
        for p in vit.parameters():
            p.add_(0.1 * torch.randn_like(p))
    settings = RULES[name][1] | ({"r": 4} if name == "tome" else {})
    reducer = make_reducer(name, vit, layers=[0], **settings)
    model = msvit.MSViT(vit, gate=make_rule("fine")).eval()
    images = torch.randn(2, 3, 32, 32).double()
    tokens = model.tokenize(images, model.decide(images), "packed")

    def loss(activity):
        given = replace(tokens, activity=activity.requires_grad_())
        return F.cross_entropy(pooled_logits(vit, run_blocks(vit, given, reducer).final), torch.arange(2))

    check_slopes(loss, torch.ones(len(tokens.x), dtype=torch.float64), range(1, len(tokens.x), 4))
