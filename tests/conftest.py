"""What every test may rely on: no network, no more threads than cores, one seed, one tiny backbone."""

import math
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # huggingface_hub reads it once, when it is imported
os.environ.setdefault("OMP_NUM_THREADS", "2")  # for the subprocesses of tests too
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve each other where cores are shared

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer

from msvit.core.attention import WeightedAttention

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if not torch.cuda.is_available():  # several CUDA kernels, attention's among them, have no deterministic form
    torch.use_deterministic_algorithms(True)  # also fills torch.empty with NaN, which shows what is read unset


# Tests that `make test-fast` leaves out, besides those that their own files mark as long.
LONG = {
    "bench/test_bench.py": (
        "test_the_command_writes_every_file",
        "test_scaling_varies_one_thing_at_a_time",
        "test_lower_precision_names_its_rows",
        "test_a_run_is_timed_at_its_own_threshold",
        "test_half_of_the_regions_coarse_take_at_most_60_percent_of_the_memory",
        "test_macs_that_are_not_counted_are_an_error_that_names_both",
        "test_an_interruption_keeps_the_turns_that_are_whole",
        "test_a_row_that_cannot_be_had_says_why",
        "test_training_steps_make_their_share_coarse_and_leave_the_model_alone",
    ),
    "explorer/test_explorer.py": ("test_the_demo_is_trained_once_and_anew_if_it_is_torn",),
    "explorer/test_models.py": ("test_a_rule_stands_in_the_gates_place", "test_a_classifier_beside_a_segmenter"),
    "studies/test_study.py": ("test_a_report_reads_finished_runs_and_is_the_same_every_time",),
    "studies/test_sweep.py": (
        "test_a_sweep_goes_on_where_it_was",
        "test_trials_that_fall_behind_are_pruned",
        "test_a_failed_trial_is_recorded_and_does_not_stop_the_rest",
    ),
}


@pytest.hookimpl(tryfirst=True)  # before the markers select
def pytest_collection_modifyitems(items):
    for item in items:
        path = "/".join(item.path.parts[-2:])
        if getattr(item, "originalname", "") in LONG.get(path, ()):
            item.add_marker("long")


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every test, whichever ran before."""
    torch.manual_seed(0)


@pytest.fixture
def make_vit():
    """A function that builds a ViT of three narrow blocks for 64 px pictures, in evaluation mode.

    Its keyword arguments go to timm's `VisionTransformer`, over the defaults below.
    """

    def make(**settings):
        tiny = {
            "img_size": 64,
            "patch_size": 8,
            "embed_dim": 64,
            "depth": 3,
            "num_heads": 4,
            "num_classes": 8,
        }
        return VisionTransformer(**tiny | settings).eval()

    return make


@pytest.fixture
def tiny_vit(make_vit):
    """The default of `make_vit`: 64 fine tokens of width 64 and a class token."""
    return make_vit()


@pytest.fixture
def unbounded(monkeypatch):
    """The tangent of hidden keys as it is, however steep: what finite differences see."""
    monkeypatch.setattr(WeightedAttention, "MOST", math.inf)
    return monkeypatch
