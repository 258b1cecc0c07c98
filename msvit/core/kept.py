"""Results that are kept: what follows from the size of pictures alone, or from weights that stay as they are."""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

Found = TypeVar("Found")


class Kept(Generic[Found]):
    """The last `most` results by their keys, the oldest of which goes when there is one too many."""

    def __init__(self, most: int):
        self.most = most
        self._found: dict[Hashable, Found] = {}

    def __len__(self) -> int:
        return len(self._found)

    def get(
        self, key: Hashable, make: Callable[[], Found], holds: Callable[[Found], bool] = lambda found: True
    ) -> Found:
        """Return what is kept under a key, if it still holds; else make it, and keep it."""
        found = self._found.get(key)
        if found is None or not holds(found):
            self._found.pop(key, None)
            found = self._found[key] = make()
            if len(self._found) > self.most:
                self._found.pop(next(iter(self._found)), None)
        return found


def recording() -> bool:
    """Return whether operations are recorded for a graph, or run on tensors without values.

    What was computed before must not come into it, and what is computed in it must not be kept.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing():
        return True
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
