"""ALGM against its definition in plain loops, and what the paper says of it."""

import math

import pytest
import torch
from helpers import segmenting

import msvit
from msvit.core.attention import Layout
from msvit.core.tokens import Tokens
from msvit.gating.rules import make_rule
from msvit.models.msvit import EXECUTIONS
from msvit.reducers.algm import ALGM, training_threshold
from msvit.reducers.registry import make_reducer

PREFIX, SIDE = 1, 4


def cosine(x, y):
    return float(x @ y) / (float(x.norm()) * float(y.norm()))


def random_tokens(case):
    """Float64 tokens of two pictures on a 4 x 4 grid, some regions of 2 x 2 patches with one token, alike in groups."""
    torch.manual_seed(case)
    kinds = torch.randn(3, 5, dtype=torch.float64)
    rows, where, areas, lengths = [], [], [], []
    for _ in range(2):
        grid, start = torch.zeros(SIDE, SIDE, dtype=torch.long), len(rows)
        rows += [torch.randn(5, dtype=torch.float64) for _ in range(PREFIX)]
        areas += [0.0] * PREFIX
        coarse = torch.rand(SIDE // 2, SIDE // 2) < 0.3
        for y in range(SIDE):
            for x in range(SIDE):
                first = y % 2 == 0 and x % 2 == 0
                if not coarse[y // 2, x // 2] or first:
                    rows.append(kinds[int(torch.randint(3, ()))] + 0.4 * torch.randn(5, dtype=torch.float64))
                    areas.append(4.0 if coarse[y // 2, x // 2] else 1.0)
                    grid[y : y + 2 if coarse[y // 2, x // 2] else y + 1, x : x + 2 if areas[-1] > 1 else x + 1] = (
                        len(rows) - 1
                    )
        where.append(grid)
        lengths.append(len(rows) - start)
    return Tokens(
        torch.stack(rows), None, torch.tensor(areas), torch.stack(where), Layout(lengths, torch.device("cpu"))
    )


def check(reduced, before, groups):
    """New rows are these groups of old ones, per picture and in order, and the means over the patches they cover."""
    assert reduced.layout.lengths == [len(g) for g in groups]
    flat = [members for g in groups for members in g]
    for x, area, members in zip(reduced.x, reduced.area, flat, strict=True):
        weight = [max(1.0, float(before.area[r])) for r in members]
        mean = sum(w * before.x[r] for w, r in zip(weight, members, strict=True)) / sum(weight)
        assert (x - mean).abs().max() <= 1e-9
        assert area == sum(before.area[r] for r in members)
    home = {old: new for new, members in enumerate(flat) for old in members}
    assert reduced.where.flatten().tolist() == [home[r] for r in before.where.flatten().tolist()]


def bounds(tokens):
    ends = tokens.layout.ends.tolist()
    return enumerate(zip(ends[:-1], ends[1:], strict=True))


@pytest.mark.parametrize("threshold", [-0.5, 0.3, 0.7])
def test_the_local_step(make_vit, threshold):
    reducer, merged = ALGM(make_vit(img_size=32), threshold), 0
    for case in range(60):
        tokens, groups = random_tokens(case), []
        for b, (first, _) in bounds(tokens):
            alike, rest = [], []
            for y in range(0, SIDE, 2):
                for x in range(0, SIDE, 2):
                    members = sorted(set(tokens.where[b, y : y + 2, x : x + 2].flatten().tolist()))
                    pairs = [(i, j) for i in members for j in members if i != j]
                    mean = sum(cosine(tokens.x[i], tokens.x[j]) for i, j in pairs) / max(len(pairs), 1)
                    if pairs and mean >= threshold:
                        alike.append((-mean, members))
                    else:
                        rest += [[r] for r in members]
            groups.append([[r] for r in range(first, first + PREFIX)] + [m for _, m in sorted(alike)] + sorted(rest))
            merged += len(alike)
        check(reducer.reduce(0, tokens, None), tokens, groups)
    assert merged > 10


@pytest.mark.parametrize("setting", ["same", "picture"])
def test_the_global_step(make_vit, setting):
    reducer, merged = ALGM(make_vit(img_size=32), 0.8, layers=[0, 2], global_threshold=setting), 0
    for case in range(60):
        tokens, groups = random_tokens(case), []
        for _, (first, last) in bounds(tokens):
            a = [r for r in range(first, last) if (r - first) % 2 == 0 and r - first >= PREFIX]
            b = [r for r in range(first, last) if (r - first) % 2 == 1 and r - first >= PREFIX]
            edges = {i: max((cosine(tokens.x[i], tokens.x[j]), j) for j in b) for i in a}
            best = [c for c, _ in edges.values()]
            mean, threshold = sum(best) / len(best), 0.8
            if setting == "picture":
                threshold = mean + math.sqrt(sum((c - mean) ** 2 for c in best) / (len(best) - 1)) / 3
            goes = {i: j for i, (c, j) in edges.items() if c >= threshold}
            merged += len(goes)
            rows = [*range(first, first + PREFIX), *(i for i in a if i not in goes), *b]
            groups.append([[r, *(i for i in a if goes.get(i) == r)] for r in rows])
        check(reducer.reduce(2, tokens, None), tokens, groups)
    assert merged > 10


def blocky(pictures, levels=4):
    """Pictures whose 32 px quarters have one colour each, under a little noise in some."""
    colours = torch.randn(pictures, 3, 2, 2).repeat_interleave(32, 2).repeat_interleave(32, 3)
    noise = torch.rand(pictures, 1, 2, 2).round().repeat_interleave(32, 2).repeat_interleave(32, 3)
    return colours + noise * torch.randn(pictures, 3, 64, 64) / levels


@torch.no_grad()
def test_more_is_merged_where_more_is_alike(make_vit):
    """Adaptive: a flat picture keeps fewer tokens than a busy one, and a lower threshold leaves fewer."""
    vit, counts = make_vit(pos_embed="none"), []
    images = torch.stack([torch.zeros(3, 64, 64), torch.randn(3, 64, 64)])
    for threshold in (0.99, 0.9, 0.0):
        model = msvit.MSViT(vit, gate=make_rule("fine"), reducer=make_reducer("algm", vit, threshold=threshold)).eval()
        result = model.run(images)
        counts.append(result.counts[0, 1])
        assert (result.final.where >= 0).all()
    assert counts[0].tolist() == [1 + 16, 1 + 64]  # windows of 2 x 2 patches
    assert all((b <= a).all() for a, b in zip(counts[:-1], counts[1:], strict=True))


def test_the_authors_layers(make_vit):
    assert ALGM(make_vit(depth=12, embed_dim=8, num_heads=1)).layers == (0, 4)
    assert ALGM(make_vit(depth=1, embed_dim=8, num_heads=1)).layers == (0,)


@torch.no_grad()
def test_the_threshold_of_training_pictures(make_vit):
    """mean + standard deviation over the windows of all pictures, in plain loops on timm's own first block."""
    vit = make_vit()
    model = msvit.MSViT(vit)
    images = blocky(6)
    x = vit._pos_embed(vit.patch_embed(images))
    x = x + vit.blocks[0].attn(vit.blocks[0].norm1(x))
    grid, found = x[:, 1:].unflatten(1, (8, 8)), []
    for b in range(6):
        for r in range(0, 8, 2):
            for c in range(0, 8, 2):
                rows = grid[b, r : r + 2, c : c + 2].flatten(0, 1)
                found.append(sum(cosine(rows[i], rows[j]) for i in range(4) for j in range(4) if i != j) / 12)
    mean = sum(found) / len(found)
    expected = mean + math.sqrt(sum((v - mean) ** 2 for v in found) / (len(found) - 1))
    batches = [images[:4], (images[4:], torch.zeros(2))]
    assert training_threshold(model, batches) == pytest.approx(expected, abs=1e-5)
    assert model.training
    with pytest.raises(ValueError, match="loader is empty"):
        training_threshold(model, [])


@pytest.mark.parametrize("decoder", ["linear", "mask"])
@torch.no_grad()
def test_it_serves_segmentation(make_vit, decoder):
    vit = make_vit()
    model = msvit.MSViT(vit, reducer=make_reducer("algm", vit, threshold=0.3))
    model = segmenting(model, 5, decoder).eval()
    images, mask = torch.randn(2, 3, 60, 90), torch.rand(2, 4, 6) < 0.3
    packed = model.run(images, mask)
    for execution in EXECUTIONS:
        assert (model.run(images, mask, execution).logits - packed.logits).abs().max() <= 1e-4
    assert (packed.counts[-1, 1] < packed.tokens).all()
    neutral = msvit.MSViT(
        vit, gate=model.gate, reducer=make_reducer("algm", vit, threshold=1.1), head=model.head
    ).eval()
    plain = msvit.MSViT(vit, gate=model.gate, head=model.head).eval()
    assert (neutral.run(images, mask).logits - plain.run(images, mask).logits).abs().max() <= 1e-5


@torch.no_grad()
def test_in_float64_and_under_autocast(make_vit):
    vit = make_vit()
    model = msvit.MSViT(vit, gate=make_rule("fine"), reducer=make_reducer("algm", vit, threshold=0.5)).eval()
    images = blocky(3)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.run(images).logits.isfinite().all()
    assert model.double().run(images.double()).logits.dtype == torch.float64
