"""Published results beside one's own: a layer of marks in the trade-off plots, relative to their dense model's."""

import re
from pathlib import Path

import pandas as pd

from ..checks import one_of

PUBLISHED = Path(__file__).with_name("published.csv")
DENSE = "dense"  # the setting of a published backbone with all its tokens, and the method of one's own
ANCHORS = ("auto", "always", "never")
ANCHORS_TITLE = "published, ImageNet"
_IMAGENET = re.compile(r"(?<![\w-])(imagenet([-_]?1k|[-_]?2012)?|ilsvrc([-_]?2012)?)(?![\w-])", re.IGNORECASE)


def published() -> pd.DataFrame:
    """Return what publications state: method, setting, backbone, accuracy (%), gmacs, data and source."""
    return pd.read_csv(PUBLISHED)


def is_imagenet(data: str) -> bool:
    """Return whether pictures, as `msvit train --data` names them, are ImageNet-1k; its small relatives are not."""
    return _IMAGENET.search(data) is not None


def anchors(dense: float) -> pd.DataFrame:
    """Return published results as points of a trade-off plot: `label`, `macs` and `accuracy`.

    Pictures and backbones differ, so that what can be compared is the difference to dense: MACs are a share of the
    published dense backbone's, and an accuracy is `dense` plus the points that its publication wins or loses.

    Args:
        dense: The accuracy of one's own dense model, in [0, 1].
    """
    stated = published()
    own = stated[stated["setting"] == DENSE].set_index("backbone")
    stated = stated[stated["setting"] != DENSE]
    lost = stated["accuracy"] - stated["backbone"].map(own["accuracy"])
    return pd.DataFrame(
        {
            "label": stated["method"] + ", " + stated["setting"],
            "macs": stated["gmacs"] / stated["backbone"].map(own["gmacs"]),
            "accuracy": dense + lost / 100,
        }
    ).reset_index(drop=True)


def anchors_beside(table: pd.DataFrame, data: str, wanted: str = "auto") -> pd.DataFrame | None:
    """Return the anchors for a table of runs with a `method` "dense", or None where they are not to be drawn.

    Args:
        data: The pictures of the runs.
        wanted: Of ANCHORS; "auto" is always if the pictures are ImageNet and there is a dense model, otherwise never.
    """
    dense = table.loc[table["method"] == DENSE, "accuracy"]
    if one_of("anchors", wanted, ANCHORS) == "always" and dense.empty:
        raise ValueError(
            "anchors='always': published results are drawn relative to the dense model, and no run here is dense; "
            "train one with epochs=0, or use 'auto' or 'never'"
        )
    if dense.empty or not (is_imagenet(data) if wanted == "auto" else wanted == "always"):
        return None
    return anchors(dense.mean())
