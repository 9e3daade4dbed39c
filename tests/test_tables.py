"""The numbers of the experiments' tables, from runs made up here."""

import os
import re
import shutil
import sys
from argparse import ArgumentTypeError, Namespace
from itertools import product

import numpy as np
import pandas as pd
import pytest
import torch
from made_up_runs import load, write_run

from dlrt import errors, plots, summaries, tables
from dlrt.errors import RunError
from dlrt.flags import FOLDER_NAME, Parser
from dlrt.options import ROOT
from dlrt.summaries import over_seeds, read_runs


def test_a_setting_has_the_mean_over_its_seeds_at_the_chosen_epoch_and_at_the_last(tmp_path):
    write_run(tmp_path, "a", [90, 80], [70.0, 60.0], seed=0)
    write_run(tmp_path, "b", [80, 90], [75.0, 74.0], seed=1, ranks="5/6")
    write_run(tmp_path, "dense", [80, 90], [98.0, 99.0], ranks="")
    found = read_runs(tmp_path)
    summary = summaries.over_seeds(found.assign(tau=tables.dense_or_tau(found)), ["tau"]).set_index("tau")
    row = summary.loc[0.2]
    assert (row["accuracy"], row["last_accuracy"], row["seeds"]) == (72.0, 67.0, 2)
    assert row["accuracy_std"] == pytest.approx(np.std([70, 74], ddof=1))
    assert (row["ranks"], row["compression"], row["epochs"]) == ("3/4", 50.0, 2)
    assert summary.loc[np.nan, "accuracy"] == 99.0
    text = tables.readable(summary.reset_index(), {}).iloc[-1]
    assert text["test accuracy [%]"] == "72.00 ± 2.83"
    assert text["at the last epoch [%]"] == "67.00 ± 9.90"


def test_a_caption_says_the_integrator_and_which_runs_had_another(tmp_path):
    write_run(tmp_path, "dense", [80], [98.0], ranks="")
    assert tables.integrators(read_runs(tmp_path)) == ""
    for seed in range(2):
        write_run(tmp_path, f"a{seed}", [80], [98.0], seed=seed, integrator="parallel")
    assert tables.integrators(read_runs(tmp_path)) == "Integrator: parallel. "
    write_run(tmp_path, "b", [80], [98.0], integrator="augmented")
    assert tables.integrators(read_runs(tmp_path)) == "Integrator: parallel (augmented of b). "


@pytest.mark.parametrize(
    ("other", "reported"), [({"lr": 0.2}, "lr 0.1 and 0.2"), ({"seed": 0}, "need a seed each")]
)
def test_runs_that_are_no_seeds_of_one_setting_are_not_averaged(other, reported, tmp_path):
    write_run(tmp_path, "a", [90], [70.0])
    write_run(tmp_path, "b", [90], [71.0], **{"seed": 1, **other})
    with pytest.raises(RunError, match=reported):
        summaries.over_seeds(read_runs(tmp_path), ["tau"])


def test_a_pruned_net_is_shown_before_its_training_and_after_it(tmp_path):
    write_run(tmp_path, "dense", [98], [97.0], ranks="", width=20)
    pruned = {"tau": 0.0, "from_checkpoint": "dense", "width": 20, "rank": 3}
    write_run(tmp_path, "cut", [50, 90], [55.0, 88.0], lr=0.01, **pruned)
    write_run(tmp_path, "cut, too large steps", [50, 80], [55.0, 89.0], lr=0.1, **pruned)
    write_run(tmp_path, "tau", [95], [94.0], width=20, rank=0.25)
    found = load("accuracy_vs_cr/produce_results").with_methods(read_runs(tmp_path), tmp_path)
    assert len(found) == 4  # of the pruned ones the one that validates better
    accuracies = found.set_index("method")["test_accuracy"].to_dict()
    assert accuracies == {"dense": 97.0, "truncated": 55.0, "retrained": 88.0, "DLRT": 94.0}


def test_the_step_size_of_plain_factors_is_the_one_best_in_validation(tmp_path):
    vanilla = {"network": "vanilla_lenet5", "ranks": ""}
    for lr, validation, test in ((0.01, 80, 99), (0.1, 90, 70), (1.0, 85, 98)):
        write_run(tmp_path, f"{lr}", [validation], [test], decay=2.0, lr=lr, **vanilla)
    write_run(tmp_path, "other seed", [99], [99], decay=2.0, lr=1.0, seed=1, **vanilla)
    write_run(tmp_path, "other method", [99], [99], decay=2.0, lr=1.0, network="decayed_lenet5")
    write_run(tmp_path, "diverged", [95], [95], decay=2.0, lr=3.0, epochs=9, **vanilla)
    for lr, loss in ((0.2, 2.3), (0.3, 2.4)):  # both at chance
        write_run(tmp_path, f"chance {lr}", [10], [10], decay=9.0, lr=lr, loss=loss, **vanilla)
    with pytest.warns(UserWarning, match=r"unfinished or diverged: diverged \(1 of 9 epochs\)"):
        found = read_runs(tmp_path)
    best = summaries.best_lrs(found[found["network"] == "vanilla_lenet5"], "decay").to_dict()
    assert best == {2.0: 0.1, 9.0: 0.2}
    shutil.rmtree(tmp_path / "diverged")
    write_run(tmp_path, "batches", [99], [99], decay=2.0, lr=0.05, batch_size=32, **vanilla)
    with pytest.raises(RunError, match=r"batches must differ in the lr only, got .*batch_size None and 32"):
        summaries.best_lrs(read_runs(tmp_path), "decay")


@pytest.mark.parametrize("experiment", ["cifar10", "gpt"])
def test_runs_that_chose_options_are_no_results(experiment, tmp_path, run_script):
    write_run(tmp_path, "tuning/a", [90], [70.0])
    write_run(tmp_path, "LeNet5/tuning/b", [90], [70.0])
    result = run_script(f"{experiment}/produce_results.py", "--results", tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert f"no finished runs in {tmp_path}; make them with: python {experiment}/run.py" in result.stderr
    write_run(tmp_path, "c", [90], [70.0])
    assert list(tables.read(Namespace(results=tmp_path, dataset=None), "")["run"]) == ["c"]


def test_plain_factors_have_one_step_size_and_dlrt_that_one_and_the_papers(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "UV_vanilla")  # as when it is run
    for lr, validation in ((0.01, 80), (0.1, 90)):
        for network, ranks in (("vanilla_lenet5", ""), ("decayed_lenet5", "3/4")):
            name = f"{network} {lr}"
            write_run(tmp_path, name, [validation], [70], network=network, decay=2.0, lr=lr, ranks=ranks)
    write_run(tmp_path, "of another --lrs", [95], [70], network="decayed_lenet5", decay=2.0, lr=0.3)
    shown = load("UV_vanilla/produce_results").curves(read_runs(tmp_path), tmp_path)
    assert shown.keys() == {("DLRT", 2.0, 0.01), ("DLRT", 2.0, 0.1), ("U Vᵀ", 2.0, 0.1)}


def test_a_run_of_trained_weights_is_not_one_more_seed(tmp_path):
    for seed, start in enumerate(["dense_seed0", "dense_seed1", None]):
        write_run(
            tmp_path, f"s{seed}", [80, 81], [70, 71], ranks="", epochs=1, seed=seed, from_checkpoint=start
        )
    found = read_runs(tmp_path)
    assert over_seeds(found[:2], ["network"])["seeds"].tolist() == [2]
    with pytest.raises(RunError, match="must differ in the seed only, got from_checkpoint True and False"):
        over_seeds(found, ["network"])


def test_plain_factors_of_other_options_and_a_damaged_record_end_the_table(tmp_path, run_script):
    shared = {"network": "decayed_lenet5", "decay": 2.0, "dataset": "digits"}
    flags = ("--results", tmp_path, "--output-dir", tmp_path / "out")
    write_run(tmp_path, "one", [80], [70], rank=20, **shared)
    result = run_script("UV_vanilla/produce_results.py", *flags)
    assert f"{tmp_path} has no runs of U Vᵀ to compare with: go on with" in result.stderr
    write_run(tmp_path, "two", [80], [70], rank=5, seed=1, **shared)
    result = run_script("UV_vanilla/produce_results.py", *flags)
    assert result.returncode == 1
    assert "one and two must differ in the seed only, got rank 20 and 5: move one away" in result.stderr
    (tmp_path / "two" / "metrics.csv").write_text("")
    result = run_script("UV_vanilla/produce_results.py", *flags)
    assert result.returncode == 1
    assert result.stderr.startswith("produce_results.py: ")
    assert "two/metrics.csv is lost or damaged" in result.stderr


def test_a_table_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    args = Namespace(output_dir=tmp_path / "file", figures=[])
    with pytest.raises(SystemExit), errors.boundary():
        tables.publish(args, pd.DataFrame({"a": [1]}), "", {})
    assert capsys.readouterr().err.endswith("file cannot be used (File exists): take another\n")


def test_fine_tuning_is_shown_by_the_best_epoch_before_it_and_in_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "cifar10")
    write_run(tmp_path, "a", [50, 60, 70, 65], [51.0, 61.0, 71.0, 66.0], epochs=2, finetune_epochs=2)
    write_run(tmp_path, "b", [50], [51.0])  # its record has no such option
    fine_tuned = load("cifar10/produce_results").fine_tuned
    row = fine_tuned(read_runs(tmp_path), tmp_path).iloc[0]
    assert (row["before [%]"], row["after [%]"], row["epochs"]) == ("61.00", "71.00", "2 + 2")
    assert row["not frozen [%]"] == ""
    write_run(tmp_path, "c", [50, 60, 70, 75], [51.0, 61.0, 71.0, 76.0], epochs=4)  # its control
    write_run(tmp_path, "d", [50, 60, 70, 75], [51.0, 61.0, 71.0, 73.0], epochs=4, lr=0.5)  # another run
    assert fine_tuned(read_runs(tmp_path), tmp_path)["not frozen [%]"].iloc[0] == "76.00"
    for seed in (1, 2):  # the last without its control
        frozen = {"epochs": 2, "finetune_epochs": 2, "seed": seed}
        write_run(tmp_path, f"a{seed}", [50, 60, 70, 65], [51.0, 61.0, 71.0, 66.0], **frozen)
    write_run(tmp_path, "c1", [50, 60, 70, 75], [51.0, 61.0, 71.0, 78.0], epochs=4, seed=1)
    row = fine_tuned(read_runs(tmp_path), tmp_path).iloc[0]
    assert (row["seeds"], row["not frozen [%]"], row["not frozen: compression [%]"]) == ("3", "", "")
    different = {"epochs": 2, "finetune_epochs": 2, "seed": 3, "rank": 0.5}
    write_run(tmp_path, "a3", [50, 60, 70, 65], [51.0, 61.0, 71.0, 66.0], **different)
    with pytest.raises(RunError, match="a and a3 must differ in the seed only"):
        fine_tuned(read_runs(tmp_path), tmp_path)


def test_every_folder_gets_the_same_figure(tmp_path):
    rows = pd.DataFrame(
        {
            "compression": [50.0, 60.0],
            "accuracy": [20.0, 99.0],
            "accuracy_std": [0.1, 0.1],
            "compression_std": [0.1, 0.1],
        }
    )
    figure = plots.accuracy_against_compression({"DLRT": rows}, {}, {"dense": 99.5})
    plots.widen_near_100(figure.axes[0])
    assert figure.axes[0].get_ylim()[0] < 20
    assert figure.axes[0].get_ylim()[1] == 100
    drawn = plots.save(figure, [tmp_path / "a", tmp_path / "b"], "drawn")
    assert drawn == tmp_path / "a" / "drawn.png"
    for kind in ("pdf", "png"):
        first, second = ((tmp_path / folder / f"drawn.{kind}").read_bytes() for folder in "ab")
        assert first == second


def test_a_dense_line_has_the_colour_of_its_curve():
    rows = pd.DataFrame(
        {"compression": [50.0], "accuracy": [98.0], "accuracy_std": [0.1], "compression_std": [0.1]}
    )
    dense = {"dense, b": 99.0, "dense, a": 98.5, "published dense": 97.0}
    figure = plots.accuracy_against_compression({"DLRT, a": rows, "DLRT, b": rows}, {}, dense)
    drawn = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    for name in "ab":
        assert drawn[f"dense, {name}"].get_color() == drawn[f"DLRT, {name}"][0].get_color()
    assert drawn["dense, a"].get_color() != drawn["dense, b"].get_color()
    assert drawn["published dense"].get_color() == "0.55"


def test_cifar10_has_a_table_of_its_own_pictures_and_of_dense_nets_with_the_same_rule(
    run_script, monkeypatch, tmp_path
):
    """Digits have no place; runs of other epochs are compared among themselves, and two dense nets that
    differ in more than that and the seed have no mean.
    """
    shared = {"dataset": "cifar10", "network": "ResNet20"}
    write_run(tmp_path / "r", "low", [70], [68.0], update="muon", compression=75.0, cut_by="loss", **shared)
    assert run_script("cifar10/produce_results.py", "--results", "r", "--output-dir", "alone").returncode == 0
    drawn = {path.name for path in (tmp_path / "alone").glob("*.png")}
    assert drawn == {"cifar10_ranks.png"}  # without a dense net there is nothing below it
    write_run(tmp_path / "r", "one", [80], [78.0], ranks="", update="muon", **shared)
    write_run(tmp_path / "r", "two", [81], [77.0], ranks="", lr=0.2, **shared)
    write_run(tmp_path / "r", "digits", [99], [98.0], ranks="", **{**shared, "dataset": "digits32"})
    flags = ["--results", "r", "--output-dir", "out"]
    result = run_script("cifar10/produce_results.py", *flags)
    assert result.returncode == 0
    assert result.stderr == "produce_results.py: left out, since not on cifar10 (--dataset): digits\n"
    other = run_script(
        "cifar10/produce_results.py", *flags[:2], "--output-dir", "other", "--dataset", "digits32"
    )
    assert (other.returncode, "98.00" in other.stdout, "68.00" in other.stdout) == (0, True, False)
    assert ("JPEG" in result.stdout, "JPEG" in other.stdout) == (True, False)
    assert "left out, since not on digits32 (--dataset): low, one, two" in other.stderr
    wrong = run_script("cifar10/produce_results.py", *flags, "--dataset", "mnist")
    assert "--dataset must be one of the runs in r, cifar10, digits32, got mnist" in wrong.stderr
    table = pd.read_csv(tmp_path / "out" / "table.csv", keep_default_na=False).set_index(["trained", "rule"])
    assert list(table.index) == [("dense", "Muon"), ("dense", "SGD"), ("DLRT, budget, matrices", "Muon")]
    assert list(table["below dense"]) == ["", "", "10.00"]
    for name, test, others in (
        ("four", 79.0, {"ranks": ""}),
        ("five", 76.0, {"compression": 75.0, "cut_by": "loss"}),
    ):
        write_run(tmp_path / "r", name, [80] * 3, [test] * 3, update="muon", **shared, **others)
    write_run(
        tmp_path / "r",
        "cut",
        [75, 75],
        [74, 74],
        update="muon",
        compression=75.0,
        ramp=0.0,
        **shared,
        from_checkpoint="four",
    )
    assert run_script("cifar10/produce_results.py", *flags, "--time").returncode == 0
    monkeypatch.syspath_prepend(ROOT / "cifar10")
    found = read_runs(tmp_path / "r")
    curves = load("cifar10/study_tables").with_ways(found[found["dataset"] == "cifar10"])["curve"]
    assert {"dense, SGD", "dense, Muon, 1 epoch", "DLRT, budget, matrices, Muon, 3 epochs"} <= set(curves)
    table = pd.read_csv(tmp_path / "out" / "table.csv", keep_default_na=False)
    below = table.loc[table["below dense"] != "", ["trained", "epochs", "below dense"]]
    assert below.to_numpy().tolist() == [
        *(["DLRT, budget, matrices", 1, "10.00"], ["DLRT, budget, matrices", 3, "3.00"]),
        ["cut by what the loss needs, trained on, matrices", 1, "5.00"],  # of the longest
    ]
    trained = {"from_checkpoint": "four", **shared}
    write_run(tmp_path / "r", "falls", [80, 80], [78, 79], compression=75.0, ramp=0.6, **trained)
    write_run(tmp_path / "r", "more", [80, 80], [78, 79], ranks="", optimizer="adam", **trained)
    assert run_script("cifar10/produce_results.py", *flags).returncode == 0
    table = pd.read_csv(tmp_path / "out" / "table.csv").set_index("trained")["rule"]
    assert table["DLRT of trained weights, matrices"] == "SGD"  # not cut: its budget falls
    for tau in (0.1, 0.2):
        tolerance = {"tau": tau, "tau_warmup": 0.0, **shared, "lr": 0.3}
        write_run(tmp_path / "r", f"tolerance{tau}", [80], [78], **tolerance)
    write_run(tmp_path / "r", "spatial", [80], [78], **{**tolerance, "spatial": True})
    assert run_script("cifar10/produce_results.py", *flags).returncode == 0
    names = set(pd.read_csv(tmp_path / "out" / "table.csv")["trained"])
    assert {"DLRT, τ = 0.1, matrices", "DLRT, τ = 0.2, matrices", "DLRT, τ = 0.2, separable kernels"} <= names
    assert table["dense, trained on"] == "Adam"
    write_run(tmp_path / "r", "three", [81], [77.0], ranks="", lr=0.1, seed=1, **shared)
    result = run_script("cifar10/produce_results.py", *flags)
    assert result.returncode == 1
    assert "must differ in the seed only, got lr 0.2 and 0.1: move one away" in result.stderr


def test_the_step_sizes_of_the_study_stand_in_a_table_with_how_they_validate(run_script, tmp_path):
    """The last epoch counts, of equals the larger step; runs that differ in more than that are refused."""
    shared = {"dataset": "cifar10", "network": "ResNet20", "ranks": ""}
    tuning = tmp_path / "r" / "resnet20" / "tuning"
    write_run(tmp_path / "r", "resnet20/dense_muon_seed0", [70, 60], [1, 2], update="muon", **shared)
    flags = ("--results", "r", "--output-dir", "out")
    for size, validation in ((0.5, [90, 40]), (0.25, [50, 60]), (1.0, [50, 60])):
        made = {"update": "muon", "update_lr": size, **shared}
        write_run(tuning, f"dense_muon_whole_x{size}", validation, [1, 2], **made)
        write_run(tuning, f"dense_muon_short_x{size}", [100 * size], [1], **made)
    write_run(tuning, "narrow_sgd_whole_x1", [51], [1], width=0.5, **shared)
    write_run(tuning, "digits", [99], [1], **{**shared, "dataset": "digits32"})
    assert run_script("cifar10/produce_results.py", *flags).returncode == 0
    table = pd.read_csv(tmp_path / "out" / "step_sizes.csv")
    assert table.drop(columns="network").to_numpy().tolist() == [
        ["dense", "Muon", 1, "0.25: 25.0, 0.5: 50.0, 1.0: 100.0", 1.0],
        ["dense", "Muon", 2, "0.25: 60.0, 0.5: 40.0, 1.0: 60.0", 1.0],
        ["dense, narrower", "SGD", 1, "0.1: 51.0", 0.1],
    ]
    assert "update_lr with Muon" in (tmp_path / "out" / "step_sizes.md").read_text()
    write_run(tuning, "other", [99], [1], update="muon", update_lr=3.0, momentum=0.5, **shared)
    result = run_script("cifar10/produce_results.py", *flags)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "must differ in the update_lr only, got momentum" in result.stderr


NAMES = [
    *("$x_1$", "a$b", "\\$ \\alpha", "{a}_{b}^2", "100 % & #1 ~", "a|b", 'it\'s "quoted"', "a\nb\r\nc"),
    *(
        "n" * 300,
        "_hidden_",
        "<b>",
        "a--b``c",
        "[x](y)",
        "*b*",
        "&lt;",
        "a,b;c",
        "\x07",
        "\ud800",
        "{0} %s \\N",
    ),
]


def one_line(name):
    return " ".join(name.split()).encode("utf-8", "backslashreplace").decode().replace("\x07", "\\x07")


def test_committed_latex_tables_have_at_most_six_columns():
    found = [*ROOT.glob("[!.]*/*.tex"), *ROOT.glob("[!.]*/*/*.tex")]
    assert found
    for path in found:
        columns = re.search(r"\\begin\{tabular\}\{(l+)\}", path.read_text(encoding="utf-8"))[1]
        assert len(columns) <= 6, path


def test_a_table_says_every_name_literally_and_in_a_cell_of_its_own(tmp_path):
    tables.write(pd.DataFrame({"name": NAMES, "value": range(len(NAMES))}), tmp_path)
    csv, md, tex = (tmp_path / f"table.{kind}" for kind in ("csv", "md", "tex"))
    assert list(pd.read_csv(csv)["name"]) == [name.replace("\ud800", "\\ud800") for name in NAMES]
    rows = md.read_text(encoding="utf-8").splitlines()[2:]
    cells = [re.split(r"(?<!\\) \| ", row.removeprefix("| "))[0].rstrip() for row in rows]
    assert [re.sub(r"\\([^a-z0-9])", r"\1", cell) for cell in cells] == list(map(one_line, NAMES))
    assert not any(re.search(r"(?<!\\)[*<|$&`]", cell) for cell in cells)
    body = re.search(r"\\midrule\n(.*)\\bottomrule", tex.read_text(encoding="utf-8"), re.DOTALL)[1]
    assert [row.split(" & ")[-1] for row in body.splitlines()] == [rf"{i} \\" for i in range(len(NAMES))]
    words = {
        r"\textbackslash{}": "\\",
        r"\textasciitilde{}": "~",
        r"\textasciicircum{}": "^",
        r"\char34{}": '"',
    }
    words |= {r"\textless{}": "<", r"\textgreater{}": ">", r"\textbar{}": "|", "{}": ""}
    words |= {f"\\{sign}": sign for sign in "{}$%&#_"}
    read = re.compile("|".join(map(re.escape, words)))
    cells = [read.sub(lambda found: words[found[0]], row.rsplit(" & ", 1)[0]) for row in body.splitlines()]
    assert cells == list(map(one_line, NAMES))


@pytest.mark.filterwarnings("error")
def test_a_figure_shows_every_name_literally_and_leaves_room_for_its_curves():
    rows = pd.DataFrame(
        {"epoch": [1, 2], "validation_accuracy": [90.0, 95.0], "evaluation_compression": 50.0}
    )
    points = pd.DataFrame(
        {"compression": [50.0], "accuracy": [98.0], "accuracy_std": [0.1], "compression_std": [0.1]}
    )
    for number, figure in enumerate((
        plots.learning_curves(dict.fromkeys(NAMES, rows)),
        plots.accuracy_against_compression(dict.fromkeys(NAMES, points), {}, {}),
        plots.accuracy_against_compression({}, dict.fromkeys(NAMES, points), dict.fromkeys(NAMES, 99.0)),
        plots.singular_values(dict.fromkeys(NAMES, torch.tensor([2.0, 1.0]))),
    )):  # fmt: skip
        figure.draw_without_rendering()
        shown = [text.get_text() for text in figure.legends[0].get_texts()]
        assert len(shown) == len(NAMES) * (2 if number == 2 else 1)
        assert all(text.count("$") == text.count(r"\$") for text in shown)  # no mathematics
        for text, name in zip(shown, NAMES * 2, strict=False):
            parts = text.replace(r"\$", "$").strip().split("…")
            assert one_line(name).startswith(parts[0])
            assert one_line(name).endswith(parts[-1])
        assert figure.axes[0].get_position().width > 0.2


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_a_folder_is_taken_as_it_is_or_refused(name):
    if name.isprintable() and len(name) < 200:
        assert FOLDER_NAME(name) == name
    else:
        with pytest.raises(ArgumentTypeError, match="printable characters"):
            FOLDER_NAME(name)


def test_a_run_of_one_epoch_is_seen():
    rows = pd.DataFrame({"epoch": [1], "validation_accuracy": [90.0], "evaluation_compression": [50.0]})
    axes = plots.learning_curves({"one": rows, "two": pd.concat([rows, rows.assign(epoch=2)])}).axes
    plots.bands(axes[0], [rows, rows], "validation_accuracy", "mean", 0)
    for line in (line for panel in axes for line in panel.lines):
        assert len(line.get_xdata()) > 1 or line.get_marker() not in ("None", "", None)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_output_ends_quietly_whatever_the_terminal_encodes_and_whoever_reads(name, encoding, monkeypatch):
    read, write = os.pipe()
    stream = os.fdopen(write, "w", encoding=encoding)
    for attribute in (name, f"__{name}__"):
        monkeypatch.setattr(sys, attribute, stream)
    Parser().parse_args([])
    output = getattr(sys, name)
    print("τ ± 中 \ud800", file=output, flush=True)
    assert os.read(read, 99) == "τ ± 中 \ud800\n".encode(encoding, "replace")
    os.close(read)
    for _ in range(3):
        print("τ" * 100_000, file=output, flush=True)
    output.close()
    stream.close()


def test_files_are_utf_8_and_one_module_chooses_the_backend_of_figures():
    for path in (*ROOT.glob("dlrt/**/*.py"), *ROOT.glob("[!.t]*/*.py"), *ROOT.glob("timings/*.py")):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"(read|write)_text\((?!.*encoding=)", text), path
        assert path.name == "plots.py" or not re.search(r"^(import|from) matplotlib", text, re.MULTILINE), (
            path
        )


EXPERIMENTS = ("mnist", "Lenet_experiment", "UV_vanilla", "accuracy_vs_cr", "cifar10")
WRONG = [{"network": None}, {"dataset": [1]}, {"seed": "x"}, {"lr": None}]
WRONG = [
    *product(EXPERIMENTS, WRONG),
    ("UV_vanilla", {"network": "MLP"}),
    ("accuracy_vs_cr", {"width": None}),
]


@pytest.mark.parametrize(("experiment", "wrong"), WRONG)
def test_records_of_wrong_types_or_of_another_experiment_cost_one_line(
    experiment, wrong, tmp_path, monkeypatch, capsys
):
    right = {"width": 500, "decay": 2.0, "network": "vanilla_lenet5"}
    write_run(tmp_path, "a", [90.0], [91.0], **{**right, **wrong})
    monkeypatch.syspath_prepend(ROOT / experiment)
    monkeypatch.setattr("sys.argv", ["produce_results.py", "--results", str(tmp_path)])
    with pytest.raises(SystemExit, match="1"):
        load(f"{experiment}/produce_results").main()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("produce_results.py: ")


def test_tables_of_other_results_stay_beside_them(run_script, tmp_path):
    write_run(tmp_path / "runs", "factors", [80], [70.0], ranks="", factors=75.0)
    published = {path: path.read_bytes() for path in (ROOT / "mnist").glob("table.*")}
    result = run_script("mnist/produce_results.py", "--results", tmp_path / "runs")
    assert result.returncode == 0, result.stderr
    assert {"table.md", "learning_curves.png"} <= {path.name for path in (tmp_path / "runs").iterdir()}
    assert published == {path: path.read_bytes() for path in published}
