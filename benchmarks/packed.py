"""Packed execution against dense timm on this machine: the speed-up on the clock beside the one that MACs promise.

    python benchmarks/packed.py [--model vit_small_patch16_224] [--batch 32] [--coarse 0.5] [--repeats 9]

Gate, tokenizer and head are inside the clock. The two are timed in turns; ratios are medians over turns.
"""

import argparse
import statistics
import time

import timm
import torch

import msvit


def seconds(function) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_small_patch16_224")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--coarse", type=float, default=0.5, help="share of coarse regions")
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()

    vit = timm.create_model(args.model).eval()
    model = msvit.MSViT(vit).eval()
    size = vit.patch_embed.img_size
    images = torch.randn(args.batch, 3, *size)
    soft = model.decide(images).soft
    model.threshold = soft.flatten().quantile(1 - args.coarse).item()
    result = model.run(images)
    rows = {"dense": lambda: vit(images), "packed": lambda: model(images)}
    for function in rows.values():
        function()
    turns = [{name: seconds(function) for name, function in rows.items()} for _ in range(args.repeats)]
    ratios = [turn["dense"] / turn["packed"] for turn in turns]
    promised = model.dense_macs(size) / result.macs.mean().item()
    print(
        f"{args.model} batch {args.batch}, {result.coarse.float().mean():.0%} coarse, "
        f"{result.tokens.double().mean():.0f} tokens, {torch.get_num_threads()} threads: "
        f"dense {1e3 * statistics.median(t['dense'] for t in turns):.0f} ms, "
        f"packed {1e3 * statistics.median(t['packed'] for t in turns):.0f} ms, "
        f"speed-up {statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}), "
        f"MACs promise {promised:.2f}, efficiency {statistics.median(ratios) / promised:.2f}"
    )


if __name__ == "__main__":
    main()
