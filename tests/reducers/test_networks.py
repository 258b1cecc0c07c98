"""Whole networks with a reducer against plain loops over pictures, heads and tokens, written from the formulas.

Weights and pictures are sines of their index, so that no file and no seed is needed.
"""

import math

import pytest
import timm
import torch

import msvit
from msvit.gating.rules import make_rule
from msvit.reducers.registry import make_reducer


def waves(shape, shift):
    return torch.sin(0.7 * torch.arange(math.prod(shape), dtype=torch.float64) ** 1.1 + shift).view(shape)


@torch.no_grad()
def formula(vit):
    """The backbone in float64 with weights that are sines."""
    for i, (name, p) in enumerate(vit.double().named_parameters()):
        scale = 1.5 / p.shape[-1] ** 0.5 if p.dim() == 2 else 0.3
        p.copy_(scale * waves(p.shape, i) + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return vit.eval()


def distilled():
    return timm.create_model(
        "deit_tiny_distilled_patch16_224", num_classes=7, depth=3, embed_dim=64, num_heads=4, img_size=96
    )


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def mean_by_size(x, size, groups):
    """The mean of each group, weighted by sizes, and its size."""
    sizes = [sum(size[i] for i in group) for group in groups]
    return [sum(size[i] * x[i] for i in g) / s for g, s in zip(groups, sizes, strict=True)], sizes


def tome(x, size, keys, given, prefix, r, order):
    a, b = list(range(0, len(x), 2)), list(range(1, len(x), 2))
    edges = []
    for i in a:
        if i >= prefix:
            best = max((j for j in b if j >= prefix), key=lambda j: cosine(keys[i], keys[j]), default=None)
            edges.append((cosine(keys[i], keys[best]) if best is not None else -2.0, i, best))
    merged = {i: j for _, i, j in sorted(edges, reverse=True)[: min(r, (len(x) - prefix) // 2)]}
    stay = [i for i in range(len(x)) if i not in merged]
    if order == "published" and merged:
        stay.sort(key=lambda i: (i >= prefix, i % 2 if i >= prefix else 0, i))
    return mean_by_size(x, size, [[i] + [g for g in merged if merged[g] == i] for i in stay])


def pitome(x, size, keys, given, prefix, keep, margin):
    patches = range(prefix, len(x))

    def energy(i):
        cosines = [cosine(keys[i], keys[j]) for j in patches]
        return sum(c if c >= margin else math.exp(c - margin) - 1 for c in cosines) / len(patches)

    order = sorted(patches, key=energy, reverse=True)[: 2 * math.floor(len(patches) - len(patches) * keep)]
    into = {i: max(order[1::2], key=lambda j: cosine(keys[i], keys[j])) for i in order[::2]}
    return mean_by_size(x, size, [[i] + [g for g in into if into[g] == i] for i in range(len(x)) if i not in into])


def evit(x, size, keys, given, prefix, keep):
    ranked = sorted(range(prefix, len(x)), key=lambda j: -float(given[j]))
    left = math.ceil(keep * len(ranked))
    kept, rest = ranked[:left], ranked[left:]
    fused = [sum(given[j] * x[j] for j in rest)] if rest else []
    x = [x[i] for i in range(prefix)] + [x[j] for j in kept] + fused
    return x, [1.0] * len(x)


def diffrate(x, size, keys, given, prefix, prune, merge):
    ranked = sorted(range(prefix, len(x)), key=lambda j: -float(given[j]))[:prune]
    stay, go = ranked[:merge], ranked[merge:]
    into = {i: max(stay, key=lambda j: cosine(x[i], x[j])) for i in go}
    groups = {i: [i] + [g for g in go if into[g] == i] for i in [*range(prefix), *stay]}
    sizes = [size[i] + sum(max(cosine(x[g], x[i]), 0.0) * size[g] for g in group[1:]) for i, group in groups.items()]
    return [sum(x[i] for i in group) / len(group) for group in groups.values()], sizes


def plain(vit, image, act, proportional=True):
    """The logits of one picture, and how many tokens each block leaves; `act(layer, x, size, keys, given)` acts."""
    x = vit.norm_pre(vit._pos_embed(vit.patch_embed(image[None])))[0]
    size, counts = [1.0] * len(x), []
    for layer, block in enumerate(vit.blocks):
        heads, d = block.attn.num_heads, block.attn.head_dim
        q, k, v = block.attn.qkv(block.norm1(x)).view(len(x), 3, heads, d).unbind(1)
        log_size = torch.tensor(size, dtype=torch.float64).log() if proportional else 0.0
        maps = [(q[:, h] @ k[:, h].T / d**0.5 + log_size).softmax(1) for h in range(heads)]
        x = x + block.attn.proj(torch.cat([a @ v[:, h] for h, a in enumerate(maps)], 1))
        rows, size = act(layer, list(x), size, k.mean(1), sum(a[0] for a in maps) / heads)
        x = torch.stack(rows)
        counts.append(len(x))
        x = x + block.mlp(block.norm2(x))
    return vit.forward_head(vit.norm(x)[None])[0], counts


CASES = [
    ("tome", {"r": 9}, lambda layer, *now: tome(*now, 9, "published")),
    ("tome", {"r": 9, "order": "picture"}, lambda layer, *now: tome(*now, 9, "picture")),
    ("tome", {"r": [7, 0, 5], "prop_attn": False}, lambda layer, *now: tome(*now, [7, 0, 5][layer], "published")),
    ("tome", {"r": 30}, lambda layer, *now: tome(*now, 30, "published")),
    ("pitome", {"keep": 0.7}, lambda layer, *now: pitome(*now, 0.7, 0.9 - 0.3 * layer)),
    (
        "diffrate",
        {"numbers": [[30, 18, 17], [22, 18, 9]], "granularity": 2, "layers": [0, 1, 2]},
        lambda layer, *now: diffrate(*now, [30, 18, 17][layer], [22, 18, 9][layer]),
    ),
    ("evit", {"keep": 0.55, "layers": [0, 1, 2]}, lambda layer, *now: evit(*now, 0.55)),
]


@pytest.mark.parametrize(("name", "settings", "act"), CASES, ids=lambda value: "" if callable(value) else str(value))
@pytest.mark.parametrize("backbone", ["plain", "registers", "distilled"])
@torch.no_grad()
def test_the_network_is_its_plain_loops(make_vit, name, settings, act, backbone):
    vit = formula(
        distilled() if backbone == "distilled" else make_vit(img_size=48, reg_tokens=3 * (backbone == "registers"))
    )
    prefix = vit.num_prefix_tokens
    images = waves((2, 3, *vit.patch_embed.img_size), 0.3)
    model = msvit.MSViT(vit, gate=make_rule("fine"), reducer=make_reducer(name, vit, **settings)).double().eval()
    result = model.run(images)

    def acting(layer, *now):
        return act(layer, *now, prefix)

    for b, image in enumerate(images):
        logits, counts = plain(vit, image, acting, settings.get("prop_attn", True))
        assert result.counts[:, 1, b].tolist() == counts
        assert (result.logits[b] - logits).abs().max() <= 1e-9
    assert result.logits.std() > 0.1
    assert (vit(images) - result.logits).abs().max() > 1e-3
