"""What a model makes of each picture of a data set, and what becomes of it over all of them."""

import contextlib
from collections.abc import Callable, Iterable, Iterator

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
            batch = Batch(_to(images, device), _to(targets, device), indices)
            with accelerator.autocast() if accelerator else contextlib.nullcontext():
                result = predict(batch.images, indices)
            for some, found in _of_one_size(batch, result):
                columns = count(some, found) | _common(model, some, found, where_of)
                columns = {name: column.to(device, torch.float64) for name, column in columns.items()}
                columns = accelerator.gather_for_metrics(columns) if accelerator else columns
                parts.append({name: column.cpu() for name, column in columns.items()})
    if not parts:
        raise ValueError("the loader has no pictures to evaluate on")
    table = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    read = table.pop("read") > 0
    pictures = {"pictures": int(read.sum())} | ({} if read.all() else {"unreadable": int((~read).sum())})
    return {name: column[read] for name, column in table.items()}, pictures


def _to(pictures: Tensor | list[Tensor], device: torch.device) -> Tensor | list[Tensor]:
    return [picture.to(device) for picture in pictures] if isinstance(pictures, list) else pictures.to(device)


def _of_one_size(batch: Batch, result: Result) -> Iterator[tuple[Batch, Result]]:
    """Yield a batch and what was made of it; of a list of pictures, each one's."""
    if not isinstance(batch.images, list):
        yield batch, result
        return
    for i in range(len(batch.images)):
        yield Batch(*(part[i][None] for part in batch)), result.picture(i)


def _common(model: MSViT, batch: Batch, result: Result, where_of: Objects | None) -> Columns:
    """Return what is counted in each picture whatever the task."""
    columns = {"read": batch.indices >= 0, "tokens": result.tokens}
    columns["macs"] = result.macs / model.dense_macs(batch.images.shape[-2:])
    columns["coarse"] = result.coarse.double().mean((1, 2))
    if result.scores is not None:
        columns["decided"] = ((result.gates - 0.5).abs() > 0.25).double().mean((1, 2))
    if where_of is not None:
        where, fine = where_of(batch.indices, model.coarse_patch).to(result.coarse.device), ~result.coarse
        regions = {"object": where, "fine_object": where & fine, "rest": ~where, "fine_rest": ~where & fine}
        columns |= {name: part.sum((1, 2)) for name, part in regions.items()}
    return columns


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
