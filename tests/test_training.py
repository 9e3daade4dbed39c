"""The loop: every sample counts alike, it learns, a resumed run ends like any other, failures are told."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from shared import plain
from torch import nn
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LambdaLR, ReduceLROnPlateau

from dlrt import DLRT, LowRankLayer, to_low_rank
from dlrt.data import Split
from dlrt.datasets import digits
from dlrt.errors import RunError
from dlrt.models import MLP
from dlrt.runs import Run, chosen_epoch, read_metrics
from dlrt.training import evaluate, fit, tau_fraction, train_epoch

RECIPE = plain(epochs=4, batch_size=64, tau=0.1)
S_STEPS = {"integrator": "parallel", "s_steps": 3}
BUDGET = {"integrator": "parallel", "compression": 0.8, "ramp": 50}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def dataset():
    return digits(None, 0)


def network(low_rank=True, seed=0):
    torch.manual_seed(seed)
    model = MLP(shape=(1, 28, 28), classes=10, width=16)
    return to_low_rank(model, rank=0.5, skip=["fc5"]) if low_rank else model


def optimizer_for(model, kind=torch.optim.SGD, integrator="augmented", **inner):
    inner = {"lr": 0.1} | inner
    if any(isinstance(module, LowRankLayer) for module in model.modules()):
        return DLRT(model, kind, integrator=integrator, **inner)
    return kind(model.parameters(), **inner)


def constant(optimizer):
    return ConstantLR(optimizer, factor=1.0)


def cosine(optimizer):
    return CosineAnnealingLR(optimizer, T_max=4)


def plateau(optimizer):
    return ReduceLROnPlateau(optimizer, factor=0.1, patience=0, threshold=0.5)


def backwards_at_last(optimizer):
    """The fourth epoch goes uphill, so that it is not the best one."""
    return LambdaLR(optimizer, lambda epoch: -0.5 if epoch == 3 else 1.0)


def train(dataset, run, recipe=RECIPE, low_rank=True, schedule=constant, seed=0, **options):
    """A fresh model, optimizer and scheduler, trained in the run's folder from its last checkpoint on."""
    model = network(low_rank, seed)
    optimizer = optimizer_for(model, **options)
    run.folder.mkdir(exist_ok=True)
    return model, fit(model, optimizer, schedule(optimizer), dataset, recipe, run, {}, quiet=True)


def test_what_a_network_begins_with_is_measured_but_not_chosen(dataset, tmp_path):
    for tau in (0.0, 0.5):
        recipe = replace(RECIPE, epochs=1, tau=tau, from_checkpoint=Path("weights"))
        _, metrics = train(dataset, Run(tmp_path / f"{tau}"), recipe, lr=1e-9)
        assert list(metrics["epoch"]) == [0, 1]
        assert list(metrics["tau"]) == [0.0, tau]
        assert chosen_epoch(metrics.assign(validation_accuracy=[9.0, 1.0])) == 1


def test_a_plateau_is_one_of_trained_epochs(dataset, tmp_path):
    """The accuracy before training, epoch 0, moves no schedule."""
    recipe = replace(RECIPE, epochs=2, from_checkpoint=Path("weights"))
    _, metrics = train(dataset, Run(tmp_path), recipe, schedule=plateau, lr=1e-6)
    assert list(metrics["lr"]) == [1e-6] * 3


class BrokenOff(Run):
    """A run that is broken off after its second epoch."""

    def save(self, state):
        super().save(state)
        if len(state["metrics"]) == 2:
            raise KeyboardInterrupt


def assert_equal_weights(weights, others):
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]), name


def test_evaluate_weighs_every_sample_alike():
    logits = torch.tensor([[9.0, 0.0], [9.0, 0.0], [9.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    split = Split(logits.view(5, 2, 1, 1), torch.zeros(5, dtype=torch.long))
    for size in (1, 2, 3, 4, 5):  # batches of 4 and 1: the mean of the batches' means would be 50 %
        loss, accuracy = evaluate(nn.Flatten(), split, batch_size=size)
        assert accuracy == 80.0
        assert loss == pytest.approx(9 / 5, rel=1e-3)


def test_evaluate_is_in_eval_mode_and_builds_no_graph(dataset):
    model, with_graph = nn.Sequential(network(), nn.Dropout(0.9)), []
    model.register_forward_hook(lambda module, inputs, output: with_graph.append(output.requires_grad))
    assert evaluate(model, dataset.test) == evaluate(model, dataset.test)
    assert with_graph == [False, False]


def test_losses_while_training_weigh_every_sample_alike(dataset, tmp_path):
    model = network(low_rank=False)
    optimizer = optimizer_for(model, lr=0.0)  # nothing moves, so that the two must agree
    recipe = replace(RECIPE, batch_size=500)  # 500, 500 and 77
    measured = train_epoch(model, optimizer, dataset, recipe, 1, Run(tmp_path), quiet=True)
    assert measured == pytest.approx(evaluate(model, dataset.train), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "shrinks_to"),  # bug, of fixed rank 8 here, is the slowest on a deep and narrow net
    [({"low_rank": False}, 0.6), ({}, 0.6), ({"integrator": "parallel"}, 0.6), ({"integrator": "bug"}, 0.9)],
)
def test_training_improves_the_validation_accuracy(dataset, tmp_path, options, shrinks_to):
    recipe = plain(epochs=6, batch_size=32, tau=0.1)
    untrained = evaluate(network(options.get("low_rank", True)), dataset.validation)[1]
    model, metrics = train(dataset, Run(tmp_path), recipe, momentum=0.5, **options)
    accuracy = evaluate(model, dataset.validation)[1]
    assert untrained < 30
    assert accuracy > (50 if shrinks_to < 0.9 else 35)
    assert metrics["train_loss"].iloc[-1] < metrics["train_loss"].iloc[0] * shrinks_to
    assert metrics["epoch"].tolist() == [1, 2, 3, 4, 5, 6]


def test_the_model_ends_with_the_weights_of_the_chosen_epoch(dataset, tmp_path):
    model, metrics = train(dataset, Run(tmp_path), schedule=backwards_at_last)
    row = metrics.loc[chosen_epoch(metrics)]
    assert row["epoch"] < 4
    assert evaluate(model, dataset.validation) == (row["validation_loss"], row["validation_accuracy"])
    assert evaluate(model, dataset.test) == (row["test_loss"], row["test_accuracy"])
    assert_equal_weights(model.state_dict(), Run(tmp_path).load()["chosen"])


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        (RECIPE, {"low_rank": False, "momentum": 0.9, "schedule": cosine}),
        (RECIPE, {"schedule": cosine}),
        (replace(RECIPE, augment=True), {"momentum": 0.9, "schedule": cosine, **S_STEPS}),
        (replace(RECIPE, tau_warmup=3.0), {"momentum": 0.9, "schedule": cosine}),
        (RECIPE, {"momentum": 0.9, "schedule": plateau}),
        (RECIPE, {"kind": torch.optim.Adam, "lr": 0.01}),
        (RECIPE, {"momentum": 0.9, "integrator": "parallel"}),
        (RECIPE, {"momentum": 0.9, "integrator": "bug"}),
        (replace(RECIPE, tau=0.0), {"momentum": 0.9, "update": "muon", **BUDGET}),
        (replace(RECIPE, epochs=1, finetune_epochs=3), {"momentum": 0.9}),
        (replace(RECIPE, epochs=2, finetune_epochs=2), {"momentum": 0.9}),
    ],
    ids=[
        "dense",
        "plain",
        "momentum",
        "warmup",
        "plateau",
        "adam",
        "parallel",
        "bug",
        "budget",
        "finetune",
        "refreeze",
    ],
)
def test_a_resumed_run_ends_bit_for_bit_as_an_uninterrupted_one(dataset, tmp_path, recipe, options):
    straight, metrics = train(dataset, Run(tmp_path / "straight"), recipe, **options)
    with pytest.raises(KeyboardInterrupt):
        train(dataset, BrokenOff(tmp_path / "broken"), recipe, **options)
    assert len(read_metrics(tmp_path / "broken")) == 2
    resumed, again = train(
        dataset, Run(tmp_path / "broken"), recipe, seed=7, **options
    )  # seed: all is loaded
    assert_equal_weights(straight.state_dict(), resumed.state_dict())
    last, also_last = (Run(tmp_path / name).load() for name in ("straight", "broken"))
    assert_equal_weights(last["model"], also_last["model"])
    assert last["scheduler"] == also_last["scheduler"]
    assert metrics.drop(columns="seconds").equals(again.drop(columns="seconds"))


def test_a_finished_run_is_not_trained_further(dataset, tmp_path):
    recipe = replace(RECIPE, epochs=2)
    model, metrics = train(dataset, Run(tmp_path), recipe)
    again, same = train(dataset, Run(tmp_path), recipe, seed=7)
    assert_equal_weights(model.state_dict(), again.state_dict())
    assert metrics.equals(same)


def test_fine_tuning_keeps_the_bases_and_moves_the_rest(dataset, tmp_path):
    recipe = replace(RECIPE, epochs=1)
    train(dataset, Run(tmp_path), recipe, momentum=0.9)
    start, before = network().state_dict(), Run(tmp_path).load()["model"]
    _, metrics = train(dataset, Run(tmp_path), replace(recipe, finetune_epochs=2), momentum=0.9)
    after = Run(tmp_path).load()["model"]
    assert metrics["frozen_bases"].tolist() == [False, True, True]
    assert start.keys() == before.keys() == after.keys()
    for name in before:
        assert not torch.equal(start[name], before[name]), name
        assert torch.equal(before[name], after[name]) == name.endswith((".U", ".V")), name


def test_the_learning_rate_follows_the_schedule(dataset, tmp_path):
    _, metrics = train(dataset, Run(tmp_path / "cosine"), schedule=cosine, low_rank=False)
    expected = [0.1 * (1 + math.cos(math.pi * epoch / 4)) / 2 for epoch in range(4)]
    assert metrics["lr"].tolist() == pytest.approx(expected)
    _, metrics = train(dataset, Run(tmp_path / "plateau"), schedule=plateau, lr=1e-6, low_rank=False)
    assert metrics["lr"].tolist() == pytest.approx([1e-6, 1e-6, 1e-7, 1e-8])  # no epoch helps


def test_the_tolerance_rises_linearly_and_then_stays(dataset, tmp_path):
    recipe = plain(epochs=3, batch_size=64, tau=0.2, tau_warmup=2.0)
    assert [tau_fraction(recipe, epochs) for epochs in (0, 0.5, 1, 1.5, 2, 2.5, 3)] == [
        0,
        0.25,
        0.5,
        0.75,
        1,
        1,
        1,
    ]
    assert tau_fraction(replace(recipe, tau_warmup=0.0), 0.1) == 1.0
    _, metrics = train(dataset, Run(tmp_path), recipe)
    assert metrics["tau"].tolist() == pytest.approx([0.1, 0.2, 0.2])


def test_the_tolerance_rises_with_every_step(dataset, tmp_path):
    taus = []

    class Watched(DLRT):
        def step(self, closure=None):
            taus.append(self.tau)
            return super().step(closure)

    model, recipe = network(), plain(epochs=3, batch_size=100, tau=0.2, tau_warmup=2.0)
    optimizer = Watched(model, torch.optim.SGD, lr=0.1)
    for epoch in (1, 2, 3):
        train_epoch(model, optimizer, dataset, recipe, epoch, Run(tmp_path), quiet=True)
    steps = 11  # of 100 samples in each epoch of 1,077
    expected = [min(0.2, 0.2 * step / (2 * steps)) for step in range(1, 3 * steps + 1)]
    assert taus == pytest.approx(expected)


CASES = [
    {"low_rank": False},
    {"low_rank": False, "kind": torch.optim.Adam},
    {},
    {"momentum": 0.9},
    {"kind": torch.optim.Adam},
    {"integrator": "parallel"},
    {"integrator": "bug"},
]


OVERFLOWS = [
    {"lr": 1e8},
    {"lr": 1e8, "integrator": "parallel"},
]  # the gradients are finite and their SVD fails


@pytest.mark.parametrize("options", [*({"lr": 1e30} | case for case in CASES), *OVERFLOWS])
def test_a_diverging_run_says_where_and_what_is_left(dataset, tmp_path, options):
    with pytest.raises(FloatingPointError, match=r"epoch 1, step \d+.*none was written.*smaller --lr"):
        train(dataset, Run(tmp_path), **options)


@pytest.mark.parametrize("options", CASES)
def test_data_that_overflow_say_where_and_leave_the_last_checkpoint(dataset, tmp_path, options):
    run = Run(tmp_path)
    train(dataset, run, replace(RECIPE, epochs=1), **options)
    before = run.checkpoint.read_bytes()
    images = torch.full_like(dataset.train.images, 3e38)
    broken = replace(dataset, train=Split(images, dataset.train.labels))
    with pytest.raises(FloatingPointError, match="epoch 2, step 1") as error:
        train(broken, run, replace(RECIPE, epochs=2), **options)
    assert str(run.checkpoint) in str(error.value)
    assert run.checkpoint.read_bytes() == before


@pytest.mark.parametrize("options", CASES)
def test_a_network_that_diverged_in_the_last_step_of_an_epoch_is_not_saved(dataset, tmp_path, options):
    recipe = replace(RECIPE, epochs=2, batch_size=2_000)  # one step an epoch: its loss is still finite
    with pytest.raises(FloatingPointError, match="epoch 1"):
        train(dataset, Run(tmp_path), recipe, lr=1e30, **options)
    assert Run(tmp_path).load() is None


def first(group, **changed):
    """A state of an optimizer with other values in its first group."""
    return {**group, "param_groups": [{**group["param_groups"][0], **changed}, *group["param_groups"][1:]]}


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        *((name, wrong) for name in ("optimizer", "scheduler") for wrong in (None, 3, [], {}, "x", {"x": 1})),
        *((name, lambda part: {**part, next(iter(part)): torch.zeros(())}) for name in ("model", "chosen")),
        *(("optimizer", lambda part, value=value: first(part, lr=value)) for value in ("x", None, [])),
        *(
            ("optimizer", lambda part, value=value: {**part, "state": {0: {"velocity": value}}})
            for value in ("x", None, [], torch.zeros(7))
        ),
        *(("scheduler", lambda part, value=value: {**part, "last_epoch": value}) for value in ("x", None)),
        *(("metrics", lambda part, value=value: [{**part[0], "tau": value}]) for value in ("x", [1])),
        ("metrics", lambda part: [{"epoch": 1}]),
    ],
)
def test_a_checkpoint_with_a_part_of_another_form_is_not_continued(dataset, tmp_path, name, wrong):
    run = Run(tmp_path)
    train(dataset, run, replace(RECIPE, epochs=1, batch_size=2_000))
    state = run.load()
    torch.save({**state, name: wrong(state[name]) if callable(wrong) else wrong}, run.checkpoint)
    with pytest.raises(RunError, match=r"checkpoint\.pt is (of another network|a damaged checkpoint)"):
        train(dataset, run, replace(RECIPE, epochs=2, batch_size=2_000))
