"""What the config of a model's folder may claim: it may come from a stranger.

It names nothing but known backbones, arguments and layers; its numbers have a measure; and what it describes is built
on the meta device first, where nothing is allocated, and must not be larger than the weights that come with it.
"""

import inspect
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
from safetensors import SafetensorError, safe_open
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from ..checks import in_interval, known_settings

CONFIG, WEIGHTS = "config.json", "model.safetensors"
PREPROCESSING = ("mean", "std", "interpolation", "crop_pct")  # of the pictures; the tags of a name differ in it
# Arguments of a backbone that a config may have: those of its class, but for other parts and places than MSViT takes.
ARGUMENTS = {name for kind in (VisionTransformer, Eva) for name in inspect.signature(kind).parameters}
ARGUMENTS |= {"pretrained_cfg_overlay"}
ARGUMENTS -= {"embed_layer", "block_fn", "attn_layer", "device", "dtype"}
LARGEST_NUMBER, MOST_ENTRIES = 1e7, 100_000  # number in a config, and list
# What building from a config and loading weights raise where these are damaged, of another version, or hostile.
UNBUILT = (OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError, ArithmeticError, RuntimeError)
UNBUILT += (SafetensorError, MemoryError)


class ModelFolderError(ValueError):
    """A folder that holds no model, or none that can be built."""


def check_config(config: Any) -> dict[str, Any]:
    """Return a config whose backbone is one of timm's, of known arguments, and all of whose numbers have a measure."""
    if not isinstance(config, dict) or not isinstance(config.get("backbone"), dict):
        raise ValueError(f"{CONFIG} has no backbone; is it a folder that save_pretrained wrote?")
    name, args = config["backbone"]["name"], config["backbone"]["args"]
    if not (isinstance(name, str) and timm.is_model(name)):
        raise ValueError(f"{CONFIG} names the backbone {name!r}, which timm {timm.__version__} does not have")
    known_settings(f"the backbone in {CONFIG}", args, sorted(ARGUMENTS))
    known_settings("pretrained_cfg_overlay", args.get("pretrained_cfg_overlay", {}), PREPROCESSING)
    in_interval("depth", args.get("depth", 12), "[1, 1000]")
    for side in config["scales"][1:] if "scales" in config else [config["scale"]]:
        in_interval("scale", side, "[2, 64]")
    for number in _numbers(config):
        in_interval(f"a number in {CONFIG}", number, f"[{-LARGEST_NUMBER}, {LARGEST_NUMBER}]")
    return config


def _numbers(value: Any) -> Iterator[float]:
    """Yield all numbers of a config; raise for a list that is too long."""
    if isinstance(value, dict | list):
        if len(value) > MOST_ENTRIES:
            raise ValueError(f"{CONFIG} has a list of {len(value):,} entries")
        for part in value.values() if isinstance(value, dict) else value:
            yield from _numbers(part)
    elif isinstance(value, int | float):
        yield value


def check_size(model: nn.Module, weights: Path):
    """Raise unless a file has about as many weights as the model of its config, on the meta device, claims to have.

    About, since files of version 0.1 may lack some that are made up when they are loaded.
    """
    with safe_open(weights, "pt") as file:
        there = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118 (no mapping)
    needed = sum(value.numel() for value in model.state_dict().values())
    if needed > 2 * there + MOST_ENTRIES:
        raise ValueError(f"{CONFIG} describes a model of {needed:,} weights, but {WEIGHTS} has {there:,}")
