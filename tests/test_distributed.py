"""Two processes are one process on the joined batch; a lost one ends the run, and any number continues it."""

import io
import json
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import small_networks
import torch
import torch.distributed as dist
from shared import fork, plain
from small_networks import low_rank_layers
from torch import nn
from torch.nn.functional import cross_entropy

import dlrt
from dlrt import DLRT, distributed, to_low_rank
from dlrt.checkpoint import load_checkpoint
from dlrt.data import Dataset, Split
from dlrt.options import ROOT
from dlrt.runs import Run, epochs_done, read_metrics
from dlrt.training import evaluate, train_epoch

STEPS = {
    "parallel": {},
    "parallel, two S-steps": {"s_steps": 2},
    "parallel, four S-steps": {"s_steps": 4, "parts": 2},
    "augmented": {"integrator": "augmented"},
    "bug": {"integrator": "bug"},
}
ORDERS = {  # of the acts of a step, and the error, where there is one
    "backward step backward step": r"RuntimeError: the rank of \d would change.*call dlrt.distributed.reduce",
    "backward sum sum step": "RuntimeError: these gradients are summed already",
    "backward sum backward sum": "RuntimeError: these gradients are summed already",
    "backward backward sum step backward sum step": "none",
    "backward sum reset backward sum step": "none",
    "truncate": "none",
    "keep backward step move truncate": r"RuntimeError: the rank of \d would change",
    "keep backward step freeze": r"RuntimeError: the (rank|bases) of \d would",
}
RECIPE = plain(epochs=2, batch_size=12, tau=0.05, augment=True)


def network():
    torch.manual_seed(0)
    return to_low_rank(small_networks.network(), rank=6, skip=["5"])  # the convolution has full rank


def batches():
    """Sizes that two processes share evenly, unevenly, and not at all; bases are updated in large ones."""
    generator = torch.Generator().manual_seed(1)
    for size in (16, 7, 17, 3, 16, 2):
        x = torch.randn(size, 1, 8, 8, generator=generator, dtype=torch.float64)
        yield x, torch.randint(0, 4, (size,), generator=generator)


def split():
    x, y = zip(*batches(), strict=True)
    return Split(torch.cat(x), torch.cat(y))


def optimizer_for(model, integrator="parallel", kind=torch.optim.SGD, **options):
    options = {"lr": 0.1, "tau": 0.02, "min_rank": 1, "integrator": integrator} | options
    return DLRT(model, kind, **options)


def trained(parts=1, **options):
    """The network after a step on every batch, of which this process takes its share, in so many passes."""
    model = network()
    optimizer = optimizer_for(model, momentum=0.9, **options)

    for x, y in batches():
        x, y, weight = distributed.own_part(x, y)

        def closure(x=x, y=y, weight=weight):
            optimizer.zero_grad()
            for inputs, labels in zip(x.tensor_split(parts), y.tensor_split(parts), strict=True):
                share = weight * len(labels) / len(y)
                loss = share * cross_entropy(model(inputs), labels, reduction="sum") / max(1, len(labels))
                loss.backward()
            distributed.reduce_gradients(model)
            return loss

        optimizer.step(closure)
    distributed.check_identical(model)
    weights = [layer.weight for layer in low_rank_layers(model)]
    return [W.detach() for W in (*weights, *model[5].parameters(), model[0].bias)]


def epoch_of(data, folder):
    """Losses and accuracies of an epoch of training, and of the network after it."""
    model = network()
    dataset = Dataset("made up", data, data, data, 4, (0.0,), (1.0,), 1, False)
    measured = train_epoch(
        model, optimizer_for(model, s_steps=4), dataset, RECIPE, 1, Run(folder), quiet=True
    )
    return torch.tensor([*measured, *evaluate(model, data, batch_size=5)])


def error_of(action):
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def broken_epoch(folder):
    """One sample of the second process is not a number."""
    data = Split(split().images[:12].clone(), split().labels[:12])
    data.images[torch.randperm(12, generator=torch.Generator().manual_seed(1))[-1]] = float("nan")
    epoch_of(data, folder)


def keep_ranks(optimizer):
    optimizer.tau, optimizer.group["allot_at"] = 0.0, 10**6


def error_in(order, s_steps):
    """What is said where "backward", "sum" and "step" come in that order, after a step as it should be."""
    model = network()
    optimizer, (x, y) = optimizer_for(model, s_steps=s_steps, allot_every=1), next(batches())
    acts = {
        "backward": lambda: cross_entropy(model(x), y).backward(),
        "sum": lambda: distributed.reduce_gradients(model),
        "step": lambda: (optimizer.step(), optimizer.zero_grad()),
        "reset": lambda: model.zero_grad(),
        "keep": lambda: keep_ranks(optimizer),
        "move": lambda: setattr(optimizer, "tau", 0.5),
        "truncate": lambda: optimizer.truncate(),
        "freeze": lambda: (optimizer.zero_grad(), optimizer.freeze_bases()),
    }
    for act in ("backward", "sum", "step"):
        acts[act]()
    optimizer.tau = 0.5  # ranks are to change
    return error_of(lambda: [acts[act]() for act in order.split()])


def checked_with_one_other_bit():
    model = network()
    if distributed.process_rank() == 1:
        model[3].V[7, 1] *= 1 + 1e-15
    distributed.check_identical(model)


def bytes_of_a_step(model, integrator):
    optimizer, summed = optimizer_for(model, integrator, tau=0.0), []
    ranks = [layer.rank for layer in low_rank_layers(model)]

    def closure():
        optimizer.zero_grad()
        loss = model(torch.randn(4, 64)).square().mean()
        loss.backward()
        distributed.reduce_gradients(model)
        summed.extend(p.grad.nbytes for p in model.parameters() if getattr(p.grad, "is_sum", False))
        return loss

    optimizer.step(closure)
    return ranks, sum(summed)


def averaged_statistics():
    norm = nn.BatchNorm1d(2)
    norm(torch.full((3, 2), 10.0 * distributed.process_rank()))
    distributed.average_buffers(norm)
    return norm.running_mean


def raise_oserror():
    raise OSError("no space left")


def ends_with(action):
    try:
        distributed.on_first_process(action)
    except SystemExit as error:
        return f"exit {error.code}"
    except OSError as error:
        return str(error)


def work(rank, folder):
    """All that a process does; the tests look at what both saved."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    wide = nn.Sequential(dlrt.LowRankLinear(64, 80, 3), nn.Tanh(), nn.Linear(80, 2))
    results = {name: trained(**options) for name, options in STEPS.items()}
    results |= {
        "epoch": epoch_of(split(), folder),
        "broken": error_of(lambda: broken_epoch(folder)),
        "errors": {(order, n): error_in(order, n) for order in ORDERS for n in (1, 3)},
        "another bit": error_of(checked_with_one_other_bit),
        "bytes": {name: bytes_of_a_step(wide, name) for name in ("parallel", "augmented")},
        "averaged": averaged_statistics(),
        "first": (distributed.on_first_process(lambda: rank), ends_with(raise_oserror)),
    }
    with redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(ROOT / "timings" / "communication.py"), run_name="__main__")
    torch.save({**results, "printed": printed.getvalue()}, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "timings")
        flags = ["--width", "64", "--ranks", "2", "--output-dir", str(folder)]
        patch.setattr(sys, "argv", ["communication.py", *flags])
        torch.multiprocessing.start_processes(
            work, (folder,), nprocs=2, start_method="fork"
        )  # no new imports
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.usefixtures("float64")
def test_two_processes_train_as_one_on_the_joined_batch(both, name):
    for one, first, second in zip(trained(**STEPS[name]), both[0][name], both[1][name], strict=True):
        assert torch.equal(first, second)
        assert (first - one).norm() <= 1e-10 * one.norm()


@pytest.mark.usefixtures("float64")
def test_losses_and_accuracies_are_those_of_all_samples(both, tmp_path):
    assert torch.equal(both[0]["epoch"], both[1]["epoch"])
    assert torch.allclose(both[0]["epoch"], epoch_of(split(), tmp_path), rtol=1e-6)  # losses are float32


def test_all_processes_see_that_one_has_broken_data(both):
    for results in both:
        assert results["broken"].startswith("FloatingPointError: the loss is nan in epoch 1, step 1")


@pytest.mark.parametrize("s_steps", [1, 3])
@pytest.mark.parametrize("order", ORDERS)
def test_gradients_are_summed_once_between_the_last_backward_pass_and_the_step(both, order, s_steps):
    for results in both:
        assert re.match(ORDERS[order], results["errors"][order, s_steps])


def test_bases_that_differ_in_one_bit_are_named(both):
    for results in both:
        assert results["another bit"].startswith("ProcessError: the processes hold different values of 3.V:")


def test_a_step_communicates_its_products_and_never_a_matrix(both):
    m, n, rest = 80, 64, 80 + 2 * 80 + 2  # a bias, and a dense layer
    for integrator, passes in (("parallel", 1), ("augmented", 2)):
        (r,), reduced = both[0]["bytes"][integrator]
        second = (passes - 1) * (2 * r) ** 2  # of the S-step in the augmented bases
        assert reduced == 8 * ((m + n) * r + r**2 + second + passes * rest)
        assert reduced < 8 * (m * n + rest)


def test_the_networks_of_the_readme_communicate_less_than_dense_ones(both):
    assert both[1]["printed"] == ""
    lines = both[0]["printed"].splitlines()
    assert [line.split()[1] for line in lines] == ["LeNet5", "MLP"]
    for line in lines:
        assert float(line.split("fewer bytes ")[1].split()[0]) > 1
        assert "low-rank messages 1 " in line
    assert float(lines[0].split("fewer bytes ")[1].split()[0]) == pytest.approx(
        4.15, abs=0.01
    )  # all products


def test_running_statistics_are_averaged(both):
    for results in both:
        assert results["averaged"].tolist() == [0.5, 0.5]  # 0.1 of 0 and of 10


def test_what_the_first_process_does_reaches_the_others_and_so_does_its_failure(both):
    assert both[0]["first"] == (0, "no space left")
    assert both[1]["first"] == (0, "exit 1")


@pytest.mark.parametrize(("size", "parts"), [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2), (16, 2)])
def test_no_part_of_a_batch_is_a_single_sample_unless_the_batch_is(monkeypatch, size, parts):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    taken, weights = [], []
    for rank in (0, 1):
        monkeypatch.setattr(distributed, "process_rank", lambda rank=rank: rank)
        x, y, weight = distributed.own_part(torch.arange(size), torch.arange(size))
        assert torch.equal(x, y)
        assert len(y) > 1 or size == 1
        weights.append(weight)
        taken += y.tolist() if weight else []
    assert taken == list(range(size))
    assert sum(weights) == pytest.approx(1)
    assert sum(weight > 0 for weight in weights) == parts


EPOCHS = 20
TRAINING = ["--dataset", "digits", "--batch-size", "64", "--device", "cpu", "--width", "24", "--name", "a"]
TRAINING += ["--epochs", str(EPOCHS)]


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds the workers in /proc")
def test_a_killed_worker_ends_the_run_with_a_message_and_any_number_of_processes_resumes_it(tmp_path):
    run = tmp_path / "a"
    command = [str(ROOT / "mnist" / "mlp_mnist.py"), *TRAINING, "--output-dir", str(tmp_path)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, *TORCHRUN, *command], env=environment, **pipes) as launched:
        try:
            end = time.monotonic() + 240
            while epochs_done(run) < 2 and launched.poll() is None:  # the first one is printed by then
                assert time.monotonic() < end
                time.sleep(0.05)
            os.kill(children(launched.pid)[1], signal.SIGKILL)
            out, err = launched.communicate(timeout=60)
        finally:
            launched.terminate()
    assert launched.returncode != 0
    assert "another process was lost" in err or "SIGKILL" in err
    assert json.loads((run / "config.json").read_text())["machine"]["processes"] == 2
    done = len(load_checkpoint(run / "checkpoint.pt")["metrics"])
    assert 1 <= done < EPOCHS
    assert out.count("epoch   1/") == 1  # one process speaks
    resumed = fork([sys.executable, *command, "--resume"])
    assert resumed.returncode == 0, resumed.stderr
    assert f"epoch {done + 1:3d}/" in resumed.stdout
    assert read_metrics(run)["epoch"].tolist() == list(range(1, EPOCHS + 1))
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint.pt", "config.json", "metrics.csv"]
