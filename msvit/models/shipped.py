"""Models that come with the package: in msvit/weights, one file each in half precision, read without a network.

A file holds the weights, the config that `save_pretrained` writes, and a card that says what the model is.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..checks import one_of
from .hub import CONFIG, WEIGHTS, assemble
from .msvit import MSViT

SHIPPED = Path(__file__).resolve().parents[1] / "weights"
EXACT = ("cut",)  # the threshold decides, and is not rounded


@dataclass(frozen=True)
class Card:
    """What a shipped model is, and what its pictures have to be.

    Attributes:
        data: The pictures that it was trained on, as `msvit train --data` names them.
        mean, std: What its pictures are normalised with.
        accuracy, dense_accuracy: On validation pictures, of the model and of its backbone before it had a gate.
        macs: Mean share of the dense model's MACs, gate included, at its own threshold.
        command: What made it.
    """

    title: str
    data: str
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    accuracy: float
    dense_accuracy: float
    macs: float
    command: str


def shipped(folder: Path = SHIPPED) -> list[str]:
    """Return the names that `load` knows."""
    return sorted(path.stem for path in folder.glob("*.safetensors"))


def load(name: str, folder: Path = SHIPPED, **options: Any) -> MSViT:
    """Return a model that comes with the package, in float32 and in evaluation mode.

        model = msvit.load("scenes")
        card = msvit.card("scenes")     # classes, normalisation, accuracy, and the command that made it

    Args:
        options: Of `MSViT`, such as fast_cpu.
    """
    with safe_open(_file(name, folder), "pt") as file:
        config = json.loads(file.metadata()["config"])
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (it is no dictionary)
    model = assemble(MSViT, config, **options)
    model.load_state_dict({key: _cast(value, torch.float32) for key, value in state.items()})
    return model.eval()


def card(name: str, folder: Path = SHIPPED) -> Card:
    """Return what is known of a model that comes with the package."""
    with safe_open(_file(name, folder), "pt") as file:
        found = json.loads(file.metadata()["card"])
    return Card(**{key: tuple(value) if isinstance(value, list) else value for key, value in found.items()})


def pack(model: Path, name: str, about: Card, folder: Path = SHIPPED) -> Path:
    """Write the model of a folder that `save_pretrained` wrote, and its card, into one file; return its path."""
    state = load_file(model / WEIGHTS)
    half = {key: value if key in EXACT else _cast(value, torch.float16) for key, value in state.items()}
    config = json.loads((model / CONFIG).read_text())
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.safetensors"
    save_file(half, path, {"config": json.dumps(config), "card": json.dumps(asdict(about))})
    path.chmod(0o644)  # safetensors writes for its owner alone
    return path


def _cast(value: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
    return value.to(kind) if value.is_floating_point() else value


def _file(name: str, folder: Path) -> Path:
    return folder / f"{one_of('model', name, shipped(folder))}.safetensors"
