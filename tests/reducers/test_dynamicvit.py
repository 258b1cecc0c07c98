"""DynamicViT as published: against reference numbers, and against its formulas in plain loops."""

import math

import peers
import pytest
import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

import msvit
from msvit.gating.rules import Static, make_rule
from msvit.models.msvit import EXECUTIONS
from msvit.reducers import dynamicvit
from msvit.reducers.base import Teacher
from msvit.reducers.dynamicvit import DynamicViT

DTYPES = pytest.mark.parametrize("dtype", peers.TOLERANCE, ids=str)
NAMES = (("in_conv", "local"), ("out_conv", "out"))  # theirs and ours, of a predictor's parts


def close(found, expected, dtype, scale=1.0):
    deviation = (found.detach().double() - torch.as_tensor(expected, dtype=torch.float64)).abs().max().item()
    assert deviation <= peers.TOLERANCE[dtype] * scale


def parameters(model):
    """Every parameter by its published name."""
    named = dict(model.vit.named_parameters())
    for s, predictor in enumerate(model.reducer.predictors.values()):
        for name, parameter in predictor.named_parameters():
            for theirs, ours in NAMES:
                name = name.replace(f"{ours}.", f"{theirs}.")
            named[f"score_predictor.{s}.{name}"] = parameter
    return named


def published(case, dtype):
    """The model of a case."""
    settings = case["settings"]
    vit = peers.backbone("vit", dtype)
    weights = {}
    if settings["mode"] == "training":
        distill = settings["distill_weight"]
        weights = {"ratio_weight": settings["ratio_weight"], "kl_weight": distill, "token_weight": distill}
    reducer = DynamicViT(vit, settings["base_rate"], settings["layers"], **weights)
    model = msvit.MSViT(vit, gate=make_rule("fine"), reducer=reducer).to(dtype).eval()
    with torch.no_grad():
        named = parameters(model)
        for name, value in peers.state(case["predictors"]).items():
            named[name.replace("/", ".")].copy_(value)
    return model


def use_noise(monkeypatch, noise):
    """Draw the difference of the Gumbel noise `[stages, B, N, 2]` of keeping and dropping."""
    stages = iter(noise[..., 0] - noise[..., 1])
    monkeypatch.setattr(dynamicvit, "add_logistic_noise", lambda x: x + next(stages).flatten().to(x.dtype))


@pytest.mark.parametrize("name", peers.names("dynamicvit/eval"))
@DTYPES
@torch.no_grad()
def test_evaluation_is_the_published(name, dtype):
    case = peers.case(name)
    model, images, layers, scores = published(case, dtype), peers.images(dtype), case["settings"]["layers"], []
    model.reducer.predictors[str(layers[0])].register_forward_hook(lambda *call: scores.append(call[-1]))
    for execution in ("packed", "masked"):
        result = model.run(images, execution=execution)
        close(result.logits, peers.output(case, "logits"), dtype)
        assert result.counts[:, 1].tolist() == [[n] * 4 for n in case["counts"]]
        for stage, layer in zip(result.stages[1:], layers, strict=True):
            kept = [where.flatten().ge(0).nonzero()[:, 0].tolist() for where in stage.where]
            assert kept == peers.output(case, f"kept_{layer}").tolist()
    logits = scores[0].view(4, 64)  # packed
    close(torch.stack([F.logsigmoid(logits), F.logsigmoid(-logits)], -1), peers.output(case, "scores_first"), dtype)
    first = peers.output(case, f"index_{layers[0]}").long()
    assert torch.equal(logits.argsort(1, descending=True)[:, : first.shape[1]], first)
    entering = torch.tensor([65])
    assert [model.reducer.count(layer, entering).item() - 1 for layer in layers] == case["kept_counts"]


@pytest.mark.parametrize("name", peers.names("dynamicvit/train"))
@DTYPES
def test_training_is_the_published(monkeypatch, name, dtype):
    case = peers.case(name)
    model, images, losses = published(case, dtype).train(), peers.images(dtype), case["losses"]
    teacher = peers.backbone("teacher", dtype)
    with torch.no_grad():
        features = teacher.forward_features(images)
        taught = Teacher(teacher.forward_head(features), features[:, 1:].unflatten(1, (8, 8)))
    use_noise(monkeypatch, peers.output(case, "noise"))
    result = model.run(images)
    close(result.logits, peers.output(case, "logits"), dtype)
    close(result.final.x.view(4, 65, -1)[:, 1:], peers.output(case, "features"), dtype)
    masks = torch.stack([(stage.where >= 0).flatten(1) for stage in result.stages[1:]])
    assert torch.equal(masks, peers.output(case, "masks").bool())
    terms, weights = model.reducer.loss(result, taught), case["settings"]
    task = F.cross_entropy(result.logits, peers.labels())
    total = task + sum(terms.values())
    close(task, losses["classification"], dtype)
    close(terms["ratio"], weights["ratio_weight"] * losses["ratio_sum"] / 3, dtype)
    close(terms["kl"], weights["distill_weight"] * losses["kl"], dtype)
    close(terms["tokens"], weights["distill_weight"] * losses["tokens"], dtype)
    close(total, losses["total"], dtype)
    total.backward()
    named = parameters(model)
    assert named.keys() == case["gradient_norms"].keys()
    for key, norm in case["gradient_norms"].items():
        close(named[key].grad.norm(), norm, dtype, scale=max(1.0, norm))
    for key in case["tensors"]:
        if key.startswith("gradient/"):
            close(named[key.removeprefix("gradient/")].grad, peers.output(case, key), dtype)


@pytest.mark.parametrize(("keep", "counts"), [(0.5, [32, 16, 8]), (0.7, [44, 31, 21]), (0.9, [57, 51, 46])], ids=str)
def test_counts_of_64_patches_are_the_published(tiny_vit, keep, counts):
    for given in (keep, [keep, keep**2, keep**3]):
        reducer = DynamicViT(tiny_vit, given)
        assert [reducer.count(layer, torch.tensor([65])).item() - 1 for layer in reducer.layers] == counts


@pytest.mark.parametrize(
    ("keep", "kept", "ratio_sum"),
    [
        (0.7, [[36, 30, 26, 28], [12, 9, 11, 6], [5, 7, 4, 3]], 0.2476186289062499),
        (0.5, [[31, 27, 30, 30], [8, 12, 10, 9], [3, 6, 4, 5]], 0.01544189453125),
        (0.7, [[31, 36, 31, 34], [20, 13, 8, 5], [6, 9, 6, 4]], 0.2002319101562499),
    ],
)
def test_the_ratio_loss_is_the_published(tiny_vit, keep, kept, ratio_sum):
    """Of as many kept tokens of 64 as in the reference cases."""
    reducer = DynamicViT(tiny_vit, keep, kl_weight=0.0, token_weight=0.0)
    stages = torch.tensor([[64] * 4, *kept], dtype=torch.float64)
    result = type("Result", (), {"stages": [type("Stage", (), {"kept": row}) for row in stages]})
    close(reducer.loss(result)["ratio"], 2 * ratio_sum / 3, torch.float64)


WIDTH, HEADS, PATCHES, LAYERS, KEEP = 8, 2, 9, (1, 2), 0.6


def waves(module):
    """Weights from the sines of whole numbers, the same on every machine."""
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            values = torch.sin(torch.arange(p.numel(), dtype=torch.float64) * (i + 2.3) + i).view_as(p)
            p.copy_(values * (0.9 if p.dim() > 1 else 0.4) + (p.dim() == 1) * 0.3)
    return module


def small():
    vit = VisionTransformer(
        img_size=12, patch_size=4, embed_dim=WIDTH, depth=3, num_heads=HEADS, num_classes=3, mlp_ratio=2
    )
    reducer = DynamicViT(vit, KEEP, LAYERS)
    return waves(msvit.MSViT(vit, gate=Static("fine"), reducer=reducer, scale=3).double())


def policy_attention(block, x, policy):
    """One picture `[n, C]`, query by query and key by key."""
    n, side = len(x), WIDTH // HEADS
    q, k, v = block.attn.qkv(x).view(n, 3, HEADS, side).unbind(1)
    rows = []
    for i in range(n):
        heads = []
        for h in range(HEADS):
            scores = [q[i, h] @ k[j, h] / math.sqrt(side) for j in range(n)]
            top = max(scores, key=lambda score: score.item())
            e = [(scores[j] - top).exp() * (1.0 if i == j else policy[j]) for j in range(n)]
            heads.append(sum((e[j] + 1e-6 / n) * v[j, h] for j in range(n)) / (sum(e) + 1e-6))
        rows.append(torch.cat(heads))
    return block.attn.proj(torch.stack(rows))


def by_formula(model, image, noise):
    """Logits, patch tokens after the last norm, and decisions of each stage, of one picture `[3, 12, 12]`."""
    vit = model.vit
    patches = [image[:, r : r + 4, c : c + 4] for r in (0, 4, 8) for c in (0, 4, 8)]
    embedded = [(vit.patch_embed.proj.weight * p).sum((1, 2, 3)) + vit.patch_embed.proj.bias for p in patches]
    x = torch.stack([vit.cls_token[0, 0], *embedded]) + vit.pos_embed[0]
    kept, decisions = [torch.ones((), dtype=torch.float64)] * PATCHES, []
    for layer, block in enumerate(vit.blocks):
        if layer in LAYERS:
            predictor, stage = model.reducer.predictors[str(layer)], LAYERS.index(layer)
            norm, linear = predictor.local[:2]
            u = F.gelu(F.linear(F.layer_norm(x[1:], [WIDTH], norm.weight, norm.bias), linear.weight, linear.bias))
            half = WIDTH // 2
            mean = sum(d * row[half:] for d, row in zip(kept, u, strict=True)) / sum(kept)
            for i in range(PATCHES):
                logp = predictor.out(torch.cat([u[i, :half], mean])).log_softmax(0)
                y = (logp + noise[stage, i]).softmax(0)
                kept[i] = kept[i] * (y[0] + (float(y[0] > y[1]) - y[0]).detach())
            kept = list(kept)
            decisions.append(torch.stack(kept))
        x = x + policy_attention(block, block.norm1(x), [torch.ones((), dtype=torch.float64), *kept])
        x = x + block.mlp(block.norm2(x))
    x = vit.norm(x)
    return vit.head(x[0]), x[1:], decisions


def test_training_is_its_formulas(monkeypatch):
    """Logits, losses and all gradients of a network of narrow blocks."""
    model, labels = small().train(), torch.tensor([2, 0])
    images = torch.sin(torch.arange(2 * 3 * 144, dtype=torch.float64) ** 1.5).view(2, 3, 12, 12)
    noise = 5 * torch.sin(torch.arange(2 * 2 * PATCHES * 2, dtype=torch.float64) ** 1.5).view(2, 2, PATCHES, 2)
    taught = Teacher(torch.cos(images[:, 0, 0, :3]), torch.cos(images[:, 0, :3, :3, None] * torch.arange(WIDTH)))
    found = [by_formula(model, image, noise[:, b]) for b, image in enumerate(images)]
    logits, features = torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found])
    decisions = [torch.stack([f[2][s] for f in found]) for s in range(2)]
    ratio = sum((d.mean(1) - KEEP ** (s + 1)).square().mean() for s, d in enumerate(decisions)) / 2
    log_t, log_p = taught.logits.log_softmax(1), logits.log_softmax(1)
    last = decisions[-1] > 0.5
    expected = {
        "ratio": 2 * ratio,
        "kl": 0.5 * (log_t.exp() * (log_t - log_p)).sum() / 2,
        "tokens": 0.5 * (features - taught.tokens.flatten(1, 2))[last].square().mean(),
    }
    total = sum(-log_p[b, label] for b, label in enumerate(labels)) / 2 + sum(expected.values())
    named = dict(model.named_parameters())
    gradients = torch.autograd.grad(total, named.values(), retain_graph=True)

    use_noise(monkeypatch, noise)
    result = model.run(images)
    assert 0 < last.sum() < decisions[0].sum() < last.numel()  # each stage drops some, and some are left
    assert torch.equal(result.stages[-1].where.flatten(1) >= 0, last)
    close(result.logits, logits.detach(), torch.float64)
    terms = model.reducer.loss(result, taught)
    for name, value in expected.items():
        close(terms[name], value.detach(), torch.float64)
    (F.cross_entropy(result.logits, labels) + sum(terms.values())).backward()
    for (name, parameter), gradient in zip(named.items(), gradients, strict=True):
        assert gradient.abs().max() > 0, name
        close(parameter.grad, gradient, torch.float64)


@torch.no_grad()
def test_shares_are_of_the_tokens_that_entered(make_vit):
    """Behind a gate N is another number in each picture; all executions and the closed form keep as many."""
    vit = make_vit(reg_tokens=1)
    model = msvit.MSViT(vit, reducer=DynamicViT(vit, 0.7)).eval()
    images, mask = torch.randn(4, 3, 64, 64), torch.rand(4, 4, 4) < torch.tensor([0.0, 0.3, 0.7, 1.0])[:, None, None]
    n = (64 - 3 * mask.sum((1, 2))).tolist()
    assert len(set(n)) > 2
    for execution in EXECUTIONS:
        counts = model.run(images, mask, execution).counts[:, 1] - 2
        for s in range(3):
            assert counts[s].tolist() == [int(n_b * 0.7 ** (s + 1)) for n_b in n]


def test_one_token_is_left_of_few(make_vit):
    model = msvit.MSViT(vit := make_vit(), gate=make_rule("coarse"), reducer=DynamicViT(vit, 0.1)).eval()
    assert model.run(torch.randn(2, 3, 64, 64)).counts[:, 1].tolist() == [[2, 2]] * 3


def test_training_by_policy_is_near_evaluation_in_half_precision(make_vit):
    """Under autocast, attention by the policy is computed in float32 and all gradients are finite."""
    vit = make_vit()
    model = msvit.MSViT(vit, reducer=DynamicViT(vit)).train()
    images, logits = torch.randn(4, 3, 64, 64), []
    for enabled in (False, True):
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            result = model.run(images)
        logits.append(result.logits.float())
    assert (logits[0] - logits[1]).abs().max() < 0.05
    F.cross_entropy(logits[1], torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_shares_do_not_rise(tiny_vit):
    with pytest.raises(ValueError, match=r"keep=\[0.5, 0.7, 0.2\] rises"):
        DynamicViT(tiny_vit, [0.5, 0.7, 0.2])
