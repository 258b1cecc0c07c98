"""From settings to files: models are built, their batches measured one after the other, and what was found written."""

import dataclasses
import math
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch

from ..models.fit_reducer import fit_reducer
from ..models.msvit import MSViT
from ..reducers.registry import REDUCERS
from ..training.build import load_data
from ..training.environment import environment
from ..training.files import RunError
from ..training.recipe import RecipeError
from ..training.runs import read
from .method import Bout, Subject
from .report import draw, write
from .settings import DTYPES, Plan, Settings, Tell, plans


def bench(settings: Settings, tell: Tell) -> dict[str, Any]:
    """Measures, writes the files after each batch, and returns what is in the JSON file.

    Raises:
        RunError: A MACs figure is not what torch counts; everything is measured and written all the same.
    """
    for plan in () if settings.run else plans(settings):  # mistakes show before anything is measured
        with torch.device("meta"):
            _new(plan)
    report = {
        "environment": environment(settings.place, 1) | {"dtype": settings.dtype, "cpu": _cpu()},
        "settings": dataclasses.asdict(settings) | {"run": Path(settings.run).name, "out": ""},
        "interrupted": False,
        "problems": [],
        "rows": [],
    }
    subject, before = None, None
    try:
        for plan in plans(settings):
            if before != (key := (plan.model, plan.size)):
                subject, before = None, None  # its memory goes back before the next is built
                subject, before = build(settings, plan), key
            Bout(settings, plan, subject, report, tell).run()
            write(report, settings.out)
    except KeyboardInterrupt:
        report["interrupted"] = True
        write(report, settings.out)
        draw(report, settings.out, tell)
        found = f"what was measured until then is in {settings.out}" if report["rows"] else "nothing was measured yet"
        raise KeyboardInterrupt(f"interrupted; {found}") from None
    draw(report, settings.out, tell)
    if report["problems"]:
        raise RunError("; ".join(report["problems"]))
    return report


def build(settings: Settings, plan: Plan) -> Subject:
    """A backbone with random weights and a new gate on random pictures, or a run's own model and pictures."""
    torch.manual_seed(0)
    if settings.run:
        model, images = _trained(settings)
        with torch.inference_mode():
            macs = model.run(images[:32]).macs.mean().item()
    else:
        model = _new(plan)
        sides, most = model.vit.patch_embed.img_size, plan.batch if plan.axis == "size" else max(settings.batch)
        coarse = round(settings.coarse * math.prod(model.grid(sides)))
        macs = model.macs_of(torch.tensor([coarse]), sides).item()
        images = torch.randn(most, model.vit.patch_embed.proj.in_channels, *sides)
    share, fits = macs / model.dense_macs(images.shape[-2:]), {}
    for name in (name for name in settings.wanted() if name in REDUCERS):
        with suppress(ValueError):  # one that this backbone cannot have; its row says so
            fits[name] = fit_reducer(name, model.vit, share)
    cut, dtype = model.cut.clone(), DTYPES[settings.dtype]
    model.to(settings.place, dtype).requires_grad_(False)
    model.cut = cut.to(settings.place)  # bfloat16 could not tell thresholds apart
    return Subject(model, images.to(settings.place, dtype), fits)


def _new(plan: Plan) -> MSViT:
    try:
        vit = timm.create_model(plan.model, **({} if plan.size is None else {"img_size": plan.size}))
        model = MSViT(vit, fast_cpu=True).eval()
    except (TypeError, ValueError, AssertionError) as error:
        raise RecipeError(f"{plan.model} cannot be timed: {error}") from error
    side, patch = vit.patch_embed.img_size[0], model.coarse_patch
    if any(side % patch for side in vit.patch_embed.img_size):
        raise RecipeError(
            f"{plan.model} takes pictures of {side} px here, no whole number of coarse patches of {patch} px; "
            f"use --size {max(side // patch, 1) * patch}"
        )
    return model


def _trained(settings: Settings) -> tuple[MSViT, torch.Tensor]:
    run, most, images = read(settings.run), max(settings.batch), []
    if run.summary is None:
        raise RunError(f"{settings.run} is not finished and has no model yet; train on with the command that began it")
    model = MSViT.from_pretrained(settings.run, fast_cpu=True).eval()
    if model.head.dense:
        raise RunError(f"{settings.run} segments; the bench times classifiers against timm's own")
    for batch in load_data(run.recipe.data, run.recipe.training.seed, model).val:
        images.append(batch.images)
        if sum(map(len, images)) >= most:
            return model, torch.cat(images)[:most]
    raise RecipeError(f"batch={most}: the run has {sum(map(len, images))} validation pictures; use a smaller batch")


def _cpu() -> str:
    """The processor's name, where the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
