"""Small backbones to train from scratch, registered with timm: `timm.create_model("vit_mini_patch8_64")`."""

from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer


def _build(name: str, size: dict, overrides: dict) -> VisionTransformer:
    """Return a ViT of this size, but for what the caller of timm's factory overrides."""
    data = overrides.get("pretrained_cfg_overlay") or {}
    overrides = {k: v for k, v in overrides.items() if v is not None and not k.startswith("pretrained")}
    overrides.pop("cache_dir", None)
    vit = VisionTransformer(**size | overrides)
    side = vit.patch_embed.img_size
    vit.pretrained_cfg = {
        "architecture": name,
        "input_size": (vit.in_chans, *side),
        "num_classes": vit.num_classes,
        **data,
    }
    vit.default_cfg = vit.pretrained_cfg
    return vit


@register_model
def vit_mini_patch8_64(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """0.2 M parameters, for the built-in pictures: trains on two CPU cores in a minute."""
    size = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4, "num_classes": 8}
    return _build("vit_mini_patch8_64", size, kwargs)


@register_model
def vit_mini_patch16_64(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """As `vit_mini_patch8_64`, with patches twice as wide: 16 fine tokens."""
    size = {"img_size": 64, "patch_size": 16, "embed_dim": 64, "depth": 3, "num_heads": 4, "num_classes": 8}
    return _build("vit_mini_patch16_64", size, kwargs)


@register_model
def vit_slim_patch8_64(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """Three quarters as wide as `vit_mini_patch8_64`, for fronts over widths."""
    size = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_heads": 4, "num_classes": 8}
    return _build("vit_slim_patch8_64", size, kwargs)


@register_model
def vit_small_patch8_64(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """0.6 M parameters: wider and deeper than the mini, to see whether a gate can be carried over."""
    size = {"img_size": 64, "patch_size": 8, "embed_dim": 96, "depth": 5, "num_heads": 6, "num_classes": 8}
    return _build("vit_small_patch8_64", size, kwargs)


@register_model
def vit_cifar_patch4_32(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """4.8 M parameters, for pictures of 32 px: 64 fine tokens, or 16 coarse ones."""
    size = {"img_size": 32, "patch_size": 4, "embed_dim": 256, "depth": 6, "num_heads": 4, "num_classes": 10}
    return _build("vit_cifar_patch4_32", size, kwargs)


@register_model
def vit_photo_patch16_128(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """As `vit_cifar_patch4_32`, for photographs of 128 px: 64 fine tokens, or 16 coarse ones."""
    size = {"img_size": 128, "patch_size": 16, "embed_dim": 256, "depth": 6, "num_heads": 4}
    return _build("vit_photo_patch16_128", size, kwargs)


@register_model
def vit_photo_patch8_128(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """As `vit_photo_patch16_128`, with 256 fine tokens, or 64 coarse ones."""
    size = {"img_size": 128, "patch_size": 8, "embed_dim": 256, "depth": 6, "num_heads": 4}
    return _build("vit_photo_patch8_128", size, kwargs)


@register_model
def vit_photo_narrow_patch8_128(pretrained: bool = False, **kwargs) -> VisionTransformer:
    """2.8 M parameters, deeper and narrower than `vit_photo_patch8_128`: the model for photographs that is shipped."""
    size = {"img_size": 128, "patch_size": 8, "embed_dim": 160, "depth": 9, "num_heads": 5, "num_classes": 10}
    return _build("vit_photo_narrow_patch8_128", size, kwargs)
