"""The scripts of CIFAR-10, on 250 bundled digits of its shape."""

import json
import math
import shutil
import tarfile
from pathlib import Path

import pandas as pd
import pytest
import torch
from made_up_runs import load as loaded
from made_up_runs import makes

from dlrt import compression, grid
from dlrt.checkpoint import load_network
from dlrt.datasets import load
from dlrt.errors import RunError
from dlrt.low_rank_options import LowRankOptions
from dlrt.options import ROOT, DenseOptions
from dlrt.training import evaluate

# a comparison's runs, but another one's: without compressions
OTHERS = "row,seed,setting,validation_accuracy,test_accuracy,ranks,seconds\n"
OTHERS += '"dense, SGD",0,"{""lr"": 0.4}",1.0,1.0,,1.0\n'
SMALL = ["--dataset", "digits32", "--epochs", "1"]
DENSE = {
    "vgg16": {"features.0", "classifier"},
    "resnet20": {"conv1", "linear"},
}


def output(result):
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize("network", DENSE)
def test_every_layer_but_the_first_and_the_last_is_low_rank(network, run_script, tmp_path):
    small = ["--rank", 4, "--tau-warmup", 0]
    for script, flags in (
        (network + "_cifar10", [*small, "--name", "low"]),
        (network + "_cifar10_baseline", ["--name", "dense"]),
    ):
        flags = [*SMALL, *flags, "--output-dir", tmp_path]
        assert "test accuracy" in output(run_script(f"cifar10/{script}.py", *flags))
    model, about = load_network(tmp_path / "low")
    twin, _ = load_network(tmp_path / "dense")
    weighted = {name for name, m in twin.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    assert compression(model).ranks.keys() == weighted - DENSE[network]
    assert not compression(twin).ranks
    accuracy = evaluate(model, load("digits32", None, 0).test)[1]
    assert accuracy == pytest.approx(pd.read_csv(tmp_path / "low" / "metrics.csv")["test_accuracy"][0])
    assert about["shape"] == [3, 32, 32]


def test_alexnet_trains_and_its_first_and_last_layer_stay_dense(run_script, tmp_path):
    """The low-rank one is only asked for its flags: the SVD of 4096 x 4096 weights takes half a minute."""
    assert "conv1', 'fc3'" in output(run_script("cifar10/alexnet_cifar10.py", "--help"))
    trained = run_script("cifar10/alexnet_cifar10_baseline.py", *SMALL, "--output-dir", tmp_path)
    assert "test accuracy" in output(trained)


@pytest.fixture(autouse=True)
def few_pictures_say_what_the_loss_needs(monkeypatch):
    """The few digits there are would take ResNet20 three seconds a cut."""
    monkeypatch.setattr("dlrt.run_network.CALIBRATION_IMAGES", 16)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of a dense ResNet20's weights."""
    from dlrt.models import ResNet20

    path = tmp_path_factory.mktemp("weights") / "resnet20.pt"
    torch.save(ResNet20().state_dict(), path)
    return path


def test_the_study_goes_to_tables_figures_and_an_archive(run_script, forked_grid, tmp_path):
    grid = [*SMALL, "--jobs", 2, "--output-dir", tmp_path / "results"]
    few = ["--preset", "gpu", "--networks", "resnet20", "--seeds", 1, "--compressions", 60, "--rules", "muon"]
    few += ["--ways", "dense", "matrices", "separable_factors", "narrow", "cut"]
    few += ["--archive", tmp_path / "all.tar.gz"]
    for _ in range(2):  # what is there is skipped
        output(run_script("cifar10/run.py", *grid, *few))
    flags = ["--finetune-epochs", 1, "--networks", "lenet5"]
    output(run_script("cifar10/fine_tune_effects.py", *grid, *flags))
    for flags in ([], ["--time"]):  # it can be run twice
        output(
            run_script("cifar10/produce_results.py", "--results", "results", "--output-dir", "out", *flags)
        )
    table = pd.read_csv(tmp_path / "out" / "table.csv", keep_default_na=False).set_index("trained")
    assert list(table["rule"].unique()) == ["Muon"]
    folder = tmp_path / "results" / "resnet20" / "separable_factors60_muon_seed0"
    pair = load_network(folder)[0].layer3[1].conv1
    assert [layer.kernel_size for layer in pair] == [(1, 3), (3, 1)]
    assert 60 <= pd.read_csv(folder / "metrics.csv")["evaluation_compression"][0] < 61
    for script, flags in (
        ("cut_without_training", ["--runs", folder, "--output-dir", "cut"]),
        ("resnet20_cifar10_baseline", [*SMALL, "--from-checkpoint", folder, "--output-dir", "other"]),
    ):
        refused = run_script(f"cifar10/{script}.py", *flags)
        assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
        assert "give" in refused.stderr
    assert table.loc["plain factors, separable kernels", "ranks (first seed)"] == "uniform"
    assert len(table) == 8
    assert "cut by singular values, trained on, separable kernels" in table.index
    dense = table.loc["dense"]
    for name, row in table.drop("dense").iterrows():
        assert 60 <= float(row["compression [%]"]) < 62, name  # a narrower net has whole channels
        points = float(dense["test accuracy [%]"]) - float(row["test accuracy [%]"])
        assert float(row["below dense"]) == pytest.approx(points, abs=0.011)
    with tarfile.open(tmp_path / "all.tar.gz") as archive:
        names = archive.getnames()
    assert len(names) == 16
    assert {Path(name).name for name in names} == {"config.json", "metrics.csv"}
    tuned = pd.read_csv(tmp_path / "out" / "fine_tune_effects.csv")
    assert list(tuned["network"]) == ["LeNet5", "LeNet5, published"]
    metrics = pd.read_csv(tmp_path / "results" / "fine_tuned" / "lenet5_1+1_seed0" / "metrics.csv")
    shown = tuned[["before [%]", "after [%]"]].astype(float).iloc[0]
    assert list(shown) == pytest.approx(list(metrics["test_accuracy"]), abs=0.01)
    control = pd.read_csv(tmp_path / "results" / "fine_tuned" / "lenet5_1+1_control_seed0" / "metrics.csv")
    assert len(control) == 2
    assert not control["frozen_bases"].any()
    assert any(abs(control["test_accuracy"] - float(tuned["not frozen [%]"][0])) < 0.01)
    assert len(list((tmp_path / "out").glob("*.pdf"))) == 3


def test_cuts_that_are_not_trained_on_go_to_a_table_and_a_figure(run_script, tmp_path):
    output(
        run_script("cifar10/resnet20_cifar10_baseline.py", *SMALL, "--name", "a", "--output-dir", tmp_path)
    )
    flags = ["--compressions", 70, "--output-dir", "out"]
    for runs in (["--runs", tmp_path / "a"], ["--runs", tmp_path / "a"], []):  # measured once
        output(run_script("cifar10/cut_without_training.py", *flags, *runs))
    beyond = ["--runs", tmp_path / "a", "--compressions", 98, "--output-dir", "beyond"]
    refused = run_script("cifar10/cut_without_training.py", *beyond)
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "--compressions, of curvature: compression must be at most 0.97" in refused.stderr
    record = tmp_path / "beyond" / "cut_without_training.csv"
    cuts = pd.read_csv(record)
    assert list(cuts["way"]) == ["curvature, spatial"]  # what was possible is there
    pd.concat([cuts, cuts.assign(run="b", asked=70)]).to_csv(record, index=False)
    uneven = run_script("cifar10/cut_without_training.py", "--output-dir", "beyond")
    assert "has some cuts of some runs only: give all --runs and --compressions again" in uneven.stderr
    record.write_text(record.read_text()[:-1])
    damaged = run_script("cifar10/cut_without_training.py", "--output-dir", "beyond")
    assert "is lost or damaged: restore it, or delete it, and measure again" in damaged.stderr
    rows = pd.read_csv(tmp_path / "out" / "cut_without_training.csv")
    assert list(rows["way"]) == ["curvature, spatial", "curvature", "singular values", "all layers alike"]
    assert rows["compression"].between(70, 74).all()
    assert rows["accuracy"].between(0, 100).all()
    metrics = pd.read_csv(tmp_path / "a" / "metrics.csv")
    assert list(rows["dense"]) == pytest.approx([metrics["test_accuracy"].iloc[-1]] * 4)
    assert (tmp_path / "out" / "cut_without_training.png").stat().st_size > 10_000
    other = shutil.copytree(tmp_path / "a", tmp_path / "other" / "a")
    state = torch.load(other / "checkpoint.pt")
    state["chosen"]["linear.weight"] *= 2
    torch.save(state, other / "checkpoint.pt")
    output(run_script("cifar10/cut_without_training.py", *flags, "--runs", other))  # not known by its name
    pooled = pd.read_csv(tmp_path / "out" / "cut_without_training.csv")
    assert list(pooled.groupby("run").size()) == [4, 4]
    rows.assign(run="b", network="VGG16").to_csv(tmp_path / "b.csv", index=False)
    pooled = pd.concat([rows, pd.read_csv(tmp_path / "b.csv")])
    pooled.to_csv(tmp_path / "out" / "cut_without_training.csv", index=False)
    result = run_script("cifar10/cut_without_training.py", *flags)
    told = (
        "got ResNet20 (268,336 weights) on digits32, VGG16 (268,336 weights) on digits32: give --output-dir"
    )
    assert (result.returncode, result.stderr.count("\n"), told in result.stderr) == (1, 1, True)
    result = run_script("cifar10/cut_without_training.py", "--output-dir", "nothing")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)


def test_low_rank_training_begins_with_all_of_the_trained_weights(run_script, weights, tmp_path):
    """At full rank epoch 0 of the low-rank run is that of the dense one."""
    start = [*SMALL, "--from-checkpoint", weights, "--output-dir", tmp_path]
    output(run_script("cifar10/resnet20_cifar10.py", *start, "--rank", "1.0", "--name", "low"))
    output(run_script("cifar10/resnet20_cifar10_baseline.py", *start, "--name", "dense"))
    low, dense = (pd.read_csv(tmp_path / name / "metrics.csv").iloc[0] for name in ("low", "dense"))
    assert low["validation_loss"] == pytest.approx(dense["validation_loss"], rel=1e-4)
    options = json.loads((tmp_path / "low" / "config.json").read_text())["options"]
    assert options["from_checkpoint"].startswith("resnet20.pt")


def test_what_cannot_be_is_told_before_any_work(run_script, tmp_path):
    result = run_script("cifar10/run.py", "--ways", "cut", "--output-dir", tmp_path / "results")
    assert result.returncode == 2
    assert "--ways cut begins with the dense net that muon trained" in result.stderr
    result = run_script("cifar10/run.py", "--epochs", 1, "--output-dir", tmp_path / "results")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "--epochs must be 2 or more" in result.stderr
    result = run_script("cifar10/run.py", "--compressions", 5, "--output-dir", tmp_path / "results")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert (
        "--compressions must be 7 to 99.9 for a narrower net, got 5: leave narrow out of --ways"
        in result.stderr
    )
    assert not (tmp_path / "results").exists()


def test_every_seed_and_budget_is_trained_with_the_scale_that_validates_best(
    run_script, monkeypatch, tmp_path
):
    """Short runs choose a smaller one here than any that is tried first, whole ones twice as large a one."""

    def loss(options):
        return abs(math.log(options["update_lr"] / (0.0075 if options["epochs"] == 1 else 0.015)))

    make, made = makes(loss)
    monkeypatch.setattr(grid, "make", make)
    flags = ["--tune", 1, "--ways", "narrow", "--rules", "muon", "--seeds", 2, "--output-dir", tmp_path]
    output(run_script("cifar10/run.py", *flags))
    tried = [name.removeprefix("resnet20/tuning/narrow_muon_") for name in made if "tuning" in name]
    short = ["short_x1", "short_x0.5", "short_x0.25", "short_x0.125", "short_x0.0625", "short_x0.03125"]
    assert sorted(tried) == sorted([*short, "whole_x0.0625", "whole_x0.125", "whole_x0.25"])
    final = {name: options for name, options in made.items() if "tuning" not in name}
    assert len(final) == 3 * 2  # budgets and seeds
    best = made["resnet20/tuning/narrow_muon_whole_x0.125"]
    assert {options["update_lr"] for options in final.values()} == {best["update_lr"]}
    assert {options["epochs"] for options in final.values()} == {best["epochs"]} == {10}


def test_short_runs_choose_the_learning_rate_of_sgd(run_script, monkeypatch, tmp_path):
    make, made = makes(
        lambda options: abs(math.log(options["lr"] / (0.1 if options["epochs"] == 1 else 0.2)))
    )
    monkeypatch.setattr(grid, "make", make)
    flags = ["--tune", 1, "--ways", "narrow", "--rules", "sgd", "--seeds", 1, "--output-dir", tmp_path]
    output(run_script("cifar10/run.py", *flags))
    assert not [name for name in made if "whole" in name]
    assert made["resnet20/narrow75_sgd_seed0"]["lr"] == 0.1


def test_ways_that_begin_dense_are_cut_after_two_fifths_and_tuned_in_whole_runs(
    run_script, monkeypatch, tmp_path
):
    """Their dense epochs have the step that is best for the dense net in short runs, not in whole ones."""

    def loss(options):
        return abs(math.log(options["update_lr"] / (0.03 if options["epochs"] == 1 else 0.06)))

    make, made = makes(loss)
    monkeypatch.setattr(grid, "make", make)
    flags = ["--tune", 1, "--rules", "muon", "--seeds", 1, "--compressions", 75, "--output-dir", tmp_path]
    ways = ["--ways", "dense", "started_separable", "started_factors"]
    output(run_script("cifar10/run.py", *ways, *flags))
    assert made.pop("resnet20/dense_muon_seed0")["update_lr"] == 0.06
    started = {name: of for name, of in made.items() if "started" in name}
    lengths = {"tuning" in name: (of["epochs"], of["dense_epochs"]) for name, of in started.items()}
    assert lengths == {True: (10, 4), False: (10, 4)}
    assert {name for name in made if "tuning" not in name} <= started.keys()
    assert {of["dense_update_lr"] for of in started.values()} == {0.03}
    way = loaded("cifar10/study_tables").way
    started = LowRankOptions(**made["resnet20/started_separable75_muon_seed0"])
    assert way(started.record(), low_rank=True) == "DLRT after a dense start, separable kernels"
    started = DenseOptions(**made["resnet20/started_factors75_muon_seed0"])
    assert way(started.record(), low_rank=False) == "plain factors after a dense start, matrices"


def test_cuts_of_the_trained_net_are_tuned_in_runs_as_long_as_they_are(run_script, monkeypatch, tmp_path):
    make, made = makes(lambda options: abs(math.log(options["update_lr"] / 0.04)))
    monkeypatch.setattr(grid, "make", make)
    flags = ["--tune", 1, "--rules", "muon", "--seeds", 2, "--compressions", 75, "--output-dir", tmp_path]
    output(run_script("cifar10/run.py", "--ways", "dense", "cut", *flags))
    cuts = {name: of for name, of in made.items() if "cut_" in name}
    final = {name: of for name, of in cuts.items() if "tuning" not in name}
    assert len(final) == 8  # seeds, kinds of kernels and of cuts
    assert {of["epochs"] for of in cuts.values()} == {4}
    for kind in ("matrices", "separable"):
        sizes = {of["update_lr"] for name, of in cuts.items() if f"tuning/cut_{kind}" in name}
        assert {of["update_lr"] for name, of in final.items() if kind in name} == {
            min(sizes, key=lambda size: abs(math.log(size / 0.04)))
        }


def test_a_probe_that_lacks_a_way_is_named(monkeypatch, run_script, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "cifar10")
    script = loaded("cifar10/study_runs")
    monkeypatch.setattr(script, "HERE", tmp_path)
    with pytest.raises(RunError, match=r"probe\.csv has no dense, Muon: make it with"):
        script.step_sizes("dense", "muon")


def test_a_run_that_is_recorded_twice_is_told_and_not_counted_twice(tmp_path, run_script):
    whole = (ROOT / "cifar10" / "probe.csv").read_text()
    (tmp_path / "probe.csv").write_text(whole + whole.splitlines()[1] + "\n")
    result = run_script("cifar10/probe.py", "--output-dir", tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert f"line {len(whole.splitlines()) + 1}: every run must be there once" in result.stderr


@pytest.mark.parametrize(
    "text", ["", "\0\n", "row,seed\na,0\n", OTHERS, "row,seed,setting\na,0,[1]\n", "a,b\n1,2,3\n"]
)
def test_a_damaged_record_of_the_probe_costs_one_line(text, tmp_path, run_script):
    (tmp_path / "probe.csv").write_text(text)
    result = run_script("cifar10/probe.py", "--output-dir", tmp_path)
    assert result.returncode == 1
    assert "probe.csv is lost or damaged" in result.stderr
    assert len(result.stderr.splitlines()) == 1
