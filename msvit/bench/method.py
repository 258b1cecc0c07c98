"""One batch of the bench: its rows are made, checked, warmed up, timed in turns and held against each other."""

import gc
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..models.msvit import MSViT
from .cases import BASES, ROWS, Case, Contender, Unavailable
from .settings import Plan, Settings, Tell
from .timing import Turn, counted_macs, in_turns, peak_memory, ratios, spread


class Subject(NamedTuple):
    """A gated model on its device, pictures for the largest batch, and settings of reducers with the same MACs."""

    model: MSViT
    images: torch.Tensor
    fits: dict[str, dict[str, Any]]


class Bout:
    """The rows of the table on one batch."""

    def __init__(self, settings: Settings, plan: Plan, subject: Subject, report: dict[str, Any], tell: Tell):
        self.settings, self.plan, self.report, self.tell = settings, plan, report, tell
        model, images = subject.model, subject.images[: plan.batch]
        if not settings.run:
            set_share(model, images, plan.coarse)
        self.case = Case(model, images, subject.fits)
        facts = {"model": Path(plan.model).name, "size": images.shape[-1], "batch": plan.batch, "dtype": settings.dtype}
        self.facts = facts | {"coarse": self.case.result.coarse.float().mean().item(), "axis": plan.axis}
        cuda = settings.place.type == "cuda"
        self.synchronise = torch.cuda.synchronize if cuda else lambda: None
        self.memory = cuda if settings.memory is None else settings.memory

    def run(self):
        """Times inference, then training steps, which are of another length."""
        self.tell("{model}, {size} px, batch {batch}, {coarse:.0%} of the regions coarse".format(**self.facts))
        last = self.plan.batch == max(self.settings.batch)
        for kinds, turns in ((("model", "part"), self.settings.turns), (("training",), (self.settings.turns + 1) // 2)):
            names = [name for name in self.settings.wanted() if ROWS[name].kind in kinds]
            if names and (last or "training" not in kinds):
                self._time(names, turns)

    def _time(self, names: list[str], count: int):
        records, turns = {name: self._prepare(name) for name in names}, []
        works = {name: record.pop("work") for name, record in records.items() if "work" in record}
        started = time.perf_counter()
        try:
            for turn in in_turns(works, count, self.synchronise) if works else ():
                turns.append(turn)
        finally:  # after an interruption the turns that are whole count
            if turns or not works:
                self.report["rows"] += [record | timed(name, records, turns) for name, record in records.items()]
        self.tell(f"  {len(turns)} turns of {len(works)} rows: {time.perf_counter() - started:.0f} s")
        self._forget(any(ROWS[name].compiled for name in names))

    def _prepare(self, name: str) -> dict[str, Any]:
        """Makes a row, warms it up and checks its MACs; one that cannot be had has a note in place of `work`."""
        row = ROWS[name]
        record = self.facts | {"row": name, "label": row.label, "kind": row.kind, "of": row.of, "note": ""}
        started = time.perf_counter()
        try:
            made = row.make(self.case)
            record |= {"tokens": made.tokens, "settings": made.settings, "macs": self._macs(name, made)}
            self._warm_up(name, made)
            if self.memory and not ROWS[name].compiled:
                record["memory_mb"] = peak_memory(made.work, self.settings.place) / 2**20
            record["work"] = made.work
        except Unavailable as error:
            record["note"] = str(error)
        except torch.OutOfMemoryError:
            record["note"] = "out of memory"
        macs = f"{record['macs'] / 1e9:.3g} GMACs a picture, " if record.get("macs") else ""
        self.tell(f"  {row.label}: " + (record["note"] or f"{macs}ready after {time.perf_counter() - started:.1f} s"))
        return record

    def _macs(self, name: str, made: Contender) -> float | None:
        """Per picture, as counted; what the closed form says must be the same."""
        if ROWS[name].compiled:
            return made.macs / self.plan.batch
        counted = counted_macs(made.work)
        if made.macs is not None and abs(made.macs - counted) > 0.5:
            self.report["problems"].append(
                f"{self.facts['model']}, batch {self.plan.batch}, {ROWS[name].label}: the closed form gives "
                f"{made.macs / 1e6:.6g} M MACs for the batch, torch counts {counted / 1e6:.6g} M"
            )
        return counted / self.plan.batch

    def _warm_up(self, name: str, made: Contender):
        try:
            for _ in range(2 if ROWS[name].compiled else 1):  # the count was a call already
                made.work()
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, OSError) as error:
            if not ROWS[name].compiled:
                raise
            raise Unavailable(
                f"torch.compile failed: {(str(error).splitlines() or [type(error).__name__])[0]}"
            ) from error

    def _forget(self, compiled: bool):
        """Gives back what rows hold; what was compiled too, of which torch keeps few versions."""
        self.case.__dict__.pop("trained", None)
        if compiled:
            torch.compiler.reset()
            gc.collect()
        if self.settings.place.type == "cuda":
            torch.cuda.empty_cache()


@torch.inference_mode()
def set_share(model: MSViT, images: torch.Tensor, coarse: float):
    """Sets the threshold so that this share of all regions is coarse."""
    soft = model.decide(images).soft.flatten().sort(descending=True).values
    count = round(coarse * len(soft))
    cuts = torch.cat([soft.new_ones(1), (soft[1:] + soft[:-1]) / 2, soft.new_zeros(1)])
    model.threshold = cuts[count].item()


def timed(name: str, records: dict[str, dict[str, Any]], turns: list[Turn]) -> dict[str, Any]:
    """What a row's turns say, alone and against the dense rows or the row that it is a part of."""
    record, row = records[name], ROWS[name]
    if not turns or name not in turns[0]:
        return {}
    seconds = [turn[name] for turn in turns]
    median, low, high = spread(seconds)
    found = {"ms": 1e3 * median, "ms_low": 1e3 * low, "ms_high": 1e3 * high, "seconds": seconds}
    if row.kind == "part":
        return found | ({"share": ratios(turns, name, row.of).median} if row.of in turns[0] else {})
    found["pictures_per_s"] = record["batch"] / median
    found["promised"] = records[row.of]["macs"] / record["macs"] if "macs" in records[row.of] else None
    for base in BASES:
        rival = base if row.kind == "model" else f"train-{base}"
        if rival in turns[0]:
            gain, key = ratios(turns, rival, name), base.replace("-", "_")
            found |= {f"vs_{key}": gain.median, f"vs_{key}_low": gain.low, f"vs_{key}_high": gain.high}
            found[f"efficiency_{key}"] = gain.median / found["promised"] if found["promised"] else None
    return found
