"""Reducers in the network: neutral settings are timm, executions agree, MACs are counted, decisions learned."""

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from helpers import check_slopes, encode

import msvit
from msvit.bench.timing import counted_macs
from msvit.core.attention import Layout
from msvit.core.backbone import pooled_logits
from msvit.core.blocks import run_blocks
from msvit.core.macs import gate_macs
from msvit.core.sampling import straight_through
from msvit.core.tokens import Tokens
from msvit.evaluation.reconstruction import reconstruction_errors
from msvit.gating.rules import Static, make_rule
from msvit.models.msvit import EXECUTIONS, Gating
from msvit.reducers.base import Teacher, check_lossless
from msvit.reducers.dynamicvit import DynamicViT
from msvit.reducers.registry import METHODS, REDUCERS, make_reducer

NEUTRAL = [
    ("dynamicvit", {"keep": 1.0}),
    ("token_pooling", {"keep": 1.0}),
    ("token_pooling", {"clusters": [64, 64, 64], "method": "kmedoids"}),
    ("power_bert", {"keep": 1.0}),
    ("random_pruning", {"keep": 1.0}),
    ("grid", {"stride": 1, "layers": [0, 1, 2]}),
    ("strided_convolution", {"stride": 1, "layers": [0, 1, 2]}),
    ("importance_sampling", {"keep": 1.0}),
    ("power_bert", {"tokens": [64, 64, 64]}),
    ("algm", {"threshold": 1.1, "layers": [0, 1, 2]}),
    ("evit", {"keep": 1.0}),
    ("diffrate", {"target": 1.0}),
    ("tome", {"r": 0}),
    ("pitome", {"keep": 1.0}),
]
REDUCING = [
    ("dynamicvit", {"keep": 0.6}),
    ("dynamicvit", {"threshold": 0.5}),
    ("token_pooling", {"keep": 0.6}),
    ("token_pooling", {"keep": [0.9, 0.8, 0.7], "method": "kmedoids", "weighted": False}),
    ("token_pooling", {"clusters": [40, 30, 12]}),
    ("power_bert", {"keep": 0.6}),
    ("random_pruning", {"keep": 0.6}),
    ("grid", {"stride": 2}),
    ("grid", {"stride": 2, "layers": [0, 2]}),
    ("evit", {"keep": 0.6}),
    ("power_bert", {"tokens": [40, 30, 12]}),
    ("importance_sampling", {"keep": 0.6}),
    ("strided_convolution", {"stride": 2}),
    ("strided_convolution", {"stride": 2, "layers": [0, 1]}),
    ("algm", {"threshold": 0.2}),
    ("algm", {"threshold": 0.3, "layers": [0, 1, 2], "global_threshold": "picture"}),
    ("evit", {"keep": 0.6, "fuse": False}),
    ("diffrate", {"target": 0.6}),
    ("diffrate", {"numbers": [[60, 30, 11], [44, 30, 9]], "granularity": 3, "layers": [0, 1, 2]}),
    ("tome", {"r": 9}),
    ("tome", {"r": [4, 0, 9], "prop_attn": False}),
    ("tome", {"r": 6, "inflect": -1.0, "order": "picture"}),
    ("pitome", {"keep": 0.8}),
]
SIZE, GRID = (64, 64), (4, 4)


def shake(module):
    """Random values where layers start with zeros, ones or 1e-5, and larger weights: all shows in the logits."""
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.dim() == 1 or "token" in name or "pos_embed" in name:
                p.add_(0.2 * torch.randn_like(p))
            else:
                p.mul_(2)
    return module.eval()


def built(vit, name, settings, gate=None, **options):
    reducer = make_reducer(name, vit, **settings)
    return msvit.MSViT(vit, gate=gate, reducer=reducer, **options).eval()


counted = torch.no_grad()(counted_macs)


@pytest.mark.parametrize(("name", "settings"), NEUTRAL, ids=str)
@pytest.mark.parametrize(
    "variant",
    [{}, {"init_values": 0.1, "reg_tokens": 4}, {"class_token": False, "global_pool": "avg"}],
    ids=str,
)
@torch.no_grad()
def test_a_neutral_setting_is_plain_timm(make_vit, name, settings, variant):
    if name in ("evit", "diffrate") and "class_token" in variant:
        pytest.skip(f"{name} needs a class token, see TestBadInput")
    vit = shake(make_vit(**variant))
    model = built(vit, name, settings, make_rule("fine"))
    images = torch.randn(3, 3, *SIZE)
    expected = vit(images)
    assert expected.std() > 0.01
    for execution in EXECUTIONS:
        result = model.run(images, execution=execution)
        assert (result.logits - expected).abs().max() <= 1e-5
        assert (result.counts == result.tokens).all()
    assert (result.macs - model.dense_macs(SIZE) >= 0).all()


@pytest.mark.parametrize(("name", "settings"), NEUTRAL[:2] + NEUTRAL[3:], ids=str)
@torch.no_grad()
def test_a_neutral_setting_is_plain_timm_with_a_distillation_token(name, settings):
    vit = shake(timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7, depth=4, img_size=96))
    settings = {**settings, "layers": [0, 1, 2, 3]} if name == "grid" else settings
    settings = {"tokens": [36, 36, 36]} if "tokens" in settings else settings
    images = torch.randn(2, 3, 96, 96)
    assert (built(vit, name, settings, make_rule("fine"))(images) - vit(images)).abs().max() <= 1e-5


@pytest.mark.parametrize(("name", "settings"), REDUCING, ids=str)
@torch.no_grad()
def test_executions_agree_and_pictures_are_alone(make_vit, name, settings):
    """After a mask with unequal counts; a reducer sees active tokens alone, wherever the inactive ones are kept."""
    model = shake(built(make_vit(reg_tokens=1, init_values=0.3), name, settings))
    images = torch.randn(4, 3, *SIZE)
    mask = torch.rand(4, *GRID) < torch.tensor([0.0, 0.3, 0.6, 1.0])[:, None, None]
    *others, packed = (model.run(images, mask, e) for e in EXECUTIONS)
    assert packed.tokens.unique().numel() > 2
    for other in others:
        assert (other.logits - packed.logits).abs().max() <= 1e-4
        assert torch.equal(other.counts, packed.counts)
        assert torch.equal(other.macs, packed.macs)
    if settings != {
        "stride": 2
    }:  # whose cells are the coarse regions, so that it has nothing to do for the last picture
        assert (packed.counts[-1, 1] < packed.tokens).all()
    for b in range(4):
        alone = model.run(images[b : b + 1], mask[b])
        assert (alone.logits - packed.logits[b]).abs().max() <= 1e-4
        assert torch.equal(alone.macs, packed.macs[b : b + 1])


@pytest.mark.parametrize(("name", "settings"), REDUCING, ids=str)
@torch.no_grad()
def test_macs_are_the_count_to_the_last_unit(make_vit, name, settings):
    """With the tokens really present; predictors, clustering and similarities included."""
    model = shake(built(make_vit(reg_tokens=1), name, settings))
    images, results = torch.randn(3, 3, *SIZE), []
    total = counted(lambda: results.append(model.run(images, torch.zeros(GRID, dtype=torch.bool))))
    macs = results[0].macs
    if settings.get("threshold") is None:
        assert total == macs.sum().item()
        assert macs.unique().numel() == 1
        assert macs[0] < model.dense_macs(SIZE)
    # Pictures of unequal lengths are clustered in one padded batch; the pictures' own share is what counts for them.
    mask = torch.rand(3, *GRID) < torch.tensor([0.1, 0.5, 0.8])[:, None, None]
    total = counted(lambda: results.append(model.run(images, mask)))
    if name in ("tome", "pitome", "diffrate", "token_pooling"):
        assert 1 <= total / results[1].macs.sum().item() <= 1.1
    else:
        assert total == results[1].macs.sum().item()
    if not model.adaptive:
        closed = model.macs_of(mask.sum((1, 2)), SIZE)
        assert torch.equal(closed - gate_macs(model.gate, 16), results[1].macs)


@pytest.mark.parametrize(
    ("name", "settings", "published"),
    [
        ("dynamicvit", {"keep": 0.7}, 2.9),  # Rao et al. 2021, table 1
        ("evit", {"keep": 0.7}, 3.0),  # Liang et al. 2022, table 1
        ("evit", {"keep": 0.5}, 2.3),
        ("tome", {"r": 13}, 2.7),  # Bolya et al. 2023, table 5
        ("tome", {"r": 0}, 4.6),
    ],
)
@pytest.mark.long
def test_published_figures_of_deit_small(name, settings, published):
    vit = timm.create_model("deit_small_patch16_224")
    model = built(vit, name, settings, make_rule("fine"))
    results = []
    total = counted(lambda: results.append(model.run(torch.randn(1, 3, 224, 224))))
    assert total == results[0].macs.item()
    assert total / 1e9 == pytest.approx(published, abs=0.1)
    assert model.macs_of(torch.tensor([0]), (224, 224)).item() == total


@pytest.mark.parametrize(("name", "settings"), REDUCING, ids=str)
@torch.no_grad()
def test_the_map_leads_every_pixel_to_its_token(make_vit, name, settings):
    model = shake(built(make_vit(), name, settings, make_rule("fine")))
    result = model.run(torch.randn(3, 3, *SIZE))
    assert [s.layer for s in result.stages] == [None, *model.reducer.layers]
    before = result.stages[0].where
    for stage in result.stages[1:]:
        dropped = stage.where < 0
        assert not (dropped.any() and model.reducer.lossless)
        assert (dropped | (before >= 0)).all()  # what is gone does not return
        # Patches that had one token together have one together still.
        for b in range(3):
            pairs = {
                (int(o), int(n)) for o, n in zip(before[b].flatten(), stage.where[b].flatten(), strict=True) if o >= 0
            }
            assert len(pairs) == len({o for o, _ in pairs})
        before = stage.where
    final = result.final
    assert (final.where < 0).any() == (not model.reducer.lossless)
    area = torch.bincount(final.where[final.where >= 0].flatten(), minlength=len(final.x))
    assert torch.equal(area.float(), final.area)
    painted = final.paint(final.area, SIZE)
    assert torch.equal(painted.isnan(), (final.where < 0).repeat_interleave(8, 1).repeat_interleave(8, 2))
    assert torch.equal(final.layout.sum((final.area > 0).long()) <= result.stages[-1].kept.long(), torch.ones(3) > 0)


@pytest.mark.parametrize(("name", "needs"), [("power_bert", "received"), ("evit", "class"), ("tome", "keys")])
@torch.no_grad()
def test_a_reducer_sees_the_attention_in_its_block(make_vit, monkeypatch, name, needs):
    """Against timm's own attention, written out; and the other blocks do not compute it."""
    vit = shake(make_vit(qk_norm=True, reg_tokens=1))
    model = msvit.MSViT(vit, gate=make_rule("fine"), reducer=make_reducer(name, vit, layers=[1])).eval()
    images, received, inputs = torch.randn(2, 3, *SIZE), [], []
    act = model.reducer.after_attention

    def watched(layer, tokens, seen):
        received.append(seen)
        return act(layer, tokens, seen)

    monkeypatch.setattr(model.reducer, "after_attention", watched)
    model(images)
    attn = vit.blocks[1].attn
    hook = attn.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    vit(images)
    hook.remove()
    q, k, _ = attn.qkv(inputs[0]).view(2, 66, 3, 4, 16).permute(2, 0, 3, 1, 4)
    q, k = attn.q_norm(q), attn.k_norm(k)
    a = (q @ k.transpose(2, 3) / 4).softmax(3).mean(1)
    expected = {"received": a.sum(1), "class": a[:, 0], "keys": k.mean(1)}[needs]
    assert len(received) == 1
    torch.testing.assert_close(received[0], expected.flatten(0, 1), rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_merging_equal_tokens_changes_nothing(make_vit):
    """With proportional attention and area-weighted pooling, two equal tokens and one of size two are the same."""
    vit = shake(make_vit(pos_embed="none", class_token=True, global_pool="avg"))
    left = torch.randn(3, 3, 8, 8, 4, 8)  # pairs of equal patches side by side
    images = left[..., None, :].expand(-1, -1, -1, -1, -1, 2, -1).reshape(3, 3, 64, 64)
    model = msvit.MSViT(vit, gate=make_rule("fine"), reducer=make_reducer("tome", vit, r=32, layers=[0])).eval()
    result = model.run(images)
    assert result.counts[0].tolist() == [[65] * 3, [33] * 3]
    assert (result.logits - vit(images)).abs().max() <= 1e-5
    pooled = built(vit, "token_pooling", {"clusters": [32], "layers": [0]}, make_rule("fine"))
    assert (pooled(images) - vit(images)).abs().max() > 1e-3  # whose centres count once each


class TestDynamicViT:
    def test_masked_training_is_discarding_evaluation(self, make_vit, monkeypatch):
        """The same decisions, as logits far from any noise, once multiplied into attention and once obeyed."""
        vit = shake(make_vit(reg_tokens=1))
        model = built(vit, "dynamicvit", {"threshold": 0.5}, make_rule("fine"))
        images = torch.randn(3, 3, *SIZE)
        logits = torch.randn(3, 3, 64).sign() * 1e4  # stage, picture, patch
        predictors = list(model.reducer.predictors.values())
        for predictor, scores in zip(predictors, logits, strict=True):
            monkeypatch.setattr(predictor, "forward", lambda x, layout, kept, scores=scores: scores.flatten())
        model.train()
        trained = model.run(images, execution="packed")
        assert trained.final.layout.lengths == [66] * 3
        model.eval()
        for predictor, scores, stage in zip(predictors, logits, trained.stages, strict=False):
            left = scores[stage.where.flatten(1) >= 0]
            monkeypatch.setattr(predictor, "forward", lambda x, layout, kept, left=left: left)
        discarded = model.run(images)
        assert (trained.logits - discarded.logits).abs().max() <= 1e-4
        assert torch.equal(trained.counts, discarded.counts)
        assert discarded.counts[-1, 1].max() < 30
        for a, b in zip(trained.stages, discarded.stages, strict=True):
            assert torch.equal(a.where >= 0, b.where >= 0)

    def test_what_is_dropped_does_not_influence_what_is_kept(self, make_vit, monkeypatch):
        vit = shake(make_vit())
        reducer = make_reducer("dynamicvit", vit, layers=[0])
        model = msvit.MSViT(vit, gate=make_rule("fine"), reducer=reducer).train()
        images, keep = torch.randn(2, 3, *SIZE), torch.rand(2, 8, 8) < 0.5
        monkeypatch.setattr(reducer.predictors["0"], "forward", lambda x, layout, kept: (2e4 * keep - 1e4).flatten())
        other = images + torch.randn_like(images) * (~keep).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None]
        first, second = model.run(images), model.run(other)
        assert (first.logits - second.logits).abs().max() <= 1e-5
        kept = first.final.x[first.final.activity > 0.5] - second.final.x[second.final.activity > 0.5]
        assert kept.abs().max() <= 1e-5
        assert (model.run(torch.randn_like(images)).logits - first.logits).abs().max() > 1e-2

    def test_top_k_keeps_the_papers_numbers(self, make_vit):
        model = built(make_vit(), "dynamicvit", {"keep": 0.7}, make_rule("fine"))
        assert model.run(torch.randn(2, 3, *SIZE)).counts[:, 1, 0].tolist() == [1 + 44, 1 + 31, 1 + 21]

    def test_losses_are_their_definitions(self, make_vit):
        vit = shake(make_vit())
        model = built(vit, "dynamicvit", {"keep": 0.7}, make_rule("fine")).train()
        images = torch.randn(2, 3, *SIZE)
        features = vit.forward_features(images).detach()
        teacher = Teacher(torch.randn(2, 8), features[:, 1:].view(2, 8, 8, -1))
        result = model.run(images)
        terms = model.reducer.loss(result, teacher)
        logits, x = result.logits.detach(), result.final.x.detach()
        ratio = kl = tokens = 0.0
        for s, goal in enumerate((0.7, 0.49, 0.343), 1):
            for b in range(2):
                ratio += (goal - float((result.stages[s].where[b] >= 0).float().mean())) ** 2 / 6
        for b in range(2):
            p, q = teacher.logits[b].softmax(0), logits[b].softmax(0)
            kl += float((p * (p / q).log()).sum()) / 2
        kept = (result.stages[-1].where >= 0).nonzero().tolist()
        for b, r, c in kept:
            row = x[result.final.where[b, r, c]]
            tokens += float((row - teacher.tokens[b, r, c]).square().mean()) / len(kept)
        expected = {"ratio": 2 * ratio, "kl": 0.5 * kl, "tokens": 0.5 * tokens}
        assert {k: v.detach().item() for k, v in terms.items()} == pytest.approx(expected, rel=1e-4)
        sum(terms.values()).backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.reducer.parameters())

    @pytest.mark.long
    def test_the_ratio_is_learned(self, make_vit):
        """The ratio loss alone brings the shares that are kept to 0.7, 0.49 and 0.343."""
        vit = shake(make_vit(embed_dim=16, img_size=32, num_heads=2))
        settings = {"keep": 0.7, "kl_weight": 0.0, "token_weight": 0.0}
        model = built(vit, "dynamicvit", settings, make_rule("fine")).train()
        optimizer = torch.optim.Adam(model.reducer.parameters(), 1e-2)
        images = torch.randn(32, 3, 32, 32)
        for _ in range(60):
            result = model.run(images)
            optimizer.zero_grad()
            model.reducer.loss(result)["ratio"].backward()
            optimizer.step()
        shares = [(s.kept / result.stages[0].kept).mean().item() for s in result.stages[1:]]
        assert shares == pytest.approx([0.7, 0.49, 0.343], abs=0.07)

    def test_at_least_one_token_stays(self, make_vit, monkeypatch):
        vit = shake(make_vit(class_token=False, global_pool="avg"))
        model = built(vit, "dynamicvit", {"threshold": 0.5}, make_rule("fine"))
        for predictor in model.reducer.predictors.values():
            monkeypatch.setattr(predictor, "forward", lambda x, layout, kept: torch.full((len(x),), -1e4))
        for training in (True, False):
            result = model.train(training).run(torch.randn(2, 3, *SIZE))
            assert result.logits.isfinite().all()
            assert result.counts[-1, 1].tolist() == [1, 1]


@pytest.mark.parametrize(("name", "settings"), REDUCING, ids=str)
@pytest.mark.parametrize("execution", EXECUTIONS[:3])
@pytest.mark.long
def test_gate_and_reducer_train_together(make_vit, name, settings, execution):
    model = shake(built(make_vit(), name, settings)).train()
    result = model.run(torch.randn(4, 3, *SIZE), execution=execution)
    F.cross_entropy(result.logits, torch.arange(4)).backward()
    missing = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert missing == []
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("name", "settings"), [REDUCING[0], *REDUCING[2:]], ids=str)
def test_a_static_gate_trains_on_what_is_left(make_vit, name, settings):
    model = shake(built(make_vit(), name, settings, Static("centre", 0.5))).train()
    result = model.run(torch.randn(4, 3, *SIZE))
    F.cross_entropy(result.logits, torch.arange(4)).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.vit.parameters())
    if name not in ("dynamicvit", "diffrate"):  # which discard nothing while they learn
        assert len(result.final.x) == result.counts[-1, 1].sum()


def test_the_gate_learns_through_a_merge(make_vit):
    """dL/dm of a reducer that does nothing is the plain model's; of one that merges it is no longer, but not zero."""
    vit = shake(make_vit(init_values=0.5))
    images, gradients = torch.randn(4, 3, *SIZE), []
    scores = torch.randn(4, 4, 4)
    for reducer in (None, make_reducer("tome", vit, r=0), make_reducer("tome", vit, r=4)):
        model = msvit.MSViT(vit, reducer=reducer).train()
        s = scores.clone().requires_grad_()
        soft = torch.sigmoid(s / model.gate.tau)
        gating = Gating(s, soft, straight_through(soft))
        tokens = encode(model, images, gating, "masked")
        F.cross_entropy(pooled_logits(vit, tokens), torch.arange(4)).backward()
        gradients.append(s.grad)
    plain, neutral, merging = gradients
    torch.testing.assert_close(neutral, plain, rtol=1e-4, atol=1e-7)
    cosine = F.cosine_similarity(merging.flatten(), plain.flatten(), 0)
    assert 0.3 < cosine < 0.9999
    assert (merging.abs() > 0).all()


@pytest.mark.parametrize(("name", "settings"), REDUCING[-8:], ids=str)
def test_bfloat16_takes_the_same_numbers_of_tokens(make_vit, name, settings):
    model = shake(built(make_vit(reg_tokens=1), name, settings))
    images, mask = torch.randn(3, 3, *SIZE), torch.rand(3, *GRID) < 0.4
    exact = model.run(images, mask)
    for training in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            result = model.train(training).run(images, mask)
            F.cross_entropy(result.logits, torch.arange(3)).backward()
        assert torch.equal(result.counts, exact.counts)
        assert all(p.grad.isfinite().all() for p in model.vit.parameters())


@pytest.mark.parametrize("fuse", [True, False])
def test_the_gate_learns_through_evit_as_finite_differences_say(make_vit, fuse, unbounded):
    """dL/d activity of active tokens, kept and fused ones alike: once through attention and once through the token."""
    vit = shake(make_vit(img_size=32, init_values=0.5)).double()
    reducer = make_reducer("evit", vit, keep=0.5, layers=[0, 1], fuse=fuse)
    model = msvit.MSViT(vit, gate=make_rule("fine"), reducer=reducer).eval()
    images = torch.randn(2, 3, 32, 32).double()
    tokens = model.tokenize(images, model.decide(images), "packed")

    def loss(activity):
        given = replace(tokens, activity=activity.requires_grad_())
        return F.cross_entropy(pooled_logits(vit, run_blocks(vit, given, reducer).final), torch.arange(2))

    check_slopes(loss, torch.ones(len(tokens.x), dtype=torch.float64), range(1, len(tokens.x), 4))
    # Half a token that is fused weighs half in the fused one, not a quarter.
    x, where = torch.randn(6, vit.embed_dim).double(), torch.arange(2, 6).view(1, 2, 2)
    seen = torch.tensor([0.3, 0.2, 0.25, 0.1, 0.1, 0.05], dtype=torch.float64)
    half = torch.tensor([1.0, 1, 1, 1, 0.6, 1], dtype=torch.float64)
    given = Tokens(x, half, torch.ones(6), where, Layout([6], x.device))
    assert not fuse or torch.allclose(reducer.reduce(0, given, seen * half).x[-1], (seen * half)[4:] @ x[4:])


@torch.no_grad()
def test_a_budget_is_met_with_a_reducer(make_vit):
    images = torch.randn(32, 3, *SIZE)
    for name, settings in (("evit", {"keep": 0.7}), ("dynamicvit", {"threshold": 0.5})):
        model = shake(built(make_vit(), name, settings))
        for p in model.gate.mlp[-1].parameters():
            p.mul_(3)
        reached = model.calibrate([images[:16], images[16:]], 0.45)
        measured = model.run(images).macs.mean().item() / model.dense_macs(SIZE)
        assert reached == pytest.approx(0.45, abs=0.02)
        assert measured == pytest.approx(reached, abs=1e-6)


@torch.no_grad()
def test_reconstruction_errors_are_reported(make_vit):
    vit = shake(make_vit())
    images = torch.randn(4, 3, *SIZE)
    errors = {}
    for name, settings in (
        ("token_pooling", {"keep": 0.5}),
        ("power_bert", {"keep": 0.5}),
        ("power_bert", {"keep": 1.0}),
    ):
        model = built(vit, name, {**settings, "layers": [1]}, make_rule("fine"))
        errors[name, settings["keep"]] = reconstruction_errors(model, images)
    assert errors["power_bert", 1.0].abs().max() < 1e-6
    assert errors["token_pooling", 0.5].shape == (1, 4)
    assert (errors["token_pooling", 0.5] < errors["power_bert", 0.5]).all()
    assert (errors["power_bert", 0.5] < 1.5).all()
    assert not model.reducer._forward_hooks


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        REDUCING[0],
        REDUCING[2],
        ("tome", {"r": 3}),
        ("diffrate", {"target": 0.7, "granularity": 2}),
        ("strided_convolution", {"layers": [1]}),
        ("algm", {"threshold": 0.3}),
    ],
    ids=str,
)
@torch.no_grad()
def test_saves_and_loads(tmp_path, name, settings):
    vit = timm.create_model("vit_mini_patch8_64")
    model = shake(built(vit, name, settings, make_rule("centre", rate=0.25)))
    model.save_pretrained(tmp_path)
    again = msvit.MSViT.from_pretrained(tmp_path)
    images = torch.randn(2, 3, *SIZE)
    assert torch.equal(again(images), model(images))
    assert again.reducer.settings == {"name": name, **settings}
    assert again.gate.rate == 0.25


def test_the_table_names_every_reducer():
    assert set(REDUCERS) == {name for name, method in METHODS.items() if method.kind == "reducer"}
    assert all(all(method) for method in METHODS.values())


def test_dense_tasks_are_served_by_methods_that_lose_nothing(tiny_vit):
    for name in REDUCERS:
        reducer = make_reducer(name, tiny_vit)
        if reducer.lossless:
            check_lossless(reducer)
            continue
        assert METHODS[name].tasks == "classification"
        with pytest.raises(ValueError, match=r"drops tokens.*dense task.*tome"):
            check_lossless(reducer)
    check_lossless(None)


class TestBadInput:
    @pytest.mark.parametrize(
        "name",
        ["dynamicvit", "token_pooling", "power_bert", "random_pruning", "importance_sampling", "evit", "pitome"],
    )
    @pytest.mark.parametrize("keep", [0, -0.5, 1.5, [0.7, 0.7, 2.0], "0.7"])
    def test_keep_ratio(self, tiny_vit, name, keep):
        with pytest.raises(ValueError, match=r"keep"):
            make_reducer(name, tiny_vit, keep=keep)

    def test_as_many_ratios_as_layers(self, tiny_vit):
        with pytest.raises(ValueError, match=r"2 ratios for 3 layers"):
            make_reducer("evit", tiny_vit, keep=[0.7, 0.5])

    @pytest.mark.parametrize(("name", "setting"), [("token_pooling", "clusters"), ("power_bert", "tokens")])
    @pytest.mark.parametrize("numbers", [[65, 2, 2], [0, 2, 2], [1.5, 2, 2], [8, 8]])
    def test_more_clusters_than_tokens(self, tiny_vit, name, setting, numbers):
        with pytest.raises(ValueError, match=rf"{setting}=.*(64|layers)"):
            make_reducer(name, tiny_vit, **{setting: numbers})

    @pytest.mark.parametrize("layers", [[3], [-1], [0, 7], [1.0]])
    @pytest.mark.parametrize("name", REDUCERS)
    def test_layer_out_of_range(self, tiny_vit, name, layers):
        with pytest.raises(ValueError, match=r"out of range.*blocks 0 to 2"):
            make_reducer(name, tiny_vit, layers=layers)

    def test_layer_twice(self, tiny_vit):
        with pytest.raises(ValueError, match="twice"):
            make_reducer("tome", tiny_vit, layers=[1, 1])

    @pytest.mark.parametrize(("name", "other"), [("evit", "power_bert"), ("diffrate", "pitome")])
    def test_class_token(self, make_vit, name, other):
        with pytest.raises(ValueError, match=rf"no class token.*{other}"):
            make_reducer(name, make_vit(class_token=False, global_pool="avg"))

    @pytest.mark.parametrize(
        ("name", "settings", "match"),
        [
            ("tome", {"r": -1}, "r=-1"),
            ("tome", {"r": 1.5}, "r=1.5"),
            ("tome", {"r": [3, -2]}, "r=-2"),
            ("tome", {"r": [3, 2, 1, 0]}, r"one number for each of the layers \[0, 1, 2\]"),
            ("tome", {"r": [3, 2, 1], "inflect": -1}, "is no schedule"),
            ("tome", {"inflect": 2}, "inflect=2"),
            ("tome", {"order": "pictures"}, "nearest is 'picture'"),
            ("evit", {"warmup": 0.5, "ramp_end": 0.3}, r"ramp_end=0.3 lies outside \[0.5, 1\]"),
            ("diffrate", {"target": 1.2}, r"target=1.2 lies outside \(0, 1\]"),
            ("diffrate", {"target": 0.3}, r"target=0.3 cannot be met: layers=\[1, 2\].*share of 0.5\d+ of the dense"),
            ("diffrate", {"granularity": 0}, "granularity=0: .*1 to 64"),
            ("diffrate", {"numbers": [[9, 8], [7]]}, r"numbers=.*two lists, P and M, for the layers \[1, 2\]"),
            ("diffrate", {"numbers": [[65, 8], [7, 6]]}, "numbers=.*65 of 64 patch tokens; .*use 4 to 64"),
            ("diffrate", {"numbers": [[9, 8], [7, 3]]}, "numbers=.*3 of 64.*with granularity=4"),
            ("grid", {"stride": 0}, "stride=0"),
            ("strided_convolution", {"stride": 1.5}, "stride=1.5"),
            ("algm", {"threshold": float("nan")}, "threshold=nan"),
            ("algm", {"threshold": "high"}, "threshold='high'"),
            ("algm", {"window": 1}, "window=1"),
            ("algm", {"global_threshold": "own"}, "'own' is not known. There are: same, picture"),
            ("token_pooling", {"method": "means"}, "kmeans, kmedoids"),
            ("token_pooling", {"iterations": 0}, "iterations=0"),
            ("dynamicvit", {"threshold": 1.0}, "threshold=1.0"),
            ("tome", {"keap": 0.5}, "no setting 'keap'.*has: r, inflect, prop_attn, order, layers"),
            ("dynamicvit", {"tresh": 0.5}, "nearest is 'threshold'"),
        ],
    )
    def test_settings(self, tiny_vit, name, settings, match):
        with pytest.raises(ValueError, match=match):
            make_reducer(name, tiny_vit, **settings)

    def test_name(self, tiny_vit):
        with pytest.raises(ValueError, match="'tomee'.*the nearest is 'tome'. There are: dynamicvit, token_pooling"):
            make_reducer("tomee", tiny_vit)

    def test_reducer_of_another_backbone(self, make_vit):
        with pytest.raises(ValueError, match=r"\(1, 64, 3\), this one has \(2, 64, 3\)"):
            msvit.MSViT(make_vit(reg_tokens=1), reducer=make_reducer("tome", make_vit()))

    def test_no_closed_form(self, tiny_vit):
        model = msvit.MSViT(tiny_vit, reducer=DynamicViT(tiny_vit, threshold=0.5))
        with pytest.raises(ValueError, match=r"run the model and read Result\.macs"):
            model.macs_of(torch.tensor([3]), SIZE)

    def test_no_teacher(self, tiny_vit):
        model = msvit.MSViT(tiny_vit, gate=make_rule("fine"), reducer=DynamicViT(tiny_vit)).train()
        assert model.reducer.needs_teacher
        with pytest.raises(ValueError, match="dense teacher"):
            model.reducer.loss(model.run(torch.randn(1, 3, *SIZE)))

    def test_saving_a_reducer_without_a_name(self, tmp_path):
        vit = timm.create_model("vit_mini_patch8_64")
        with pytest.raises(ValueError, match="make_reducer"):
            msvit.MSViT(vit, reducer=DynamicViT(vit)).save_pretrained(tmp_path)
