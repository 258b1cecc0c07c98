"""The gate losses over a batch that two processes share equal those of one process, gradients included."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from msvit.gating.losses import make_loss

pytestmark = pytest.mark.long

NAMES = ("gbas", "bas", "l0", "ratio")
SIZES = (5, 3)  # of the two batches; that they differ must not matter either


class Gated(nn.Module):
    """A gate on four features and its loss, as a trainer holds them."""

    def __init__(self, name: str):
        super().__init__()
        torch.manual_seed(1)
        self.gate = nn.Linear(4, 1, dtype=torch.float64)
        settings = {"learn_temperature": True} if name == "gbas" else {}
        self.loss = make_loss(name, (2, 3), target=0.8, **settings).double()
        for parameter in self.loss.parameters():  # apart, as after some training
            nn.init.normal_(parameter, std=0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.loss(self.gate(x).squeeze(-1).sigmoid())


def pictures() -> torch.Tensor:
    return torch.randn(sum(SIZES), 2, 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def step(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The loss and all gradients, by name."""
    loss = model(x)
    loss.backward()
    grads = {name.removeprefix("module."): p.grad for name, p in model.named_parameters()}
    return {"value": loss.detach(), **grads}


def work(rank: int, folder: str):
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the machine's own name may lead nowhere
    dist.init_process_group("gloo", init_method=Path(folder, "meet").as_uri(), rank=rank, world_size=2)
    x = pictures().split(SIZES)[rank]
    found = {name: step(DistributedDataParallel(Gated(name)), x) for name in NAMES}
    # A process alone sees the whole loss gradient of its priors: without any averaging it must be the same.
    alone = Gated("gbas")
    found["unaveraged"] = {k: v for k, v in step(alone, x).items() if k.startswith("loss.")}
    torch.save(found, Path(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """What two processes found."""
    folder = tmp_path_factory.mktemp("gloo")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rank", [0, 1])
def test_two_processes_equal_one(shared, name, rank):
    expected = step(Gated(name), pictures())
    assert shared[rank][name].keys() == expected.keys()
    for key, value in expected.items():
        assert value.abs().max() > 0, key
        torch.testing.assert_close(shared[rank][name][key], value, rtol=1e-12, atol=1e-15, msg=key)


def test_priors_need_no_averaging(shared):
    expected = step(Gated("gbas"), pictures())
    for found in shared:
        assert found["unaveraged"].keys() == {"loss.logits", "loss.log_temperature"}
        for key, value in found["unaveraged"].items():
            torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-15)


def test_half_of_the_batch_is_another_loss(shared):
    """So that the tests above could fail."""
    alone = step(Gated("gbas"), pictures().split(SIZES)[0])["value"]
    assert not torch.isclose(alone, shared[0]["gbas"]["value"], rtol=1e-3)
