"""Plain factors and DLRT start from the same weights, and every plain factor trains."""

import pytest
import torch
from made_up_runs import load

from dlrt import LowRankLayer, compression
from dlrt.errors import OptionError
from dlrt.models import LeNet5
from dlrt.options import ROOT

SHAPE = (1, 28, 28)


@pytest.fixture(scope="module")
def factored():
    return load("UV_vanilla/factored")


def pair(factored, decay):
    torch.manual_seed(0)
    low_rank = factored.decayed_lenet5(SHAPE, 10, rank=20, decay=decay)
    torch.manual_seed(0)
    return low_rank, factored.vanilla_lenet5(SHAPE, 10, rank=20, decay=decay)


@pytest.mark.parametrize("decay", [1.0, 2.0, 10.0])
def test_both_start_as_the_same_network(factored, decay):
    low_rank, vanilla = pair(factored, decay)
    x = torch.randn(4, *SHAPE)
    assert torch.allclose(low_rank(x), vanilla(x), rtol=1e-4, atol=1e-5)


def test_singular_values_decay_in_every_layer(factored):
    none, strong = pair(factored, 1.0)[0], pair(factored, 10.0)[0]
    layers = [
        (a, b) for a, b in zip(none.modules(), strong.modules(), strict=True) if isinstance(a, LowRankLayer)
    ]
    assert len(layers) == sum(parameter.dim() > 1 for parameter in LeNet5().parameters())
    for layer, decayed in layers:
        ratio = layer.S.diagonal() / decayed.S.diagonal()
        assert torch.allclose(ratio.log10(), torch.arange(layer.rank, dtype=torch.float32), atol=1e-3)


def test_they_count_against_the_same_network(factored):
    low_rank, vanilla = pair(factored, 2.0)
    layers = [module for module in low_rank.modules() if isinstance(module, LowRankLayer)]
    assert compression(vanilla).dense_parameters == compression(low_rank).dense_parameters
    assert compression(vanilla).evaluation_parameters == sum(a.rank * sum(a.shape) for a in layers)


def test_a_run_of_plain_factors_goes_on_and_begins_with_no_other_weights(run_script, tmp_path):
    flags = ["--dataset", "digits", "--output-dir", tmp_path, "--name", "a", "--epochs"]
    script = "UV_vanilla/lenet5_mnist_baseline.py"
    assert run_script(script, *flags, 1).returncode == 0
    refused = run_script(script, *flags[:-2], "b", "--from-checkpoint", tmp_path / "a")
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "--from-checkpoint is for networks that begin dense" in refused.stderr
    again = run_script(script, *flags, 1, "--resume")
    assert (again.returncode, "compression 90" in again.stdout) == (0, True)


def test_every_factor_trains(factored):
    _, vanilla = pair(factored, 2.0)
    vanilla(torch.randn(8, *SHAPE)).square().sum().backward()
    factors = [parameter for parameter in vanilla.parameters() if parameter.dim() > 1]
    assert len(factors) == 8
    assert all(factor.grad.norm() > 0 for factor in factors)


@pytest.mark.parametrize(
    "flags",
    [
        {"rank": 0.5},
        {"tau": 0.1},
        {"skip": ["conv1"]},
        {"max_rank": 10},
        {"min_rank": 10},
        {"compression": 75.0},
        {"compression": 75.0, "dense_epochs": 1, "rank": None},
    ],
    ids=str,
)
def test_what_changes_ranks_is_refused(monkeypatch, flags):
    monkeypatch.syspath_prepend(ROOT / "UV_vanilla")  # as when it is run
    options = load("UV_vanilla/lenet5_mnist").Options
    assert options(rank=20, tau=0.0).max_rank == 20
    with pytest.raises(OptionError, match=r"one rank, --rank, a whole number .* --compression"):
        options(**{"rank": 20, "tau": 0.0, **flags})
    with pytest.raises(OptionError, match="leave --factors out"):
        load("UV_vanilla/lenet5_mnist_baseline").Options(factors=95.0)
