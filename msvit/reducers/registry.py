"""Methods that drop or merge tokens inside the network, by name, and the table of everything on this bench."""

from functools import partial
from typing import NamedTuple

from torch import nn

from ..checks import known_settings, one_of
from .algm import ALGM
from .base import Reducer
from .diffrate import DiffRate
from .dynamicvit import DynamicViT
from .evit import EViT
from .pitome import PiToMe
from .pruning import GridPooling, ImportanceSampling, PowerBert, RandomPruning, StridedConvolution
from .token_pooling import TokenPooling
from .tome import ToMe


class Method(NamedTuple):
    """A row of the table.

    Attributes:
        kind: "gate" (learned decisions), "rule" (decisions without learning) or "reducer" (inside the network).
        paper: Where it comes from.
        learned: What of it is trained, besides the backbone.
        cost: What it does besides the blocks' own work.
        tasks: What it can serve.
    """

    kind: str
    paper: str
    learned: str = "nothing"
    cost: str = "nothing"
    tasks: str = "classification, dense"


CLASSES, FUSED = "classification", "classification; dense only with one label for all fused pixels"
METHODS = {
    "gate": Method("gate", "MSViT, Havtorn et al. 2023", "gate, priors of GBaS", "a network on each coarse patch"),
    "quota": Method(
        "gate",
        "quota of CTS, Lu et al. 2023; dense: its labels too; classification: straight-through, not theirs",
        "gate",
        "a network on each coarse patch",
    ),
    "pattern": Method("gate", "baseline: a static pattern that is learned", "a score per position, priors of GBaS"),
    "entropy": Method("rule", "APT's threshold alone, Choudhury et al. 2025", cost="a histogram of each coarse patch"),
    "apt": Method(
        "rule", "APT, Choudhury et al. 2025", "its path of full-resolution patches", "a histogram, that path"
    ),
    "fine": Method("rule", "the dense model"),
    "coarse": Method("rule", "the dense model at half resolution"),
    "centre": Method("rule", "baseline: fine in the middle"),
    "border": Method("rule", "baseline: fine at the border"),
    "checkerboard": Method("rule", "baseline: every other region"),
    "random": Method("rule", "baseline: regions at random"),
    "dynamicvit": Method("reducer", "Rao et al. 2021", "a predictor per stage", "predictors", CLASSES),
    "token_pooling": Method("reducer", "Marin et al. 2021", cost="unfused attention and clustering at its layers"),
    "power_bert": Method(
        "reducer", "PoWER-BERT, Goyal et al. 2020", cost="unfused attention at its layers", tasks=CLASSES
    ),
    "grid": Method("reducer", "baseline: strided average"),
    "strided_convolution": Method(
        "reducer", "baseline of Marin et al. 2021", "a convolution at its layers", "a matrix for each token there"
    ),
    "random_pruning": Method("reducer", "baseline: tokens at random", tasks=CLASSES),
    "importance_sampling": Method(
        "reducer", "baseline of Marin et al. 2021", cost="unfused attention at its layers", tasks=CLASSES
    ),
    "evit": Method("reducer", "Liang et al. 2022", cost="one more query at its layers", tasks=FUSED),
    "tome": Method("reducer", "Bolya et al. 2023", cost="similarities in every block"),
    "diffrate": Method(
        "reducer",
        "Chen et al. 2023",
        "the numbers of tokens each block prunes and merges",
        "one more query and similarities at its layers",
        CLASSES,
    ),
    "algm": Method("reducer", "ALGM, Norouzi et al. 2024", cost="similarities at its layers"),
    "pitome": Method("reducer", "Tran et al. 2024", cost="similarities of all pairs in every block"),
}
REDUCERS = {
    "dynamicvit": DynamicViT,
    "token_pooling": TokenPooling,
    "power_bert": PowerBert,
    "grid": GridPooling,
    "strided_convolution": StridedConvolution,
    "random_pruning": RandomPruning,
    "importance_sampling": ImportanceSampling,
    "evit": EViT,
    "tome": ToMe,
    "diffrate": DiffRate,
    "algm": ALGM,
    "pitome": PiToMe,
}


def make_reducer(name: str, vit: nn.Module, **settings) -> Reducer:
    """Make a reducer for a backbone, by its name in `REDUCERS`; the settings are the class's own."""
    make = partial(REDUCERS[one_of("reducer", name, REDUCERS)], vit)
    reducer = make(**known_settings(name, settings, make))
    reducer.settings = {"name": name, **settings}
    return reducer
