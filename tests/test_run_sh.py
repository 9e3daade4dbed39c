"""run.sh draws and compares what there is, and says what is missing."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_cam_scripts import ROOT, modules, pictures, runs, save_run, script

__all__ = ["modules", "pictures", "runs", "script"]  # fixtures


def test_run_sh_says_which_commands_train_what_it_needs(tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "CHECKPOINTS": str(tmp_path)}
    for flags, code, told in (
        ([], 1, "python cifar10/resnet20_cifar10_baseline.py"),
        (["--slow"], 2, "takes --quick"),
    ):
        command = ["bash", str(ROOT / "run.sh"), *flags]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == code
        assert told in result.stderr
        assert result.stderr.count(f"--output-dir {tmp_path}") == (2 if code == 1 else 0)


RECORDER = """#!/bin/sh
printf '%s\\n' "$@" end >> "$RECORD"
case "$1" in
pytorch-grad-cam/cam.py) exit "${CODE:-0}" ;;
esac
"""


@pytest.fixture
def run_sh(tmp_path):
    """Run run.sh with a Python that writes commands down and ends cam.py as told; exit code and commands."""
    (tmp_path / "python").write_text(RECORDER)
    (tmp_path / "python").chmod(0o755)

    def call(checkpoints, out, code=0):
        record = tmp_path / "record"
        record.write_text("")
        variables = {"PYTHON": tmp_path / "python", "CHECKPOINTS": checkpoints, "OUT": out, "RECORD": record}
        environment = {"PATH": "/usr/bin:/bin", "CODE": str(code)} | {
            key: str(value) for key, value in variables.items()
        }
        command = ["bash", str(ROOT / "run.sh")]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        commands = [its.splitlines() for its in record.read_text().split("end\n") if its]
        return result.returncode, commands

    return call


def test_run_sh_draws_and_compares_what_has_a_checkpoint(run_sh, run_script, tmp_path):
    runs, out = tmp_path / "my runs", tmp_path / "out"
    save_run(runs / "dense_seed0", shape=(3, 16, 16))
    save_run(runs / "dense_seed2", seed=2, shape=(3, 16, 16))
    save_run(runs / "tau0.12_seed0", shape=(3, 16, 16), tau=0.12)
    save_run(runs / "tau0.3_seed0", shape=(3, 16, 16), tau=0.3)
    save_run(runs / "compression60_seed0", shape=(3, 16, 16), tau=0.1)
    (runs / "dense_seed1").mkdir()  # its record was committed, its checkpoint was not
    code, commands = run_sh(runs, out)
    assert code == 0
    assert len(commands) == 10
    *commands, (script, *flags) = commands
    assert run_script(script, *flags, "--nonsense").stderr.endswith(
        "unrecognized arguments: --nonsense (--help lists all options)\n"
    )
    assert flags == ["--results", str(out / "comparison"), "--output-dir", str(out)]
    drawn = [Path(flags[flags.index("--output-dir") + 1]).name for _, *flags in commands[:-1]]
    assert drawn == ["dense", "tau0.04", "tau0.08", "tau0.12", "tau0.16", "tau0.2", "tau0.3", "compression60"]
    for script, *flags in [
        commands[1],
        commands[3],
        commands[-1],
    ]:  # a network cut, one trained, all compared
        flags = [str(ROOT / flag) if flag == "test_images" else flag for flag in flags]
        quick = ["--no-faithfulness", "--time-shares"] if "compare_cams" in script else []
        result = run_script(script, *flags, *quick)
        assert result.returncode == 0, result.stderr
    assert len(list(out.glob("*/chelsea.png.cam.png"))) == 2
    networks = {path.stem for path in (out / "comparison/maps").glob("*.csv")}
    cut = {f"svd_tau{tau}" for tau in (0.04, 0.08, 0.16, 0.2)}
    trained = {"dense_seed0", "dense_seed2", "tau0.12_seed0", "tau0.3_seed0", "compression60_seed0"}
    assert networks == trained | cut | {"full_rank", "random_weights", "randomcam"}


def test_run_sh_compares_with_seeds_from_scratch_where_the_reference_is_adapted(run_sh, tmp_path):
    for name in (
        "adapted_dense_seed0",
        "adapted_dense_seed1",
        "scratch_dense_seed0",
        "scratch12_dense_seed1",
    ):
        save_run(tmp_path / "runs" / name)
    code, commands = run_sh(tmp_path / "runs", tmp_path / "out")
    assert code == 0
    compared = commands[-2]
    assert compared[compared.index("--reference") + 1] == str(tmp_path / "runs/adapted_dense_seed0")
    seeds = compared[compared.index("--seeds") + 1 : compared.index("--images")]
    assert seeds == [str(tmp_path / "runs/scratch12_dense_seed1")]


@pytest.mark.parametrize(("code", "commands"), [(1, 8), (2, 1), (3, 1)])
def test_run_sh_goes_on_after_an_unreadable_picture_and_after_nothing_else(code, commands, run_sh, tmp_path):
    save_run(tmp_path / "runs/dense_seed0")
    ended, called = run_sh(tmp_path / "runs", tmp_path / "out", code)
    assert (ended, len(called)) == (code, commands)
