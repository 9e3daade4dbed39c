"""run.sh draws the photographs that are shipped, without training, and says what is missing."""

import os
import subprocess
import sys

import pandas as pd
import pytest
from made_up_cam_runs import ROOT


def run_sh(*flags, **variables):
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **variables}
    command = ["bash", str(ROOT / "run.sh"), *flags]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def assert_maps(folder, number):
    table = pd.read_csv(folder / "cams.csv")
    assert len(table) == number
    dense = table[table["network"] == "efficientnet_lite0"].set_index("file")
    assert dense.loc["chelsea.png", "predicted"] == "Egyptian cat"
    assert (folder / "cams.png").stat().st_size > 100_000
    at_15 = table[table["network"].str.endswith("compression15")]
    assert (at_15["correlation"] > 0.97).all()


def test_run_sh_draws_dense_and_low_rank_networks_on_the_photographs(tmp_path):
    result = run_sh(OUT=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert f"figure: {tmp_path / 'cams.png'}" in result.stdout
    assert_maps(tmp_path, 5 * 5)


def test_the_quick_one_draws_one_photograph_by_two_networks(tmp_path, run_script):
    """What it hands to Python is written down, and then run in this process."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\n[ "$1" = -c ] || printf "%s\\n" "$@" > {tmp_path / "given"}\n')
    python.chmod(0o755)
    result = run_sh("--quick", PYTHON=str(python), OUT=str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    script, option, picture, *flags = (tmp_path / "given").read_text().splitlines()
    result = run_script(script, option, ROOT / picture, *flags)
    assert result.returncode == 0, result.stderr
    assert_maps(tmp_path / "out", 2)


@pytest.mark.parametrize(
    ("flags", "python", "told"),
    [(["--slow"], sys.executable, "takes --quick"), ([], "false", "make demo-cam installs it first")],
)
def test_run_sh_says_what_is_wrong_in_a_line(flags, python, told, tmp_path):
    result = run_sh(*flags, PYTHON=python, OUT=str(tmp_path / "out"))
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert told in result.stderr
    assert not (tmp_path / "out").exists()


def test_run_sh_leaves_the_logic_to_python():
    assert (ROOT / "run.sh").read_text().count("\n") <= 60
