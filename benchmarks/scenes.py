"""Do the built-in pictures hold up training? Time to make a batch of scenes against a training step on it.

Run `python benchmarks/scenes.py [--threads 2]`; about half a minute. The aim: a batch, averaged over a run of six
epochs in which each picture is made once and then comes from memory, takes under a tenth of the dense step of the
tiny ViT (64 px, patch 8, width 64, depth 3, batch 128).
"""

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer

from msvit.data.loaders import make_loaders, set_epoch
from msvit.data.scenes import DIFFICULTIES


def batches(difficulty: str, epochs: int, n: int = 4096) -> list[float]:
    """Return the milliseconds for a batch of 128 in each epoch; the first one makes the pictures."""
    loader, times = make_loaders(f"scenes:{difficulty}", train_n=n, val_n=1).train, []
    for epoch in range(epochs):
        set_epoch(loader, epoch)
        start = time.perf_counter()
        steps = sum(1 for _ in loader)
        times.append((time.perf_counter() - start) / steps * 1e3)
    return times


def step(repeats: int = 12) -> float:
    """Return the milliseconds of a dense training step, the median after two steps of warm-up."""
    vit = VisionTransformer(img_size=64, patch_size=8, embed_dim=64, depth=3, num_heads=4, num_classes=8)
    optimizer = torch.optim.AdamW(vit.parameters(), 1e-3)
    images, labels, _ = next(iter(make_loaders(train_n=128, val_n=1).train))
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        optimizer.zero_grad()
        F.cross_entropy(vit(images), labels).backward()
        optimizer.step()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    torch.set_num_threads(parser.parse_args().threads)
    dense = step()
    print(f"dense training step: {dense:.0f} ms for 128 pictures, {torch.get_num_threads()} threads")
    print("difficulty  made [ms]  from memory [ms]  mean of six epochs [ms]  share of a step")
    for difficulty in DIFFICULTIES:
        times = batches(difficulty, 6)
        mean = statistics.mean(times)
        made, kept = times[0], statistics.median(times[1:])
        print(f"{difficulty:10} {made:10.1f} {kept:17.1f} {mean:24.1f} {mean / dense:15.1%}")


if __name__ == "__main__":
    main()
