"""Runs with --dense-epochs: first those of a dense run, then one cut by what the loss needs; one schedule."""

import pytest
import torch

import dlrt.training
from dlrt.checkpoint import load_checkpoint, load_network
from dlrt.convolutions import SpatialLowRankConv2d
from dlrt.layers import LowRankLayer
from dlrt.runs import read_metrics

START = ("--dense-epochs", 2, "--compression", 95, "--spatial")
RULE = ("--update", "muon", "--nesterov", "--epochs", 4)
MEASURED = ["lr", "train_loss", "validation_loss", "validation_accuracy", "test_loss", "test_accuracy"]


@pytest.fixture
def lenet5(run_script, tmp_path):
    """Two epochs of LeNet5 on the digits and two more; gives the metrics."""
    flags = ["--dataset", "digits", "--device", "cpu", "--output-dir", tmp_path, *RULE]

    def run(name, *more, code=0, dense=False):
        script = f"mnist/lenet5_mnist{'_baseline' if dense else ''}.py"
        result = run_script(script, *flags, *(() if dense else START), "--name", name, *more)
        assert result.returncode == code, result.stderr
        return read_metrics(tmp_path / name)

    return run


def test_the_first_epochs_are_those_of_a_dense_run_and_the_others_are_low_rank(lenet5, tmp_path):
    dense, metrics = lenet5("dense", dense=True), lenet5("a")
    assert metrics[MEASURED][:2].equals(dense[MEASURED][:2])
    assert metrics["lr"].tolist() == dense["lr"].tolist()
    assert (metrics["evaluation_compression"][:2] == 0).all()
    assert metrics["evaluation_compression"][2:].between(95, 96).all()
    assert metrics["ranks"][2] == metrics["ranks"][3] != ""
    network, _ = load_network(tmp_path / "a")  # of an epoch after the cut, however good those before were
    assert any(isinstance(module, SpatialLowRankConv2d) for module in network.modules())


def test_the_cut_keeps_what_the_loss_needs(lenet5):
    by_loss, by_weights = (lenet5(by, "--lr", 0.01, "--cut-by", by) for by in ("loss", "weights"))
    assert by_loss["train_loss"][2] < by_weights["train_loss"][2]


def test_a_run_that_breaks_off_again_and_again_ends_with_the_same_weights(lenet5, tmp_path, monkeypatch):
    """In the dense epochs, right at the cut, and after it."""
    whole = lenet5("whole")
    one_epoch = dlrt.training._epoch

    def breaks_off(*given):
        if given[5] == epoch:
            raise KeyboardInterrupt
        return one_epoch(*given)

    for epoch in (2, 3, 4):
        monkeypatch.setattr(dlrt.training, "_epoch", breaks_off)
        assert len(lenet5("a", *(["--resume"] if epoch > 2 else []), code=130)) == epoch - 1
        monkeypatch.undo()
    assert lenet5("a", "--resume")[MEASURED].equals(whole[MEASURED])
    ends, again = (load_checkpoint(tmp_path / name / "checkpoint.pt")["model"] for name in ("whole", "a"))
    assert all(torch.equal(ends[name], again[name]) for name in ends.keys() | again.keys())


def test_a_schedule_that_waits_for_the_loss_goes_on_waiting(lenet5, monkeypatch):
    """The rate that it has fallen to, and the epochs that it has waited, are those of the dense part."""
    for measured in ("train_epoch", "evaluate"):
        monkeypatch.setattr(dlrt.training, measured, lambda *_: (1.0, 50.0))
    metrics = lenet5("a", "--schedule", "plateau", "--epochs", 10, "--dense-epochs", 7)
    assert metrics["lr"].tolist() == pytest.approx([0.05] * 5 + [0.005] * 4 + [0.0005])


def test_what_is_low_rank_is_what_skip_leaves(lenet5, tmp_path):
    lenet5("a", "--skip", "conv1", "fc2")
    network, _ = load_network(tmp_path / "a")
    low_rank = {name for name, module in network.named_modules() if isinstance(module, LowRankLayer)}
    assert low_rank == {"conv2", "fc1"}


def test_what_is_out_of_reach_is_told_before_the_first_epoch(run_script, tmp_path):
    flags = ("--dataset", "digits", "--output-dir", tmp_path, "--dense-epochs", 2, "--compression", 99.9)
    result = run_script("mnist/lenet5_mnist.py", *flags)
    assert (result.returncode, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    assert "--compression must be at most 0.9" in result.stderr
    assert list(tmp_path.iterdir()) == []
