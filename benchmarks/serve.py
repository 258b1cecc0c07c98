"""An example of a server: pictures that arrive at random are served in batches of about as many tokens each.

    python benchmarks/serve.py    # ViT-Ti with random weights, on noise
    python benchmarks/serve.py --model vit_small_patch16_224 --pictures 500 --tokens 4096 --load 2

The gate looks at a picture when it arrives, so its number of tokens is known while it waits. Those of about as many
wait together. The next batch is of those whose first one has waited longest, as many as have `--tokens` tokens in all:
that bounds the time that a batch takes, and its memory. It is compared with batches of whatever waits, and with the
dense model, at the same times of arrival: `--load` times as many a second as the dense model serves one by one.
"""

import argparse
import math
import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

import timm
import torch
from torch import Tensor

import msvit
from msvit.bench.timing import quartiles


class Waiting(NamedTuple):
    """A picture that has arrived: its number, how many tokens it takes, and its decisions by size of regions."""

    number: int
    tokens: int
    masks: list[Tensor]


class Served(NamedTuple):
    """Logits `[n, K]`, the seconds from each picture's arrival to its answer, all seconds, and tokens in each batch."""

    logits: Tensor
    latency: list[float]
    seconds: float
    batches: list[int]


class Queue:
    """Pictures that wait, in lines of about as many tokens.

    Args:
        width: Pictures whose tokens differ by less may share a line.
        most: Tokens in a batch; one picture may have more.
    """

    def __init__(self, width: int, most: int):
        self.width, self.most = width, most
        self.lines: dict[int, deque[Waiting]] = defaultdict(deque)

    def __len__(self) -> int:
        return sum(map(len, self.lines.values()))

    def add(self, picture: Waiting):
        self.lines[picture.tokens // self.width].append(picture)

    def take(self) -> list[Waiting]:
        """Return the next batch: of the line whose first picture came first, in the order of arrival."""
        line = min(filter(None, self.lines.values()), key=lambda line: line[0].number)
        batch, room = [line.popleft()], self.most
        room -= batch[0].tokens
        while line and line[0].tokens <= room:
            room -= line[0].tokens
            batch.append(line.popleft())
        return batch


def look(model: msvit.MSViT, pictures: Tensor, first: int) -> list[Waiting]:
    """Ask the gate about pictures, which are numbered from `first`."""
    masks = [u > 0.5 for u in model.decide(pictures).undivided]
    sides = (model.scale, *[2] * (len(masks) - 1))
    merged = sum((k * k - 1) * mask.sum((1, 2)) for k, mask in zip(sides, masks, strict=True))
    tokens = model.vit.num_prefix_tokens + math.prod(model.patches(pictures.shape[-2:])) - merged
    return [Waiting(first + i, n, [mask[i] for mask in masks]) for i, n in enumerate(tokens.tolist())]


def answer(model: msvit.MSViT, pictures: Tensor, batch: list[Waiting]) -> Tensor:
    """Return the logits of a batch, by the decisions that were made when its pictures arrived."""
    masks = [torch.stack(level) for level in zip(*(waiting.masks for waiting in batch), strict=True)]
    return model.run(pictures, masks).logits


@torch.inference_mode()
def serve(pictures: Tensor, arrivals: Sequence[float], look: Callable, answer: Callable, queue: Queue) -> Served:
    """Serve pictures that arrive at these seconds, in batches as the queue makes them."""
    arrived, start, latency, logits, batches = 0, time.perf_counter(), {}, {}, []
    while len(latency) < len(pictures):
        now = time.perf_counter() - start
        new = sum(at <= now for at in arrivals[arrived:])
        if new:
            for waiting in look(pictures[arrived : arrived + new], arrived):
                queue.add(waiting)
            arrived += new
        if not len(queue):
            time.sleep(max(arrivals[arrived] - now, 0))
            continue
        batch = queue.take()
        numbers = [waiting.number for waiting in batch]
        found, done = answer(pictures[numbers], batch), time.perf_counter() - start
        logits |= dict(zip(numbers, found, strict=True))
        latency |= {i: done - arrivals[i] for i in numbers}
        batches.append(sum(waiting.tokens for waiting in batch))
    order = range(len(pictures))
    return Served(torch.stack([logits[i] for i in order]), [latency[i] for i in order], done, batches)


def line(name: str, served: Served) -> str:
    """Return a line of the table that is printed."""
    n, late = len(served.latency), sorted(served.latency)
    middle, worst = 1e3 * quartiles(late).median, 1e3 * late[math.ceil(0.95 * n) - 1]
    size = n / len(served.batches)
    return f"{name:<24} {n / served.seconds:10.1f} {middle:12.0f} {worst:12.0f} {size:10.1f} {max(served.batches):10d}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224", help="a timm name; its weights are random here")
    parser.add_argument("--pictures", type=int, default=100)
    parser.add_argument("--tokens", type=int, default=2048, help="in a batch, at most")
    parser.add_argument("--width", type=int, default=32, help="of a line of the queue, in tokens")
    parser.add_argument("--load", type=float, default=1.5, help="of what the dense model serves one by one")
    args = parser.parse_args()

    torch.manual_seed(0)
    vit = timm.create_model(args.model).eval()
    model = msvit.MSViT(vit, fast_cpu=True).eval()
    contrast = torch.linspace(0.1, 2, args.pictures)[torch.randperm(args.pictures)]  # noise of which gates differ
    pictures = torch.randn(args.pictures, 3, *vit.patch_embed.img_size) * contrast[:, None, None, None]
    with torch.inference_mode():
        model.threshold = model.decide(pictures[:32]).soft.median().item()
        start = time.perf_counter()
        for i in range(8):
            vit(pictures[i : i + 1])
        rate = args.load * 8 / (time.perf_counter() - start)
    gaps, arrivals = random.Random(0), [0.0]
    while len(arrivals) < args.pictures:
        arrivals.append(arrivals[-1] + gaps.expovariate(rate))

    dense = vit.num_prefix_tokens + vit.patch_embed.num_patches

    def all_fine(new: Tensor, first: int) -> list[Waiting]:
        return [Waiting(first + i, dense, []) for i in range(len(new))]

    def gated(new: Tensor, first: int) -> list[Waiting]:
        return look(model, new, first)

    ways = {
        "dense timm": (all_fine, lambda images, batch: vit(images), dense),
        "MSViT, whatever waits": (gated, lambda images, batch: answer(model, images, batch), 10**9),
        "MSViT, by tokens": (gated, lambda images, batch: answer(model, images, batch), args.width),
    }
    print(f"{rate:.1f} pictures arrive a second")
    print(f"{'':24} pictures/s  ms (median)     ms (95%)      batch  most tokens")
    for name, (looking, answering, width) in ways.items():
        print(line(name, serve(pictures, arrivals, looking, answering, Queue(width, args.tokens))))


if __name__ == "__main__":
    main()
