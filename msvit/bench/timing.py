"""What calling a function costs here: seconds in turns with others, MACs as torch counts them, memory."""

import importlib
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.flop_counter import (
    FlopCounterMode,
    flop_registry,
    register_flop_formula,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

Work = Callable[[], object]
Turn = dict[str, float]  # seconds by name


class Spread(NamedTuple):
    """The middle of some values, and their quartiles."""

    median: float
    low: float
    high: float


def spread(values: Sequence[float]) -> Spread:
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median, low, high)


def in_turns(
    works: Mapping[str, Work],
    count: int,
    synchronise: Work = lambda: None,
    clock: Callable[[], float] = time.perf_counter,
    seed: int = 0,
) -> Iterator[Turn]:
    """Calls every function once a turn, in a new order each turn, and yields each whole turn's seconds.

    Whatever else the machine does meets all of them alike, so that ratios within a turn are worth more than times.
    """
    dice, order = random.Random(seed), list(works)
    for _ in range(count):
        dice.shuffle(order)
        seconds = {}
        for name in order:
            synchronise()
            start = clock()
            works[name]()
            synchronise()
            seconds[name] = clock() - start
        yield {name: seconds[name] for name in works}


def ratios(turns: Sequence[Turn], above: str, below: str) -> Spread:
    """Of two functions' seconds, turn by turn."""
    return spread([turn[above] / turn[below] for turn in turns])


def counted_macs(work: Work) -> float:
    """MACs of the matrix products that one call runs, at two FLOPs each."""
    _complete_registry()
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    return counter.get_total_flops() / 2


def _complete_registry():
    """Older PyTorch counts attention on a CPU, and packed attention on CUDA, as nothing."""
    aten = torch.ops.aten
    formulas = {
        aten._scaled_dot_product_flash_attention_for_cpu: _padded_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward_flops,
    }
    if torch.cuda.is_available():
        importlib.import_module("torch.nn.attention.varlen")  # makes the operation
        formulas[torch.ops.torch_attn._varlen_attn] = _varlen_flops
    for operation, formula in formulas.items():
        if operation not in flop_registry:
            register_flop_formula(operation, get_raw=True)(formula)


def _padded_flops(q, k, v, *rest, **options) -> int:
    return sdpa_flop_count(q.shape, k.shape, v.shape)


def _backward_flops(grad, q, k, v, *rest, **options) -> int:
    return sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


def _varlen_flops(q, k, v, ends_q, ends_k, *rest, **options) -> int:
    """Rows `[T, H, D]` of pictures that end at `ends`."""
    pairs = (ends_q.diff().long() * ends_k.diff().long()).sum().item()
    return 2 * pairs * q.shape[1] * (q.shape[2] + v.shape[2])


def peak_memory(work: Work, device: torch.device) -> int:
    """Bytes that PyTorch's tensors take during a call, at most, beyond what there was before it.

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
    now = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
    return peak
