"""Models on disk and on the Hugging Face hub: config.json says how to build, model.safetensors holds the weights.

A folder never says less than what was saved: the model is built again from its config, on PyTorch's meta device, and
compared with the one to save, module by module and setting by setting, before anything is written.

A folder may come from a stranger, see `check_config`; its weights are safetensors, which run no code.
"""

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from huggingface_hub import hf_hub_download
from timm.models import get_model_args
from torch import nn

from ..checks import first_line
from ..gating.entropy import earlier_settings
from ..gating.gate import Gate, Quadtree
from ..gating.learned import GATES
from ..gating.rules import make_rule
from ..reducers.registry import make_reducer
from . import zoo  # noqa: F401 (registers its backbones with timm, so that their folders load)
from .check_config import CONFIG, PREPROCESSING, UNBUILT, WEIGHTS, ModelFolderError, check_config, check_size
from .coarse import name_of
from .heads import SegmentationHead

HUB = "hub:"  # before the name of a model on the Hugging Face hub
LAYER_MODULES = {"torch.nn": nn, "timm.layers": timm.layers}  # the only ones that a config may name
# Switches for running a model, which no argument sets, and what timm keeps about published weights.
NO_SETTINGS = {"training", "grad_checkpointing", "fused_attn", "distilled_training", "fast_cpu"}
NO_SETTINGS |= {"pretrained_cfg", "default_cfg", "pretrained_model_args"}


def describe_backbone(vit: nn.Module) -> dict[str, Any]:
    """Return the timm name and arguments, as JSON, that build this backbone again.

    `timm.models.get_model_args` has what `timm.create_model` was called with and what was changed since by
    `reset_classifier` and `set_input_size`. What it leaves out is read from the layers, the drop rates, and from the
    pretrained config, the normalisation of the pictures.

    Raises:
        ValueError: If timm does not know the backbone by a name, or an argument cannot be written as JSON.
    """
    config = getattr(vit, "pretrained_cfg", None) or {}
    if not (name := config.get("architecture")):
        raise ValueError(
            "this backbone was built without timm.create_model, so its folder could not say how to build it again; "
            "register it with timm.models.register_model and create it by name"
        )
    args = get_model_args(vit, _drop_rates(vit)) | {"img_size": vit.patch_embed.img_size}
    if data := {key: config[key] for key in PREPROCESSING if key in config}:
        args["pretrained_cfg_overlay"] = data
    return {"name": name, "args": {key: _written(key, value) for key, value in args.items()}}


def read_args(args: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments for `timm.create_model` that `describe_backbone` has written."""
    return {key: _read(value) for key, value in args.items()}


def _drop_rates(vit: nn.Module) -> dict[str, float]:
    """Return the rates of dropout and stochastic depth, as its layers have them (timm rounds them to float32)."""
    last = vit.blocks[-1]
    return {
        "drop_rate": vit.head_drop.p,
        "pos_drop_rate": vit.pos_drop.p,
        "proj_drop_rate": last.attn.proj_drop.p,
        "drop_path_rate": getattr(last.drop_path1, "drop_prob", 0.0),
    }


def _written(name: str, value: Any) -> Any:
    """Return an argument as JSON: a layer by its name, a partial of one with its settings."""
    if isinstance(value, partial) and not value.args:
        settings = {key: _written(f"{name}.{key}", setting) for key, setting in value.keywords.items()}
        return _written(name, value.func) | {"settings": settings}
    for module, layers in LAYER_MODULES.items():
        if isinstance(value, type) and getattr(layers, value.__name__, None) is value:
            return {"layer": f"{module}.{value.__name__}"}
    try:
        return json.loads(json.dumps(value))
    except TypeError:
        raise ValueError(
            f"the backbone's argument {name}={value!r} cannot be written to {CONFIG}; use a number, a string, or a "
            f"layer of {' or '.join(LAYER_MODULES)}"
        ) from None


def _read(value: Any) -> Any:
    """Return what `_written` was given. Only known layers are looked up: a config may come from anywhere."""
    if not isinstance(value, dict) or "layer" not in value:
        return value
    module, _, name = str(value["layer"]).rpartition(".")
    layer = getattr(LAYER_MODULES.get(module), name, None)
    if not (isinstance(layer, type) and issubclass(layer, nn.Module)):
        raise ValueError(
            f"{CONFIG} names the layer {value['layer']!r}; known are those of {' and '.join(LAYER_MODULES)}"
        )
    return partial(layer, **read_args(value["settings"])) if "settings" in value else layer


def _check_same(model: nn.Module, again: nn.Module):
    """Raise a ValueError if a model and the one built from its config differ in modules, their settings, or shapes."""
    ours, theirs = _structure(model), _structure(again)
    wrong = [key for key in ours | theirs if ours.get(key) != theirs.get(key)]
    if wrong:
        listed = ", ".join(f"{key} is {ours.get(key)} instead of {theirs.get(key)}" for key in wrong[:3])
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(
            f"this model would not be the same when it is loaded: {listed}{more}; make such a change by an argument of "
            "timm.create_model or of the model's parts, so that it can be written down"
        )


def _structure(model: nn.Module) -> dict[str, str]:
    """Return all that makes a model besides its weights: types, shapes, and the modules' public attributes."""
    found = {key: str(list(value.shape)) for key, value in model.state_dict().items()}
    for name, module in model.named_modules():
        found[name] = f"{type(module).__module__}.{type(module).__qualname__}"
        for key, value in vars(module).items():
            if value is not None and not key.startswith("_") and key not in NO_SETTINGS:
                found[f"{name}.{key}".lstrip(".")] = json.dumps(value, default=repr)
    return found


def model_files(model: nn.Module) -> dict[str, bytes]:
    """Return the files of a model's folder, by name: the config and the weights."""
    gate, reducer = model.gate, model.reducer
    if (described := getattr(gate, "settings", None)) is None:
        raise ValueError(
            f"the gate is a {type(gate).__name__}; only those of msvit.gating and what msvit.make_rule makes can be "
            "built again from a config"
        )
    if reducer is not None and getattr(reducer, "settings", None) is None:
        raise ValueError(
            f"the reducer is a {type(reducer).__name__}; make it with msvit.make_reducer, so that it can be "
            "built again from a config"
        )
    config = {
        "backbone": describe_backbone(model.vit),
        "scales": list(model.scales),
        "margin": model.margin,
        "gate": described,
        "coarse_embed": name_of(model.coarse_embed),
    }
    if reducer is not None:
        config["reducer"] = reducer.settings
    if model.head.dense:
        config["head"] = model.head.settings
    with torch.device("meta"):
        again = assemble(type(model), json.loads(json.dumps(config)))
    _check_same(model, again)
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    text = json.dumps(config, indent=2) + "\n"
    return {CONFIG: text.encode(), WEIGHTS: safetensors.torch.save(state)}


def load_folder(
    cls: type[nn.Module],
    model_id: str | Path,
    map_location: str = "cpu",
    strict: bool = True,
    fast_cpu: bool = False,
    **download: Any,
) -> nn.Module:
    """Build the model of a folder, in the precision that it was saved in, without timm's own weights.

    Args:
        model_id: The folder, or "hub:OWNER/NAME" for one on the Hugging Face hub; nothing else asks the network.
    """
    config_path, weights = (_fetch(str(model_id), name, download) for name in (CONFIG, WEIGHTS))
    try:
        config = check_config(json.loads(config_path.read_text()))
        with torch.device("meta"):
            check_size(assemble(cls, config), weights)
        model = assemble(cls, config, fast_cpu=fast_cpu)
        state = safetensors.torch.load_file(weights, device=map_location)
        for key, value in model.state_dict(keep_vars=True).items():
            value.data = value.data.to(state[key].dtype if key in state else value.dtype)
        model.load_state_dict(state, strict=strict)
    except UNBUILT as error:
        raise ModelFolderError(f"{model_id} holds no model that can be built: {first_line(error)}") from error
    return model.to(map_location).eval()


def assemble(cls: type[nn.Module], config: Mapping[str, Any], **options: Any) -> nn.Module:
    """Return the model of a config, with new weights."""
    backbone = config["backbone"]
    vit = timm.create_model(backbone["name"], pretrained=False, **read_args(backbone["args"]))
    gate = _make_gate(**_today(config["gate"]))
    embed = config.get("coarse_embed") or ("shared" if config["share_embedding"] else "own")  # until version 0.1
    parts = {"margin": config["margin"], "gate": gate, "coarse_embed": embed}
    # Until version 0.1 the scale alone, and a rule said by its thresholds if there were three.
    parts |= {"scales": config["scales"]} if "scales" in config else {"scale": config["scale"]}
    if "reducer" in config:
        settings = dict(config["reducer"])
        parts["reducer"] = make_reducer(settings.pop("name"), vit, **settings)
    if (head := config.get("head", config.get("segmenter"))) is not None:  # its name until version 0.1
        parts["head"] = SegmentationHead(vit, **head)
    return cls(vit, **parts, **options)


def _make_gate(name: str | None = None, **settings: Any) -> nn.Module:
    """Return what decides, by the settings that were saved; those of a plain gate have no name."""
    if name is None:
        return Gate(**settings)
    gates = GATES | {"quadtree": Quadtree}
    return gates[name](**settings) if name in gates else make_rule(name, **settings)


def _today(gate: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a gate's settings; those of an entropy rule had other names until version 0.1."""
    return earlier_settings(**gate) if gate.get("name") == "entropy" and "thresholds" not in gate else gate


def rename_decoder(model: nn.Module, state: dict, prefix: str, *rest):
    """Rename a decoder's weights: until version 0.1 it stood beside the backbone."""
    for key in [key for key in state if key.startswith(f"{prefix}decoder.")]:
        state[f"{prefix}head.{key.removeprefix(prefix)}"] = state.pop(key)


def _fetch(model_id: str, name: str, download: dict) -> Path:
    """Return the path of a folder's file, or of a downloaded one."""
    path = Path(model_id) / name
    if model_id.startswith(HUB):
        known = ("revision", "cache_dir", "force_download", "local_files_only", "token")
        options = {key: value for key, value in download.items() if key in known}
        try:
            return Path(hf_hub_download(model_id.removeprefix(HUB), name, **options))
        except (OSError, ValueError) as error:
            raise ModelFolderError(f"{model_id} cannot be had from the hub: {first_line(error)}") from error
    if not os.path.isdir(model_id):
        raise FileNotFoundError(f"there is no folder {model_id!r}; a model on the hub is called {HUB}OWNER/NAME")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{model_id} has no {name}; is it a folder that save_pretrained wrote?")
    return path
