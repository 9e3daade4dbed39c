"""The notebook runs from top to bottom, and its numbers keep what the theory and its text promise."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
from PIL import Image

ROOT = Path(__file__).parents[1]
NAME = "pca_experiments.ipynb"
COMMAND = re.search(r"^jupyter .*$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)[0]
GIFS = ("pendulum_cloud.gif", "pendulum_video.gif")
FIGURES = [
    "pendulum",
    "cloud_frames",
    "cloud_errors",
    "cloud_law",
    "cloud_spin",
    "moving_pivot",
    "video_errors",
    "video_frames",
    "double_pendulum_frames",
    "double_pendulum_ranks",
    "order_and_robustness",
    "stream_trackers",
]
BETWEEN = {  # experiment, quantity: the least and the largest value
    ("cloud", "BUG: rms error / that of PCA"): (1.01, 2.2),
    ("cloud", "Strang splitting: rms error / that of PCA"): (1.01, 2.2),
    ("cloud", "BUG: mean velocity error / that of PCA"): (0, 0.95),
    ("thin cloud", "largest deviation from sqrt(1 + theta^2)"): (0, 1e-3),
    ("return", "Strang splitting: gap after the pendulum's full swing"): (0, 1e-12),
    ("return", "Strang splitting: gap with 10 steps a side"): (0, 1e-12),
    ("return", "Strang splitting: gap with 160 steps a side"): (0, 1e-12),
    ("return", "BUG: gap with 160 steps a side"): (1e-4, 1e-2),
    ("return", "BUG: order of the gap"): (0.9, 1.15),
    ("spin", "distance of the cloud from its start after one turn"): (0, 1e-14),
    ("spin", "b/a = 0.01: error / best after one turn"): (6.3, 6.4),
    ("spin", "b/a = 0.01: error / best after two turns"): (12.5, 12.8),
    ("moving pivot", "BUG, centred: rms error / that of PCA"): (1, 2.2),
    ("moving pivot", "BUG, centred: worst frame, error / that of PCA"): (1, 2.2),
    ("moving pivot", "BUG, wrong: rms error / that of PCA"): (2, 1e2),
    ("video", "anchored BUG: mean error / best"): (1, 1.02),
    ("video", "anchored augmented BUG: mean error / best"): (1, 1.02),
    ("video", "anchored augmented BUG: worst frame, error / best"): (1, 1.02),
    ("video", "subspace iteration: mean error / best"): (1, 1.02),
    ("video", "BUG: mean error / best"): (1.5, 10),
    ("video", "StreamingPCA, forgetting 0.98: mean error / best"): (1.2, 2),
    ("video", "randomised SVD, q = 8: mean error / best"): (1.01, 1.3),
    ("video", "randomised SVD, q = 16: mean error / best"): (1, 1.001),
    ("video", "IncrementalPCA: worst frame, error / best"): (1.2, 100),
    ("video", "anchored splitting against subspace iteration, largest difference"): (0, 1e-10),
    ("axis", "subspace iteration: mean angle to the axis of PCA in degrees"): (0, 1),
    ("axis", "IncrementalPCA: mean angle to the axis of PCA in degrees"): (10, 90),
    ("ensemble", "anchored: worst error / tolerance"): (0, 1.3),
    ("ensemble", "anchored: largest rank above the optimal"): (-2, 2),
    ("ensemble", "anchored, started at rank 1: worst error / tolerance"): (0, 1.3),
    ("ensemble", "increments: median rank / optimal"): (1.5, 6),
    ("ensemble", "increments: worst error / tolerance"): (0, 1.1),
    ("ensemble", "increments, share 1/√N: worst error / tolerance"): (0, 2),
    ("ensemble", "increments, started at rank 1: error / tolerance at the end"): (5, 1e3),
    ("ensemble", "optimal rank at the start"): (1, 6),
    ("ensemble", "optimal rank at the end"): (20, 100),
    ("stream", "EEG: forgetting SVD (StreamingPCA), rank 8, mean"): (0.2, 0.9),
    ("stream", "camera: forgetting SVD (StreamingPCA), rank 8, mean"): (0.2, 0.9),
    ("order", "BUG: measured order"): (0.9, 1.1),
    ("order", "augmented BUG: measured order"): (0.9, 1.1),
    ("order", "Lie splitting: measured order"): (0.9, 1.1),
    ("order", "Strang splitting: measured order"): (1.9, 2.15),
    ("robustness", "BUG: largest error / best, rank 2 to 32"): (1, 1.6),
    ("robustness", "augmented BUG: largest error / best, rank 2 to 32"): (1, 1.6),
    ("robustness", "Lie splitting: largest error / best, rank 2 to 32"): (1, 1.6),
    ("robustness", "Strang splitting: largest error / best, rank 2 to 32"): (1, 1.6),
    ("robustness", "Runge-Kutta: error / best at rank 2"): (1, 2),
    ("robustness", "Runge-Kutta: share of ranks without a usable result"): (0.4, 0.9),
    ("exactness", "BUG: relative error, data of the rank, 1 steps"): (0, 1e-12),
    ("exactness", "midpoint BUG: relative error, data of the rank, 14 steps"): (0, 1e-12),
    ("exactness", "Strang splitting: relative error, data of the rank, 14 steps"): (0, 1e-12),
    ("exactness", "parallel BUG: relative error, data of the rank, 14 steps"): (1e-4, 1),
    ("order", "augmented BUG: measured order, field from rank one"): (0.9, 1.1),
    ("order", "midpoint BUG: measured order, field from rank one"): (1.9, 2.1),
}


def outside(folder):
    """The numbers that a run of the notebook has left in a folder and that lie outside their bounds."""
    table = pd.read_csv(folder / "figures/pca_metrics.csv").set_index(["experiment", "quantity"])["value"]
    return {
        key: table[key] for key, (least, largest) in BETWEEN.items() if not least <= table[key] <= largest
    }


def assert_complete(folder):
    """Every figure and every gif is there, and small."""
    for figure in FIGURES:
        assert (folder / f"figures/{figure}.png").stat().st_size < 500_000
        assert (folder / f"figures/{figure}.pdf").stat().st_size < 500_000
    for gif in GIFS:
        assert (folder / gif).stat().st_size <= 1_000_000
        with Image.open(folder / gif) as picture:
            assert 5 <= picture.n_frames <= 100


def test_the_notebook_runs_and_its_numbers_lie_where_they_must(tmp_path):
    """With the README's command and the short films of FAST=1, which leave those of a whole run alone."""
    shutil.copy(ROOT / NAME, tmp_path)
    command = [sys.executable, "-m", *shlex.split(COMMAND)]
    result = subprocess.run(
        command, cwd=tmp_path, env=os.environ | {"FAST": "1"}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {NAME, "fast"}
    assert_complete(tmp_path / "fast")
    assert not outside(tmp_path / "fast")


def test_the_numbers_that_are_committed_lie_where_they_must():
    assert_complete(ROOT)
    assert not outside(ROOT)


def test_the_notebook_is_committed_as_it_ran_from_top_to_bottom():
    notebook = nbformat.read(ROOT / NAME, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [
        output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"
    ]
    pictures = [output for output in outputs if {"image/png", "image/gif"} & set(output.get("data", {}))]
    assert len(pictures) == len(FIGURES) + len(GIFS) + 1  # that of timings/pca.py
    assert (ROOT / NAME).stat().st_size < 3_500_000
