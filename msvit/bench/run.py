"""From settings to a report: cases are loaded and measured one after the other, and the report written after each."""

import gc
import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path

import torch

from ..training.files import RunError
from ..training.recipe import RecipeError
from .cases import Case, Unavailable, load_case, new_model
from .methods import PREPARE, PreparedMethod
from .report import Report, draw_figure, new_report, write_report
from .settings import BENCH_METHODS, BenchSettings, CaseSettings, case_settings
from .timing import Timing, Work, compare, counted_macs, interleaved, peak_memory


def bench(settings: BenchSettings, tell: Callable[[str], object]) -> Report:
    """Measure, write the files after each case, and return what is in the JSON file.

    After an interruption too there are files, of what was measured until then.

    Args:
        tell: Called with a line about each step.

    Raises:
        RunError: A MACs figure is not what torch counts; everything is measured and written all the same.
    """
    device, cases = find_device(settings.device), list(case_settings(settings))
    for case in () if settings.run else cases:  # mistakes show before anything is measured
        with torch.device("meta"):
            new_model(case)
    report = new_report(settings, device)
    timer = CaseTimer(settings, device, report, tell)
    try:
        for _, group in groupby(cases, lambda case: (case.model, case.size)):
            timer.time_group(list(group))
    except KeyboardInterrupt:
        report["interrupted"] = True
        write_report(report, settings.out)
    draw_figure(report, settings.out, tell)
    if report["interrupted"]:
        found = f"what was measured until then is in {settings.out}" if report["rows"] else "nothing was measured yet"
        raise KeyboardInterrupt(f"interrupted; {found}")
    if report["problems"]:
        raise RunError("; ".join(report["problems"]))
    return report


class CaseTimer:
    """Times methods on one case after the other, and adds what it finds to a report."""

    def __init__(self, settings: BenchSettings, device: torch.device, report: Report, tell: Callable[[str], object]):
        self.settings, self.device, self.report, self.tell = settings, device, report, tell
        cuda = device.type == "cuda"
        self.repeats = settings.repeats or (50 if cuda else 5)
        self.memory = cuda if settings.memory is None else settings.memory
        self.synchronise = torch.cuda.synchronize if cuda else lambda: None

    def time_group(self, group: list[CaseSettings]):
        """Time cases of one model and one size; its memory is free again before the next is loaded."""
        loaded = load_case(self.settings, group, self.device)
        Path(self.settings.out).mkdir(parents=True, exist_ok=True)  # or it is known before minutes are spent
        for case in group:
            self._time_case(case, loaded.first(case.batch))
            write_report(self.report, self.settings.out)

    def _time_case(self, chosen: CaseSettings, case: Case):
        """Time inference, then training steps, which are of another length."""
        if not self.settings.run:
            case.set_share(chosen.coarse)
        facts = {
            "model": Path(chosen.model).name,
            "size": case.images.shape[-1],
            "batch": chosen.batch,
            "dtype": self.settings.dtype,
            "coarse": case.result.coarse.float().mean().item(),
            "axis": chosen.axis,
        }
        self.tell("{model}, {size} px, batch {batch}, {coarse:.0%} of the regions coarse".format(**facts))
        last = chosen.batch == max(self.settings.batch)
        for kinds, repeats in ((("model", "part"), self.repeats), (("training",), (self.repeats + 1) // 2)):
            names = [name for name in self.settings.methods() if BENCH_METHODS[name].kind in kinds]
            if names and (last or "training" not in kinds):
                self._time_methods(names, case, facts, repeats)

    def _time_methods(self, names: list[str], case: Case, facts: Timing, repeats: int):
        timings = {name: facts | _describe(name) for name in names}
        prepared = {name: self._prepare(name, case, timing) for name, timing in timings.items()}
        works = {name: work for name, work in prepared.items() if work is not None}
        done, started = [], time.perf_counter()
        try:
            for seconds in interleaved(works, repeats, self.synchronise):
                done.append(seconds)
        finally:  # after an interruption the repeats that are whole count
            if done:
                self.report["rows"] += [timing | compare(name, timings, done) for name, timing in timings.items()]
        self.tell(f"  {len(done)} repeats of {len(works)} methods: {time.perf_counter() - started:.0f} s")
        if any(BENCH_METHODS[name].compiled for name in names):  # torch keeps few versions of what was compiled
            torch.compiler.reset()
            gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _prepare(self, name: str, case: Case, timing: Timing) -> Work | None:
        """Return a method's function, warm, and add to its timing what is known; None, and a note, if it has none."""
        work, started = None, time.perf_counter()
        try:
            prepared = PREPARE[name](case)
            macs = self._count_macs(name, prepared, timing)
            timing |= {"tokens": prepared.tokens, "settings": prepared.settings, "macs": macs}
            _warm_up(name, prepared.work)
            if self.memory and not BENCH_METHODS[name].compiled:
                timing["memory_mb"] = peak_memory(prepared.work, self.device) / 2**20
            work = prepared.work
        except Unavailable as error:
            timing["note"] = str(error)
        except torch.OutOfMemoryError:
            timing["note"] = "out of memory"
        macs = f"{timing['macs'] / 1e9:.3g} GMACs a picture, " if timing.get("macs") else ""
        ready = timing["note"] or f"{macs}ready after {time.perf_counter() - started:.1f} s"
        self.tell(f"  {timing['label']}: {ready}")
        return work

    def _count_macs(self, name: str, prepared: PreparedMethod, timing: Timing) -> float:
        """Return the MACs of a picture, as counted; what the closed form says must be the same."""
        if BENCH_METHODS[name].compiled:
            return prepared.macs / timing["batch"]
        counted = counted_macs(prepared.work)
        if prepared.macs is not None and abs(prepared.macs - counted) > 0.5:
            self.report["problems"].append(
                f"{timing['model']}, batch {timing['batch']}, {timing['label']}: the closed form gives "
                f"{prepared.macs / 1e6:.6g} M MACs for the batch, torch counts {counted / 1e6:.6g} M"
            )
        return counted / timing["batch"]


def find_device(name: str) -> torch.device:
    """Return the device of that name, or the one that "auto" stands for."""
    cuda = torch.cuda.is_available()
    if name == "cuda" and not cuda:
        raise RecipeError("device='cuda': this PyTorch sees no CUDA device; use cpu")
    return torch.device(("cuda" if cuda else "cpu") if name == "auto" else name)


def _describe(name: str) -> Timing:
    method = BENCH_METHODS[name]
    return {"row": name, "label": method.label, "kind": method.kind, "of": method.of, "note": ""}


def _warm_up(name: str, work: Work):
    compiled = BENCH_METHODS[name].compiled
    try:
        for _ in range(2 if compiled else 1):  # the count was a call already
            work()
    except (RuntimeError, OSError) as error:
        if not compiled or isinstance(error, torch.OutOfMemoryError):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Unavailable(f"torch.compile failed: {reason}") from error
