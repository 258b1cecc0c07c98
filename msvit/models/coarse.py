"""How coarse patches are embedded: as fine ones are, by weights of their own, or as APT does."""

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..checks import one_of
from ..core import backbone

COARSE_EMBEDS = ("shared", "own", "apt")


class FullResolution(nn.Module):
    """APT's path by which a coarse token sees its patches at full resolution (Choudhury et al. 2025).

    With E the backbone's patch embedding, the token of a patch that is 2^i fine ones wide is

        E(small) + pos_i + zero_conv(z),    z = patch_attn^i(E(sub)),    E(sub) of shape [C, 2^i, 2^i]

    where `small` is the patch in bilinear interpolation without antialias, `sub` are the fine patches in it, without
    positions, and pos_i are the position embeddings resized to the grid of that size. patch_attn, a convolution of
    2 x 2 with stride 2, is the same in all i steps; zero_conv is linear and zero at the start.
    """

    def __init__(self, width: int):
        super().__init__()
        self.patch_attn = nn.Conv2d(width, width, 2, stride=2)
        self.zero_conv = nn.Linear(width, width)
        nn.init.zeros_(self.zero_conv.weight)
        nn.init.zeros_(self.zero_conv.bias)

    def forward(self, parts: Tensor) -> Tensor:
        """Return what is added to tokens, `[n, C]`, from the embeddings of the fine patches in them `[n, s, s, C]`."""
        z = parts.permute(0, 3, 1, 2)
        while z.shape[-1] > 1:
            z = self.patch_attn(z)
        return self.zero_conv(z.flatten(1))

    def macs(self, vit: VisionTransformer, side: int) -> int:
        """Return the MACs for a token that is `side` = 2^i fine patches wide, besides those of its own embedding."""
        convolutions = (side**2 - 1) // 3  # 1 + 4 + … + 4^(i - 1)
        per_patch = backbone.convolution(vit).weight.numel()
        return side**2 * per_patch + convolutions * self.patch_attn.weight.numel() + self.zero_conv.weight.numel()


def make_coarse_embed(name: str, vit: VisionTransformer, scale: int) -> nn.Module | None:
    """Return what embeds coarse patches, by a name of COARSE_EMBEDS; None where they share the backbone's embedding."""
    if one_of("coarse_embed", name, COARSE_EMBEDS) == "shared":
        return None
    if name == "own":
        return backbone.copy_embedding(vit)
    if scale & (scale - 1):
        raise ValueError(f"scale={scale} with coarse_embed='apt': its path halves patches; use 2, 4, 8 …")
    return FullResolution(vit.embed_dim)


def name_of(coarse_embed: nn.Module | None) -> str:
    """Return the name by which `make_coarse_embed` makes such a module."""
    if coarse_embed is None:
        return "shared"
    return "apt" if isinstance(coarse_embed, FullResolution) else "own"
