"""Runs with --dense-epochs: first those of a dense run, then one cut by what the loss needs; one schedule."""

import pytest
import torch
from torch import nn

import dlrt.training
from dlrt.checkpoint import load_checkpoint, load_network
from dlrt.convolutions import SpatialLowRankConv2d
from dlrt.factors import Factors
from dlrt.layers import LowRankLayer
from dlrt.low_rank_options import LowRankOptions
from dlrt.options import DenseOptions
from dlrt.run_network import cut
from dlrt.run_optimizer import go_on_with, make_optimizer
from dlrt.runs import read_metrics

SMALL = ("--skip", "conv1", "fc1", "fc2")  # one kernel is in factors, which takes less time
LARGE = ("--skip", "conv1", "fc2")
START = {  # of each kind of network
    "dense": SMALL,
    "low-rank": ("--dense-epochs", 2, "--compression", 3, "--spatial", *SMALL),
    "factors": ("--dense-epochs", 2, "--factors", 3, "--spatial", *SMALL),
}
RULE = ("--update", "muon", "--nesterov", "--epochs", 4)
FAST = ("--update", "sgd", "--no-nesterov")
MEASURED = ["lr", "train_loss", "validation_loss", "validation_accuracy", "test_loss", "test_accuracy"]


@pytest.fixture
def lenet5(run_script, tmp_path):
    """Two epochs of LeNet5 on a few digits and two more; gives the metrics."""
    flags = ["--dataset", "digits32", "--batch-size", 50, "--device", "cpu", "--output-dir", tmp_path, *RULE]

    def run(name, *more, code=0, kind="low-rank"):
        script = f"mnist/lenet5_mnist{'' if kind == 'low-rank' else '_baseline'}.py"
        result = run_script(script, *flags, *START[kind], "--name", name, *more)
        assert result.returncode == code, result.stderr
        return read_metrics(tmp_path / name)

    return run


@pytest.mark.parametrize("kind", ["low-rank", "factors"])
def test_the_first_epochs_are_those_of_a_dense_run_and_the_others_are_in_factors(kind, lenet5, tmp_path):
    dense = lenet5("dense", "--update-lr", 0.01, kind="dense")
    metrics = lenet5("a", "--dense-update-lr", 0.01, kind=kind)
    assert metrics[MEASURED][:2].equals(dense[MEASURED][:2])
    assert metrics["lr"].tolist() == dense["lr"].tolist()
    assert (metrics["evaluation_compression"][:2] == 0).all()
    assert metrics["evaluation_compression"][2:].between(3, 4).all()
    assert metrics["ranks"][2] == metrics["ranks"][3]
    network, _ = load_network(tmp_path / "a")  # of an epoch after the cut, however good those before were
    assert isinstance(network.conv2, {"low-rank": SpatialLowRankConv2d, "factors": Factors}[kind])
    assert isinstance(network.fc1, nn.Linear)


@pytest.mark.parametrize(("kind", "size"), [("low-rank", "compression"), ("factors", "factors")])
def test_the_cut_keeps_what_the_loss_needs(kind, size, lenet5):
    by_loss, by_weights = (
        lenet5(by, *FAST, *LARGE, f"--{size}", 95, "--lr", 0.01, "--cut-by", by, kind=kind)
        for by in ("loss", "weights")
    )
    assert by_loss["train_loss"][2] < by_weights["train_loss"][2]


@pytest.mark.parametrize("kind", ["low-rank", "factors"])
@pytest.mark.parametrize(
    "flags", [(), (*FAST, "--schedule", "plateau")], ids=["Muon, cosine", "SGD, plateau"]
)
def test_a_run_that_breaks_off_again_and_again_ends_with_the_same_weights(
    kind, flags, lenet5, tmp_path, monkeypatch
):
    """In the dense epochs, right at the cut, and after it."""
    whole = lenet5("whole", *flags, kind=kind)
    one_epoch = dlrt.training._epoch

    def breaks_off(*given):
        if given[5] == epoch:
            raise KeyboardInterrupt
        return one_epoch(*given)

    for epoch in (2, 3, 4):
        monkeypatch.setattr(dlrt.training, "_epoch", breaks_off)
        goes_on = ["--resume"] if epoch > 2 else []
        assert len(lenet5("a", *flags, *goes_on, code=130, kind=kind)) == epoch - 1
        monkeypatch.undo()
    assert lenet5("a", *flags, "--resume", kind=kind)[MEASURED].equals(whole[MEASURED])
    ends, again = (load_checkpoint(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "a"))
    assert all(torch.equal(ends[name], again[name]) for name in ends.keys() | again.keys())


def test_a_schedule_that_waits_for_the_loss_goes_on_waiting(lenet5, monkeypatch):
    """The rate that it has fallen to, and the epochs that it has waited, are those of the dense part."""
    for measured in ("train_epoch", "evaluate"):
        monkeypatch.setattr(dlrt.training, measured, lambda *_: (1.0, 50.0))
    metrics = lenet5("a", "--schedule", "plateau", "--epochs", 10, "--dense-epochs", 7)
    assert metrics["lr"].tolist() == pytest.approx([0.05] * 5 + [0.005] * 4 + [0.0005])


def test_what_is_low_rank_is_what_skip_leaves(lenet5, tmp_path):
    lenet5("a", *FAST, *LARGE)
    network, _ = load_network(tmp_path / "a")
    low_rank = {name for name, module in network.named_modules() if isinstance(module, LowRankLayer)}
    assert low_rank == {"conv2", "fc1"}


def test_the_rule_is_for_layers_that_a_cut_leaves_whole_as_well(lenet5, tmp_path):
    """At a compression that some need not bear: they are low-rank of full rank, and count as dense."""
    metrics = lenet5("a", *FAST, *LARGE, "--compression", 10, "--no-spatial")
    network, _ = load_network(tmp_path / "a")
    ranks = {layer: layer.rank for layer in (network.conv2, network.fc1)}
    assert any(rank == min(layer.shape) for layer, rank in ranks.items())
    assert metrics["evaluation_compression"].iloc[-1] >= 10


@pytest.mark.parametrize(
    ("script", "wanted"), [("lenet5_mnist", "--compression"), ("lenet5_mnist_baseline", "--factors")]
)
def test_what_is_out_of_reach_is_told_before_the_first_epoch(script, wanted, run_script, tmp_path):
    flags = ("--dataset", "digits", "--output-dir", tmp_path, "--dense-epochs", 2, wanted, 99.9)
    result = run_script(f"mnist/{script}.py", *flags)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert f"{wanted} must be at most 0.9" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_in_another_form_than_the_options_say_is_refused(lenet5, tmp_path):
    """Nothing goes on dense that is to be in factors, and nothing the other way; nor what is damaged."""
    for kind in START:
        lenet5(kind, *FAST, kind=kind)
    states = {kind: load_checkpoint(tmp_path / kind / "checkpoint.pt") for kind in START}
    wrong = [(kind, states[other]) for kind in START for other in START if other != kind]
    first, second = "conv2.0.weight", "conv2.1.weight"
    for name, value in ((second, None), (first, torch.tensor(1.0)), (second, 1)):
        weights = dict(states["factors"]["model"])
        weights[name] = weights[name][..., None] if value == 1 else value
        weights = {name: weight for name, weight in weights.items() if weight is not None}
        wrong.append(("factors", {**states["factors"], "model": weights}))
    for kind, state in wrong:
        torch.save(state, tmp_path / kind / "checkpoint.pt")
        lenet5(kind, *FAST, "--resume", kind=kind, code=1)


def test_the_optimizer_before_the_cut_lets_go_of_the_weights():
    """Whoever still holds it: they would take as much memory as the dense network."""
    models = nn.Linear(3, 2), nn.Linear(3, 2)
    before, after = (torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9) for model in models)
    models[0](torch.ones(1, 3)).sum().backward()
    before.step()
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(before, T_max=4)
    go_on_with(scheduler, after)
    assert not before.state
    assert not any(group["params"] for group in before.param_groups)


@pytest.mark.parametrize(("kind", "size"), [(DenseOptions, "factors"), (LowRankOptions, "compression")])
def test_the_two_parts_may_have_step_sizes_of_their_own(kind, size):
    sizes = {"lr": 0.1, "update": "muon", "update_lr": 0.02, "dense_update_lr": 0.03}
    options = kind(epochs=2, dense_epochs=1, cut_by="weights", **{size: 50}, **sizes)

    def share(model):
        return max(group.get("update_share", 0) for group in make_optimizer(model, options, 1).param_groups)

    model = nn.Sequential(nn.Linear(30, 40), nn.Linear(40, 30))
    assert share(model) == pytest.approx(0.3)
    assert share(cut(model, options, dataset=None)) == pytest.approx(0.2)


def test_a_network_that_is_one_layer_is_cut():
    options = LowRankOptions(epochs=2, dense_epochs=1, compression=50, cut_by="weights")
    layer = cut(nn.Linear(30, 40), options, dataset=None)
    assert isinstance(layer, LowRankLayer)
    assert layer.rank == 8
