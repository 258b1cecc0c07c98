"""Figures of runs and of gate losses in one style, by matplotlib; those of `plots.interactive` are by plotly.

Functions are imported when they are first asked for, so that `import msvit.plots` needs neither.
"""

import importlib
from typing import Any

_FUNCTIONS = {
    "gate_loss": ("cdf_fit", "hyperprior_fit", "prior_map"),
    "runs": ("front", "gate_maps", "importance", "picture_pairs", "positions", "token_counts", "tradeoff"),
    "segmentation": ("quality", "segmentation_maps"),
    "style": ("save", "with_note"),
}
_HOMES = {name: module for module, names in _FUNCTIONS.items() for name in names}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
