"""What happens to runs: killed while writing, full disks, two at once, wrong files, odd data, odd layers."""

import ctypes
import os
import resource
import signal
import struct
import subprocess
import time
from contextlib import contextmanager, redirect_stderr
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_training import RECIPE, assert_equal_weights, dataset, network, one_thread, optimizer_for, train
from torch import nn
from torch.overrides import TorchFunctionMode

from dlrt import DLRT, LowRankConv2d, LowRankLinear, script, to_low_rank
from dlrt.checkpoint import load_checkpoint
from dlrt.data import Split
from dlrt.errors import DataError, RunError
from dlrt.low_rank_options import LowRankOptions
from dlrt.models import MLP
from dlrt.options import ROOT
from dlrt.picture_sets import picture_set
from dlrt.runs import Run
from dlrt.training import fit

__all__ = ["dataset", "one_thread"]  # fixtures
QUICK = ["--dataset", "digits", "--epochs", "1", "--batch-size", "128", "--device", "cpu", "--name", "a"]


def trained(folder, *flags):
    """A training script, in this process; its exit code."""
    options = LowRankOptions.parse("", [*QUICK, "--output-dir", str(folder), *flags], skip=["fc5"])
    try:
        script.run(options, MLP, folder, settings={"width": 8})
    except SystemExit as error:
        return error.code
    return 0


def in_a_child(action):
    """Fork, act, and give the child's process number; it ends as the action ends it, else with 0."""
    if child := os.fork():
        return child
    try:
        torch.set_num_threads(1)
        action()
    except BaseException:
        os._exit(1)
    os._exit(0)


def signal_that_ended(child):
    return os.WTERMSIG(os.waitpid(child, 0)[1])


@contextmanager
def files_up_to(size):
    """A disk that has room for so many bytes in a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class KilledWhileWriting(Run):
    """The kernel ends the process in the middle of the second checkpoint, at a byte of its choice."""

    def save(self, state):
        if len(state["metrics"]) == 2:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            half = self.checkpoint.stat().st_size // 2
            resource.setrlimit(resource.RLIMIT_FSIZE, (half, half))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        super().save(state)


def test_a_run_killed_while_it_writes_a_checkpoint_resumes_bit_for_bit(dataset, tmp_path):
    recipe = replace(RECIPE, epochs=3, augment=True)
    options = {"integrator": "parallel", "momentum": 0.9, "s_steps": 4}
    straight, _ = train(dataset, Run(tmp_path / "straight"), recipe, **options)
    broken = KilledWhileWriting(tmp_path / "broken")
    child = in_a_child(lambda: train(dataset, broken, recipe, **options))
    assert signal_that_ended(child) == signal.SIGXFSZ
    whole, part = broken.checkpoint.stat(), (broken.folder / "checkpoint.pt.part").stat()
    assert 0 < part.st_size < whole.st_size  # it was in the midst of it
    assert len(load_checkpoint(broken.checkpoint)["metrics"]) == 1
    resumed, _ = train(dataset, Run(tmp_path / "broken"), recipe, seed=7, **options)
    assert_equal_weights(straight.state_dict(), resumed.state_dict())


def test_a_full_disk_leaves_the_last_checkpoint_and_says_how_to_go_on(dataset, tmp_path):
    run = Run(tmp_path)
    train(dataset, run, replace(RECIPE, epochs=1))
    before = run.checkpoint.read_bytes()
    with files_up_to(len(before) // 2), pytest.raises(OSError, match=r"too large.*--resume") as error:
        train(dataset, run, replace(RECIPE, epochs=2))
    assert str(run.checkpoint) in str(error.value)
    assert run.checkpoint.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "metrics.csv"]
    train(dataset, run, replace(RECIPE, epochs=2))  # there is room again


def test_a_script_on_a_full_disk_ends_with_one_line(tmp_path, capsys):
    with files_up_to(5_000):
        assert trained(tmp_path, "--quiet") == 1
    message = capsys.readouterr().err
    assert f"{tmp_path / 'a' / 'checkpoint.pt'} cannot be written" in message
    assert len(message.splitlines()) == 1
    lock = ["git", "rev-parse", "--path-format=absolute", "--git-path", "index.lock"]
    path = subprocess.run(lock, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    assert not path or not os.path.exists(path)  # asking for the commit wrote nothing


def drop_root_privileges():
    """Give up all capabilities, so that permissions hold for root, too."""
    ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))


def test_a_folder_that_may_not_be_written_costs_one_line(tmp_path):
    folder, message = tmp_path / "results", tmp_path / "message"
    folder.mkdir()
    folder.chmod(0o555)

    def run():
        if os.geteuid() == 0:
            drop_root_privileges()
        with message.open("w") as file, redirect_stderr(file):
            trained(folder)

    os.waitpid(in_a_child(run), 0)
    assert "Permission denied" in message.read_text()
    assert str(folder) in message.read_text()
    assert len(message.read_text().splitlines()) == 1
    assert list(folder.iterdir()) == []


def test_two_runs_into_one_folder_are_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    folder = tmp_path / "a"

    def run():
        own_run = Run(folder)
        own_run.start({"lr": 0.1}, resume=False)
        time.sleep(60)

    child = in_a_child(run)
    try:
        end = time.monotonic() + 30
        while not (folder / "config.json").exists() and time.monotonic() < end:
            time.sleep(0.01)
        for resume in (False, True):
            with pytest.raises(RunError, match="another process writes to") as error:
                Run(folder).start({"lr": 0.1}, resume)
            assert str(folder) in str(error.value)
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    Run(folder).start({"lr": 0.1}, resume=True)


def test_a_checkpoint_of_another_network_is_refused_in_one_line(dataset, tmp_path):
    for name, other in (("dense", {"low_rank": False}), ("adam", {"kind": torch.optim.Adam})):
        run = Run(tmp_path / name)
        train(dataset, run, replace(RECIPE, epochs=1))
        state = run.load()
        if name == "adam":
            state["optimizer"]["param_groups"].append({"params": [99]})
            run.save(state)
        with pytest.raises(RunError, match="is of another network") as error:
            train(dataset, run, replace(RECIPE, epochs=2), **other)
        assert str(run.checkpoint) in str(error.value)
        assert len(str(error.value).splitlines()) == 1


def test_a_rank_larger_than_possible_is_the_full_rank(tmp_path, capsys):
    assert trained(tmp_path, "--rank", "99999", "--tau", "0", "--quiet") == 0
    assert "ranks 8/8/8/8" in capsys.readouterr().out


@pytest.mark.parametrize("tau", [-0.1, 1.0, 1.5, float("nan")])
def test_an_impossible_tolerance_is_refused_at_any_time(tau):
    model = to_low_rank(MLP(width=8))
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        DLRT(model, torch.optim.SGD, lr=0.1, tau=tau)
    optimizer = DLRT(model, torch.optim.SGD, lr=0.1)
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        optimizer.tau = tau


def test_a_batch_larger_than_the_data_set_is_the_data_set(dataset, tmp_path):
    samples = len(dataset.train)
    models = [
        train(dataset, Run(tmp_path / str(size)), replace(RECIPE, epochs=2, batch_size=size))[0]
        for size in (samples, samples + 1, 10**6)
    ]
    for model in models[1:]:
        assert_equal_weights(models[0].state_dict(), model.state_dict())


def without_samples(split):
    return Split(split.images[:0], split.labels[:0])


def test_an_empty_data_set_is_refused(dataset, tmp_path):
    for name in ("train", "validation", "test"):
        empty = replace(dataset, **{name: without_samples(getattr(dataset, name))})
        with pytest.raises(ValueError, match=f"digits has none for {name}"):
            train(empty, Run(tmp_path))
    nothing = torch.zeros(0, 1, 28, 28, dtype=torch.uint8), torch.zeros(0, dtype=torch.uint8)
    with pytest.raises(DataError, match="more than 360 training images are needed, got 0"):
        picture_set("digits", (*nothing, *nothing), 0, validation=360)


def test_a_data_set_of_one_class_is_learnt_and_nothing_breaks(dataset, tmp_path):
    for label, options in ((0, {}), (3, {"integrator": "parallel"}), (3, {"integrator": "bug"})):
        parts = {
            name: replace(split, labels=torch.full_like(split.labels, label))
            for name, split in (("train", dataset.train), ("validation", dataset.validation))
        }
        run = Run(tmp_path / f"{label}{options}")
        _, metrics = train(replace(dataset, **parts), run, replace(RECIPE, epochs=2), **options)
        assert metrics["validation_accuracy"].iloc[-1] == 100


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        hidden = nn.Linear(784, 8), nn.BatchNorm1d(8), nn.ReLU()
        self.body = nn.Sequential(nn.Flatten(), *hidden, nn.Linear(8, 10))

    def forward(self, x):
        return self.body(x)


def test_batch_normalisation_survives_a_sample_that_is_left_over(dataset, tmp_path):
    few = replace(dataset, train=Split(dataset.train.images[:65], dataset.train.labels[:65]))
    assert [len(y) for _, y in few.train.batches(32)] == [32, 33]
    model = to_low_rank(Normed(), rank=4)
    optimizer = optimizer_for(model)
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    metrics = fit(model, optimizer, schedule, few, replace(RECIPE, batch_size=32), Run(tmp_path), {}, True)
    assert metrics["train_loss"].iloc[-1] < metrics["train_loss"].iloc[0]


class BrokenLapack(TorchFunctionMode):
    """An SVD that does not converge for some types of numbers, which no matrix at hand makes it do."""

    def __init__(self, *broken):
        super().__init__()
        self.broken, self.calls = broken, []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.linalg.svd:
            self.calls.append(args[0].dtype)
            if args[0].dtype in self.broken:
                raise torch.linalg.LinAlgError("linalg.svd: the algorithm failed to converge")
        return function(*args, **(kwargs or {}))


def one_step():
    model = network()
    optimizer = optimizer_for(model, integrator="parallel")
    torch.manual_seed(1)
    model(torch.randn(8, 1, 28, 28)).square().mean().backward()
    optimizer.step()
    return model


def test_an_svd_that_does_not_converge_is_repeated_in_float64():
    expected = one_step()
    with BrokenLapack(torch.float32) as lapack:
        model = one_step()
    assert {torch.float32, torch.float64} == set(lapack.calls)
    assert torch.allclose(model.fc2.weight, expected.fc2.weight, atol=1e-5)


def test_an_svd_that_converges_in_no_precision_names_the_layer():
    model = network()
    optimizer = optimizer_for(model, integrator="parallel")
    model(torch.randn(8, 1, 28, 28)).square().mean().backward()
    both = BrokenLapack(torch.float32, torch.float64)
    with both, pytest.raises(torch.linalg.LinAlgError, match=r"the SVD of S fails in fc1: .*converge"):
        optimizer.step()


sizes = st.integers(1, 9)
linear_layers = st.builds(lambda m, n: nn.Linear(n, m), sizes, sizes)
convolutions = st.builds(
    lambda m, n, **options: nn.Conv2d(n, m, **options),
    sizes,
    st.integers(1, 4),
    kernel_size=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    bias=st.booleans(),
)


@settings(max_examples=200, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    dense=linear_layers | convolutions,
    rank=st.floats(0.1, 1),
    samples=st.integers(1, 6),
    spatial=st.booleans(),
    integrator=st.sampled_from(["augmented", "parallel", "bug"]),
    s_steps=st.integers(1, 3),
    tau=st.sampled_from([0.0, 0.01, 0.1, 0.5]),
    lr=st.sampled_from([1e-3, 0.1, 1.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_every_layer_keeps_orthonormal_bases_and_its_weight_within_the_bound(
    dense, rank, samples, spatial, integrator, s_steps, tau, lr, seed
):
    torch.manual_seed(seed)
    layer = to_low_rank(dense, rank, spatial=spatial)
    conv = isinstance(layer, LowRankConv2d)
    assert conv or isinstance(layer, LowRankLinear)
    x = torch.randn(samples, layer.in_channels, 7, 6) if conv else torch.randn(samples, layer.in_features)
    options = {"integrator": integrator, "s_steps": s_steps if integrator == "parallel" else 1}
    optimizer = DLRT(layer, torch.optim.SGD, lr=lr, tau=tau, min_rank=1, **options)
    for _ in range(2):  # of three S-steps the truncation does not come
        before, gradients = layer.weight.detach(), []

        def closure(gradients=gradients):
            optimizer.zero_grad()
            same = layer.to_dense()  # the gradient for the whole weight
            (G,) = torch.autograd.grad(same(x).sin().mean(), same.weight)
            gradients.append(G.norm())
            loss = layer(x).sin().mean()
            loss.backward()
            return loss

        assert optimizer.step(closure).isfinite()
        for basis in (layer.U, layer.V):
            assert torch.allclose(basis.mT @ basis, torch.eye(basis.shape[1]), atol=1e-5)
        step = lr * gradients[0]
        bound = step + tau * (before.norm() + step)
        if integrator == "bug":  # the K- and the L-step, each of lr G, and the S-step at other weights
            bound = 2 * step + lr * gradients[1]
        assert (layer.weight - before).norm() <= bound + 1e-5 * (1 + before.norm())
