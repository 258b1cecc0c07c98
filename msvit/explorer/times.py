"""The time that a model takes for the picture shown, beside the dense one's: in turns, after a warm-up."""

import time
from collections.abc import Callable
from typing import NamedTuple

from ..bench.timing import Quartiles, interleaved, quartiles

PATIENCE = 0.25  # seconds that the measurement of a picture may take
FEWEST_REPEATS, MOST_REPEATS = 5, 41  # repeats


class Times(NamedTuple):
    """Milliseconds for one picture: medians and quartiles over repeats in which both models had their turn."""

    gated: Quartiles
    dense: Quartiles

    @property
    def gain(self) -> float:
        """How many times as fast the gated model is."""
        return self.dense.median / self.gated.median


def time_in_turns(gated: Callable[[], object], dense: Callable[[], object], patience: float = PATIENCE) -> Times:
    """Return the times of two models, which are called in turns so that what else the machine does meets both."""
    works = {"gated": gated, "dense": dense}
    for work in works.values():
        work()  # the first call of a size is slower than all later ones
    start = time.perf_counter()
    repeats = list(interleaved(works, FEWEST_REPEATS))
    each = (time.perf_counter() - start) / FEWEST_REPEATS
    repeats += interleaved(works, min(int(patience / each), MOST_REPEATS) - FEWEST_REPEATS)
    return Times(*(quartiles([1e3 * seconds[name] for seconds in repeats]) for name in works))
