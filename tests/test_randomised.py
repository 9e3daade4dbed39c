"""Cascading randomisation: from the last layer to the first, the norms stay, and maps lose what they were."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
from made_up_cam_runs import ROOT, save_run
from torch import nn
from torchvision.models import VisionTransformer

import dlrt
from dlrt.cams.build_networks import random_weights
from dlrt.cams.randomised import cascade, randomise, weighted_modules
from dlrt.cams.targets import of_classes


class Reversed(nn.Module):
    """Layers that are called in another order than they are made in."""

    def __init__(self):
        super().__init__()
        self.head, self.norm = nn.Linear(8, 4), nn.BatchNorm2d(8)
        self.second, self.first = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(1, 6, 3, padding=1)

    def forward(self, x):
        x = self.norm(self.second(self.first(x).relu())).relu()
        return self.head(x.mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Reversed().eval()


def test_layers_come_in_the_order_of_their_calls_without_norms(model):
    assert weighted_modules(model, torch.zeros(1, 1, 9, 9)) == [model.first, model.second, model.head]


def test_no_weight_of_a_transformer_stays_as_it_was():
    model = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4)
    nn.init.normal_(model.heads.head.weight)
    nn.init.normal_(model.class_token)
    before, generator = copy.deepcopy(model), torch.Generator()
    for module in weighted_modules(model, torch.randn(1, 3, 32, 32)):
        randomise(module, generator)
    pairs = zip(model.parameters(), before.parameters(), strict=True)
    assert [torch.equal(p, q) for p, q in pairs] == [p.dim() == 1 for p in model.parameters()]


def test_the_control_of_random_weights_keeps_no_weight_of_a_transformer():
    model = VisionTransformer(32, 8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    drawn = random_weights(model)
    assert not [n for n, p in drawn.named_parameters() if torch.equal(p, model.get_parameter(n))]
    again = dict(random_weights(model).named_parameters())
    assert all(torch.equal(p, again[n]) for n, p in drawn.named_parameters())


@pytest.mark.parametrize("rank", [None, 2])
def test_random_weights_have_the_norm_of_those_before(model, rank):
    layer = dlrt.to_low_rank(model, rank=rank).second if rank else model.second
    before = layer.weight.detach().clone()
    randomise(layer, torch.Generator().manual_seed(0))
    assert torch.linalg.matrix_rank(layer.weight.flatten(1)) == (rank or 8)
    assert torch.isclose(layer.weight.norm(), before.norm(), rtol=1e-5)
    assert torch.corrcoef(torch.stack([layer.weight.detach().flatten(), before.flatten()]))[0, 1].abs() < 0.3


def test_a_cascade_begins_with_the_own_maps_and_leaves_the_model_as_it_was(model):
    before, images = copy.deepcopy(model.state_dict()), torch.randn(5, 1, 9, 9)
    state = torch.random.get_rng_state()
    found = list(cascade(model, images, of_classes([0, 1, 2, 3, 0]), "gradcam", "second", steps=9, seed=0))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    shares, names, correlations = zip(*found, strict=True)
    assert shares == pytest.approx([0, 1 / 3, 2 / 3, 1])
    assert names == ("", "head", "second", "first")  # no more steps than layers
    assert np.allclose(correlations[0], 1)
    assert np.mean(np.abs(correlations[-1])) < 0.7
    again = list(cascade(model, images, of_classes([0, 1, 2, 3, 0]), "gradcam", "second", steps=1, seed=0))
    assert [name for _, name, _ in again] == ["", "first"]
    other = list(cascade(model, images, of_classes([0, 1, 2, 3, 0]), "gradcam", "second", steps=1, seed=1))
    assert not np.allclose(again[1][2], other[1][2])


def test_the_script_leaves_a_row_for_each_map_and_a_figure(run_script, tmp_path):
    save_run(tmp_path / "runs" / "dense")
    flags = ["--checkpoint", tmp_path / "runs" / "dense", "--image-path", ROOT / "test_images", "--rank", 2]
    flags += ["--steps", 2, "--draws", 2, "--output-dir", "out"]
    result = run_script("pytorch-grad-cam/randomise.py", *flags)
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path / "out" / "randomised.csv")
    pictures = table["file"].nunique()
    assert len(table) == 2 * 2 * 3 * pictures
    assert np.allclose(table.loc[table["random_layers"] == 0, "correlation"], 1, atol=1e-5)
    assert "figure: out/randomised.png" in result.stdout
    assert (tmp_path / "out" / "randomised.png").stat().st_size > 10_000
    result = run_script("pytorch-grad-cam/randomise.py", "--image-path", tmp_path / "nothing")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    flags[4:6] = ["--method", "fullgrad"]  # whose raw maps are of no layer
    assert run_script("pytorch-grad-cam/randomise.py", *flags).returncode == 0
