"""What users do to timm's models: each row of the README's table works, or is refused in words."""

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import mini_model, shake
from torch import nn
from torch.func import functional_call
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import msvit
from msvit.core.blocks import Steps

MASK = torch.tensor([[True, False, True, True]] * 4)


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 64)


@pytest.fixture
def model():
    return mini_model()


def gradients(model, images):
    """Logits while training with one draw of noise, and the gradients of all parameters."""
    model.train()
    torch.manual_seed(1)
    logits = model(images)
    logits.square().sum().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return logits.detach(), found


class TestCheckpointing:
    @pytest.mark.parametrize("settings", [{}, {"drop_path_rate": 0.5, "proj_drop_rate": 0.2}])
    def test_the_same_gradients(self, make_vit, images, settings):
        model = msvit.MSViT(shake(make_vit(**settings)))
        expected = gradients(model, images)
        model.set_grad_checkpointing()
        assert model.vit.grad_checkpointing
        torch.testing.assert_close(gradients(model, images), expected)

    def test_less_is_kept(self, model, images):
        """What the backbone says is heeded: fewer numbers wait for the backward pass."""

        def kept():
            sizes = {}
            torch.manual_seed(1)
            with torch.autograd.graph.saved_tensors_hooks(
                lambda x: sizes.update({x.data_ptr(): x.numel()}) or x, lambda x: x
            ):
                model.train()(images).sum()
            return sum(sizes.values())

        before = kept()
        model.vit.set_grad_checkpointing()
        assert kept() < 0.5 * before
        model.set_grad_checkpointing(False)
        assert kept() == before

    def test_with_a_reducer(self, make_vit, images):
        vit = shake(make_vit())
        model = msvit.MSViT(vit, reducer=msvit.make_reducer("tome", vit, r=8))
        expected = gradients(model, images)
        model.set_grad_checkpointing()
        torch.testing.assert_close(gradients(model, images), expected)


class TestHooks:
    @torch.no_grad()
    def test_on_blocks_they_see_rows(self, model, images):
        seen = []
        before = model.vit.blocks[1].register_forward_pre_hook(lambda block, args: seen.append(args[0]))
        after = model.vit.blocks[1].register_forward_hook(lambda block, args, out: seen.append(out))
        result, (tokens,) = model.run(images), model.forward_intermediates(images, [1], False, False, "tokens", True)
        assert [x.shape for x in seen[:2]] == [(result.tokens.sum(), 64)] * 2
        torch.testing.assert_close(seen[1], tokens.x)
        before.remove(), after.remove()
        model(images)
        assert len(seen) == 4
        assert "forward" not in vars(model.vit.blocks[1])

    @torch.no_grad()
    def test_what_they_return_counts(self, model, images):
        expected = model(images)
        with model.vit.blocks[2].register_forward_hook(lambda block, args, out: out + 1.0):
            assert not torch.allclose(model(images), expected)
        with model.vit.blocks[2].register_forward_pre_hook(lambda block, args: args[0] + 0.0):
            torch.testing.assert_close(model(images), expected)

    def test_backward_ones_too(self, model, images):
        seen = []
        model.vit.blocks[0].register_full_backward_hook(lambda block, into, out: seen.append(out[0].shape))
        result = model.run(images)
        result.logits.sum().backward()
        assert seen == [(result.tokens.sum(), 64)]

    @torch.no_grad()
    def test_on_layers_they_see_rows(self, model, images):
        seen = []
        for name in ("attn.qkv", "attn.proj", "norm1", "norm2", "mlp"):
            layer = model.vit.blocks[0].get_submodule(name)
            layer.register_forward_hook(lambda layer, args, out, name=name: seen.append((name, len(out))))
        total = int(model.run(images).tokens.sum())
        assert seen == [(name, total) for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp")]

    @pytest.mark.parametrize("name", ["blocks.1.attn", "patch_embed", "patch_embed.proj"])
    def test_those_that_are_never_called_are_told_of(self, model, images, name):
        model.vit.get_submodule(name).register_forward_hook(print)
        with pytest.warns(UserWarning, match=rf"hooks on {name} are never called.*Hook blocks\[i\]"):
            model(images)


class Adapter(nn.Module):
    """As LoRA's: a layer in a wrapper that has its weight, and adds what its own small layers make of the input."""

    def __init__(self, base, down, up):
        super().__init__()
        self.base_layer, self.down, self.up = base, down, up

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


def adapt(vit):
    """Wrap all that PEFT finds under the names ["qkv", "proj"], the patch embedding among them."""
    for name, layer in list(vit.named_modules()):
        if name.rpartition(".")[2] not in ("qkv", "proj"):
            continue
        if isinstance(layer, nn.Linear):
            more = nn.Linear(layer.in_features, 2, bias=False), nn.Linear(2, layer.out_features, bias=False)
        else:
            more = (
                nn.Conv2d(layer.in_channels, 2, layer.kernel_size, layer.stride, bias=False),
                nn.Conv2d(2, layer.out_channels, 1, bias=False),
            )
        vit.set_submodule(name, Adapter(layer, *more))


@pytest.mark.parametrize("coarse_embed", ["shared", "apt"])
def test_lora_on_qkv_and_proj(model, images, coarse_embed):
    """All fine it is timm's with the same adapters; their gradients come, and MACs count them."""
    model = msvit.MSViT(model.vit, gate=model.gate, coarse_embed=coarse_embed).eval()
    before = model.run(images, MASK)
    adapt(model.vit)
    with torch.no_grad():
        torch.testing.assert_close(model.run(images, MASK & False).logits, model.vit(images), rtol=0, atol=1e-5 * 20)
    after = model.run(images, MASK)
    assert not torch.allclose(before.logits, after.logits)
    assert (after.macs > before.macs).all()
    after.logits.sum().backward()
    assert model.vit.patch_embed.proj.up.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_lora_merged_again_is_as_before(model, images):
    expected = model(images)
    whole = copy.deepcopy(model)
    adapt(whole.vit)
    for layer in [m for m in whole.modules() if isinstance(m, Adapter)]:
        nn.init.zeros_(layer.up.weight)
    torch.testing.assert_close(whole(images), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantized tensor creation:UserWarning")
def test_dynamic_quantisation(model, images):
    """Logits are near, and MACs are those of the layers that were there."""
    quantised = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8)
    expected, found = model.run(images, MASK), quantised.run(images, MASK)
    assert any("quantized" in type(m).__module__ for m in quantised.vit.modules())
    assert (found.logits - expected.logits).norm() < 0.1 * expected.logits.norm()
    assert torch.equal(found.macs, expected.macs)
    assert quantised(images).isfinite().all()


@torch.no_grad()
def test_pickling_after_compiling(model, images):
    """It is pickled as it was before; compiled code belongs to a process."""
    expected = model(images)
    model.compile(backend="eager")
    loaded = pickle.loads(pickle.dumps(model))
    assert loaded._steps == Steps() != model._steps
    assert torch.equal(loaded(images), expected)
    assert torch.equal(copy.deepcopy(model)(images), expected)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_pictures_of_another_precision_are_refused(model, images, dtype):
    model.to(dtype)
    with pytest.raises(ValueError, match=rf"pictures are torch.float32, the model's weights {dtype}.*images.to"):
        model(images)
    assert model(images.to(dtype)).dtype == dtype


@torch.no_grad()
def test_autocast_takes_what_it_took(model, images):
    with torch.autocast("cpu", torch.bfloat16):
        assert model(images).isfinite().all()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_trace_decides_anew(model):
    """45 pictures with other decisions than those that the trace was made with: all right."""
    first, others = torch.randn(1, 3, 64, 64), torch.randn(45, 1, 3, 64, 64) * 2 + 0.5
    traced = torch.jit.trace(model, first, check_trace=False)
    different = 0
    model.requires_grad_(False)
    for images in others:
        torch.testing.assert_close(traced(images), model(images), rtol=1e-4, atol=1e-4)
        different += not torch.equal(model.run(images).coarse, model.run(first).coarse)
    assert different > 20
    with pytest.raises(ValueError, match="execution='packed' cannot be traced.*masked"):
        torch.jit.trace(lambda x: model.run(x, execution="packed").logits, first)


class TestWhatWorkedBefore:
    @torch.no_grad()
    def test_copies(self, model, images):
        expected = model(images)
        stored = io.BytesIO()
        torch.save(model, stored)
        stored.seek(0)
        for other in (
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(stored, weights_only=False),
        ):
            assert torch.equal(other(images), expected)

    @torch.no_grad()
    def test_channels_last(self, model, images):
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)
        found = last(images.to(memory_format=torch.channels_last))
        torch.testing.assert_close(found, model(images), rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_functional_calls(self, model, images):
        state = {name: value.clone() for name, value in model.state_dict().items()}
        torch.testing.assert_close(functional_call(model, state, images), model(images))

    @pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.9)], ids=["SWA", "EMA"])
    def test_averages(self, model, images, average):
        averaged = AveragedModel(model, multi_avg_fn=average)
        averaged.update_parameters(model)
        with torch.no_grad():
            torch.testing.assert_close(averaged.eval()(images), model(images), rtol=1e-4, atol=1e-4)


SHARDED = """
import sys, tempfile
import timm, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from accelerate import Accelerator
import msvit
from msvit.models import zoo

def losses(model, optimiser, steps=3):
    found = []
    for step in range(steps):
        torch.manual_seed(step)
        images = torch.randn(4, 3, 64, 64)
        torch.manual_seed(step + 10)
        loss = model(images).square().mean()
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        found.append(loss.item())
    return found

def make():
    torch.manual_seed(0)
    model = msvit.MSViT(timm.create_model("vit_mini_patch8_64")).train()
    return model

dist.init_process_group("gloo")
plain = make()
expected = losses(plain, torch.optim.SGD(plain.parameters(), 0.1))
if sys.argv[1] == "fsdp2":
    model = make()
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.vit.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
else:
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2, accelerator.state
    model = make()
    model, optimiser = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 0.1))
found = losses(model, optimiser)
torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
dist.destroy_process_group()
"""


@pytest.mark.long
@pytest.mark.parametrize("way", ["fsdp2", "accelerate"])
def test_two_processes_on_the_cpu(tmp_path, way):
    """FSDP2 with every block sharded on its own, and accelerate: the losses of one process."""
    (tmp_path / "sharded.py").write_text(SHARDED)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(tmp_path / "sharded.py"), way]
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
