"""Compiled models: the same function, and few graphs."""

import pytest
import torch
from helpers import shake

import msvit

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning:torch")


@pytest.fixture(autouse=True)
def fresh():
    """Graphs of other tests are forgotten."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def masks(*pictures):
    return [torch.rand(n, 4, 4) < rate for n, rate in zip(pictures, (0.3, 0.7, 0.5, 0.1, 0.9), strict=False)]


@torch.no_grad()
@pytest.mark.long
def test_compiled_blocks_compute_the_same_with_one_graph_for_all_lengths(make_vit):
    model = msvit.MSViT(shake(make_vit(init_values=0.1, qk_norm=True)), fast_cpu=True).eval()
    given = [(torch.randn(len(mask), 3, 64, 64), mask) for mask in masks(3, 3, 2, 5, 4)]
    expected = [model.run(*batch).logits for batch in given]
    model.compile(backend="aot_eager")
    graphs = [model.graphs]
    for batch, logits in zip(given, expected, strict=True):
        assert (model.run(*batch).logits - logits).abs().max() <= 1e-5
        graphs.append(model.graphs)
    assert graphs[0] == 0
    assert 3 <= graphs[1] <= 6
    assert len(set(graphs[1:])) == 1


@pytest.mark.long
def test_compiled_training_has_the_same_gradients(make_vit):
    """With stochastic depth, whose draws are of pictures; more batches need no more graphs."""
    model = msvit.MSViT(shake(make_vit(drop_path_rate=0.3))).train()

    def gradients(seed):
        torch.manual_seed(seed)
        model(torch.randn(4, 3, 64, 64)).square().sum().backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    expected = [gradients(seed) for seed in range(3)]
    model.compile(backend="aot_eager")
    counts = []
    for seed, wanted in enumerate(expected):
        torch.testing.assert_close(gradients(seed), wanted, rtol=1e-4, atol=1e-5)
        counts.append(model.graphs)
    assert counts[1] == counts[2]


@pytest.mark.long
@pytest.mark.parametrize("training", [False, True])
def test_the_whole_model_compiles(make_vit, training):
    """`torch.compile(model)`, linear layers through oneDNN or not: logits and gradients of eager."""
    model = msvit.MSViT(shake(make_vit()), fast_cpu=True).train(training)
    images = torch.randn(3, 3, 64, 64)

    def found(function):
        torch.manual_seed(1)
        logits = function(images)
        logits.square().sum().backward()
        grads = [p.grad for p in model.vit.parameters()]
        model.zero_grad()
        return logits.detach(), grads

    torch.testing.assert_close(found(torch.compile(model, backend="eager")), found(model), rtol=1e-3, atol=1e-4)


@torch.no_grad()
@pytest.mark.slow
def test_by_the_default_compiler(make_vit):
    model = msvit.MSViT(shake(make_vit())).eval()
    images, (mask, other) = torch.randn(3, 3, 64, 64), masks(3, 3)
    expected = [model.run(images, m).logits for m in (mask, other)]
    model.compile()
    for m, logits in zip((mask, other), expected, strict=True):
        torch.testing.assert_close(model.run(images, m).logits, logits, rtol=1e-4, atol=1e-4)
