"""Timings: the grid that records them, what is counted beside the times, table and figures made of them."""

import argparse
import importlib
import json
import shutil
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from dlrt import DLRT, LowRankLinear, compression
from dlrt.timing import in_turn

FOLDER = Path(__file__).parents[1] / "timings"
WIDTH, BATCH, RANKS = 64, 16, (2, 8)
GRID = ["--width", WIDTH, "--batch-size", BATCH, "--ranks", *RANKS, "--s-steps", 1, 5, "--repeats", 3]
KEY = ["phase", "integrator", "s_steps", "adaptive", "rank"]


@pytest.fixture(scope="module")
def scripts():
    """The modules of the folder by name; scripts in one folder import each other."""
    names = ("networks", "measure", "memory", "run", "produce_results", "step", "growth", "at_scale", "pca")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield argparse.Namespace(**{name: importlib.import_module(name) for name in names})
    for name in names:
        del sys.modules[name]


def call(script, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"timings/{script.__name__}.py", *map(str, flags)])
        script.main()


@pytest.fixture(scope="module")
def results(scripts, tmp_path_factory):
    """The folder of a small grid."""
    folder = tmp_path_factory.mktemp("timings")
    call(scripts.run, *GRID, "--device", "cpu", "--name", "small", "--output-dir", folder)
    return folder


@pytest.fixture(scope="module")
def rows(results):
    return pd.read_csv(results / "small" / "metrics.csv").fillna({"integrator": ""})


def test_the_low_rank_resnet20s_of_the_table_are_compressed_to_60_percent(scripts):
    found = scripts.step.contenders("resnet20", argparse.Namespace())
    assert [title for title, *_ in found] == ["ResNet20", "ResNet20 spatial"]
    for _, dense, [low], x in found:
        assert 60 <= compression(low).evaluation_compression < 62
        assert dense(x[:2]).shape == low(x[:2]).shape == (2, 10)


def test_every_setting_has_a_row_at_every_rank(rows):
    adaptive = {("augmented", 1, True), ("parallel", 1, True), ("parallel", 5, True)}
    fixed = {(name, 1, False) for name in ("augmented", "parallel", "bug", "factors")}
    expected = {("training", *setting, rank) for setting in adaptive | fixed for rank in RANKS}
    expected |= {("inference", "", 1, False, rank) for rank in RANKS}
    assert len(rows) == len(expected)
    assert set(rows[KEY].itertuples(index=False, name=None)) == expected
    assert (rows["ranks"] == rows["rank"].map(lambda rank: "/".join([str(rank)] * 4))).all()  # to the end
    assert (rows[["lower_ms", "median_ms", "upper_ms"]].diff(axis=1).iloc[:, 1:] >= 0).all(axis=None)


def test_shares_of_a_step_are_parts_of_a_whole(rows, scripts):
    rows = rows[~rows["integrator"].isin(["", "factors"])]
    shares = rows[[f"share_{part}" for part in scripts.measure.SHARES]]
    assert np.allclose(shares.sum(axis=1), 1, atol=1e-4)
    assert (shares >= 0).all(axis=None)
    bug = rows["integrator"] == "bug"
    assert ((rows["share_svd"] > 0) == ~bug).all()
    assert (shares[["share_forward_backward", "share_qr", "share_s_gradient", "share_rest"]] > 0).all(
        axis=None
    )


def test_products_into_a_matrix_that_is_there_are_counted_as_others_are(scripts):
    A, B, C = torch.ones(10, 4), torch.ones(4, 5), torch.ones(10, 5)
    counted = scripts.measure.flops(lambda: C.addmm_(A, B, alpha=-1))
    assert counted == scripts.measure.flops(lambda: A @ B) == 2 * 10 * 4 * 5


def test_operations_are_those_of_the_matrix_products(rows):
    w, dense = WIDTH, 784 * WIDTH + 3 * WIDTH**2 + 10 * WIDTH
    training, inference = (rows[rows["phase"] == phase] for phase in ("training", "inference"))
    assert np.allclose(1e9 * inference["dense_gflops"], 2 * BATCH * dense, rtol=1e-5)
    assert np.allclose(1e9 * training["dense_gflops"], 2 * BATCH * (3 * dense - 784 * w), rtol=1e-5)
    r = inference["rank"]
    assert np.allclose(1e9 * inference["gflops"], 2 * BATCH * (r * (784 + 7 * w + 4 * r) + 10 * w), rtol=1e-5)
    # forwards, twice backwards, and more for the bases; all that with other bases between their moves
    assert (training["gflops"] > 2 * inference["gflops"].min()).all()
    plain = training[training["integrator"] == "factors"].set_index("rank")["gflops"]
    assert (plain < training[training["integrator"] != "factors"].groupby("rank")["gflops"].min()).all()
    parallel = training[training["adaptive"] & (training["integrator"] == "parallel")]
    by_s_steps = parallel.set_index(["rank", "s_steps"])["gflops"].unstack()
    assert (by_s_steps[1] > by_s_steps[5]).all()


def test_peak_memory_holds_weights_gradients_and_momentum(rows):
    parameters = 784 * WIDTH + 3 * WIDTH**2 + 10 * WIDTH
    dense = 1e6 * rows.groupby("phase")["dense_peak_mb"].first()
    assert 4 * 3 * parameters < dense["training"] < 4 * 4 * parameters
    assert 4 * parameters < dense["inference"] < dense["training"] / 2
    assert (rows["peak_mb"] < rows["dense_peak_mb"]).all()  # at these ranks


def test_what_is_measured_is_not_measured_again(results, scripts, tmp_path, capsys):
    shutil.copytree(results, tmp_path / "results")
    path = tmp_path / "results" / "small" / "metrics.csv"
    whole = pd.read_csv(path)
    flags = [*GRID, "--name", "small", "--output-dir", tmp_path / "results"]
    written = path.stat().st_mtime_ns
    call(scripts.run, *flags)
    assert path.stat().st_mtime_ns == written
    kept = whole[:-1]  # as if the machine had gone down before the last setting of the last rank
    kept.to_csv(path, index=False)
    call(scripts.run, *flags)
    again = pd.read_csv(path)
    pd.testing.assert_frame_equal(again[:-1], kept)
    pd.testing.assert_frame_equal(again[KEY], whole[KEY])
    with pytest.raises(SystemExit):
        call(scripts.run, *flags, "--width", 32)
    assert "was begun with other options (width 64 -> 32)" in capsys.readouterr().err


def test_one_grid_is_measured_with_one_version_of_torch(results, scripts, tmp_path, capsys):
    shutil.copytree(results, tmp_path / "results")
    config = tmp_path / "results" / "small" / "config.json"
    config.write_text(config.read_text().replace(torch.__version__, "2.9.9"))
    with pytest.raises(SystemExit):
        call(scripts.run, *GRID, "--name", "small", "--output-dir", tmp_path / "results")
    assert f"was measured with torch 2.9.9, this is {torch.__version__}" in capsys.readouterr().err


def test_what_is_slow_is_not_measured_at_larger_ranks(scripts):
    settings = scripts.run.settings(["augmented", "bug"], [1])
    args = argparse.Namespace(slowest=1.5, seconds=10)
    slow = {
        "repeats": 3,
        "s_steps": 1,
        "rank": 40,
        "median_ms": 400.0,
        "dense_median_ms": 200.0,
    }  # of ten steps
    rows = [{**settings[1]._asdict(), **slow}, {**settings[2]._asdict(), **slow, "median_ms": 250.0}]
    rows += [
        {**settings[3]._asdict(), **slow, "median_ms": 30.0, "dense_median_ms": 15.0}
    ]  # it costs nothing
    assert scripts.run.wanted(80, rows, settings, args) == [settings[0], *settings[2:]]
    assert scripts.run.wanted(40, rows, settings, args) == [settings[0], settings[4]]
    assert scripts.run.wanted(20, rows, settings, args) == settings


def test_what_is_timed_as_pca_comes_near_the_best_approximation(scripts):
    """Of a matrix whose singular values decay; a randomised SVD wants more columns than the rank."""
    U, V = (torch.linalg.qr(torch.randn(size, 200).double())[0] for size in (300, 200))
    sigma = 0.9 ** torch.arange(200.0).double()
    A, best = (U * sigma) @ V.mT, float(sigma[8:].norm())
    basis = scripts.pca.gram(A)
    assert (A - basis @ (basis.mT @ A)).norm() == pytest.approx(best, rel=1e-6)
    errors = []
    for columns in (8, 16):
        P, found, Qh = scripts.pca.randomised(A, columns)
        assert len(found) == 8
        errors.append(float((A - P * found @ Qh).norm()) / best)
    assert 1.01 < errors[0] < 1.3
    assert 1 <= errors[1] < 1.01


def test_functions_are_called_in_turn_within_their_time(scripts):
    order = []
    calls = [
        lambda: order.append("dense"),
        lambda: (order.append("slow"), time.sleep(0.2)),
        lambda: order.append("low"),
    ]
    times = in_turn(calls, repeats=6, seconds=0.3)
    assert [len(elapsed) for elapsed in times] == [6, 3, 6]
    assert order[:9] == ["dense", "slow", "low"] * 3
    assert order[9:] == ["dense", "low"] * 3
    assert min(times[1]) >= 200  # milliseconds


def test_time_counts_for_the_innermost_part(scripts):
    watch = scripts.measure.Stopwatch("cpu")
    slept = []

    def sleep():
        start = time.perf_counter()
        time.sleep(0.05)
        slept.append(time.perf_counter() - start)

    inner = watch.wrapped("inner", sleep)
    start = time.perf_counter()
    with watch.part("outer"):
        inner()
        time.sleep(0.01)
    whole = time.perf_counter() - start
    assert watch.seconds["inner"] >= slept[0]
    assert 0.01 <= watch.seconds["outer"] <= whole - slept[0]
    assert watch.seconds.total() <= whole


def test_a_watched_step_leaves_the_library_as_it_was(scripts):
    places = [place for part in scripts.measure.PARTS.values() for place in part]
    before = [getattr(*place) for place in places]
    optimizer = DLRT(nn.Sequential(LowRankLinear(8, 8, 2)), torch.optim.SGD, lr=0.1)

    def failing():
        raise ArithmeticError

    with pytest.raises(ArithmeticError):
        scripts.measure.shares(optimizer, failing, 1, "cpu")
    assert [getattr(*place) for place in places] == before


@pytest.mark.parametrize("rank", [7, 40, 123.4])
@pytest.mark.parametrize("power", [0.3, 1, 2])
def test_break_even_of_a_power_law_is_exact(scripts, rank, power):
    ranks = np.array([5, 10, 20, 80, 320])
    assert scripts.produce_results.break_even(ranks, (rank / ranks) ** power) == pytest.approx(rank)


def test_break_even_outside_of_what_was_measured(scripts):
    ranks, told = np.array([5, 10, 20]), scripts.produce_results.told
    outside = {(3.0, 2.0, 1.1): "above 20", (0.9, 0.5, 0.1): "below 5", (0.5, 2.0, 0.5): "14"}
    for advantage, text in outside.items():
        assert told(scripts.produce_results.break_even(ranks, np.array(advantage)), ranks) == text


def test_table_and_figures_are_the_same_twice(results, scripts, tmp_path, capsys):
    made = []
    for _ in range(2):
        call(scripts.produce_results, "--results", results, "--output-dir", tmp_path)
        made.append({path.name: path.read_bytes() for path in tmp_path.iterdir()})
    assert made[0] == made[1]
    figures = {f"timings{which}.{kind}" for which in ("", "_shares") for kind in ("pdf", "png")}
    assert made[0].keys() == {"table.csv", "table.md", "table.tex"} | figures
    table = pd.read_csv(tmp_path / "table.csv", keep_default_na=False)
    assert len(table) == 8 + 2
    assert list(table["break-even rank"][-2:]) == ["about 125", "near 2100"]
    assert "Rows of a GPU are still to come." in capsys.readouterr().out


def test_a_second_device_stands_beside_the_first(results, scripts, tmp_path):
    for name in ("small", "gpu"):
        shutil.copytree(results / "small", tmp_path / name)
    path = tmp_path / "gpu" / "config.json"
    config = json.loads(path.read_text())
    config["options"].update({"device": "Some GPU", "kind": "cuda"})
    path.write_text(json.dumps(config))
    produce = scripts.produce_results
    rows = produce.read(tmp_path)
    assert list(dict.fromkeys(produce.table(rows)["device"]))[1:] == [
        f"Some GPU, width {WIDTH}, batch {BATCH}",
        "published, other hardware",
    ]
    assert f"; Some GPU, width {WIDTH}, batch {BATCH} (torch" in produce.caption(rows)
    assert "still to come" not in produce.caption(rows)
    for figure, axes in ((produce.times(rows), 3), (produce.shares(rows), 8)):
        assert [part.get_suptitle() for part in figure.subfigs] == list(rows["device"].unique())
        assert [len(part.axes) for part in figure.subfigs] == [axes, axes]
        plt.close(figure)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ranks", 0], "argument --ranks: must be a whole number in [1, inf), got 0"),
        (["--width", 64, "--ranks", 8, 128], "--ranks must be at most --width, 64, got 128"),
        (["--integrators", "euler"], "invalid choice: 'euler'"),
        (["--seconds", -1], "argument --seconds: must be a number in (0, inf), got -1"),
        (["--device", "meta"], "--device must be cpu or cuda"),
    ],
)
def test_a_bad_flag_costs_one_line(scripts, flags, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        call(scripts.run, *flags, "--output-dir", tmp_path)
    assert error.value.code == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count("\n") == 1


def test_growth_has_a_row_for_every_size_and_no_dense_net_that_is_too_large(scripts, tmp_path, capsys):
    flags = ["--width", 32, "--widths", 16, 64, "--depths", 1, 2, "--ranks", 2, 8, "--repeats", 1]
    call(scripts.growth, *flags, "--largest-dense", 4 * 32**2, "--output-dir", tmp_path)
    table = pd.read_csv(tmp_path / "growth.csv")
    sizes = [("width", 16, 4, 16), ("width", 64, 4, 16), ("depth", 32, 1, 16), ("depth", 32, 2, 16)]
    sizes += [("rank", 32, 4, 2), ("rank", 32, 4, 8)]
    assert list(table[["along", "width", "depth", "rank"]].itertuples(index=False, name=None)) == sizes
    assert list(table["dense [ms]"].isna()) == [width == 64 for _, width, _, _ in sizes]
    assert (tmp_path / "growth.png").stat().st_size
    assert capsys.readouterr().out.count("dlrt ms") == len(sizes)


def test_growth_is_the_power_of_its_last_points(scripts):
    widths = [1, 2, 4, 8]
    rows = pd.DataFrame({"axis": "width", "width": widths, "dlrt ms": [9, *(3 * w**1.5 for w in widths[1:])]})
    rows["dlrt mb"] = [7, *(5 / w for w in widths[1:])]
    assert scripts.growth.exponents(rows, "width") == "width^1.50 and width^-1.00"


def test_operations_of_an_update_grow_with_the_third_power_of_all_sizes(scripts):
    whole, smaller = (scripts.at_scale.update(2048, 1024, 128, smaller=by) for by in (1, 2))
    assert smaller == pytest.approx(whole, rel=0.05)
    assert 2 * 6 < whole / (3072 * 128**2) < 2 * 10  # Gram matrices, bases, velocity; and small matrices


def test_what_is_held_and_summed_at_scale_falls_with_the_rank(scripts, tmp_path, capsys):
    call(scripts.at_scale, "--ranks", 64, 256, "--output-dir", tmp_path)
    dense, low, higher = pd.read_csv(tmp_path / "at_scale.csv").to_dict("records")
    assert dense["parameters"] == "6.74 billion"
    for column in ("held [GB]", "to be summed [GB]", "passes [TFLOP]"):
        assert low[column] < higher[column] < dense[column]
    assert 0 == dense["on top [%]"] < low["on top [%]"] < higher["on top [%]"]
    net = scripts.at_scale.Transformer(blocks=20_000, width=32, hidden=64, vocabulary=100)
    full, none = (scripts.at_scale.count(net, rank, tokens=4096) for rank in (32, None))
    assert none["parameters"] == "0.20 billion"
    for column in ("parameters", "passes [TFLOP]"):  # a layer whose factors do not pay is computed as dense
        assert full[column] == none[column]
    with pytest.raises(SystemExit):
        call(scripts.at_scale, "--ranks", 5000, "--output-dir", tmp_path)
    assert "--ranks must be at most the width, 4096, got 5000" in capsys.readouterr().err


def test_layers_of_other_libraries_are_timed_where_they_are_installed(scripts, tmp_path, capsys):
    flags = ["--peers", "--repeats", 1, "--runs", 2, "--width", 16, "--ranks", 2, "--networks", "mlp"]
    if all(find_spec(name) for name in ("peft", "tltorch")):
        call(scripts.step, *flags, "--output-dir", tmp_path)
        assert set(pd.read_csv(tmp_path / "step.csv")["peer"]) == {"lora"}
    else:
        with pytest.raises(SystemExit):
            call(scripts.step, *flags, "--output-dir", tmp_path)
        assert "pip install peft tensorly-torch" in capsys.readouterr().err


def test_a_ratio_is_the_median_of_the_runs_with_its_spread(scripts):
    assert scripts.step.ratio([2.0, 3.0, 8.0], [1.0, 2.0, 2.0]) == "2.00 x (1.50 to 4.00)"
    assert scripts.step.ratio([3.0], [2.0]) == "1.50 x"


def test_two_folders_of_one_device_are_not_mixed(results, scripts, tmp_path):
    for name in ("one", "other"):
        shutil.copytree(results / "small", tmp_path / name)
    produce = scripts.produce_results
    rows = produce.read(tmp_path)
    first, second = rows["device"].unique()
    assert second == f"{first} (other)"
    assert len(produce.table(rows)) == 2 * 8 + 2


@pytest.mark.parametrize("name", ["step", "growth", "memory", "at_scale", "run"])
def test_a_folder_that_cannot_be_made_is_told_before_anything_is_timed(scripts, name, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(SystemExit) as stop:
        call(vars(scripts)[name], "--output-dir", file)
    assert stop.value.code == 1
    output = capsys.readouterr()
    assert (output.out, output.err.count("\n")) == ("", 1)
    assert str(file) in output.err
    assert "cannot be used" in output.err


@pytest.mark.parametrize(("name", "function"), [("step", "compare"), ("growth", "row"), ("memory", "peak")])
def test_ctrl_c_ends_a_timing_with_one_line(scripts, name, function, tmp_path, monkeypatch, capsys):
    def interrupted(*_, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(vars(scripts)[name], function, interrupted)
    with pytest.raises(SystemExit) as stop:
        call(vars(scripts)[name], "--width", 32, "--ranks", 2, 4, "--output-dir", tmp_path)
    assert stop.value.code == 130
    assert f"{name}.py: interrupted; " in capsys.readouterr().err


def test_the_folder_of_a_device_lies_among_the_results(scripts, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        call(scripts.run, *GRID, "--name", "../elsewhere", "--output-dir", tmp_path / "results")
    assert stop.value.code == 2
    assert "--name" in capsys.readouterr().err
