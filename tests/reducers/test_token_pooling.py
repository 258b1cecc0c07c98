"""Token Pooling and PoWER-BERT against what other people's code computed."""

import json
from pathlib import Path

import peers
import pytest
import torch
from peers import TOLERANCE

import msvit
from msvit.core.attention import Layout
from msvit.core.tokens import Tokens
from msvit.gating.rules import make_rule
from msvit.reducers.registry import make_reducer
from msvit.reducers.token_pooling import ALGORITHMS

KEPT = json.loads((Path(__file__).parent / "data" / "token_pooling.json").read_text())


def pooled(vit, case, dtype, iterations):
    """What the reducer makes of a case's points: its tokens, and the cluster of each point."""
    points, weight = (peers.output(case, name).to(dtype) for name in ("points", "weight"))
    settings = case["settings"]
    method, k = settings.get("method", "kmedoids"), settings["K"]
    b, n, width = points.shape
    reducer = make_reducer(
        "token_pooling",
        vit,
        clusters=[k],
        layers=[1],
        method=method,
        weighted=settings["weighted"],
        iterations=iterations,
    )
    x = torch.cat([torch.randn(b, 1, width, dtype=dtype), points], 1).flatten(0, 1)
    where = torch.arange(b)[:, None] * (n + 1) + 1 + torch.arange(n)
    area = torch.cat([torch.zeros(b, 1), torch.ones(b, n)], 1).flatten()
    seen = torch.cat([torch.ones(b, 1, dtype=dtype), weight], 1).flatten()
    reduced = reducer.reduce(1, Tokens(x, None, area, where[:, None], Layout([n + 1] * b, x.device)), seen)
    cluster = reduced.where[:, 0] - torch.arange(b)[:, None] * (k + 1) - 1
    return reduced.x.view(b, k + 1, width)[:, 1:], cluster


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", peers.names("token_pooling/assign"))
def test_the_first_assignment(make_vit, name, dtype):
    case = peers.case(name)
    points, weight, centres = (peers.output(case, key) for key in ("points", "weight", "centres"))
    centres, expected = centres.long(), peers.output(case, "assignment").long()
    assert torch.equal(weight.to(dtype).sort(dim=1, descending=True).indices[:, : centres.shape[1]], centres)
    for algorithm in ALGORITHMS.values():
        found, medoids = algorithm(points.to(dtype), weight.to(dtype), centres, None, 1)
        assert torch.equal(found, expected)
        assert torch.equal(medoids, centres)
    x, cluster = pooled(make_vit(), case, dtype, iterations=1)
    ascending = centres.sort(1)
    assert torch.equal(x, points.to(dtype).gather(1, ascending.values[..., None].expand_as(x)))
    assert torch.equal(ascending.indices.gather(1, cluster), expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", peers.names("token_pooling/kme"))
def test_clustering(make_vit, name, dtype):
    case = peers.case(name)
    settings, points = case["settings"], peers.output(case, "points").to(dtype)
    weight = peers.output(case, "weight").to(dtype) if settings["weighted"] else torch.ones_like(points[..., 0])
    start, expected = peers.output(case, "start").long(), peers.output(case, "assignment").long()
    rounds = settings["rounds"]
    found, medoids = ALGORITHMS[settings["method"]](points, weight, start, None, rounds + 1)
    assert torch.equal(found, expected)
    if settings["method"] == "kmedoids":
        assert torch.equal(medoids, peers.output(case, "medoids").long())
        x, cluster = pooled(make_vit(), case, dtype, rounds + 1)
        assert torch.equal(x, points.gather(1, medoids[..., None].expand_as(x)))
        assert torch.equal(cluster, expected)
    else:  # centres move after each assignment, also after the last
        assert (pooled(make_vit(), case, dtype, rounds)[0] - peers.output(case, "centres")).abs().max() <= TOLERANCE[
            dtype
        ]
        assert torch.equal(pooled(make_vit(), case, dtype, rounds + 1)[1], expected)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("method", ["power_bert", "token_pooling"])
@pytest.mark.parametrize("name", peers.names("token_pooling/significant"))
@torch.no_grad()
def test_the_most_significant_of_a_whole_model(monkeypatch, name, method, dtype):
    """What prunes before block l by the attention of block l - 1 prunes in block l - 1, since an MLP sees one row."""
    case, vit = peers.case(name), peers.backbone("vit", dtype)
    blocks, numbers = (case["settings"][key] for key in ("cluster_loc", "cluster_count"))
    own = (
        {"tokens": numbers} if method == "power_bert" else {"method": "kmedoids", "iterations": 1, "clusters": numbers}
    )
    reducer, received = make_reducer(method, vit, layers=[block - 1 for block in blocks], **own), {}
    act = reducer.after_attention

    def watched(layer, tokens, seen):
        received[layer + 1] = tokens.layout.pad(seen)[:, 1:]
        return act(layer, tokens, seen)

    monkeypatch.setattr(reducer, "after_attention", watched)
    result = msvit.MSViT(vit, gate=make_rule("fine"), reducer=reducer).eval().run(peers.images(dtype))
    assert result.logits.dtype == dtype
    assert (result.logits - peers.output(case, "logits")).abs().max() <= TOLERANCE[dtype]
    assert result.counts[[block - 1 for block in blocks], 1].tolist() == [[1 + n] * 4 for n in numbers]
    for block, stage, order in zip(blocks, result.stages[1:], peer_orders(case), strict=True):
        theirs = peers.output(case, f"significance_{block}").gather(1, order.argsort(1))  # the sum over the heads
        assert (received[block] - theirs / vit.blocks[0].attn.num_heads).abs().max() <= TOLERANCE[dtype]
        if method == "power_bert":  # what clusters drops nothing
            found = (stage.where.flatten(1) >= 0).nonzero()[:, 1].view(4, -1)
            assert torch.equal(found, peers.output(case, f"kept_{block}").long())


def peer_orders(case):
    """The patches that come to each block where tokens are lost, in the peer's order: the most significant first."""
    order = torch.arange(64).expand(4, -1)
    for block in case["settings"]["cluster_loc"]:
        yield order
        order = order.gather(1, peers.output(case, f"centres_{block}").long())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", peers.names("token_pooling/significant"))
@torch.no_grad()
def test_the_assignments_of_a_whole_model(name, dtype):
    """Of the tokens that come to a block, by timm's own blocks, to the nearest of those that stay."""
    case, vit = peers.case(name), peers.backbone("vit", dtype)
    x, done = vit.norm_pre(vit._pos_embed(vit.patch_embed(peers.images(dtype)))), 0
    for block in case["settings"]["cluster_loc"]:
        x = vit.blocks[done:block](x)
        centres, expected = (peers.output(case, f"{part}_{block}").long() for part in ("centres", "assignment"))
        for algorithm in ALGORITHMS.values():
            assert torch.equal(algorithm(x[:, 1:], torch.ones_like(x[:, 1:, 0]), centres, None, 1)[0], expected)
        kept = torch.cat([torch.zeros_like(centres[:, :1]), centres + 1], 1)
        x, done = x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])), block


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_numbers_kept_here(dtype):
    """A few points of the reference, so that the nearest centre is tested where the file is not at hand."""
    points = torch.tensor(KEPT["points"], dtype=dtype)[None]
    start = torch.arange(KEPT["centres"])[None]
    for algorithm in ALGORITHMS.values():
        found, _ = algorithm(points, torch.ones_like(points[..., 0]), start, None, 1)
        assert found[0].tolist() == KEPT["assignment"]
