"""Errors for bad input: each names the value, what was expected, and the nearest there is. Light to import."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class DataError(ValueError):
    """A picture or a label map that cannot be used, found while it is read.

    What a worker process raises arrives here behind its traceback; the last line is the message.
    """

    def __init__(self, message: str):
        super().__init__(message.strip().splitlines()[-1].removeprefix(f"{__name__}.{type(self).__name__}: "))


def plain(text: Any) -> str:
    """Return text on one line and without control characters: names may come from anywhere."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text))


def cut(name: str, most: int) -> str:
    """Return the first letters of a file's name, in so many bytes at most: those are what file systems count."""
    return name.encode(errors="replace")[:most].decode(errors="ignore")


def first_line(error: BaseException) -> str:
    """Return what an error says first, for the line in which another tells it; its kind where it says nothing."""
    return plain((str(error).strip().splitlines() or [type(error).__name__])[0])[:300]


def closest(value: Any, known: Iterable[Any], count: int = 1) -> list[str]:
    """Return the names that `value` may be a misspelling of, the likeliest first."""
    return difflib.get_close_matches(str(value), [str(name) for name in known], count, cutoff=0.5)


def hint(value: Any, known: Iterable[Any]) -> str:
    """Return what a message adds about the nearest name; nothing where none is near."""
    near = closest(value, known)
    return f"; the nearest is {near[0]!r}" if near else ""


def one_of(name: str, value: Any, known: Iterable[Any], error: type[Exception] = ValueError) -> Any:
    """Return `value`, or raise an error that lists what there is."""
    known = list(known)
    if value not in known:
        listed = ", ".join(map(str, known))
        raise error(f"{name}={value!r} is not known{hint(value, known)}. There are: {listed}")
    return value


def known_settings(
    owner: str, settings: Mapping[str, Any], takes: Callable | Iterable[str], error: type[Exception] = ValueError
) -> dict[str, Any]:
    """Return the settings, or raise an error for the first that `takes`, a callable or names, does not have."""
    takes = list(inspect.signature(takes).parameters if callable(takes) else takes)
    for name in settings:
        if name not in takes:
            raise error(f"{owner} has no setting {name!r}{hint(name, takes)}. It has: {', '.join(takes)}")
    return dict(settings)


def inside(value: float, interval: str) -> bool:
    """Return whether a number lies in an interval such as "[0, 1)". NaN lies in none."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    above = low <= value if interval[0] == "[" else low < value
    return above and (value <= high if interval[-1] == "]" else value < high)


def in_interval(name: str, value: Tensor | float, interval: str, error: type[Exception] = ValueError) -> Any:
    """Return `value`, or raise an error unless it, or all of a tensor, lies in an interval such as "(0, inf)".

    One pass over a tensor and one wait for its device: what breaks a bound in training is to be said, not averaged.
    """
    if not hasattr(value, "aminmax"):
        if not inside(value, interval):
            raise error(f"{name}={value!r} lies outside {interval}")
        return value
    import torch

    if not value.numel():
        raise error(f"{name} is empty, shape {list(value.shape)}; expected at least one value in {interval}")
    least, most = torch.stack(value.detach().aminmax()).tolist()
    if not (inside(least, interval) and inside(most, interval)):
        got = f"{least:g}" if least == most else f"values from {least:g} to {most:g}"
        raise error(f"{name} has {'NaN' if math.isnan(least) else got}, outside {interval}")
    return value


def check_images(images: Tensor, channels: int, finite: bool = False):
    """Raise unless pictures are floats `[B, channels, H, W]`, not empty."""
    from torch import Tensor

    if not isinstance(images, Tensor) or images.dim() != 4 or not images.is_floating_point():
        got = f"{images.dtype} {list(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"pictures are {got}; expected a float tensor [B, {channels}, H, W]")
    b, c, height, width = images.shape
    if b == 0:
        raise ValueError("an empty batch; give at least one picture")
    if c != channels:
        raise ValueError(f"pictures have {c} channels, the backbone takes {channels}")
    if not height or not width:
        raise ValueError(f"a picture of {height} x {width} px; give at least one pixel")
    if finite and not (ok := images.isfinite().flatten(1).all(1)).all():
        raise ValueError(f"pictures {(~ok).nonzero()[:, 0].tolist()} of the batch have NaN or infinite pixels")


def check_precision(images: Tensor, weight: Tensor):
    """Raise a ValueError unless pictures have the weights' precision, or autocast sees to it."""
    import torch

    if images.dtype != weight.dtype and not torch.is_autocast_enabled(images.device.type):
        raise ValueError(
            f"pictures are {images.dtype}, the model's weights {weight.dtype}; give images.to({weight.dtype}), or run "
            "the model in float32 under torch.autocast"
        )


def check_mask(mask: Tensor, pictures: int, grid: tuple[int, int], of: str = "the mask"):
    """Raise unless decisions are bool `[h, w]` or `[B, h, w]`."""
    import torch
    from torch import Tensor

    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(f"{of} is {got}; expected a bool tensor, True = coarse (for scores use `scores > 0`)")
    if tuple(mask.shape) not in (tuple(grid), (pictures, *grid)):
        raise ValueError(
            f"{of} has shape {list(mask.shape)}; expected {list(grid)} for all pictures or {[pictures, *grid]} for each"
        )


def check_masks(masks: Tensor | Sequence[Tensor], pictures: int, grids: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return decisions for regions of each size, small to large; of two scales the one mask need not be in a list."""
    masks = list(masks) if isinstance(masks, list | tuple) else [masks]
    if len(masks) != len(grids):
        raise ValueError(
            f"{len(masks)} mask{'s' * (len(masks) != 1)} for {len(grids)} sizes of regions; give a list with one for "
            f"each, of {' and '.join(map(str, map(list, grids)))} regions"
        )
    for i, (mask, grid) in enumerate(zip(masks, grids, strict=True)):
        check_mask(mask, pictures, grid, "the mask" if len(grids) == 1 else f"mask {i} (small regions first)")
    return masks
