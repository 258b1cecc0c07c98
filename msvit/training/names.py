"""What runs and methods are called where people read them, the same in menus, tables, hovers and legends."""

from collections.abc import Mapping
from typing import Any

from .recipe import Recipe


def short_name(recipe: Recipe) -> str:
    """Return a run's name, as in "MSViT gbas · 58 % · seed 0 · ae2072"; the last word is that of its folder's name."""
    budget = [f"{recipe.gating.target:.0%}".replace("%", " %")] if recipe.training.epochs else []
    words = [method_name(recipe.to_dict()), *budget, f"seed {recipe.training.seed}", recipe.run_name[-6:]]
    return " · ".join(words)


def method_name(run: Mapping[str, Any]) -> str:
    """Return what decides in a run of these settings, what shapes it, and which parts are off."""
    if not run["epochs"]:
        return "dense"
    after = f" + {run['reducer']}" if run["reducer"] else ""
    if run["gating"] == "fine":
        return run["reducer"] or "dense, trained on"
    if run["gating"] not in ("learned", "pattern"):
        return mask_label(run["gating"]) + after
    who = "MSViT" if run["gating"] == "learned" else "pattern"
    words = [f"{who} {run['loss']}" + ("" if run["control"] == "none" else f" + {run['control']}")]
    if not run["gate_lr"]:
        words = [f"{who} fixed"]
    elif run["loss"] == "none" and run["control"] != "none":
        words = [f"{who}, controller only ({run['control']})"]
    words += [{"none": "untrimmed", "batch": "trimmed by batch"}[run["trim"]]] if run["trim"] != "margin" else []
    words += {"shared": [], "own": ["own embedding"], "apt": ["APT's path"]}[run["coarse_embed"]]
    return ", ".join(words) + after


def mask_label(name: str) -> str:
    """Return what tables call who decides in the gate's place; APT is more than a mask, and a quota learns."""
    return {"apt": "APT", "quota": "quota"}.get(name, f"{name} mask")
