"""Names of timm that are plain vision transformers, or why not."""

import pytest

from msvit.models.names import list_backbones


def test_a_name_says_what_it_builds():
    (found,) = list_backbones("vit_small_patch16_rope_mixed_ape_224")
    assert found == (found.name, 16, "224 x 224", 197, "learned, rotary (mixed)", "")
    (found,) = list_backbones("vit_small_patch16_36x1_224")
    assert (found.positions, found.refused) == ("learned", "")
    (found,) = list_backbones("vit_small_patch16_18x2_224")
    assert found.refused.startswith(
        "VisionTransformer has ['ParallelThingsBlock']; supported are timm's standard blocks"
    )
    with pytest.raises(ValueError, match=r"of its \d+ names that match 'swin\*', none is a plain vision transformer"):
        list_backbones("swin*")
    with pytest.raises(ValueError, match="timm has no name that matches 'vitt'"):
        list_backbones("vitt")
