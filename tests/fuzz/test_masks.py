"""Masks and pictures of any kind: what the model runs on is computed alike by all executions, all else is refused."""

import contextlib

import torch
from helpers import mini_model
from hypothesis import given
from hypothesis import strategies as st

from msvit.checks import check_images, check_mask
from msvit.models.tokenizer import EXECUTIONS

MODEL = mini_model()
sides = st.integers(1, 5)
dtypes = st.sampled_from([torch.bool, torch.float32, torch.int64, torch.float16, torch.complex64])


@given(st.lists(st.integers(0, 40), max_size=5), dtypes, st.integers(1, 4))
def test_pictures_are_taken_or_refused(shape, dtype, channels):
    with contextlib.suppress(ValueError):
        check_images(torch.zeros(shape, dtype=dtype), channels, finite=True)
        assert len(shape) == 4
        assert shape[1] == channels
        assert min(shape) > 0


@given(st.lists(st.integers(0, 4), max_size=4), dtypes, st.integers(1, 3), sides, sides)
def test_masks_are_taken_or_refused(shape, dtype, pictures, h, w):
    with contextlib.suppress(ValueError, TypeError):
        check_mask(torch.zeros(shape, dtype=dtype), pictures, (h, w))
        assert dtype == torch.bool
        assert shape in ([h, w], [pictures, h, w])


@given(st.integers(1, 3), sides, sides, st.integers(0, 2**31), st.floats(0, 1))
def test_all_executions_agree_on_any_decisions(pictures, h, w, seed, share):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(pictures, 3, 16 * h, 16 * w, generator=generator)
    mask = torch.rand(pictures, h, w, generator=generator) < share
    with torch.no_grad():
        logits = [MODEL.run(images, mask, execution).logits for execution in EXECUTIONS]
    for other in logits[1:]:
        torch.testing.assert_close(other, logits[0], atol=1e-4, rtol=1e-4)
