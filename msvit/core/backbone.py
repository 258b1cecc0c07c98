"""The timm side: what of a built VisionTransformer or Eva is used, and which ones can be used at all.

The functions here read a timm model's public parts and never change it.
"""

import copy
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionPoolLatent, AttentionRope, PatchEmbed
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from .attention import Layout, attend
from .candidates import Candidates
from .kept import Kept, recording
from .precision import in_full
from .rotary import check_rotary
from .tokens import Tokens

PREFIX = ("cls_token", "dist_token", "reg_token")  # in timm's order
KEPT_SIZES = 4  # of pictures, whose bases are kept for a backbone
KEPT_BASES: WeakKeyDictionary[nn.Module, Kept] = WeakKeyDictionary()
WINDOWED = ("SwinTransformer", "SwinTransformerV2", "SwinTransformerV2Cr", "Hiera", "HieraDet", "VisionTransformerSAM")
REMEDIES = dict.fromkeys(WINDOWED, "attends in windows or merges patches by their grid, see docs/hierarchical.md")
REMEDIES["NaFlexVit"] = "embeds and packs pictures itself; a plain vit_* takes lists of pictures of all sizes here"
POOLS = ("token", "avg", "avgmax", "max", "map")
BLOCKS = {
    Block: (Attention,),
    EvaBlock: (EvaAttention, AttentionRope),
    EvaBlockPostNorm: (EvaAttention, AttentionRope),
}


def check_backbone(vit: nn.Module):
    """Raise a TypeError or ValueError that says why a model cannot be used."""
    kind = type(vit).__name__
    if not isinstance(vit, VisionTransformer | Eva):
        why = f": it {REMEDIES[kind]}" if kind in REMEDIES else ""
        raise TypeError(
            f"{kind} is no plain vision transformer{why}; MSViT needs a timm VisionTransformer or Eva such as vit_*, "
            "deit_*, deit3_*, eva02_* (not swin, or a convolutional network); `msvit models` lists all"
        )
    known = [b for b in vit.blocks if type(b) in BLOCKS]
    blocks = {type(b).__name__ for b in vit.blocks if type(b) not in BLOCKS}
    blocks |= {type(b.attn).__name__ for b in known if type(b.attn) not in BLOCKS[type(b)]}
    if blocks:
        listed = ", ".join(block.__name__ for block in BLOCKS)
        raise ValueError(f"{kind} has {sorted(blocks)}; supported are timm's standard blocks ({listed}) and attention")
    check_rotary(getattr(vit, "rope", None))
    if type(vit.patch_embed) is not PatchEmbed:
        raise ValueError(f"patch embedding {type(vit.patch_embed).__name__}; supported is timm's PatchEmbed")
    if len(set(vit.patch_embed.patch_size)) > 1:
        raise ValueError(f"patches of {vit.patch_embed.patch_size} pixels; supported are square ones")
    if vit.global_pool not in POOLS or (vit.global_pool == "map" and type(vit.attn_pool) is not AttentionPoolLatent):
        raise ValueError(f"global_pool={vit.global_pool!r}; supported are {', '.join(POOLS)}")
    dropout = max([vit.blocks[0].attn.attn_drop.p, getattr(vit.patch_drop, "prob", 0.0)])
    if dropout > 0:
        raise ValueError(
            f"attn_drop_rate or patch_drop_rate is {dropout}; build the backbone without them (drop_path_rate, "
            "proj_drop_rate and pos_drop_rate work)"
        )


def norms_after(block: nn.Module) -> bool:
    """Return whether a block has its norms on what its branches add, in place of what they see."""
    return isinstance(block, EvaBlockPostNorm)


def projections(attn: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Return queries, keys and values of rows `[T, C]`, each `[T, H, D]`, from one projection or from three."""
    if attn.qkv is None:
        return tuple(part(x).unflatten(1, (-1, attn.head_dim)) for part in (attn.q_proj, attn.k_proj, attn.v_proj))
    joint = attn.qkv(x)
    if getattr(attn, "q_bias", None) is not None:
        joint = joint + torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])  # EVA's: that of keys is 0
    return joint.view(joint.shape[0], 3, -1, attn.head_dim).unbind(1)


def scaled(block: nn.Module, branch: int, rows: Tensor) -> Tensor:
    """Return what the first or second branch of a block adds, scaled (LayerScale) or normed where the block does so."""
    if isinstance(block, Block):
        return getattr(block, f"ls{branch}")(rows)
    if norms_after(block):
        return getattr(block, f"norm{branch}")(rows)
    scale = getattr(block, f"gamma_{branch}")
    return rows if scale is None else rows * scale


def patch_size(vit: VisionTransformer) -> int:
    return vit.patch_embed.patch_size[0]


def convolution(vit: VisionTransformer) -> nn.Conv2d:
    """Return the convolution that embeds patches; where an adapter such as LoRA's wraps it, the one inside."""
    return next(module for module in vit.patch_embed.proj.modules() if isinstance(module, nn.Conv2d))


def bases(vit: VisionTransformer, candidates: Candidates, each: bool = False, keep: bool = False) -> Tensor:
    """Return what each candidate is before its pixels are added, `[N, C]`: prefix tokens and positions.

    The position of a coarse token is the mean of those of its fine patches; positions are resized to other grids as
    timm does. With `each`, the backbone's own positions are resized to the grid of each size.

    Args:
        keep: Where no gradient is asked for, keep them as long as what they are made of has the same values. These are
            compared every time: a weight may be changed in ways that leave no mark on it, such as by its `data`.
    """
    if not keep or recording() or torch.is_grad_enabled():
        return _bases(vit, candidates, each)
    sources = [t for name in (*PREFIX, "pos_embed") if (t := getattr(vit, name, None)) is not None]

    def same(found: tuple[list[Tensor], Tensor]) -> bool:
        return all(torch.equal(now, before) for now, before in zip(sources, found[0], strict=True))

    key = candidates, each, *((t.device, t.dtype) for t in sources)
    kept = KEPT_BASES.setdefault(vit, Kept(KEPT_SIZES))
    return kept.get(key, lambda: ([t.clone() for t in sources], _bases(vit, candidates, each)), same)[1]


def _bases(vit: VisionTransformer, candidates: Candidates, each: bool) -> Tensor:
    prefix = [t[0] for name in PREFIX if (t := getattr(vit, name, None)) is not None]
    prefix = torch.cat(prefix) if prefix else convolution(vit).weight.new_empty(0, vit.embed_dim)
    if vit.pos_embed is None:
        return F.pad(prefix, (0, 0, 0, candidates.count - len(prefix)))
    lead, own, (h, w) = 0 if vit.no_embed_class else len(prefix), vit.patch_embed.grid_size, candidates.fine.grid
    positions = vit.pos_embed[0, lead:]
    if lead:
        prefix = prefix + vit.pos_embed[0, :lead]
    if not each:
        return candidates.positions(prefix, resized(positions, own, (h, w)))
    levels = []
    for side, grid, _ in candidates.levels:
        tiles = (-(-h // side), -(-w // side))  # the last row or column may end outside of the picture
        levels.append(resized(positions, own, tiles).unflatten(0, tiles)[: grid[0], : grid[1]].flatten(0, 1))
    return torch.cat([prefix, *levels])


def resized(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Return positions `[h w, C]` on another grid, bicubic with antialias: timm's resize, but float64 stays float64."""
    if tuple(old) == tuple(new):
        return positions
    grid = F.interpolate(in_full(positions).T.unflatten(1, old)[None], new, mode="bicubic", antialias=True)
    return grid[0].flatten(1).T.to(positions.dtype)


def embed(vit: VisionTransformer, pixels: Tensor) -> Tensor:
    """Return the backbone's patch embedding of pixels `[..., c S S]`, for all scales the same."""
    proj = vit.patch_embed.proj
    if type(proj) is nn.Conv2d:
        embedded = F.linear(pixels, proj.weight.flatten(1), proj.bias)
    else:  # one that an adapter wraps: it has more weights than the convolution's
        inner = convolution(vit)
        patches = pixels.reshape(-1, *inner.weight.shape[1:])
        embedded = proj(patches).view(*pixels.shape[:-1], inner.out_channels)
    return vit.patch_embed.norm(embedded)


def copy_embedding(vit: VisionTransformer) -> nn.Module:
    """Return another patch embedding, on pixels `[n, c S S]`, with weights of its own."""
    proj = convolution(vit)
    linear = nn.Linear(proj.weight[0].numel(), proj.out_channels, bias=proj.bias is not None)
    linear.weight.data.copy_(proj.weight.flatten(1))
    if proj.bias is not None:
        linear.bias.data.copy_(proj.bias)
    return nn.Sequential(linear, copy.deepcopy(vit.patch_embed.norm))


def drop_path(module: nn.Module, branch: Tensor, layout: Layout) -> Tensor:
    """Drop a branch at random (stochastic depth): one draw per picture, as in timm, not one per row."""
    if isinstance(module, nn.Identity) or not module.training:
        return branch
    return _drop_pictures(module, branch, layout)


@torch.compiler.disable  # a graph would be of this layout alone
def _drop_pictures(module: nn.Module, branch: Tensor, layout: Layout) -> Tensor:
    kept = module(branch.new_ones(len(layout.lengths), 1))
    return branch * kept[layout.picture]


def pooled_logits(vit: VisionTransformer, tokens: Tokens) -> Tensor:
    """Return what timm's own head makes of the tokens after the last norm, `[B, classes]`.

    Average pooling weighs a token by its area, so that it is the mean over the fine grid. The head is given a sequence
    on which its own pooling returns what was pooled here.
    """
    rows = tokens.layout.ends[:-1, None] + torch.arange(vit.num_prefix_tokens, device=tokens.x.device)
    lead = tokens.x[rows]
    if vit.global_pool == "token":
        return vit.forward_head(lead)
    if vit.global_pool == "map":
        return vit.head(vit.head_drop(vit.fc_norm(_attention_pool(vit, tokens))))
    pooled = _pool(vit, tokens)[:, None]
    return vit.forward_head(pooled if pools_prefix(vit) else torch.cat([lead, pooled], 1))


def pools_prefix(vit: VisionTransformer) -> bool:
    """Return whether pooling takes the prefix tokens too: as a setting says, in Eva's attention pooling always."""
    return vit.pool_include_prefix if isinstance(vit, VisionTransformer) else vit.attn_pool is not None


def _weights(vit: VisionTransformer, tokens: Tokens, by_area: bool) -> Tensor:
    """Return how much each row counts in pooling, `[T]`; prefix rows only where timm includes them."""
    weight = tokens.area if by_area else tokens.area.clamp(max=1)
    if pools_prefix(vit):
        weight = weight.where(tokens.area > 0, torch.ones_like(weight))
    return weight if tokens.activity is None else weight * tokens.activity


def _pool(vit: VisionTransformer, tokens: Tokens) -> Tensor:
    """Return average, maximum or the mean of both, `[B, C]`, in the activations' precision."""
    results = []
    if vit.global_pool in ("avg", "avgmax"):
        weight = _weights(vit, tokens, by_area=True).to(tokens.x.dtype)[:, None]
        results.append(tokens.layout.sum(tokens.x * weight) / tokens.layout.sum(weight))
    if vit.global_pool in ("max", "avgmax"):
        seen = _weights(vit, tokens, by_area=False) > 0.5
        rows = tokens.x.masked_fill(~seen[:, None], -torch.inf)
        results.append(tokens.layout.pad(rows, -torch.inf).amax(1))
    return sum(results) / len(results)


def _attention_pool(vit: VisionTransformer, tokens: Tokens) -> Tensor:
    """Pool rows as timm's AttentionPoolLatent: one query per picture, every token a key."""
    pool, b = vit.attn_pool, len(tokens.layout.lengths)
    q = pool.q(pool.latent[0]).view(1, pool.num_heads, pool.head_dim)
    k, v = pool.kv(tokens.x).view(len(tokens.x), 2, pool.num_heads, pool.head_dim).unbind(1)
    q, k = pool.q_norm(q).to(v.dtype).expand(b, -1, -1), pool.k_norm(k).to(v.dtype)
    weight = _weights(vit, tokens, by_area=False) if vit.num_prefix_tokens else tokens.activity
    x = pool.proj_drop(pool.proj(attend(tokens.layout, q, k, v, weight).flatten(1)))
    return x if pool.mlp is None else x + pool.mlp(pool.norm(x))
