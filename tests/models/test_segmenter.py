"""Segmenter's decoders: what the peers' code computed, and the mathematics in plain loops on weights of a formula."""

import math

import peers
import pytest
import torch
from peers import TOLERANCE

from msvit.core.attention import Layout
from msvit.core.tokens import Tokens
from msvit.models.heads import SegmentationHead

LINEAR = ("blocks.{}.attn.qkv", "blocks.{}.attn.proj", "blocks.{}.mlp.fc1", "blocks.{}.mlp.fc2")
WITH_BIAS = [name.format(i) for name in (*LINEAR, "blocks.{}.norm1", "blocks.{}.norm2") for i in range(2)]
WITH_BIAS += ["proj_dec", "decoder_norm", "mask_norm"]
PUBLISHED = ["cls_emb", "proj_patch", "proj_classes"] + [f"{n}.{p}" for n in WITH_BIAS for p in ("weight", "bias")]


def weights_of(case, dtype):
    state = peers.state(case["weights"])
    if case["settings"].get("projections") == "identity":
        eye = torch.eye(len(state["proj_patch"]))
        state |= dict.fromkeys(("proj_patch", "proj_classes", "proj_dec.weight"), eye)
        state["proj_dec.bias"] = torch.zeros(len(eye))
    return {f"decoder.{name}": value.to(dtype) for name, value in state.items()}


def as_tokens(rows, side, prefix):
    """Rows [B, h w, C] as all-fine tokens behind prefix tokens, which a decoder does not see."""
    b, n, width = rows.shape
    x = torch.cat([torch.randn(b, prefix, width, dtype=rows.dtype), rows], 1).flatten(0, 1)
    where = torch.arange(b)[:, None] * (prefix + n) + prefix + torch.arange(n)
    area = (torch.arange(prefix + n) >= prefix).repeat(b).to(torch.float32)
    return Tokens(x, None, area, where.view(b, -1, side), Layout([prefix + n] * b, x.device))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", peers.names("segmenter/"))
@torch.no_grad()
def test_a_case_of_the_peers(name, dtype):
    case, vit = peers.case(name), peers.backbone("vit", dtype)
    head = SegmentationHead(vit, case["settings"]["n_cls"], case["settings"]["decoder"]).to(dtype).eval()
    head.load_state_dict(weights_of(case, dtype))
    size, expected = case["image_size"], peers.output(case, "logits")
    rows, _, first = case["tokens"].partition(",")
    rows = peers.tensor(rows, dtype)[:1] if first else peers.tensor(rows, dtype)
    tokens = as_tokens(rows, -(-size[1] // 8), vit.num_prefix_tokens)
    if name == "segmenter/pixels":
        logits = head.logits(vit, tokens, size)[:, :3]
    else:
        logits = head.decode(vit, tokens).permute(0, 3, 1, 2)
    assert logits.dtype == dtype
    assert logits.shape == expected.shape
    assert (logits - expected).abs().max() <= TOLERANCE[dtype]


def wave(*shape, step, height=1.0):
    """Weights without a seed: the sine of the index."""
    return (height * torch.sin(step * torch.arange(math.prod(shape), dtype=torch.float64))).view(shape)


def small_decoder(vit, classes):
    head = SegmentationHead(vit, classes, "mask").double()
    state = {
        name: wave(*value.shape, step=0.7 + 0.1 * i, height=0.4) + (1 if "norm" in name and "weight" in name else 0)
        for i, (name, value) in enumerate(head.decoder.state_dict().items())
    }
    head.decoder.load_state_dict(state)
    return head.decoder, state


def normed(row, state, name):
    mean = sum(row) / len(row)
    spread = sum((v - mean) ** 2 for v in row) / len(row)
    scaled = [(v - mean) / math.sqrt(spread + 1e-5) for v in row]
    weight, bias = state[f"{name}.weight"].tolist(), state[f"{name}.bias"].tolist()
    return [w * v + b for w, v, b in zip(weight, scaled, bias, strict=True)]


def linear(row, state, name):
    weight, bias = state[f"{name}.weight"].tolist(), state[f"{name}.bias"].tolist()
    return [sum(w * v for w, v in zip(ws, row, strict=True)) + b for ws, b in zip(weight, bias, strict=True)]


def block_by_hand(z, state, name, heads):
    n, width = len(z), len(z[0])
    d = width // heads
    qkv = [linear(normed(row, state, f"{name}.norm1"), state, f"{name}.attn.qkv") for row in z]
    out = [[0.0] * width for _ in z]
    for h in range(heads):
        q, k, v = ([row[part * width + h * d : part * width + (h + 1) * d] for row in qkv] for part in range(3))
        for i in range(n):
            e = [math.exp(sum(a * b for a, b in zip(q[i], k[j], strict=True)) / math.sqrt(d)) for j in range(n)]
            for c in range(d):
                out[i][h * d + c] = sum(e[j] * v[j][c] for j in range(n)) / sum(e)
    moved = [linear(row, state, f"{name}.attn.proj") for row in out]
    z = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(z, moved, strict=True)]
    for i in range(n):
        hidden = linear(normed(z[i], state, f"{name}.norm2"), state, f"{name}.mlp.fc1")
        hidden = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in hidden]
        z[i] = [a + b for a, b in zip(z[i], linear(hidden, state, f"{name}.mlp.fc2"), strict=True)]
    return z


@torch.no_grad()
def test_the_mask_transformer_in_plain_loops(make_vit):
    """Pictures of unequal length in one batch; weights and tokens are sines, so that nothing has to be kept."""
    width, heads, classes, lengths = 8, 2, 3, [4, 2]
    decoder, state = small_decoder(make_vit(embed_dim=width, num_heads=heads), classes)
    x = wave(sum(lengths), width, step=1.3)
    found = decoder(x, None, Layout(lengths, x.device))
    expected = []
    for rows in x.split(lengths):
        z = [linear(row, state, "proj_dec") for row in rows.tolist()] + state["cls_emb"][0].tolist()
        for i in range(2):
            z = block_by_hand(z, state, f"blocks.{i}", heads)
        z = torch.tensor([normed(row, state, "decoder_norm") for row in z], dtype=torch.float64)
        p, q = z[:-classes] @ state["proj_patch"], z[-classes:] @ state["proj_classes"]
        for i in range(len(p)):
            cosines = [float(p[i] @ q[k]) / float(p[i].norm()) / float(q[k].norm()) for k in range(classes)]
            expected.append(normed(cosines, state, "mask_norm"))
    assert (found - torch.tensor(expected, dtype=torch.float64)).abs().max() <= 1e-9
    assert found.std() > 0.1


def test_published_names(make_vit):
    """The names of Segmenter's checkpoints, with one prefix."""
    head = SegmentationHead(make_vit(), 4, "mask")
    assert sorted(head.state_dict()) == sorted(f"decoder.{name}" for name in PUBLISHED)
    assert head.no_weight_decay() == {"decoder.cls_emb"}
    norms = [m for m in head.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 6
    assert {norm.eps for norm in norms} == {1e-5}
