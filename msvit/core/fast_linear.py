"""Linear layers on a CPU: through oneDNN, whatever BLAS this PyTorch was built with.

PyTorch hands float32 linear layers to its BLAS. Its x86 builds bring MKL, which on CPUs of other makers than Intel is
far from the speed of their AVX-512 units, and which packs the weights anew at every call: costly where a picture is few
tokens. oneDNN is in the same build. The results agree to rounding.

With AVX2 alone MKL is the faster of the two (ViT-S, 4,000 rows: 0.81 of oneDNN's time; 64 rows: 0.70), and oneDNN makes
a kernel for every new number of rows, of which training has a new one in each step: there all stays with MKL.
"""

import platform
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

AVAILABLE = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)
FASTER = "AVX512" in torch.backends.cpu.get_cpu_capability()  # on this machine


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b, and the two products of its gradient, all by the same kernel."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, needs = grad.reshape(-1, grad.shape[-1]), ctx.needs_input_grad
        return (
            _product(rows, weight.t()).view_as(x) if needs[0] else None,
            _product(rows.t(), x.reshape(-1, x.shape[-1]).t()) if needs[1] else None,
            rows.sum(0) if len(needs) > 2 and needs[2] else None,
        )


_usual = F.linear
_here, _entered, _lock = threading.local(), [0], threading.Lock()


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Stand for `F.linear` while any thread is within `fast_linear`; what other threads get is as usual."""
    if torch.compiler.is_compiling() or not getattr(_here, "depth", 0) or not _suits(input, weight):
        return _usual(input, weight, bias)
    return (_Linear.apply if torch.is_grad_enabled() else _product)(input, weight, bias)


@contextmanager
def _one_dnn() -> Iterator[None]:
    """Swap one function; a `TorchFunctionMode` would cost each of the 600 calls that a picture makes."""
    _here.depth = getattr(_here, "depth", 0) + 1
    with _lock:
        _entered[0] += 1
        F.linear = _linear
    try:
        yield
    finally:
        _here.depth -= 1
        with _lock:
            _entered[0] -= 1
            if not _entered[0]:
                F.linear = _usual


def _suits(x: Tensor, weight: Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.numel() > 0


def fast_linear(on: bool = True) -> AbstractContextManager:
    """Return a context in which `F.linear` and nn.Linear take the fast way, if it is on and there is one.

    A model takes it by itself with `MSViT(…, fast_cpu=True)`, as the command line, the bench and the notebooks ask for.
    It is a private operator of PyTorch: where that is missing AVAILABLE is False, where it gains nothing FASTER is, and
    nothing changes. Methods that are compared on the clock are all timed within it, dense ones too.
    """
    off = not on or torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu")
    return _one_dnn() if AVAILABLE and FASTER and not off else nullcontext()


if AVAILABLE:

    @register_flop_formula(torch.ops.mkldnn._linear_pointwise)
    def _flops(x: torch.Size, weight: torch.Size, *rest, **options) -> int:
        return 2 * x.numel() * weight[0]
