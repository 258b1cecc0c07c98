"""What stands where a gate stands: a rule, and what it says of pictures."""

from collections.abc import Sequence

from torch import Tensor, nn

from ..checks import in_interval
from ..core.precision import in_full


class Rule(nn.Module):
    """A module that scores the regions of pictures `[B, c, H, W]`. It learns nothing.

    Attributes:
        adjustable: Whether a threshold on its scores means something, so that a budget can be calibrated.
        sizes: How many sizes of regions it scores; None if it is as many as one asks for.
    """

    adjustable: bool = False
    sizes: int | None = None

    def score(self, images: Tensor, grids: list[tuple[int, int]]) -> list[Tensor]:
        """Return soft decisions in [0, 1], 1 = one token, `[B, h, w]` for each grid, from small regions to large.

        Regions tile a picture from its upper left corner, each 2 x 2 of the size before; the smallest ones all of it.
        """
        raise NotImplementedError


class ThresholdRule(Rule):
    """A rule with a threshold for each size of regions, on pixels as they are before normalisation.

    Args:
        thresholds: One for coarse patches, and one for each size above them: up to three.
        mean, std: Of the pictures' normalisation, to have pixels from 0 to 1 again.

    Attributes:
        interval: Which thresholds mean something.
    """

    adjustable = True
    interval: str = "[0, inf)"

    def __init__(self, thresholds: Sequence[float], mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        if not isinstance(thresholds, list | tuple) or len(thresholds) not in (1, 2, 3):
            raise ValueError(
                f"thresholds={thresholds!r}: give a list of one number (two scales), two (three scales) or three (four)"
            )
        for threshold in thresholds:
            in_interval("threshold", threshold, self.interval)
        self.thresholds, self.mean, self.std = tuple(thresholds), tuple(mean), tuple(std)

    @property
    def sizes(self) -> int:
        return len(self.thresholds)

    def pixels(self, images: Tensor) -> Tensor:
        """Return pictures from 0 to 1, in float32 or better."""
        if len(self.mean) != images.shape[1]:
            raise ValueError(f"mean={self.mean} for pictures of {images.shape[1]} channels; give one number for each")
        wide = in_full(images)
        return wide * wide.new_tensor(self.std)[:, None, None] + wide.new_tensor(self.mean)[:, None, None]

    def extra_repr(self) -> str:
        return f"thresholds={list(self.thresholds)}"
