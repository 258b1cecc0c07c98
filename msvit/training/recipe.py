"""The recipe: all settings of a training run, in small groups, for the command line, notebooks and records.

Commands, notebooks and `settings.json` know every setting by a flat name (`epochs_dense`, `reducer_settings`); code
is handed the group that it needs (`recipe.training.epochs_dense`, `recipe.reducer.settings`).
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from ..checks import cut, hint
from .settings import Checked, RecipeError, parsed, setting

LEARNED = ("learned", "quota", "pattern")  # who trains, and rules that do not
BOUNDED = ("entropy", "apt", "psnr", "equality")  # rules with thresholds
GATINGS = (*LEARNED, "fine", "coarse", "centre", "border", "checkerboard", "random", *BOUNDED, "oracle")


@dataclasses.dataclass(frozen=True)
class DataSettings(Checked):
    """Pictures: what a run learns from."""

    source: str = setting(
        "scenes:easy",
        "scenes:easy|middle|hard|scales, screens, folder:/path, or what timm's create_dataset reads",
        flat="data",
    )
    size: int = setting(64, "side of the pictures (segmentation: of the crops to train on) in pixels", "[8, 16384]")
    train_n: int = setting(0, "training pictures an epoch; 0 = all there are (of scenes 8192)", "[0, 100000000]")
    val_n: int = setting(0, "pictures to evaluate on; 0 = all there are (of scenes 2048)", "[0, 100000000]")
    holdout: float = setting(0.0, "share of the training pictures to evaluate on in their place", "[0, 1)")
    augment: str = setting("none", "augmentation of training pictures: none, light or timm")
    batch: int = setting(128, "pictures in a step, over all processes", "[1, inf)")
    workers: int = setting(0, "processes that read pictures, for each process that trains", "[0, 1024]")
    task: str = setting("classify", "a label for each picture, or for each pixel", choices=("classify", "segment"))
    short: int = setting(0, "segmentation: resize a folder's pictures to this shorter side first; 0 = no", "[0, 16384]")


@dataclasses.dataclass(frozen=True)
class ModelSettings(Checked):
    """Model: what is trained, and from where it starts."""

    name: str = setting(
        "tiny",
        "tiny (3 blocks of width 64, patch 8), a timm name, a run's folder, hub:OWNER/NAME, or scenes as in msvit.load",
        flat="model",
    )
    checkpoint: str = setting("", "safetensors (or weights-only) file for the backbone")
    pretrained: bool = setting(False, "start a timm model from its published weights")
    gate: str = setting("", "folder, or hub:OWNER/NAME, of the run whose trained gate is taken over")
    scale: int = setting(2, "a coarse patch is scale x scale fine ones", "[2, 64]")
    scales: list = setting([], "sides of a quadtree's tokens in fine patches, as in 1,2,4; empty = 1,scale", "[1, 64]")
    coarse_embed: str = setting("shared", "how coarse patches are embedded", choices=("shared", "own", "apt"))
    drop_path: float = setting(0.0, "stochastic depth of the last block", "[0, 1)")
    decoder: str = setting("linear", "segmentation: what labels the tokens", choices=("linear", "mask"))
    scatter: str = setting("after", "segmentation: fine grid after or before the decoder", choices=("after", "before"))
    sliding: bool = setting(False, "segmentation: evaluate through overlapping windows of the training size")


@dataclasses.dataclass(frozen=True)
class TrainingSettings(Checked):
    """Training: how long, how fast, and on what."""

    epochs_dense: int = setting(3, "epochs of the backbone alone, all tokens fine", "[0, 1000000]")
    epochs: int = setting(5, "epochs of the gate and the backbone together", "[0, 1000000]")
    optimizer: str = setting("adamw", "timm's name of the optimizer")
    lr: float = setting(1e-3, "peak learning rate of the backbone; 0 = frozen", "[0, 1e6]")
    lr_scale: float = setting(1.0, "factor on lr, the backbone's, in stage two", "[0, 1e6]")
    freeze: int = setting(0, "first epochs of stage two in which backbone and head stay as they are", "[0, inf)")
    gate_lr: float = setting(1e-3, "peak learning rate of the gate; 0 = it stays as its start taught it", "[0, 1e6]")
    coarse_lr: float | None = setting(None, "of what embeds coarse patches alone; none = lr", "[0, 1e6]")
    reducer_lr: float = setting(1e-3, "peak learning rate of a reducer's own layers; 0 = frozen", "[0, 1e6]")
    prior_lr: float = setting(1e-2, "peak learning rate of the gate loss's priors; 0 = frozen", "[0, 1e6]")
    weight_decay: float = setting(0.05, "of the matrices of backbone and gate", "[0, 1e6]")
    layer_decay: float = setting(1.0, "factor on the learning rate from each block to the one below", "(0, 1]")
    schedule: str = setting("cosine", "timm's schedule", choices=("cosine", "poly", "wsd", "constant"))
    warmup: float = setting(0.2, "epochs of linear warm-up, in each stage", "[0, inf)")
    clip: float = setting(0.0, "largest norm of the gradient; 0 = any", "[0, 1e6]")
    accumulate: int = setting(1, "steps whose gradients make one update", "[1, inf)")
    ema: float = setting(0.0, "decay of the moving average of the weights; 0 = none", "[0, 1)")
    smoothing: float = setting(0.0, "label smoothing", "[0, 1)")
    mixup: float = setting(0.0, "timm's mixup alpha; 0 = none", "[0, 1e6]")
    cutmix: float = setting(0.0, "timm's cutmix alpha; 0 = none", "[0, 1e6]")
    distill: float = setting(0.0, "weight of KL(dense || gated), the teacher as stage one left it", "[0, 1e6]")
    precision: str = setting("fp32", "bf16 = autocast", choices=("fp32", "bf16"))
    device: str = setting("auto", "auto = an accelerator if there is one", choices=("auto", "cpu"))
    seed: int = setting(0, "of weights, order, augmentation and noise", "[0, 4294967295]")


@dataclasses.dataclass(frozen=True)
class GatingSettings(Checked):
    """Gate: who decides, what it costs, and what shapes it."""

    by: str = setting("learned", "who decides: the gate, or what stands in its place", choices=GATINGS, flat="gating")
    network: str = setting(
        "filters", "what the gate sees a region with", choices=("filters", "pixels"), flat="gate_network"
    )
    rule_settings: dict = setting({}, "settings of entropy, apt, psnr or equality, as in thresholds=[6.0,4.0]")
    loss: str = setting("gbas", "the gate loss: gbas, bas, l0, ratio or none")
    loss_weight: float | None = setting(
        None, "weight of the gate loss; none = the loss's own, segmentation: over the regions", "[0, inf)"
    )
    loss_settings: dict = setting({}, "settings of the gate loss, as in sigma=0.1 temperature=0.3")
    budget: str = setting(
        "macs", "what target is a share of: dense MACs, or coarse regions", choices=("macs", "coarse")
    )
    target: float = setting(0.58, "the budget: gate, priors and masks are held to it", "(0, 1)")
    targets: list = setting(
        [], "a quadtree's share of undivided regions of each size, small first; empty = as target asks", "(0, 1)"
    )
    start: str = setting(
        "utility",
        "what the gate learns alone before the joint stage",
        choices=("none", "detail", "entropy", "utility"),
        flat="gate_start",
    )
    control: str = setting(
        "none",
        "what holds the gate at the budget while it trains, beside its loss",
        choices=("none", "bias", "projection"),
    )
    calibrate: bool = setting(True, "set the threshold after training so that training pictures meet the budget")
    temperature: float = setting(0.3, "of the Gumbel-sigmoid in the first step", "(0, inf)")
    temperature_end: float = setting(0.2, "and in the last; between them it moves geometrically", "(0, inf)")
    trim: str = setting(
        "margin",
        "cut training sequences: each to its active tokens and a margin, or all of a batch to the most that one has",
        choices=("margin", "batch", "none"),
    )
    margin: float = setting(0.1, "inactive tokens with this soft activity stay, with trim=margin", "[0, 0.5]")

    @property
    def learned(self) -> bool:
        return self.by in LEARNED

    @property
    def shaped(self) -> bool:
        """Whether gate loss and controller apply: a quota keeps to its budget without."""
        return self.learned and self.by != "quota"

    @property
    def method(self) -> str:
        """The rule; or the gate's loss and controller, whose names mean one algorithm each."""
        if not self.shaped:
            return self.by
        name = self.loss if self.control == "none" else f"{self.loss}+{self.control}"
        if self.loss == "none" and self.control != "none":
            name = f"controller-{self.control}"
        return name if self.by == "learned" else f"{self.by}-{name}"


@dataclasses.dataclass(frozen=True)
class ReducerSettings(Checked):
    """Reducer: what drops or merges tokens in the network."""

    name: str = setting(
        "", "what drops or merges tokens in the network, by the names of `msvit methods`", flat="reducer"
    )
    settings: dict = setting({}, "its settings, as in keep=0.7", flat="reducer_settings")


MEAN_LOSSES = ("l0", "ratio")  # gate losses of the mean gate alone: under a projection they are no loss
HARMLESS = ("workers", "device")  # how a run is carried out, not what comes out


@dataclasses.dataclass(frozen=True, init=False)
class Recipe:
    """What a run learns from, what it trains, and how: `Recipe(epochs=2, data="scenes:hard")`, by flat names.

    Stage one trains the backbone alone with all tokens fine (`epochs_dense`), stage two the gate with it
    (`epochs`). With `epochs_dense=0` the backbone enters stage two as it is built or loaded.
    """

    data: DataSettings
    model: ModelSettings
    training: TrainingSettings
    gating: GatingSettings
    reducer: ReducerSettings

    def __init__(self, **settings: Any):
        groups: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
        for name, value in settings.items():
            group, field = find(name)
            groups[group][field.name] = value
        for group, kind in GROUPS.items():
            object.__setattr__(self, group, kind(**groups[group]))
        self._check_together()

    def _check_together(self):
        """Raise for settings that are good alone and mean nothing together."""
        training, gating, task = self.training, self.gating, self.data.task
        if training.epochs_dense + training.epochs == 0:
            raise RecipeError("epochs_dense=0 and epochs=0 train nothing; make one of them positive")
        flat = self.to_dict()
        foreign = ("mixup", "cutmix", "distill") if task == "segment" else ("short", "sliding")
        if wrong := [name for name in foreign if flat[name]]:
            raise RecipeError(f"{wrong[0]}={flat[wrong[0]]!r} is not for task={task!r}; leave it at 0")
        if gating.control == "projection" and gating.loss in MEAN_LOSSES:
            raise RecipeError(
                f"loss={gating.loss!r} with control='projection' is the controller alone under another name: it takes "
                "the force that all gates share out of the gradient, and this loss has no other; say loss='none' for "
                "that, or control='none' or 'bias' for this loss"
            )
        if gating.rule_settings and gating.by not in BOUNDED:
            raise RecipeError(f"rule_settings are for gating={' or '.join(BOUNDED)}; gating={gating.by!r} has none")
        apt, embed = gating.by == "apt", self.model.coarse_embed
        if apt and embed == "own":
            raise RecipeError("gating='apt' embeds coarse patches as APT does; leave coarse_embed at shared or apt")
        rate = training.lr * training.lr_scale
        others = (gating.learned and training.gate_lr, (apt or embed != "shared") and training.coarse_lr)
        if training.epochs and not (any(others) or (rate and (self.reducer.name or not training.freeze))):
            still = f"freeze={training.freeze}" if rate else "lr * lr_scale = 0"
            raise RecipeError(
                f"{still} and gate_lr={training.gate_lr:g} with gating={gating.by!r} leave nothing to train"
            )

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """Return the recipe of a mapping; a name that does not exist is refused, with the nearest that does."""
        return cls(**_renewed(settings))

    def to_dict(self) -> dict[str, Any]:
        """Return every setting by its flat name, as JSON has it."""
        return {name: getattr(getattr(self, group), field.name) for name, (group, field) in FIELDS.items()}

    def replace(self, **changes: Any) -> Self:
        """Return the same recipe but for `changes`, checked as new."""
        return self.from_dict(self.to_dict() | changes)

    def difference(self, other: Self) -> dict[str, tuple[Any, Any]]:
        """Return the settings that differ and can change a result: name -> (here, there)."""
        here, there = self.to_dict(), other.to_dict()
        return {k: (here[k], there[k]) for k in here if here[k] != there[k] and k not in HARMLESS}

    @property
    def method(self) -> str:
        """What saves tokens: nothing ("dense"), the gate by what shapes it, or the rule in its place."""
        if self.held_fixed:
            return "fixed" if self.gating.by == "learned" else f"{self.gating.by}-fixed"
        return self.gating.method if self.training.epochs else "dense"

    @property
    def held_fixed(self) -> bool:
        """Whether the second stage leaves the gate as it found or taught it, so that no loss shapes it."""
        return self.training.epochs > 0 and self.gating.learned and not self.training.gate_lr

    @property
    def run_name(self) -> str:
        """A folder's name for the run: readable, and another one for every other recipe."""
        settings = {k: v for k, v in self.to_dict().items() if k not in HARMLESS}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
        method = f"{self.method}{self.gating.target:g}" if self.training.epochs else self.method
        words = [self.data.source, self.model.name, method, f"s{self.training.seed}"]
        plain = "_".join(word.strip("/").rsplit("/", 1)[-1] for word in words)
        return cut("".join(c if c.isalnum() or c in ".-_" else "-" for c in plain)[:120], 248) + "-" + digest


def _renewed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings of version 0.1, where three were true or false, by the names of today."""
    settings, trim, control = dict(settings), settings.get("trim"), settings.get("control")
    if "share_embedding" in settings:
        settings["coarse_embed"] = "shared" if settings.pop("share_embedding") else "own"
    if isinstance(trim, bool):
        settings["trim"] = "margin" if trim else "none"
    if isinstance(control, bool):
        settings["control"] = "projection" if control else "none"
        if control and settings.get("loss") in MEAN_LOSSES:
            settings["loss"] = "none"  # which is what it was
    return settings


class Setting(NamedTuple):
    """Where a flat name leads: the group, and the field in it."""

    group: str
    field: dataclasses.Field


GROUPS = {group.name: group.type for group in dataclasses.fields(Recipe)}
FIELDS = {
    field.metadata["flat"] or field.name: Setting(group, field)
    for group, kind in GROUPS.items()
    for field in dataclasses.fields(kind)
}


def find(name: str) -> Setting:
    """Return where a flat name leads, or raise an error with the nearest that there is."""
    if name not in FIELDS:
        raise RecipeError(f"no setting is called {name!r}{hint(name, FIELDS)}. There are: {', '.join(FIELDS)}")
    return FIELDS[name]


def parse(name: str, text: str) -> Any:
    """Return the value that was typed for a setting."""
    return parsed(find(name).field, text)
