"""The environment of a run: what its figures may depend on beside the recipe."""

import platform
import shutil
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Return versions, commit and device, as a record has them."""
    names = ("torch", "torchvision", "timm", "accelerate", "numpy", "safetensors")
    cuda = device.type == "cuda"
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "msvit": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in names},
        "system": platform.platform(terse=True),
        "device": torch.cuda.get_device_name(device) if cuda else f"{device.type}, {platform.machine()}",
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "processes": processes,
    }


def _commit() -> str | None:
    """Return the last commit that touched this package, with a + if it was changed since; None outside of git."""
    if not (git := shutil.which("git")):
        return None
    here = [git, "-C", str(Path(__file__).parents[1])]
    try:
        commit, changed = (
            subprocess.run([*here, *command], capture_output=True, text=True, timeout=10, check=True).stdout.strip()
            for command in (["log", "-1", "--format=%h", "--", "."], ["status", "--porcelain", "--", "."])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + "+" * bool(changed) if commit else None
