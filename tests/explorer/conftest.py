"""Models and pictures that most tests of the explorer begin with."""

import pytest
from helpers import gate_of, mini_model, segmenter_of

from msvit.explorer.models import LoadedModel


@pytest.fixture
def loaded():
    return LoadedModel.of("mini", mini_model())


@pytest.fixture
def gated(loaded):
    return gate_of(loaded)


@pytest.fixture
def segmenter():
    return LoadedModel.of("pixels", segmenter_of())
