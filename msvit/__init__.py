"""Mixed-scale tokenization for vision transformers, and the methods it is measured against, on one bench.

Names are imported when they are first asked for, so that `import msvit` alone costs nothing: neither torch nor timm.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "MSViT": "models.msvit",
    "Result": "models.msvit",
    "SegmentationHead": "models.heads",
    "Gate": "gating.gate",
    "Tokens": "core.tokens",
    "card": "models.shipped",
    "fast_linear": "core.fast_linear",
    "gbas": "gating.losses",
    "load": "models.shipped",
    "make_loss": "gating.losses",
    "make_reducer": "reducers.registry",
    "make_rule": "gating.rules",
    "zoo": "models.zoo",
}
_MODULES = ("gbas", "zoo")
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_HOMES[name]}", __name__)
    found = module if name in _MODULES else getattr(module, name)
    globals()[name] = found  # asked for once
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
