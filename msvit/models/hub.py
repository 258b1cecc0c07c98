"""Models on disk and on the Hugging Face hub: config.json says how to build, model.safetensors holds the weights."""

import json
from pathlib import Path

import timm
import torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file, save_file
from torch import nn

from ..gating.gate import Gate
from ..gating.rules import make_rule
from ..reducers.registry import make_reducer
from . import zoo  # noqa: F401 (registers its backbones with timm, so that their folders load)
from .heads import SegmentationHead

CONFIG, WEIGHTS = "config.json", "model.safetensors"


def describe_backbone(vit: nn.Module) -> dict:
    """The timm name and arguments that build this backbone again."""
    name = (getattr(vit, "pretrained_cfg", None) or {}).get("architecture")
    if not name:
        raise ValueError(
            "this backbone was built without timm.create_model, so its folder could not say how to build it again; "
            "register it with timm.models.register_model and create it by name"
        )
    pe = vit.patch_embed
    args = {k: v for k, v in getattr(vit, "_model_args", {}).items() if _is_json(v)}
    args |= {"num_classes": vit.num_classes, "img_size": list(pe.img_size), "in_chans": pe.proj.in_channels}
    with torch.device("meta"):
        again = timm.create_model(name, pretrained=False, **args)
    wrong = shapes(vit).items() ^ shapes(again).items()
    if wrong:
        raise ValueError(f"timm's {name} with {args} is not this backbone; they differ in {sorted(wrong)[:4]}")
    return {"name": name, "args": args}


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in module.state_dict().items()}


def _is_json(value) -> bool:
    try:
        return json.loads(json.dumps(value)) is not None or value is None
    except TypeError:
        return False


def save_folder(model: nn.Module, folder: Path):
    """Writes the config and the weights."""
    gate, reducer = model.gate, model.reducer
    if type(gate) is Gate:
        described = {"patch": gate.patch, "channels": gate.channels, "width": gate.mlp[0].out_features}
    elif (described := getattr(gate, "settings", None)) is None:
        raise ValueError(
            f"the gate is a {type(gate).__name__}; only msvit.Gate and what msvit.make_rule makes can be built "
            "again from a config"
        )
    if reducer is not None and getattr(reducer, "settings", None) is None:
        raise ValueError(
            f"the reducer is a {type(reducer).__name__}; make it with msvit.make_reducer, so that it can be "
            "built again from a config"
        )
    config = {
        "backbone": describe_backbone(model.vit),
        "scale": model.scale,
        "margin": model.margin,
        "gate": described,
        "share_embedding": model.coarse_embed is None,
    }
    if reducer is not None:
        config["reducer"] = reducer.settings
    if model.head.dense:
        config["head"] = model.head.settings
    (Path(folder) / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    state = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
    save_file(state, Path(folder) / WEIGHTS)


def load_folder(
    cls, model_id: str, map_location: str = "cpu", strict: bool = True, fast_cpu: bool = False, **download
) -> nn.Module:
    """Build the model of a folder or a hub id, without timm's own pretrained weights."""
    config = json.loads(_fetch(model_id, CONFIG, download).read_text())
    vit = timm.create_model(config["backbone"]["name"], pretrained=False, **config["backbone"]["args"])
    gate = (make_rule if "name" in config["gate"] else Gate)(**config["gate"])
    parts = {name: config[name] for name in ("scale", "margin", "share_embedding")} | {"gate": gate}
    if "reducer" in config:
        settings = dict(config["reducer"])
        parts["reducer"] = make_reducer(settings.pop("name"), vit, **settings)
    if (head := config.get("head", config.get("segmenter"))) is not None:  # its name until version 0.1
        parts["head"] = SegmentationHead(vit, **head)
    model = cls(vit, **parts, fast_cpu=fast_cpu)
    model.load_state_dict(load_file(_fetch(model_id, WEIGHTS, download), device=map_location), strict=strict)
    return model.to(map_location).eval()


def _fetch(model_id: str, name: str, download: dict) -> Path:
    """Return the path of a folder's file, or of a downloaded one."""
    if Path(model_id).is_dir():
        if not (path := Path(model_id) / name).is_file():
            raise FileNotFoundError(f"{model_id} has no {name}; is it a folder that save_pretrained wrote?")
        return path
    known = ("revision", "cache_dir", "force_download", "local_files_only", "token")
    return Path(hf_hub_download(model_id, name, **{k: v for k, v in download.items() if k in known}))
