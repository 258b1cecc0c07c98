"""What a model makes of each picture of a data set, and what becomes of it over all of them."""

import contextlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..data.loaders import Batch
from ..models.msvit import MSViT, Result

Predict = Callable[[Tensor, Tensor], Result]  # of pictures and their indices
# Of indices, the side of a patch, and how many pixels its token averages, 2 if not given: bool [B, h, w], where the
# object is, of those that this token would lose.
Objects = Callable[..., Tensor]
Columns = dict[str, Tensor]  # by name, a value or more for each picture


@torch.no_grad()
def per_picture(
    model: MSViT,
    loader: Iterable,
    count: Callable[[Batch, Result], Columns],
    predict: Predict | None = None,
    accelerator=None,
) -> tuple[Columns, dict[str, int]]:
    """Return what is found in each readable picture of a loader, float64, and the numbers of pictures.

    Beside what `count` finds these are macs (a share of the dense backbone's), tokens, coarse (a share of the regions),
    of a gate decided (the share of regions whose soft m is below 1/4 or above 3/4) and, for built-in scenes, how many
    regions show the object or do not, and are fine. Other arguments are those of `evaluate`.
    """
    device = next(model.parameters()).device
    predict = predict or (lambda images, indices: model.run(images))
    where_of, parts = object_finder(loader), []
    with model.evaluating():
        for images, targets, indices in loader:
            batch = Batch(images.to(device), targets.to(device), indices)
            with accelerator.autocast() if accelerator else contextlib.nullcontext():
                result = predict(batch.images, indices)
            columns = count(batch, result) | {"read": indices >= 0, "tokens": result.tokens}
            columns["macs"] = result.macs / model.dense_macs(images.shape[-2:])
            columns["coarse"] = result.coarse.double().mean((1, 2))
            if result.scores is not None:
                columns["decided"] = ((result.gates - 0.5).abs() > 0.25).double().mean((1, 2))
            if where_of is not None:
                where, fine = where_of(indices, model.coarse_patch).to(device), ~result.coarse
                regions = {"object": where, "fine_object": where & fine, "rest": ~where, "fine_rest": ~where & fine}
                columns |= {name: part.sum((1, 2)) for name, part in regions.items()}
            columns = {name: column.to(device, torch.float64) for name, column in columns.items()}
            columns = accelerator.gather_for_metrics(columns) if accelerator else columns
            parts.append({name: column.cpu() for name, column in columns.items()})
    if not parts:
        raise ValueError("the loader has no pictures to evaluate on")
    table = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    read = table.pop("read") > 0
    pictures = {"pictures": int(read.sum())} | ({} if read.all() else {"unreadable": int((~read).sum())})
    return {name: column[read] for name, column in table.items()}, pictures


def means(columns: Columns, names: Iterable[str]) -> dict[str, float]:
    """Return the means over the pictures, each with its spread (`_sd`)."""
    out = {}
    for name in names:
        out[name], out[f"{name}_sd"] = columns[name].mean().item(), columns[name].std(correction=0).item()
    return out


def ratios(columns: Columns, pairs: dict[str, tuple[str, str]]) -> dict[str, float]:
    """Return by name what share one column's sum is of another's; NaN where there is nothing to share."""
    return {name: (columns[a].sum() / columns[b].sum()).item() for name, (a, b) in pairs.items()}


def object_ratios(columns: Columns) -> dict[str, float]:
    """Return the shares of fine regions on the object and elsewhere, for built-in scenes."""
    pairs = {f"fine_{part}": (f"fine_{part}", part) for part in ("object", "rest")}
    return ratios(columns, pairs if "object" in columns else {})


def oracle_masks(model: MSViT, where: Objects, indices: Tensor, size: tuple[int, int]) -> list[Tensor]:
    """Return the ideal decisions for built-in scenes: a region is one token where that loses nothing of the object."""
    patch, masks = model.coarse_patch // model.scale, []
    for side, (h, w) in zip(model.scales[1:], model.grids(size), strict=True):
        masks.append(~where(indices, patch * side, side)[:, :h, :w].to(model.cut.device))
    return masks


def object_finder(loader: Iterable) -> Objects | None:
    """Return what tells where the objects are, if the pictures are built-in ones."""
    scenes = getattr(getattr(loader, "dataset", None), "scenes", None)
    if scenes is None:
        return None

    def find(indices: Tensor, patch: int, scale: int = 2) -> Tensor:
        return torch.from_numpy(scenes.object_regions(indices.cpu().numpy(), patch, scale))

    return find
