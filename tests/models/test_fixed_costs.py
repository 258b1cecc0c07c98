"""What one picture costs whatever its size: calls of PyTorch, counted, not timed."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import msvit

GATE, TOKENIZER, BLOCK, REST = 22, 76, 25, 40  # the most calls of each


class Calls(TorchDispatchMode):
    """Counts operations; in inference mode those that consist of others are one."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def calls(function):
    with torch.inference_mode():
        function()  # what is kept is found
        with Calls() as found:
            function()
    return found.count


@pytest.mark.parametrize("size", [64, 60])
def test_calls_before_the_first_block_do_not_grow(make_vit, size):
    model, images = msvit.MSViT(make_vit()).eval(), torch.randn(1, 3, size, size)
    gate = calls(lambda: model.decide(images))
    assert gate <= GATE + (size == 60)  # padding is one
    tokenizer = calls(lambda: model.tokenize(images, model.decide(images))) - gate
    assert tokenizer <= TOKENIZER + (size == 60)
    assert calls(lambda: model(images)) <= GATE + TOKENIZER + len(model.vit.blocks) * BLOCK + REST


def test_more_pictures_need_no_more_calls_before_the_first_block(make_vit):
    model, images = msvit.MSViT(make_vit()).eval(), torch.randn(4, 3, 64, 64)
    assert calls(lambda: model.tokenize(images, model.decide(images))) <= GATE + TOKENIZER
