import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import msvit
from msvit.bench.timing import counted_macs
from msvit.core import fast_linear as linear

pytestmark = pytest.mark.skipif(not linear.AVAILABLE, reason="this PyTorch has no oneDNN on x86")


@pytest.fixture
def used(monkeypatch):
    """How many linear layers took the fast way."""
    calls = []
    suits = linear._suits
    monkeypatch.setattr(linear, "FASTER", True)
    monkeypatch.setattr(linear, "_suits", lambda *args: suits(*args) and calls.append(args[0].shape) is None)
    return calls


@pytest.mark.parametrize("shape", [(1, 24), (197, 24), (2, 5, 24), (2, 3, 4, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_the_fast_way_is_the_same_function(shape, bias, used):
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 40, bias=bias), torch.randn(shape)
    strided = torch.randn(*shape[:-1], 48)[..., ::2]
    with torch.no_grad():
        for rows in (x, strided):
            expected = layer(rows)
            with linear.fast_linear():
                torch.testing.assert_close(layer(rows), expected, atol=1e-5, rtol=1e-5)
                torch.testing.assert_close(F.linear(rows, layer.weight), rows @ layer.weight.T, atol=1e-5, rtol=1e-5)
    assert len(used) == 4


def test_no_rows_and_other_precisions_go_the_usual_way(used):
    layer = nn.Linear(8, 3)
    with torch.no_grad(), linear.fast_linear():
        assert layer(torch.empty(0, 8)).shape == (0, 3)
        assert layer.double()(torch.ones(2, 8).double()).dtype == torch.float64
        assert layer.bfloat16()(torch.ones(2, 8).bfloat16()).dtype == torch.bfloat16
    assert not used


@pytest.mark.parametrize("shape", [(1, 24), (197, 24), (2, 3, 24)])
@pytest.mark.parametrize("frozen", ["nothing", "rows", "weight"])
def test_the_gradients_are_the_same(shape, frozen, used):
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 40), torch.randn(shape, requires_grad=frozen != "rows")
    layer.weight.requires_grad_(frozen != "weight")
    inputs = [t for t in (x, layer.weight, layer.bias) if t.requires_grad]
    out = torch.randn(*shape[:-1], 40)
    expected = torch.autograd.grad((layer(x) * out).sum(), inputs)
    with linear.fast_linear():
        y = layer(x)
    torch.testing.assert_close(torch.autograd.grad((y * out).sum(), inputs), expected, atol=1e-4, rtol=1e-4)
    assert len(used) == 1


def test_autocast_goes_the_usual_way(used):
    layer, x = nn.Linear(8, 3), torch.ones(2, 8)
    with torch.autocast("cpu", torch.bfloat16), linear.fast_linear():
        assert layer(x).dtype == torch.bfloat16
    assert not used


def test_hooks_still_run_and_macs_are_still_counted(used):
    layer, x, seen = nn.Linear(8, 3), torch.ones(5, 8), []
    layer.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    with torch.no_grad(), linear.fast_linear():
        macs = counted_macs(lambda: layer(x))
    assert seen == [(5, 3)]
    assert len(used) == 1
    assert macs == 5 * 8 * 3


def test_other_calls_and_other_threads_are_left_alone(used):
    """A mode of PyTorch would see every call, and cost a small model a fifth of its time."""
    usual, layer, x = F.linear, nn.Linear(8, 3), torch.ones(5, 8)
    with linear.fast_linear(), torch.no_grad():
        assert torch._C._len_torch_function_stack() == 0
        with linear.fast_linear():
            layer(x)
        layer(x)
        assert len(used) == 2, "also after an inner context has ended"
        with ThreadPoolExecutor(1) as elsewhere:
            assert torch.equal(elsewhere.submit(layer, x).result(), usual(x, layer.weight, layer.bias))
            assert len(used) == 2

            def within():
                with linear.fast_linear(), torch.no_grad():
                    return layer(x)

            elsewhere.submit(within).result()
            assert len(used) == 3
        layer(x)
        assert len(used) == 4, "also after another thread has left"
        F.linear(input=x, weight=layer.weight, bias=None)
        assert len(used) == 5, "by its names, as some of timm's layers call it"
    with pytest.raises(ZeroDivisionError), linear.fast_linear():
        _ = 1 / 0
    assert F.linear is usual


def test_compiled_code_keeps_the_usual_layers(used):
    layer, x = nn.Linear(8, 3), torch.ones(5, 8)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad(), linear.fast_linear():
        compiled(x)
        compiled(x)
    assert not used


def test_where_it_is_not_faster_nothing_changes(used, monkeypatch):
    monkeypatch.setattr(linear, "FASTER", False)
    layer, x = nn.Linear(8, 3), torch.ones(5, 8)
    with linear.fast_linear():
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert not used


def test_it_is_off_unless_asked_for_and_agrees_when_on(used, tiny_vit):
    """A library that changed its numbers unasked would surprise people."""
    images = torch.randn(2, 3, 64, 64)
    plain = msvit.MSViT(tiny_vit).eval()
    fast = msvit.MSViT(tiny_vit, gate=plain.gate, fast_cpu=True).eval()
    with torch.no_grad():
        expected = plain(images)
        assert not used
        found = fast(images)
    assert used
    assert (found - expected).abs().max() <= 1e-5


@pytest.mark.long
@pytest.mark.parametrize("code", ["del mkldnn._linear_pointwise", "torch.backends.mkldnn.is_available = lambda: False"])
def test_without_the_operator_layers_go_the_usual_way(code):
    """In a fresh interpreter whose PyTorch lacks it, as one of tomorrow may: nothing breaks, nothing changes."""
    script = f"""
import types, torch
mkldnn = types.SimpleNamespace(_linear_pointwise=torch.ops.mkldnn._linear_pointwise)
torch.ops.mkldnn = mkldnn
{code}
from msvit.core import fast_linear
assert not fast_linear.AVAILABLE
layer, x = torch.nn.Linear(8, 4), torch.randn(3, 8)
with fast_linear.fast_linear():
    assert torch.equal(layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
