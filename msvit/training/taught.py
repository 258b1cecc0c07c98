"""Gates that have been taught, kept with the run that they start from: the rows of a study begin with the same gate."""

import contextlib
import hashlib
import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from .. import __version__
from ..models.msvit import MSViT
from .files import RunBusy, locked, write_whole

TRY_AGAIN = 0.2  # seconds between two tries at the lock


def teach_once(teach: Callable[[], None], model: MSViT, folder: Path, facts: Any):
    """Give a model's gate what `teach` would teach it: from the folder, if that has been done before.

    While another process teaches there, it is waited for.

    Args:
        folder: Where taught gates are kept; one that cannot be written to keeps nothing.
        facts: All that the lesson depends on beside the model's weights, number of threads and device.
    """
    path = folder / f"{_name(model, facts)}.safetensors"
    try:
        folder.mkdir(exist_ok=True)
        lock = _waited_for(folder / ".lock")
    except OSError:
        lock = contextlib.nullcontext()
    with lock:
        if not _takes_over(model, path):
            teach()
            with contextlib.suppress(OSError):
                write_whole(path, save(model.gate.state_dict()))


def _waited_for(path: Path) -> io.FileIO:
    while True:
        try:
            return locked(path)
        except RunBusy:
            time.sleep(TRY_AGAIN)


def _takes_over(model: MSViT, path: Path) -> bool:
    """Load a gate that is there; return whether there was a whole one."""
    try:
        model.gate.load_state_dict(load(path.read_bytes()))
    except (OSError, SafetensorError, RuntimeError):
        return False
    return True


def _name(model: MSViT, facts: Any) -> str:
    """Return a name that only the same lesson for the same model has."""
    found = hashlib.sha256(repr((facts, torch.get_num_threads(), model.cut.device.type, __version__)).encode())
    for name, value in model.state_dict().items():
        found.update(name.encode() + value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:32]
