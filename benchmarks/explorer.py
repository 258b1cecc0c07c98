"""A step of the explorer's threshold on this machine: model, panels and all that goes to the browser.

    python benchmarks/explorer.py [--model deit_tiny_patch16_224] [--steps 20]

The browser's own part (decoding a few small pictures) comes on top.
"""

import argparse
import statistics
import time

import torch

from msvit.explorer import Explorer


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_tiny_patch16_224", help="a timm name or a folder")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()

    explorer = Explorer(args.model, source="photographs")
    soft = torch.from_numpy(explorer.states[0].gated.soft).flatten()
    steps, models = [], []
    for i in range(args.steps + 2):
        start = time.perf_counter()
        explorer.threshold.value = soft.quantile(0.1 + 0.8 * i / (args.steps + 1)).item()
        steps.append(1e3 * (time.perf_counter() - start))
        models.append(explorer.states[0].ms)
    steps, models = steps[2:], models[2:]  # the first two warm up
    print(
        f"{args.model}, {torch.get_num_threads()} threads: a threshold step takes {statistics.median(steps):.0f} ms "
        f"(median of {len(steps)}, {min(steps):.0f} to {max(steps):.0f}), model {statistics.median(models):.0f} "
        "of it; the limit is 150 ms"
    )


if __name__ == "__main__":
    main()
