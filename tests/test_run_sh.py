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


@pytest.mark.parametrize(("flags", "maps"), [([], 5 * 5), (["--quick"], 2)])
def test_run_sh_draws_dense_and_low_rank_networks_on_the_photographs(flags, maps, tmp_path):
    result = run_sh(*flags, OUT=str(tmp_path))
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path / "cams.csv")
    assert len(table) == maps
    dense = table[table["network"] == "efficientnet_lite0"].set_index("file")
    assert dense.loc["chelsea.png", "predicted"] == "Egyptian cat"
    assert (tmp_path / "cams.png").stat().st_size > 100_000
    at_15 = table[table["network"].str.endswith("compression15")]
    assert (at_15["correlation"] > 0.97).all()
    assert f"figure: {tmp_path / 'cams.png'}" in result.stdout


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
