"""What is saved is what is loaded: every argument of a backbone, or an error that names what cannot be written."""

import inspect
import json
from functools import partial

import pytest
import timm
import torch
from helpers import shake
from timm.layers import GluMlp, QuickGELU, RmsNorm
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import msvit
from msvit.models.hub import describe_backbone, read_args
from msvit.reducers.registry import REDUCERS, make_reducer

MINI = "vit_mini_patch8_64"


class Sharp(nn.GELU):
    """An activation that no config may name."""


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


def saved_and_loaded(model, folder, size=(64, 64), channels=3):
    """The model of the folder, after it has computed the same to the last bit."""
    model.eval().save_pretrained(folder)
    again = msvit.MSViT.from_pretrained(folder)
    images = torch.randn(3, channels, *size, dtype=model.vit.patch_embed.proj.weight.dtype)
    with torch.no_grad():
        mask = torch.rand(3, *model.grid(size)) < 0.5
        for decisions in (mask, None):
            ours, theirs = (m.run(images, decisions).logits for m in (model, again))
            assert torch.equal(theirs, ours)
            assert ours.std() > 0
    return again


def act(model):
    return model.vit.blocks[0].mlp.act


# ---- every argument of timm's VisionTransformer, in the forms it takes

ARGS = {
    "img_size": [{"img_size": (64, 128)}, {"img_size": 32}],
    "patch_size": [{"patch_size": 16}],
    "in_chans": [{"in_chans": 1}],
    "num_classes": [{"num_classes": 5}],
    "global_pool": [{"global_pool": pool} for pool in ("avg", "avgmax", "max", "map")],
    "embed_dim": [{"embed_dim": 32}],
    "depth": [{"depth": 2}],
    "num_heads": [{"num_heads": 2}],  # the shapes of four
    "mlp_ratio": [{"mlp_ratio": 2.5}],
    "qkv_bias": [{"qkv_bias": False}],
    "qk_norm": [{"qk_norm": True}],
    "scale_attn_norm": [{"scale_attn_norm": True}],
    "scale_mlp_norm": [{"scale_mlp_norm": True}],
    "proj_bias": [{"proj_bias": False}],
    "init_values": [{"init_values": 0.1}],
    "class_token": [{"class_token": False, "global_pool": "avg"}],
    "pos_embed": [{"pos_embed": "none"}],
    "no_embed_class": [{"no_embed_class": True}],
    "reg_tokens": [{"reg_tokens": 4}, {"reg_tokens": 4, "no_embed_class": True}],
    "pre_norm": [{"pre_norm": True}],
    "final_norm": [{"final_norm": False}],
    "fc_norm": [{"fc_norm": True}, {"fc_norm": False, "global_pool": "avg"}],
    "pool_include_prefix": [{"pool_include_prefix": True, "global_pool": "avg"}],  # no shape shows it
    "dynamic_img_size": [{"dynamic_img_size": True}],
    "dynamic_img_pad": [{"dynamic_img_pad": True}],
    "drop_rate": [{"drop_rate": 0.2}],
    "pos_drop_rate": [{"pos_drop_rate": 0.2}],
    "proj_drop_rate": [{"proj_drop_rate": 0.2}],
    "drop_path_rate": [{"drop_path_rate": 0.1}, {"drop_path_rate": 1 / 3}],
    "weight_init": [{"weight_init": "jax"}],
    "fix_init": [{"fix_init": True}],
    "embed_norm_layer": [{"embed_norm_layer": "layernorm"}, {"embed_norm_layer": nn.LayerNorm}],
    "norm_layer": [
        {"norm_layer": "rmsnorm"},
        {"norm_layer": RmsNorm},
        {"norm_layer": partial(nn.LayerNorm, eps=1e-3)},
    ],
    "act_layer": [
        {"act_layer": "relu"},
        {"act_layer": nn.ReLU},
        {"act_layer": QuickGELU},
        {"act_layer": partial(nn.GELU, approximate="tanh")},
        {"act_layer": partial(nn.LeakyReLU, negative_slope=0.3)},
    ],
    "mlp_layer": [{"mlp_layer": GluMlp}, {"mlp_layer": partial(GluMlp, gate_last=False)}],
}
REFUSED = {"patch_drop_rate", "attn_drop_rate"}  # by MSViT itself, see test_msvit.py
ONE_KIND = {"embed_layer", "block_fn", "attn_layer"}  # MSViT takes the default alone
PLACEMENT = {"device", "dtype"}  # of weights; the dtype is theirs


def test_every_argument_of_timm_is_tried():
    known = set(inspect.signature(VisionTransformer).parameters)
    assert ARGS.keys() | REFUSED | ONE_KIND | PLACEMENT == known


@pytest.mark.parametrize("args", [args for cases in ARGS.values() for args in cases], ids=str)
def test_every_argument_is_kept(args, tmp_path):
    vit = shake(timm.create_model(MINI, **args))
    size, channels = vit.patch_embed.img_size, vit.in_chans
    model = msvit.MSViT(vit, gate=msvit.Gate(2 * vit.patch_embed.patch_size[0], channels))
    again = saved_and_loaded(model, tmp_path, size, channels).vit
    assert repr(again) == repr(vit.eval())
    rates = [[getattr(block.drop_path1, "drop_prob", 0) for block in v.blocks] for v in (vit, again)]
    assert rates[0] == rates[1]  # their repr is rounded
    assert describe_backbone(again) == describe_backbone(vit)


def test_a_layers_name_is_readable(tmp_path):
    vit = timm.create_model(MINI, act_layer=nn.ReLU, norm_layer=partial(RmsNorm, eps=1e-3))
    args = describe_backbone(vit)["args"]
    assert args["act_layer"] == {"layer": "torch.nn.ReLU"}
    assert args["norm_layer"] == {"layer": "timm.layers.RmsNorm", "settings": {"eps": 1e-3}}
    assert read_args(args)["act_layer"] is nn.ReLU
    json.dumps(args, allow_nan=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_precision_is_that_of_the_saved_weights(dtype, tmp_path):
    assert saved_and_loaded(msvit.MSViT(shake(timm.create_model(MINI))).to(dtype), tmp_path).cut.dtype == dtype


# ---- published models: their own arguments, and what was done to them since


def test_saves_and_loads_with_timm_name_and_arguments(tmp_path):
    vit = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=7, depth=2, img_size=128)
    model = msvit.MSViT(vit, scale=4).eval()
    model.threshold = 0.37
    again = saved_and_loaded(model, tmp_path, (128, 128))
    assert {p.name for p in tmp_path.iterdir()} >= {"config.json", "model.safetensors"}
    assert again.threshold == pytest.approx(0.37)
    assert again.scale == 4


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("vit_tiny_patch16_224", lambda vit: vit.reset_classifier(3)),
        ("vit_tiny_patch16_224", lambda vit: vit.reset_classifier(3, "avg")),  # where its norm is stays
        ("vit_tiny_patch16_224", lambda vit: vit.set_input_size((96, 64))),
        ("vit_tiny_patch16_224", lambda vit: vit.set_grad_checkpointing()),
        ("vit_base_patch16_siglip_224", lambda vit: vit.reset_classifier(5)),
        ("vit_base_patch16_siglip_224", lambda vit: vit.reset_classifier(5, "avg")),  # drops the pooling's weights
        ("vit_small_patch14_reg4_dinov2", lambda vit: vit.reset_classifier(2)),
        ("deit3_small_patch16_224", lambda vit: vit.reset_classifier(2)),
    ],
)
def test_changes_that_timm_supports_are_kept(name, change, tmp_path):
    side = 56 if "patch14" in name else 64
    vit = timm.create_model(name, depth=1, img_size=side)
    change(vit)
    saved_and_loaded(msvit.MSViT(shake(vit)), tmp_path, vit.patch_embed.img_size)


@pytest.mark.parametrize("name", ["vit_base_patch16_224.mae", "vit_base_patch16_224.augreg_in1k", MINI])
def test_normalisation_is_kept(name, tmp_path):
    """A name's tags differ in it, and the name alone has that of its first tag."""
    vit = timm.create_model(name, depth=1, pretrained_cfg_overlay={"crop_pct": 0.5}, img_size=64)
    again = saved_and_loaded(msvit.MSViT(vit), tmp_path).vit
    for key in ("mean", "std", "interpolation", "crop_pct"):
        ours, theirs = vit.pretrained_cfg.get(key), again.pretrained_cfg.get(key)
        assert theirs == (list(ours) if isinstance(ours, tuple) else ours)
    assert again.pretrained_cfg["crop_pct"] == 0.5


def test_the_older_configs_are_read(tmp_path):
    """Arguments as plain JSON, without drop rates and normalisation, as they were written until version 0.1."""
    model = msvit.MSViT(shake(timm.create_model(MINI))).eval()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["backbone"]["args"] = {"num_classes": 8, "img_size": [64, 64], "in_chans": 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(msvit.MSViT.from_pretrained(tmp_path)(images), model(images))


# ---- what a folder could not say is refused, and nothing is written


@pytest.mark.parametrize(
    ("args", "match"),
    [
        ({"act_layer": Sharp}, r"act_layer=.*Sharp.* cannot be written to config\.json.*torch\.nn or timm\.layers"),
        ({"norm_layer": lambda dim, **_: nn.LayerNorm(dim)}, "norm_layer=.*lambda"),
        ({"act_layer": partial(Sharp, approximate="tanh")}, "act_layer=.*Sharp"),
        ({"norm_layer": partial(nn.LayerNorm, device=torch.device("cpu"))}, "norm_layer.device="),
    ],
)
def test_an_argument_that_cannot_be_written_is_named(args, match, tmp_path):
    vit = timm.create_model(MINI, **args)
    with pytest.raises(ValueError, match=match):
        msvit.MSViT(vit).save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def replace_activation(model):
    model.vit.blocks[1].mlp.act = nn.ReLU()


def replace_pooling(model):
    model.vit.pool_include_prefix = True  # keeps shapes and modules


def remove_blocks(model):
    model.vit.blocks = model.vit.blocks[:2]


def change_epsilon(model):
    model.vit.norm.eps = 0.5


def change_stochastic_depth(model):
    model.vit.blocks[0].drop_path1 = timm.layers.DropPath(0.3)


def replace_forward(model):
    model.vit.blocks[0].mlp.forward = Doubling()


def replace_gate_activation(model):
    model.gate.mlp[2] = nn.ReLU()


def add_hidden_layer(model):
    model.gate.mlp.append(Doubling())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (replace_activation, r"blocks\.1\.mlp\.act is .*ReLU instead of .*GELU"),
        (replace_pooling, r"loaded: vit\.pool_include_prefix is true instead of false"),
        (remove_blocks, r"blocks\.2.* is None instead of"),
        (change_epsilon, r"norm\.eps is 0\.5 instead of 1e-06"),
        (change_stochastic_depth, r"blocks\.0\.drop_path1"),
        (replace_forward, r"blocks\.0\.mlp\.forward"),
        (replace_gate_activation, r"gate\.mlp\.2 is .*ReLU instead of .*GELU"),
        (add_hidden_layer, r"gate\.mlp\.10 is .*Doubling instead of None"),
    ],
)
def test_a_change_that_no_argument_tells_is_refused(change, match, tmp_path):
    model = msvit.MSViT(timm.create_model(MINI))
    change(model)
    with pytest.raises(ValueError, match=rf"would not be the same when it is.*{match}"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_registered_function_called_by_itself_is_refused_unless_it_was_given_nothing(tmp_path):
    """timm's factory is what keeps arguments."""
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.act is"):
        msvit.MSViT(msvit.zoo.vit_mini_patch8_64(act_layer=nn.ReLU)).save_pretrained(tmp_path)
    saved_and_loaded(msvit.MSViT(shake(msvit.zoo.vit_mini_patch8_64())), tmp_path)


def test_saving_what_could_not_be_built_again_is_refused(tiny_vit, tmp_path):
    with pytest.raises(ValueError, match=r"timm\.create_model"):
        msvit.MSViT(tiny_vit).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        msvit.MSViT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "layer", ["os.system", "torch.nn.functional.relu", "timm.layers.create_act", "torch.nn.Nope", 3]
)
def test_a_config_from_anywhere_names_only_layers(layer, tmp_path):
    msvit.MSViT(timm.create_model(MINI)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["backbone"]["args"]["act_layer"] = {"layer": layer}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="names the layer"):
        msvit.MSViT.from_pretrained(tmp_path)


def test_saving_draws_no_random_numbers(tmp_path):
    model, before = msvit.MSViT(timm.create_model(MINI)), torch.get_rng_state()
    model.save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", REDUCERS)
def test_a_reducer_is_saved_whatever_training_told_it(tmp_path, name):
    """`begin` is called with the progress of training; what it leaves is no setting."""
    vit = timm.create_model(MINI)
    model = msvit.MSViT(vit, gate=msvit.make_rule("fine"), reducer=make_reducer(name, vit)).eval()
    model.reducer.begin(5 / 6)
    model.save_pretrained(tmp_path)
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(
        msvit.MSViT.from_pretrained(tmp_path).eval().run(images).logits, model.run(images).logits
    )
