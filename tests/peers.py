"""Reference numbers that the published code of other systems computed; where the files are not at hand, tests skip.

They lie in a folder `shared/data` beside the repository: `peers_reference.json` says in formulas what each peer
computes, and `peers_reference.safetensors` has weights, inputs and outputs in float64.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

FOLDER = Path(__file__).parents[2] / "shared" / "data"
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}


@cache
def _reference() -> dict:
    path = FOLDER / "peers_reference.json"
    return json.loads(path.read_text()) if path.is_file() else {"cases": []}


def names(prefix: str) -> list:
    """Return the names of the cases that begin like this, to parametrise a test; one that skips where there is none."""
    found = [case["name"] for case in _reference()["cases"] if case["name"].startswith(prefix)]
    return found or [pytest.param("", marks=pytest.mark.skip(reason="the peers' reference numbers are not at hand"))]


def case(name: str) -> dict:
    """Return what the JSON says of a case."""
    return next(case for case in _reference()["cases"] if case["name"] == name)


def tensor(name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return a tensor by its full name."""
    with safe_open(str(FOLDER / "peers_reference.safetensors"), "pt") as file:
        found = file.get_tensor(name)
    return found if dtype is None else found.to(dtype)


def output(case: dict, name: str) -> Tensor:
    """Return a tensor by the name that it has in a case."""
    return tensor(case["tensors"][name])


def state(prefix: str) -> dict[str, Tensor]:
    """Return the tensors under a prefix, without it."""
    with safe_open(str(FOLDER / "peers_reference.safetensors"), "pt") as file:
        found = [key for key in file.keys() if key.startswith(f"{prefix}/")]  # noqa: SIM118 (no mapping)
        return {key.removeprefix(f"{prefix}/"): file.get_tensor(key) for key in found}


def images(dtype: torch.dtype) -> Tensor:
    """Return the pictures of the cases with a backbone."""
    return tensor("images", dtype)


def labels() -> Tensor:
    """Return the pictures' classes."""
    return torch.tensor(_reference()["labels"])


def backbone(name: str, dtype: torch.dtype) -> nn.Module:
    """Return "vit" or "teacher", in evaluation mode; what the teacher does not have is as in "vit"."""
    settings = {key: value for key, value in _reference()["backbones"][name].items() if key != "note"}
    vit = VisionTransformer(**settings).to(dtype).eval()
    vit.load_state_dict(state("vit") | state(name))
    return vit
