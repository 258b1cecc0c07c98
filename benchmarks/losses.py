"""How long the gate losses take: `python benchmarks/losses.py`, on the GPU if there is one, else on the CPU.

Forward and backward, by values and prior parameters, after a warm-up: the median of the repeats, and the least, which
other work on the machine disturbs less. The training step is that of
plain timm's ViT-S/16 at 224 px with AdamW, on as many pictures as the loss is given gates of.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import timm
import torch
from torch import Tensor

from msvit.gating.losses import beta_cdf, cvm, make_loss, relaxed_bernoulli_cdf


class Seconds(NamedTuple):
    median: float
    least: float


def timed(work: Callable[[], object], device: torch.device, repeats: int) -> Seconds:
    """Return how long `work` takes, once it has run twice."""
    seconds = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return Seconds(statistics.median(seconds[2:]), min(seconds[2:]))


def per_position(cdf: Callable[..., Tensor], low: float, high: float, device: torch.device) -> Callable[[], object]:
    """Return the CvM of 1,024 values at each of 196 positions, against priors whose two parameters are trained."""
    values, p, q = torch.rand(1024, 196), torch.rand(196), torch.rand(196)
    p, q = (low + t * (high - low) for t in (p, q))
    values, p, q = (t.to(device).requires_grad_() for t in (values, p, q))
    return lambda: torch.autograd.grad(cvm(values, cdf, 0, params=(p, q)).mean(), (values, p, q))


def training_step(batch: int, device: torch.device) -> Callable[[], object]:
    """Return a training step of plain ViT-S/16."""
    model = timm.create_model("vit_small_patch16_224").to(device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
    images, labels = torch.randn(batch, 3, 224, 224, device=device), torch.randint(1000, (batch,), device=device)

    def step():
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def gate_loss(name: str, batch: int, device: torch.device) -> Callable[[], object]:
    """Return a gate loss on the grid of 224 px pictures with coarse patches of 32 px."""
    loss = make_loss(name, (7, 7)).to(device)
    gates = torch.rand(batch, 7, 7, device=device, requires_grad=True)
    return lambda: torch.autograd.grad(loss(gates), (gates, *loss.parameters()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="pictures of the training step (default: %(default)s)")
    parser.add_argument(
        "--repeats", type=int, default=15, help="and a third of them for the step (default: %(default)s)"
    )
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}\n")
    print("| 1,024 values x 196 positions, forward and backward | ms | least |\n|---|---|---|")
    rows = [
        ("relaxed Bernoulli, p and T trained, 0.05 to 0.95", relaxed_bernoulli_cdf, 0.05, 0.95),
        ("Beta, a and b trained, 0.05 to 1", beta_cdf, 0.05, 1.0),
        ("Beta, a and b trained, 0.05 to 50", beta_cdf, 0.05, 50.0),
    ]
    for label, cdf, low, high in rows:
        median, least = timed(per_position(cdf, low, high, device), device, arguments.repeats)
        print(f"| {label} | {1e3 * median:.1f} | {1e3 * least:.1f} |")
    step = timed(training_step(arguments.batch, device), device, max(arguments.repeats // 3, 1))
    print(f"\nViT-S/16, 224 px, batch {arguments.batch}: {1e3 * step.median:.0f} ms a training step\n")
    print("| gate loss, 7 x 7 regions | ms | least | share of the step |\n|---|---|---|---|")
    for loss in ("gbas", "bas", "l0", "ratio", "none"):
        median, least = timed(gate_loss(loss, arguments.batch, device), device, arguments.repeats)
        print(f"| {loss} | {1e3 * median:.2f} | {1e3 * least:.2f} | {median / step.median:.2%} |")


if __name__ == "__main__":
    main()
