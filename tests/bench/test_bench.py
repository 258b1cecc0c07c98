"""The bench: what it times and how, what its figures are made of, and the files it leaves."""

import argparse
import csv
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from helpers import ROTARY

from msvit import MSViT, cli
from msvit.bench import cases, report, timing
from msvit.bench import run as bench_run
from msvit.bench.cases import Case, load_case
from msvit.bench.methods import PREPARE
from msvit.bench.run import bench, find_device
from msvit.bench.settings import (
    BENCH_METHODS,
    BenchSettings,
    CaseSettings,
    add_options,
    case_settings,
    from_options,
)
from msvit.gating.gate import Gate
from msvit.reducers.registry import REDUCERS
from msvit.training.files import RunError
from msvit.training.recipe import RecipeError

TINY = "vit_mini_patch8_64"
FAST = {"models": (TINY,), "batch": (1, 4), "repeats": 2, "device": "cpu", "train": False}


def run(capsys, *words):
    code = cli.main(["bench", "--models", TINY, "--device", "cpu", *(str(word) for word in words)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def make_case(batch=3, coarse=0.5, vit=None, scales=(1, 2)):
    torch.manual_seed(0)
    model = MSViT(timm.create_model(TINY) if vit is None else vit, scales=scales).eval()
    case = Case(model, torch.randn(batch, 3, 64, 64), {})
    case.set_share(coarse)
    return case


# ---- the clock


class Clock:
    """Time that only `work` moves."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self):
        return self.now

    def work(self, name, seconds):
        def call():
            self.now += seconds
            self.calls.append(name)

        return call


def test_repeats_are_interleaved_and_their_order_changes():
    clock = Clock()
    works = {name: clock.work(name, seconds) for name, seconds in (("a", 1.0), ("b", 2.0), ("c", 4.0))}
    repeats = list(timing.interleaved(works, 12, clock=clock))
    assert repeats == [{"a": 1.0, "b": 2.0, "c": 4.0}] * 12
    orders = [tuple(clock.calls[i : i + 3]) for i in range(0, 36, 3)]
    assert all(sorted(order) == ["a", "b", "c"] for order in orders)
    assert len(set(orders)) > 2


def test_the_device_is_waited_for_on_both_sides_of_a_call():
    calls = []
    list(timing.interleaved({"a": lambda: calls.append("work")}, 2, synchronise=lambda: calls.append("wait")))
    assert calls == ["wait", "work", "wait"] * 2


def test_a_sleep_is_timed():
    works = {"short": lambda: time.sleep(0.01), "long": lambda: time.sleep(0.05)}
    repeats = list(timing.interleaved(works, 3))
    assert all(0.01 <= seconds["short"] and 0.05 <= seconds["long"] for seconds in repeats)
    assert min(seconds["short"] for seconds in repeats) < 0.05


def test_medians_quartiles_and_ratios():
    assert timing.quartiles([5, 1, 2, 4, 3]) == (3, 2, 4)
    assert timing.quartiles([7]) == (7, 7, 7)
    repeats = [{"dense": 2.0, "packed": 1.0}, {"dense": 20.0, "packed": 5.0}, {"dense": 3.0, "packed": 3.0}]
    assert timing.ratios(repeats, "dense", "packed").median == 2.0  # of 2, 4, 1; the ratio of the medians is 1


def test_a_method_is_compared_repeat_by_repeat():
    timings = {"dense": {"macs": 8e9, "batch": 4}, "packed": {"macs": 4e9, "batch": 4}, "gate": {"batch": 4}}
    seconds = {"dense": 3.0, "dense-linear": 2.4, "packed": 2.0, "gate": 0.5}
    found = timing.compare("packed", timings, [seconds] * 3)
    assert (found["ms"], found["pictures_per_s"], found["promised"]) == (2000, 2, 2)
    assert (found["vs_dense"], found["efficiency_dense"]) == (1.5, 0.75)
    assert found["vs_dense_linear"] == pytest.approx(1.2)
    assert "vs_dense_compiled" not in found
    assert timing.compare("gate", timings, [seconds])["share"] == 0.25
    assert timing.compare("tome", timings | {"tome": {}}, [seconds]) == {}


# ---- MACs and memory


def test_every_closed_form_is_the_count(make_eva):
    """Of the backbone of tests, and of a rotary one, whose reducers and parts see rotated queries and keys."""
    for case in (make_case(), make_case(vit=make_eva(**ROTARY[4]).requires_grad_(False))):
        assert_counted(case)


def assert_counted(case):
    case.fits = {name: {} for name in REDUCERS}
    for name, method in BENCH_METHODS.items():
        if name not in ("dense-compiled", "packed-compiled"):
            prepared = PREPARE[name](case)
            counted = timing.counted_macs(prepared.work)
            assert counted > 0, name
            assert prepared.macs is None or prepared.macs == counted, name
            without = method.kind == "training" or name in ("block", "kmeans", "kmedoids")
            assert (prepared.macs is None) == without, name


@pytest.mark.parametrize("scales", [(1, 2), (1, 2, 4)])
def test_closed_forms_have_the_path_of_apt(scales):
    case = make_case(scales=scales)
    case.model.coarse_embed = MSViT(case.vit, coarse_embed="apt", scales=scales).coarse_embed
    for name in ("packed", "fine", "gate", *(["masked"] if len(scales) == 2 else [])):
        prepared = PREPARE[name](case)
        assert prepared.macs == timing.counted_macs(prepared.work), name


def test_masked_execution_counts_all_candidates():
    tokens = 1 + 16 + 64
    block = 12 * tokens * 64**2 + 2 * tokens**2 * 64
    gate = 16 * (3 * 16 * 16 * 64 + 2 * 64 * 64 + 64)
    assert PREPARE["masked"](make_case()).macs / 3 == 3 * block + (tokens - 1) * 3 * 64 * 64 + 64 * 8 + gate


def test_the_query_of_attention_pooling_is_in_the_figures():
    vit = timm.create_model(TINY, global_pool="map", class_token=False)
    case = Case(MSViT(vit).eval().requires_grad_(False), torch.randn(3, 3, 64, 64), {})
    for name in ("dense", "packed", "masked"):
        prepared = PREPARE[name](case)
        assert prepared.macs == timing.counted_macs(prepared.work), name


@pytest.mark.parametrize("method", ["packed", "train-dense"])
def test_attention_is_counted_where_pytorch_does_not(monkeypatch, method):
    work = PREPARE[method](make_case()).work
    known = timing.counted_macs(work)
    for name in ("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention_for_cpu_backward"):
        monkeypatch.delitem(timing.flop_counter.flop_registry, getattr(torch.ops.aten, name), raising=False)
    with timing.flop_counter.FlopCounterMode(display=False) as counter:
        work()
    assert counter.get_total_flops() / 2 < known
    assert timing.counted_macs(work) == known


def test_attention_on_lengths_is_counted():
    """The formula for PyTorch versions that have none: what the closed form says of packed attention."""
    lengths = torch.tensor([3, 5, 2])
    ends = torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()])
    rows = torch.randn(10, 4, 16)
    flops = timing._varlen_flops(rows, rows, rows, ends, ends, 5, 5)
    assert flops == 2 * 2 * 4 * 16 * (9 + 25 + 4)


@pytest.mark.long
def test_macs_that_are_not_counted_are_an_error_that_names_both(tmp_path, monkeypatch):
    true = MSViT._macs
    monkeypatch.setattr(MSViT, "_macs", lambda *given, **named: true(*given, **named) * 1.25)
    with pytest.raises(RunError, match="MSViT packed: the closed form gives") as error:
        bench(BenchSettings(**FAST, rows=("packed",), out=str(tmp_path)), tell=lambda line: None)
    given, counted = map(float, re.search(r"gives (\S+) M MACs .*? counts (\S+) M", str(error.value)).groups())
    assert given / counted == pytest.approx(1.25, rel=1e-4)
    assert "Not to be trusted" in (tmp_path / "bench.md").read_text()
    assert "seconds" in json.loads((tmp_path / "bench.json").read_text())["rows"][0]


def test_reducers_are_matched_to_the_packed_model():
    case = load_case(BenchSettings(**FAST, coarse=0.5), [CaseSettings(TINY, None, 4, 0.5)], torch.device("cpu"))
    case.set_share(0.5)
    wanted = case.result.macs.mean().item()
    for name in REDUCERS:
        # A grid has as many settings as there are blocks, here three.
        rough = name in ("grid", "strided_convolution")
        assert PREPARE[name](case).macs / 4 == pytest.approx(wanted, rel=0.08 if rough else 0.02), name


def test_peak_memory_is_what_tensors_take():
    def work():
        first = torch.ones(1 << 18)
        second = first + 1
        del first
        return second * 2

    assert timing.peak_memory(work, torch.device("cpu")) == pytest.approx(2 * 4 * (1 << 18), rel=0.01)


@pytest.mark.long
def test_half_of_the_regions_coarse_take_at_most_60_percent_of_the_memory():
    torch.manual_seed(0)
    vit = timm.create_model("vit_tiny_patch16_224", img_size=512).eval()
    model, images = MSViT(vit).eval(), torch.randn(2, 3, 512, 512)
    mask = torch.rand(2, 16, 16) < 0.5
    with torch.inference_mode():
        dense = timing.peak_memory(lambda: vit(images), torch.device("cpu"))
        packed = timing.peak_memory(lambda: model.run(images, mask), torch.device("cpu"))
    assert packed <= 0.6 * dense


# ---- decisions


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_threshold_meets_the_share(share):
    assert make_case(4, share).result.coarse.float().mean().item() == share


def test_a_quadtree_has_half_of_its_coarse_regions_in_larger_tokens():
    case = make_case(4, 0.5, scales=(1, 2, 4))
    assert [u.sum().item() for u in case.undivided] == [0.5 * 4 * 16, 0.25 * 4 * 4]
    for share in (0.0, 1.0):
        case.set_share(share)
        assert case.result.coarse.float().mean() == share
    for name in ("masked", "train-trimmed"):
        with pytest.raises(cases.Unavailable, match="two scales"):
            PREPARE[name](case)


@pytest.mark.long
def test_training_steps_make_their_share_coarse_and_leave_the_model_alone():
    case = make_case(64)
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    rates = [case.trained.run(case.images).coarse.float().mean().item() for _ in range(8)]
    assert sum(rates) / 8 == pytest.approx(cases.TRAINING_SHARE, abs=0.03)
    PREPARE["train-trimmed"](case).work()
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())
    assert not case.model.training


def test_a_training_step_reaches_gate_and_backbone():
    case, seen = make_case(), []
    work = PREPARE["train-trimmed"](case).work
    for part in (case.trained.gate.mlp[0].weight, case.trained.vit.blocks[0].attn.qkv.weight):
        part.register_hook(lambda grad: seen.append(grad.abs().sum().item()))
    work()
    assert len(seen) == 2
    assert min(seen) > 0


# ---- the command


@pytest.mark.long
def test_the_command_writes_every_file(capsys, tmp_path):
    out = tmp_path / "new" / "folder"
    rows = "dense,dense-linear,packed,g*,train*"
    code, shown, progress = run(capsys, "--batch", "1,3", "--repeats", 2, "--memory", "--rows", rows, "--out", out)
    assert code == 0, progress
    assert sorted(p.name for p in out.iterdir()) == [f"bench.{kind}" for kind in ("csv", "json", "md", "png", "svg")]
    found = json.loads((out / "bench.json").read_text())
    assert torch.__version__.startswith(found["environment"]["torch"])
    assert {"device", "threads", "dtype", "cpu", "timm"} <= found["environment"].keys()
    assert found["settings"]["batch"] == [1, 3]
    rows = {(row["batch"], row["row"]): row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) == 2 * 5 + 4
    packed, dense = rows[3, "packed"], rows[3, "dense"]
    assert len(packed["seconds"]) == 2
    assert packed["ms_low"] <= packed["ms"] <= packed["ms_high"]
    assert packed["pictures_per_s"] == pytest.approx(3e3 / packed["ms"])
    assert packed["promised"] == pytest.approx(dense["macs"] / packed["macs"])
    assert packed["efficiency_dense"] == pytest.approx(packed["vs_dense"] / packed["promised"])
    assert packed["memory_mb"] > 0
    assert dense["vs_dense"] == dense["promised"] == 1
    assert packed["coarse"] == 0.5
    assert rows[3, "train-trimmed"]["vs_dense"] > 0
    assert (1, "train-dense") not in rows
    with open(out / "bench.csv") as file:
        lines = list(csv.DictReader(file))
    assert [line["row"] for line in lines] == [row["row"] for row in found["rows"]]
    assert float(lines[1]["ms"]) == found["rows"][1]["ms"]
    page = (out / "bench.md").read_text()
    for text in (shown, page):
        assert "MSViT packed" in text
        assert f"{TINY}, 64 px, batch 3, 50% coarse" in text
    assert "gate + tokenizer" in progress


@pytest.mark.long
def test_scaling_varies_one_thing_at_a_time(capsys, tmp_path):
    words = ("--scaling", "--size", "64,128", "--batch", "1,4", "--repeats", 1, "--out", tmp_path)
    code, _, progress = run(capsys, *words, "--rows", "packed")
    assert code == 0, progress
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    packed = [row for row in rows if row["row"] == "packed"]
    points = {axis: [row[axis] for row in packed if row["axis"] == axis] for axis in ("batch", "coarse", "size")}
    assert points == {"batch": [1, 2, 4], "coarse": [0, 0.25, 0.5, 0.75, 1], "size": [64, 128]}
    promised = [row["promised"] for row in packed if row["axis"] == "coarse"]
    assert promised == sorted(promised)
    assert promised[0] < 1 < promised[1]
    assert (tmp_path / "scaling.png").exists()


@pytest.mark.long
def test_scaling_of_a_quadtree(capsys, tmp_path):
    words = ("--scaling", "--scales", "1,2,4", "--size", "64,128", "--batch", 1, "--repeats", 1, "--memory")
    code, _, progress = run(capsys, *words, "--rows", "packed", "--out", tmp_path)
    assert code == 0, progress
    rows = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    sizes = {row["size"]: row for row in rows if (row["axis"], row["row"]) == ("size", "packed")}
    assert sizes.keys() == {64, 128}
    assert all(row["memory_mb"] > 0 and row["promised"] > 1 for row in sizes.values())
    assert sizes[128]["coarse"] == 0.5


def test_a_quadtree_in_front_of_a_rotary_model():
    chosen = CaseSettings("eva02_tiny_patch14_224", 112, 1, 0.5, scales=(1, 2, 4))
    case = load_case(BenchSettings(rows=("packed",)), [chosen], torch.device("cpu"))
    case.set_share(0.5)
    assert [u.item() for u in case.undivided] == [8, 1]
    for name in ("dense", "packed", "gate"):
        prepared = PREPARE[name](case)
        assert prepared.macs == timing.counted_macs(prepared.work), name


@pytest.mark.long
def test_a_run_is_timed_at_its_own_threshold(capsys, tmp_path):
    small = {"train-n": 32, "val-n": 24, "batch": 16, "epochs-dense": 1, "epochs": 1, "device": "cpu"}
    words = [f"--{name}={value}" for name, value in small.items()]
    assert cli.main(["train", *words, "--quiet", "--folder", str(tmp_path / "mine")]) == 0
    capsys.readouterr()
    words = (
        "--run",
        tmp_path / "mine",
        "--repeats",
        1,
        "--rows",
        "packed,masked",
        "--no-train",
        "--out",
        tmp_path / "out",
    )
    code, _, progress = run(capsys, *words, "--batch", 24)
    assert code == 0, progress
    row = json.loads((tmp_path / "out/bench.json").read_text())["rows"][1]
    own = json.loads((tmp_path / "mine/summary.json").read_text())
    assert row["model"] == "mine"
    assert row["coarse"] == pytest.approx(own["coarse"])
    assert row["promised"] == pytest.approx(1 / own["macs"])
    assert str(tmp_path) not in (tmp_path / "out/bench.json").read_text()
    code, _, printed = run(capsys, *words, "--batch", 25)
    assert (code, "24 validation pictures" in printed) == (2, True)


@pytest.mark.long
def test_a_row_that_cannot_be_had_says_why(capsys, tmp_path, monkeypatch):
    def refuse(*_, **__):
        def call(*_):
            raise RuntimeError("No working C++ compiler found\nand more")

        return call

    monkeypatch.setattr(torch, "compile", refuse)
    words = ("--rows", "dense-compiled,packed", "--batch", 2, "--repeats", 1, "--no-train", "--out", tmp_path)
    code, shown, _ = run(capsys, *words)
    assert code == 0
    assert "dense compiled: torch.compile failed: No working C++ compiler found." in shown
    rows = {row["row"]: row for row in json.loads((tmp_path / "bench.json").read_text())["rows"]}
    assert "ms" not in rows["dense-compiled"]
    assert rows["packed"]["vs_dense"] > 0
    assert "vs_dense_compiled" not in rows["packed"]


@pytest.mark.long
def test_lower_precision_names_its_rows(tmp_path):
    chosen = {"rows": ("packed", "tome", "dense-linear", "train-trimmed"), "train": True, "out": str(tmp_path)}
    found = bench(BenchSettings(**FAST | chosen, dtype="bfloat16"), tell=lambda line: None)
    rows = {row["row"]: row for row in found["rows"] if row["batch"] == 4}
    assert "float32 on x86" in rows["dense-linear"]["note"]
    assert all(rows[name]["ms"] > 0 for name in ("dense", "packed", "tome", "train-trimmed"))
    assert rows["packed"]["dtype"] == "bfloat16"


def test_an_interruption_keeps_the_repeats_that_are_whole(capsys, tmp_path, monkeypatch):
    def stopped(works, *given):
        yield dict.fromkeys(works, 1.0)
        if stopped.batches:
            raise KeyboardInterrupt
        stopped.batches += 1

    stopped.batches = 0
    monkeypatch.setattr(bench_run, "interleaved", stopped)
    code, _, printed = run(capsys, "--rows", "packed", "--batch", "1,2,4", "--no-train", "--out", tmp_path)
    assert code == 130
    assert f"interrupted; what was measured until then is in {tmp_path}" in printed
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["interrupted"] is True
    assert [row["batch"] for row in found["rows"]] == [1, 1, 2, 2]
    assert "It was interrupted." in (tmp_path / "bench.md").read_text()
    assert not list(tmp_path.glob("*.tmp"))


def test_without_matplotlib_there_is_no_figure_and_a_word_about_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in [name for name in sys.modules if name.startswith("msvit.plots")]:
        monkeypatch.delitem(sys.modules, name)
    lines = []
    report.draw_figure({"settings": {"scaling": False}, "rows": [{"ms": 1.0}]}, tmp_path, lines.append)
    assert lines == ["no figure: matplotlib is not installed; pip install 'msvit[notebooks]'"]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--rows", "pakced"], "rows='pakced' is not known; the nearest is 'packed'"),
        (["--models", "vit_smal_patch16_224"], "the nearest: vit_small_patch16_224"),
        (["--models", "resnet18"], "ResNet is no plain vision transformer"),
        (["--dtype", "bfloat"], "the nearest is 'bfloat16'"),
        (["--device", "gpu"], "device='gpu' is not known"),
        (["--size", "72"], "use --size 64"),
        (["--scales", "1,2,6"], "scales=(1, 2, 6): the first is 1"),
        (["--scales", "1,2,4,8,16"], "use scales=(1, 2, 4, 8)"),
        (["--batch", "0"], "batch=0 lies outside [1, inf)"),
        (["--repeats", "-1"], "repeats=-1 lies outside [0, inf)"),
        (["--coarse", "1.5"], "coarse=1.5"),
        (["--repeat", "3"], "the nearest is --repeats"),
        (["--run", "no/such"], "is no run"),
        (["--run", "x", "--scaling"], "without --run"),
    ],
)
def test_a_mistake_is_an_error_of_one_line(capsys, monkeypatch, tmp_path, words, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *words)
    assert (code, out) == (1 if words == ["--run", "no/such"] else 2, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_cuda_is_refused_where_there_is_none(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto").type == "cpu"
    with pytest.raises(RecipeError, match="sees no CUDA device; use cpu"):
        find_device("cuda")


def test_defaults_and_patterns():
    assert [name for name in BenchSettings().methods() if not BENCH_METHODS[name].usual] == []
    assert BenchSettings(rows=("kmeans",), train=False).methods() == ["dense", "block", "kmeans"]
    assert BenchSettings(rows=("train-*",)).methods()[0] == "dense"
    settings = BenchSettings(models=(TINY, "deit_tiny_patch16_224"), size=(64, 128), batch=(1, 2))
    assert len(list(case_settings(settings))) == 8
    with pytest.raises(RecipeError, match="one value"):
        BenchSettings(batch=())
    assert isinstance(make_case().model.gate, Gate)


def test_the_commands_of_the_page_are_understood():
    """Of reports/bench, which says what made its files."""
    page = (Path(__file__).parents[2] / "reports" / "bench" / "README.md").read_text()
    found = {}
    for name, one, quoted in re.findall(r"^\| `(\S+)`.*?`make bench ARGS=(?:(--\S+)|'([^']+)')`", page, re.MULTILINE):
        parser = argparse.ArgumentParser()
        add_options(parser)
        found[name] = from_options(vars(parser.parse_args((one or quoted).split())))
    assert list(found) == ["bench.*", "scaling.*", "gpu/bench.*"]
    gpu = found["gpu/bench.*"]
    assert (gpu.device, gpu.dtype, gpu.size, gpu.out) == ("cuda", "bfloat16", (224, 1024), "reports/bench/gpu")
    assert {"dense-compiled", "packed", "gate"} < set(gpu.methods())


def test_every_method_of_the_table_can_be_prepared():
    assert list(PREPARE) == list(BENCH_METHODS)
    assert {method.of for method in BENCH_METHODS.values()} <= set(BENCH_METHODS)
    assert set(REDUCERS) <= set(BENCH_METHODS)


def test_settings_are_light_to_import():
    """The command line imports them for `--help` alone."""
    code = """
import sys
import msvit.bench.settings
print(sorted({"torch", "timm", "numpy", "pandas"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
