"""What every test may rely on: no network, no more threads than cores, one seed, one tiny backbone."""

import math
import os
import shutil
import tempfile

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers have that of the process that started them
    os.environ["MSVIT_HOME"] = tempfile.mkdtemp(prefix="msvit-tests-")  # for the runs and results of notebooks
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # huggingface_hub reads it once, when it is imported
os.environ.setdefault("OMP_NUM_THREADS", "2")  # for the subprocesses of tests too
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # spinning threads starve each other where cores are shared

import pytest
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer

from msvit.core import attention

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
if not torch.cuda.is_available():  # several CUDA kernels, attention's among them, have no deterministic form
    torch.use_deterministic_algorithms(True)  # also fills torch.empty with NaN, which shows what is read unset


LONG = ("notebook", "browser", "long")


def pytest_collection_modifyitems(items):
    """The longest come first, so that quick tests fill what room is left on the other cores."""
    marked = {mark: {item.path for item in items if item.get_closest_marker(mark)} for mark in LONG}
    marked["notebook"] |= {item.path for item in items if item.path.suffix == ".ipynb"}
    items.sort(key=lambda item: [item.path not in marked[mark] for mark in LONG])


def pytest_unconfigure(config):
    """Remove what the notebooks wrote, once all workers are done."""
    if not hasattr(config, "workerinput"):
        shutil.rmtree(os.environ["MSVIT_HOME"], ignore_errors=True)


@pytest.fixture(autouse=True)
def seed():
    """The same random numbers in every test, whichever ran before."""
    torch.manual_seed(0)


TINY = {"img_size": 64, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 4, "num_classes": 8}


@pytest.fixture
def make_vit():
    """A function that builds a ViT of three narrow blocks for 64 px pictures, in evaluation mode.

    Its keyword arguments go to timm's `VisionTransformer`, over the defaults above.
    """

    def make(**settings):
        return VisionTransformer(**TINY | settings).eval()

    return make


@pytest.fixture
def make_eva():
    """As `make_vit`, timm's `Eva`: with rotary positions and a class token that answers."""

    def make(**settings):
        return Eva(**TINY | {"use_rot_pos_emb": True, "global_pool": "token"} | settings).eval()

    return make


@pytest.fixture
def tiny_vit(make_vit):
    """The default of `make_vit`: 64 fine tokens of width 64 and a class token."""
    return make_vit()


@pytest.fixture
def unbounded(monkeypatch):
    """The tangent of hidden keys as it is, however steep: what finite differences see."""
    monkeypatch.setattr(attention, "MOST", math.inf)
    return monkeypatch
