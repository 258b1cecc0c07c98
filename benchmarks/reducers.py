"""What reducers cost and what they bring on this machine, on the clock.

    python benchmarks/reducers.py pooling [--batch 32] [--repeats 9]
    python benchmarks/reducers.py methods [--share 0.6] [--batch 32] [--repeats 5]

"pooling" times the clustering of 197 tokens of width 384 to 98 against the ViT-S block it sits in; "methods" every
method at that share of dense MACs against dense timm, the tokenizer inside the clock. What is compared is timed in
turns; ratios are medians over turns.
"""

import argparse
import statistics
import time

import timm
import torch

import msvit
from msvit.layout import Layout, attend_watched
from msvit.masks import make_rule
from msvit.passage import STEPS
from msvit.reducers import REDUCERS, make_reducer
from msvit.tokens import Tokens


def in_turns(rows: dict, repeats: int) -> dict[str, list[float]]:
    """Seconds of each function, called in turns, after one call to warm up."""
    times = {name: [] for name in rows}
    for turn in range(repeats + 1):
        for name, function in rows.items():
            start = time.perf_counter()
            function()
            if turn:
                times[name].append(time.perf_counter() - start)
    return times


def ratio(times: dict, name: str, base: str) -> str:
    ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def pooling(args: argparse.Namespace):
    """The block on all tokens, and on top of it the clustering between attention and MLP."""
    vit = timm.create_model("vit_small_patch16_224").eval()
    block, n = vit.blocks[6], 197
    layout = Layout([n] * args.batch, torch.device("cpu"))
    where = torch.arange(args.batch * n).view(args.batch, n)[:, 1:].view(args.batch, 14, 14)
    tokens = Tokens(torch.randn(args.batch * n, 384), None, torch.ones(args.batch * n), where, layout)
    before, attended, mixed = STEPS
    h, q, k, v = before(block, tokens.x)
    seen = attend_watched(layout, q, k, v).received

    rows = {
        "block": lambda: block(tokens.x.view(args.batch, n, -1)),
        "attention, watched": lambda: attend_watched(layout, q, k, v),
        "attention, fused": lambda: msvit.layout.attend(layout, q, k, v),
    }
    for method in ("kmeans", "kmedoids"):
        reducer = make_reducer("token_pooling", vit, clusters=[97], layers=[6], method=method)
        rows[method] = lambda r=reducer: r(6, tokens, seen)
    times = in_turns(rows, args.repeats)
    for name in rows:
        print(f"{name:20} {1e3 * statistics.median(times[name]):7.1f} ms, of the block {ratio(times, name, 'block')}")


def at_share(name: str, vit, share: float) -> msvit.MSViT:
    """The method with the setting whose MACs are nearest to that share of dense."""
    size, fine = vit.patch_embed.img_size, make_rule("fine")
    regions = torch.zeros(1, dtype=torch.long)

    def model(**settings) -> msvit.MSViT:
        return msvit.MSViT(vit, gate=fine, reducer=make_reducer(name, vit, **settings)).eval()

    depth = len(vit.blocks)
    knobs = {"tome": [{"r": r} for r in range(1, 30)], "grid": [{"layers": [i]} for i in range(depth)]}
    candidates = [model(**s) for s in knobs.get(name, [{"keep": k / 100} for k in range(30, 100, 2)])]

    def macs(m: msvit.MSViT) -> float:
        if name != "grid":
            return m.macs_of(regions, size).item()
        return m.run(torch.zeros(1, vit.patch_embed.proj.in_channels, *size)).macs.item()

    return min(candidates, key=lambda m: abs(macs(m) / m.dense_macs(size) - share))


def methods(args: argparse.Namespace):
    """Every reducer, and the packed mixed-scale model with a static mask, at the same share of MACs."""
    vit = timm.create_model("vit_small_patch16_224").eval()
    size = vit.patch_embed.img_size
    models = {name: at_share(name, vit, args.share) for name in REDUCERS}
    rates = [msvit.MSViT(vit, gate=make_rule("random", rate=r / 49)).eval() for r in range(49)]
    models["mixed scale"] = min(
        rates,
        key=lambda m: abs(
            m.macs_of(torch.tensor([round(m.gate.rate * 49)]), size).item() / m.dense_macs(size) - args.share
        ),
    )
    images = torch.randn(args.batch, 3, *size)
    rows = {"dense": lambda: vit(images)} | {name: lambda m=m: m(images) for name, m in models.items()}
    times = in_turns(rows, args.repeats)
    print(
        f"dense {1e3 * statistics.median(times['dense']):.0f} ms, batch {args.batch}, {torch.get_num_threads()} threads"
    )
    for name, model in models.items():
        promised = model.dense_macs(size) / model.run(images[:2]).macs.mean().item()
        speedup = statistics.median(d / t for d, t in zip(times["dense"], times[name], strict=True))
        settings = {**model.gate.settings, **(model.reducer.settings if model.reducer is not None else {})}
        print(
            f"{name:15} {1e3 * statistics.median(times[name]):6.0f} ms, speed-up {speedup:.2f}, "
            f"MACs promise {promised:.2f}, efficiency {speedup / promised:.2f}   {settings}"
        )


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["pooling", "methods"])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--share", type=float, default=0.6, help="of dense MACs")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    {"pooling": pooling, "methods": methods}[args.what](args)


if __name__ == "__main__":
    main()
