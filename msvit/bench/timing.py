"""Timing: what calling a function costs here. Seconds, interleaved with others; MACs as torch counts them; memory."""

import importlib
import itertools
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils import flop_counter

from .settings import BENCH_METHODS

Work = Callable[[], object]
Seconds = dict[str, float]  # that each method took in one repeat, by its name
Timing = dict[str, Any]  # a line of the report: a case, a method, and what the clock says of it
BASES = ("dense", "dense-linear", "dense-compiled")  # what is held against, with "train-" before it in training


class Quartiles(NamedTuple):
    """The middle of some values, and their quartiles."""

    median: float
    low: float
    high: float


def quartiles(values: Sequence[float]) -> Quartiles:
    """Return the quartiles of one value or more."""
    low, median, high = values * 3 if len(values) == 1 else statistics.quantiles(values, n=4, method="inclusive")
    return Quartiles(median=median, low=low, high=high)


def interleaved(
    works: Mapping[str, Work],
    repeats: int,
    synchronise: Work = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Iterator[Seconds]:
    """Call every function once a repeat, in a new order each time, and yield the seconds of each whole repeat.

    What else the machine does meets all of them alike, so that ratios within a repeat tell more than times.
    """
    generator, order = random.Random(0), list(works)
    for _ in range(repeats):
        generator.shuffle(order)
        seconds = {}
        for name in order:
            synchronise()
            start = clock()
            works[name]()
            synchronise()
            seconds[name] = clock() - start
        yield {name: seconds[name] for name in works}


def ratios(repeats: Sequence[Seconds], above: str, below: str) -> Quartiles:
    """Return the quartiles of two functions' ratio, repeat by repeat."""
    return quartiles([seconds[above] / seconds[below] for seconds in repeats])


def compare(name: str, timings: Mapping[str, Timing], repeats: Sequence[Seconds]) -> Timing:
    """Return what the repeats say of a method, alone and against the dense ones or the method that it is a part of.

    Args:
        timings: Of every method, with `macs` and `batch`.
    """
    timing, method = timings[name], BENCH_METHODS[name]
    if not repeats or name not in repeats[0]:
        return {}
    seconds = [repeat[name] for repeat in repeats]
    median, low, high = quartiles(seconds)
    found = {"ms": 1e3 * median, "ms_low": 1e3 * low, "ms_high": 1e3 * high, "seconds": seconds}
    if method.kind == "part":
        return found | ({"share": ratios(repeats, name, method.of).median} if method.of in repeats[0] else {})
    found["pictures_per_s"] = timing["batch"] / median
    found["promised"] = timings[method.of]["macs"] / timing["macs"] if "macs" in timings[method.of] else None
    for base in BASES:
        other = base if method.kind == "model" else f"train-{base}"
        if other in repeats[0]:
            gain, key = ratios(repeats, other, name), base.replace("-", "_")
            found |= {f"vs_{key}": gain.median, f"vs_{key}_low": gain.low, f"vs_{key}_high": gain.high}
            found[f"efficiency_{key}"] = gain.median / found["promised"] if found["promised"] else None
    return found


def counted_macs(work: Work) -> float:
    """Return the MACs of the matrix products that one call runs, at two FLOPs each."""
    _complete_registry()
    with flop_counter.FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 2


def _complete_registry():
    """Register what older PyTorch counts as nothing: attention on a CPU, and packed attention on CUDA."""
    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: flop_counter.sdpa_flop,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_counter.sdpa_backward_flop,
    }
    if torch.cuda.is_available():
        importlib.import_module("torch.nn.attention.varlen")  # makes the operation
        formulas[torch.ops.torch_attn._varlen_attn] = _varlen_flops
    for operation, formula in formulas.items():
        if operation not in flop_counter.flop_registry:
            flop_counter.register_flop_formula(operation, get_raw=True)(formula)


def _varlen_flops(q, k, v, ends_q, ends_k, *rest, **options) -> int:
    """Return the FLOPs of attention among rows `[T, H, D]` of pictures that end at `ends`."""
    pairs = (ends_q.diff().long() * ends_k.diff().long()).sum().item()
    return 2 * pairs * q.shape[1] * (q.shape[2] + v.shape[2])


def peak_memory(work: Work, device: torch.device) -> int:
    """Return the bytes that PyTorch's tensors take during a call, at most, beyond what there was before it.

    On CUDA as its allocator says, on a CPU from every allocation that the profiler sees. What a BLAS takes for itself
    is in neither.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own remarks are no part of the answer
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    changes = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    return max(itertools.accumulate((event["args"]["Bytes"] for event in changes), initial=0))
