"""What a script leaves behind, and that the two halves of the demo can be compared."""

import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from made_up_runs import copy_committed

from dlrt.errors import DIVERGED

ROOT = Path(__file__).parents[1]
QUICK = ["--dataset", "digits", "--epochs", "1"]


@pytest.mark.parametrize("flags", [("parallel",), ("bug", "--rank", "5"), ("augmented", "--amp")])
def test_every_integrator_and_autocast_train(flags, tmp_path, run_script):
    quick = [*QUICK, "--width", 40, "--output-dir", tmp_path]
    result = run_script("mnist/mlp_mnist.py", *quick, "--integrator", *flags)
    assert result.returncode == 0, result.stderr
    if "bug" in flags:
        assert "ranks 5/5/5/5" in result.stdout


def test_runs_are_compared_in_a_table_and_a_figure(tmp_path, run_script):
    for script in ("lenet5_mnist", "lenet5_mnist_baseline"):
        run_script(f"mnist/{script}.py", *QUICK, "--output-dir", tmp_path / "results", "--quiet")
    for _ in range(2):  # it can be run twice
        result = run_script("mnist/produce_results.py", "--results", "results", "--output-dir", "out")
        assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert list(table["run"]) == ["dense_seed0", "tau0.15_seed0"]
    assert table["compression [%]"][0] == 0 < table["compression [%]"][1]
    for name in ("table.md", "learning_curves.png", "learning_curves.pdf"):
        assert (tmp_path / "out" / name).stat().st_size > 100
    assert str(Path("out") / "learning_curves.png") in result.stdout


def test_a_loss_that_is_not_finite_has_an_exit_code_of_its_own(tmp_path, run_script):
    wild = ["--lr", 1e9, "--width", 8, "--batch-size", 32, "--output-dir", tmp_path]
    result = run_script("mnist/mlp_mnist_baseline.py", *QUICK, *wild)
    assert result.returncode == DIVERGED
    assert "the loss is" in result.stderr


def test_quiet_prints_the_result_only(tmp_path):
    """In a process of its own, whose warnings would be seen."""
    flags = [*QUICK, "--width", "20", "--quiet", "--output-dir", str(tmp_path)]
    command = [sys.executable, str(ROOT / "mnist/mlp_mnist.py"), *flags]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    assert result.stdout.startswith("test accuracy ")


SMALL = ["--dataset", "digits", "--epochs", 1, "--seeds", 1, "--jobs", 2]
EXPERIMENTS = {
    "Lenet_experiment": ["--best-epochs", 1, "--taus", 0.1, "--best-taus"],
    "UV_vanilla": ["--decays", 1, "--lrs", 1e-4, 0.1],
    "accuracy_vs_cr": ["--taus", 0.1, "--widths", 12, "--pruned-ranks", 3, "--retraining-lrs", 0.01, 0.1],
}


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_an_experiment_goes_from_runs_to_table_and_figures(experiment, tmp_path, run_script, forked_grid):
    flags = [*SMALL, *EXPERIMENTS[experiment], "--output-dir", tmp_path / "results"]
    result = run_script(f"{experiment}/run.py", *flags)
    assert result.returncode == 0, result.stderr
    if experiment == "UV_vanilla":  # plain factors with both, DLRT with the paper's and the better one
        made = {path.name for path in (tmp_path / "results").iterdir()}
        lrs = {"vanilla": ("0.0001", "0.1"), "dlrt": ("0.01", "0.1")}
        assert made == {f"{method}_decay1_lr{lr}_seed0" for method in lrs for lr in lrs[method]}
    for _ in range(2):  # it can be run twice
        result = run_script(f"{experiment}/produce_results.py", "--results", "results", "--output-dir", "out")
        assert result.returncode == 0, result.stderr
        assert result.stderr == ""
    made = {path.suffix for path in (tmp_path / "out").iterdir()}
    assert made == {".csv", ".md", ".tex", ".pdf", ".png"}


COMMITTED = [path.parent for path in sorted(ROOT.glob("[!.]*/produce_results.py"))]


@pytest.mark.parametrize("experiment", [path.name for path in COMMITTED if (path / "table.csv").exists()])
def test_every_number_of_an_experiment_follows_from_its_committed_runs(
    experiment, tmp_path, run_script, monkeypatch
):
    """From those alone: others may be in the making here. Figures are laid out, but not written."""
    monkeypatch.setattr("dlrt.plots.Figure.savefig", lambda figure, *_, **__: figure.draw_without_rendering())
    copy_committed(f"{experiment}/results", tmp_path)
    runs = tmp_path / experiment / "results"
    flags = ["--results", runs] if runs.exists() else []  # without git all that is there counts
    result = run_script(f"{experiment}/produce_results.py", *flags, "--output-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    written = [path for path in tmp_path.iterdir() if path.suffix in (".csv", ".md", ".tex")]
    assert written
    for path in written:
        assert path.read_text() == (ROOT / experiment / path.name).read_text()


@pytest.mark.parametrize("experiment", ["mnist", "timings", *EXPERIMENTS])
def test_without_runs_an_experiment_says_which_command_makes_them(experiment, tmp_path, run_script):
    result = run_script(f"{experiment}/produce_results.py", "--results", tmp_path)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert re.search(f"make them with: python {experiment}/(run|lenet5_mnist)[.]py", result.stderr)
