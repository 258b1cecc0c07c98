"""The example of a server: every picture gets its own answer, and no batch more tokens than it may have."""

import importlib.util
from functools import partial
from pathlib import Path

import pytest
import torch
from helpers import mini_model

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "serve.py"


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("serve", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("width", [8, 10**9])
def test_pictures_are_served_as_the_model_would(example, width):
    model = mini_model()
    pictures = torch.randn(9, 3, 64, 64) * torch.linspace(0.1, 2, 9).view(-1, 1, 1, 1)
    with torch.inference_mode():
        model.threshold = model.decide(pictures).soft.median().item()
        expected = model.run(pictures)
    assert [waiting.tokens for waiting in example.look(model, pictures, 0)] == expected.tokens.tolist()
    arrivals = [0.0] * 5 + [0.02] * 4
    ways = partial(example.look, model), partial(example.answer, model)
    served = example.serve(pictures, arrivals, *ways, example.Queue(width, 150))
    torch.testing.assert_close(served.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert sum(served.batches) == expected.tokens.sum()
    assert max(served.batches) <= 150
    assert all(0 < late <= served.seconds for late in served.latency)
    assert example.line("way", served).split()[-1] == str(max(served.batches))


def test_the_line_of_the_first_comes_first(example):
    queue = example.Queue(width=10, most=45)
    for number, tokens in enumerate([12, 31, 15, 38, 19, 11]):
        queue.add(example.Waiting(number, tokens, []))
    batches = []
    while len(queue):
        batches.append([waiting.number for waiting in queue.take()])
    assert batches == [[0, 2], [1], [3], [4, 5]]
