"""What is done to a model to run it elsewhere or faster: pickling, recording, compiling."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..core.blocks import Steps


class Deployable:
    """Pickling, recording and compiling of a model.

    A model is compiled as it is by `torch.compile(model)`, in parts, since how many tokens run is known when the gate
    has decided; or by `compile`, which leaves the parts that depend on it alone.
    """

    def compile(self, backend: str | Callable = "inductor"):
        """Compile what a block does row by row, for inference and training.

        The number of rows is a variable of the graphs, so that they serve all batches: `graphs` counts them. Attention,
        which has the pictures' lengths, and what comes before the first block stay as they are.
        """
        counted = CountedBackend(backend)
        self._steps = Steps(*(torch.compile(step, dynamic=True, backend=counted) for step in Steps()))
        self._backend = counted

    @property
    def graphs(self) -> int:
        """How many graphs `compile` has had compiled so far; it stays as it is while batches only differ in length."""
        return 0 if self._backend is None else self._backend.graphs

    @property
    def recorded(self) -> bool:
        """Whether a graph of it is recorded, which must do the same work whatever is decided."""
        return torch.jit.is_tracing() or torch.compiler.is_exporting()

    @property
    def usual_execution(self) -> str:
        """What runs where nothing is said: trimmed while training, packed in evaluation.

        Masked where a graph is recorded, since that alone does the same work whatever is decided.
        """
        if self.recorded:
            return "masked"
        return "trimmed" if self.training else "packed"

    def check_recordable(self, execution: str):
        """Raise a ValueError where a trace would hold the decisions about one picture for all."""
        if torch.jit.is_tracing() and execution != "masked":
            raise ValueError(
                f"execution={execution!r} cannot be traced: which tokens run depends on the picture, and a trace would "
                "keep those of the first; use 'masked', which is what model(images) does while it is traced"
            )

    def __getstate__(self) -> dict:
        """Leave out what was compiled: it belongs to this process."""
        return vars(self) | {"_steps": Steps(), "_backend": None}


class CountedBackend:
    """A backend of `torch.compile` that counts the graphs it is given."""

    def __init__(self, backend: str | Callable):
        self.backend = torch._dynamo.lookup_backend(backend) if isinstance(backend, str) else backend
        self.graphs = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable:
        self.graphs += 1
        return self.backend(graph, inputs)
