"""Averages of low-rank models are those of their dense weights."""

import copy

import pytest
import torch
from torch import nn

import dlrt
from dlrt.models import GPT

pytestmark = pytest.mark.usefixtures("float64")


def test_an_average_of_models_is_that_of_their_dense_weights():
    models = [dlrt.to_low_rank(nn.Sequential(nn.Linear(9, 7), nn.BatchNorm1d(7)), rank=r) for r in (2, 3)]
    mean = dlrt.average(models)
    expected = (models[0][0].weight + models[1][0].weight) / 2
    assert torch.allclose(mean[0].weight, expected, atol=1e-14)
    assert type(mean[0]) is nn.Linear
    again = dlrt.to_low_rank(mean, tau=1e-12)
    assert torch.allclose(again[0].weight, expected, atol=1e-12)


def test_an_average_counts_a_weight_that_is_tied_once():
    models = [GPT((8,), classes=5, width=16, depth=1, heads=2) for _ in range(2)]
    mean = dlrt.average(
        [dlrt.to_low_rank(copy.deepcopy(model), skip=["head"]) for model in models], [0.25, 0.75]
    )
    expected = 0.25 * models[0].head.weight + 0.75 * models[1].head.weight
    torch.testing.assert_close(mean.words.weight, expected)
    assert mean.head.weight is mean.words.weight
