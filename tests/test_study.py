"""The tests over groups of networks, and the study of maps that is made of them."""

import shutil

import numpy as np
import pandas as pd
import pytest
from made_up_runs import write_run
from scipy import stats

from dlrt.cams import group_tests as tests
from dlrt.cams.study import KINDS, complete
from dlrt.cams.study_results import compare
from dlrt.errors import RunError

MEASURED = ["kind", "seed", "method", "accuracy", "parameters", "undefined"]
MEASURED += ["difference", "energy", "faithfulness"]


def groups(shift, networks=12, seed=0):
    """Two groups (2, networks) of an outcome, which depends on a covariate by half, and the covariate."""
    rng = np.random.default_rng(seed)
    covariates = rng.normal(size=(2, networks)) + np.array([[2.0], [0.0]])
    noise = 0.1 * rng.normal(size=(2, networks))
    x, y = (
        np.stack([0.5 * covariate + error, covariate])
        for covariate, error in zip(covariates, noise, strict=True)
    )
    x[0] += shift
    return x, y


@pytest.mark.parametrize("paired", [True, False])
def test_a_shift_is_found_and_none_is_invented(paired):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 20))
    assert tests.permutation_p(x + 5, y, paired) < 0.001
    null = [tests.permutation_p(*rng.normal(size=(2, 5)), paired) for _ in range(60)]
    assert np.mean(np.array(null) < 0.3) == pytest.approx(0.3, abs=0.15)


def test_equivalence_needs_a_small_difference_that_is_well_known():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 100))
    assert tests.equivalence_p(x, y, 1.0, paired=False) < 0.001
    assert tests.equivalence_p(x[:3], y[:3], 0.1, paired=False) > 0.05
    assert tests.equivalence_p(x + 2, y, 1.0, paired=False) > 0.99
    narrow = stats.ttest_rel(x, y).confidence_interval(0.90)  # inside the bounds where p < 5 %
    bound = max(abs(narrow.low), abs(narrow.high))
    assert tests.equivalence_p(x, y, bound, paired=True) == pytest.approx(0.05)


def test_holms_correction_is_that_of_his_paper():
    np.testing.assert_allclose(tests.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


@pytest.mark.parametrize("paired", [True, False])
def test_the_difference_at_equal_covariate_is_that_of_least_squares(paired):
    x, y = groups(shift=0.3)
    if paired:
        d = x - y
        design, outcome = np.stack([np.ones(12), d[1]], axis=1), d[0]
    else:
        member = np.repeat([1.0, 0.0], 12)
        both = np.concatenate([x, y], axis=1)
        design, outcome = np.stack([member, np.ones(24), both[1]], axis=1), both[0]
    expected = np.linalg.lstsq(design, outcome, rcond=None)[0][0]
    assert tests.adjusted_difference(x, y, paired) == pytest.approx(expected)
    low, high = tests.interval(tests.adjusted_difference, x, y, paired)
    assert low < expected < high
    raw = tests.interval(tests.mean_difference, x, y, paired)
    assert raw[0] < x[0].mean() - y[0].mean() < raw[1]


def test_intervals_cover_a_difference_about_as_often_as_they_say():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(40):
        x, y = rng.normal(size=(2, 2, 20))
        low, high = tests.interval(tests.mean_difference, x, y, False)
        covered += low < 0 < high
    assert 33 <= covered <= 40


def test_the_study_finds_what_was_put_into_its_measurements(run_script, tmp_path):
    """Low-rank networks differ in 1 - r from dense and not from narrow ones, and in pairs they are alike."""
    rng, rows = np.random.default_rng(0), []
    for seed in range(8):
        for kind in ("dense", "lowrank", "narrow", "continued", "compressed"):
            for method in ("gradcam", "layercam", "eigencam"):
                differs = 0.2 * (kind in ("lowrank", "narrow"))
                noise = 0.02 * rng.normal(size=3)
                outcomes = [0.2 + differs + noise[0], 0.6 + noise[1], 0.5 + noise[2]]
                rows.append([kind, seed, method, 80 + rng.normal(), 15_000, 0, *outcomes])
    pd.DataFrame(rows, columns=MEASURED).to_csv(tmp_path / "measured.csv", index=False)
    flags = ["--measurements", tmp_path / "measured.csv", "--output-dir", tmp_path / "out"]
    printed = run_script("pytorch-grad-cam/study/produce_results.py", *flags).stdout
    table = pd.read_csv(tmp_path / "out/table.csv")
    differing = table[table["verdict"].str.contains("differs")]
    assert set(zip(differing["comparison"], differing["outcome"], strict=True)) == {
        ("low-rank − dense", "1 − r")
    }
    raw = compare(pd.read_csv(tmp_path / "measured.csv")).set_index(["comparison", "outcome", "method"])
    groups = pd.DataFrame(rows, columns=MEASURED).query("method == 'gradcam'").groupby("kind")["energy"]
    one, other = (groups.get_group(kind).to_numpy() for kind in ("lowrank", "dense"))
    expected = tests.equivalence_p(one, other, other.std(ddof=1), paired=False)  # without correction
    assert raw.loc[("A", "energy", "gradcam"), "p_equivalent"] == pytest.approx(expected)
    assert "8 seeds each, fewer than the 20" in printed
    assert (tmp_path / "out/gradcam_study.pdf").is_file()
    measured = pd.read_csv(tmp_path / "measured.csv")
    measured.loc[0, "difference"] = np.nan
    with pytest.raises(RunError, match=r"must be finite, got difference nan, .* for dense, seed 0, gradcam"):
        compare(measured)


def test_a_seed_is_complete_with_all_kinds_to_the_last_epoch(tmp_path):
    for kind in KINDS:
        write_run(tmp_path, f"{kind}_seed3", [1, 2, 3], [1, 2, 3], epochs=1, finetune_epochs=2)
        (tmp_path / f"{kind}_seed3" / "checkpoint.pt").touch()
    shutil.copytree(tmp_path / "compressed_seed3", tmp_path / "compressed_seed4_old")
    assert complete(tmp_path) == [3]
    write_run(tmp_path / "other", "dense_seed3", [1], [1], epochs=1, finetune_epochs=2)
    shutil.copyfile(tmp_path / "other/dense_seed3/metrics.csv", tmp_path / "dense_seed3/metrics.csv")
    assert complete(tmp_path) == []


def test_without_measurements_the_study_says_how_they_are_made(run_script, tmp_path):
    flags = ["--measurements", tmp_path / "none.csv"]
    done = run_script("pytorch-grad-cam/study/produce_results.py", *flags)
    assert done.returncode == 1
    assert "study/run.py" in done.stderr


def test_a_network_is_as_its_twin_and_what_is_measured_is_kept(run_script, tmp_path):
    """All runs are copies of one: 1 - r is 0, and rows that are there are not measured again."""
    flags = ["--dataset", "hard_clutter", "--epochs", 1, "--width", 0.25, "--quiet", "--output-dir", "runs"]
    run_script("pytorch-grad-cam/convnet_clutter_baseline.py", *flags, "--name", "reference_seed200")
    kinds = ["dense", "lowrank", "narrow", "continued", "compressed"]
    done = run_script("pytorch-grad-cam/study/measure.py", "--results", "runs", "--output", "measured.csv")
    assert (done.returncode, "reference_seed201, reference_seed202" in done.stderr) == (1, True)
    for name in (
        *(f"{kind}_seed0" for kind in kinds),
        *(f"reference_seed{seed}" for seed in (201, 202, 203)),
    ):
        shutil.copytree(tmp_path / "runs/reference_seed200", tmp_path / f"runs/{name}")
    kept = pd.DataFrame([[kind, 0, "gradcam", 0, 0, 0, 7, 7, 7] for kind in kinds[:4]], columns=MEASURED)
    kept.to_csv(tmp_path / "measured.csv", index=False)
    flags = ["--results", "runs", "--output", "measured.csv"]
    done = run_script("pytorch-grad-cam/study/measure.py", *flags)
    assert (done.returncode, done.stdout, done.stderr) == (0, "compressed_seed0\n", "")
    rows = pd.read_csv(tmp_path / "measured.csv")
    assert (rows["difference"][:4] == 7).all()
    measured = rows[4:]
    assert list(measured["method"]) == ["gradcam", "layercam", "eigencam"]
    np.testing.assert_allclose(measured["difference"], 0, atol=1e-6)
    assert measured["energy"].between(0, 1).all()
    assert (measured["parameters"] == 3_940).all()


def test_networks_of_several_seeds_are_compared_with_the_first_kind_of_other_seeds(run_script, tmp_path):
    """Equal networks differ by nothing; a run without weights keeps its rows; one network has no other."""
    flags = ["--dataset", "hard_clutter", "--epochs", 1, "--width", 0.25, "--quiet", "--output-dir", "runs"]
    run_script("pytorch-grad-cam/convnet_clutter_baseline.py", *flags, "--name", "dense_seed0")
    flags = ["--results", "runs", "--kinds", "dense", "twin", "--count", 20, "--output-dir", "out"]
    done = run_script("pytorch-grad-cam/study/cifar10.py", *flags)
    assert done.returncode == 1
    assert "two finished runs dense_seedN" in done.stderr
    for name in ("dense_seed1", "twin_seed0", "twin_seed1"):
        shutil.copytree(tmp_path / "runs/dense_seed0", tmp_path / "runs" / name)
    run_script("pytorch-grad-cam/study/cifar10.py", *flags)
    rows = pd.read_csv(tmp_path / "out/cifar10_measured.csv")
    assert len(rows) == 4 * 3
    np.testing.assert_allclose(rows["difference"], 0, atol=1e-6)
    rows["difference"] = np.where((rows["kind"] == "twin") & (rows["seed"] == 1), 0.5, 0.0)
    rows.to_csv(tmp_path / "out/cifar10_measured.csv", index=False)
    (tmp_path / "runs/twin_seed1/checkpoint.pt").unlink()
    done = run_script("pytorch-grad-cam/study/cifar10.py", *flags[:-3], 10, *flags[-2:])
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "that stay, 20, got 10" in done.stderr
    run_script("pytorch-grad-cam/study/cifar10.py", *flags)
    table = pd.read_csv(tmp_path / "out/cifar10.csv").set_index("network")
    assert table.loc["twin", "1 − r, Grad-CAM"] == "0.250 ± 0.354"
    assert table.loc["dense", "1 − r, Grad-CAM"] == "0.000"  # one pair
    assert list(table["seeds"]) == [2, 2]
    assert "made anew" not in (tmp_path / "out/cifar10.md").read_text()
    metrics = tmp_path / "runs/twin_seed1/metrics.csv"
    pd.read_csv(metrics).assign(test_accuracy=1.0).to_csv(metrics, index=False)
    run_script("pytorch-grad-cam/study/cifar10.py", *flags)
    assert "made anew since: twin." in (tmp_path / "out/cifar10.md").read_text()
    (tmp_path / "out/cifar10_measured.csv").write_text("nothing", encoding="utf-8")
    done = run_script("pytorch-grad-cam/study/cifar10.py", *flags)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        "cifar10_measured.csv is lost or damaged: restore it, or delete it and measure again" in done.stderr
    )
