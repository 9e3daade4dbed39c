"""A grid: finished runs are left alone, broken ones go on, a failure is reported and stops nobody else."""

import json
import signal
import sys
import time

import pandas as pd
import pytest
import torch
from shared import fork

from dlrt import grid
from dlrt.errors import RunError
from dlrt.options import ROOT
from dlrt.runs import epochs_done, read_metrics

SCRIPT = ROOT / "mnist" / "mlp_mnist_baseline.py"
QUICK = {"dataset": "digits", "width": 8}
QUICK_SCRIPT = """
import json, pathlib, sys
flags = dict(zip(sys.argv[2::2], sys.argv[3::2]))  # behind --quiet
if flags.get("--lr") == "-1":
    sys.exit("word " * 10**5 + "\\nargument --lr: must be positive")
if flags.get("--lr") == "1e9":
    print("the loss is inf", file=sys.stderr)
    sys.exit(3)
start = flags.get("--from-checkpoint")
if start and not (pathlib.Path(start) / "checkpoint.pt").exists():
    sys.exit("no weights to begin with")
folder = pathlib.Path(flags["--output-dir"], flags["--name"])
folder.mkdir(parents=True, exist_ok=True)
options = {"epochs": int(flags["--epochs"]), "threads": flags["--workers"]}
options |= {"from_checkpoint": start and pathlib.Path(start).name, "dataset": flags.get("--dataset")}
(folder / "config.json").write_text(json.dumps({"options": options}))
(folder / "metrics.part").write_text(f"epoch,ranks\\n{options['epochs']},\\n")
(folder / "metrics.part").replace(folder / "metrics.csv")
(folder / "checkpoint.pt").touch()
"""


@pytest.fixture
def script(tmp_path):
    """What a training script leaves behind, without PyTorch and training."""
    path = tmp_path / "quick.py"
    path.write_text(QUICK_SCRIPT)
    return path


def test_a_run_that_broke_off_is_continued_and_a_finished_one_left_alone(tmp_path, forked_grid, capsys):
    plans = [grid.RunSpec(f"a/{name}", SCRIPT, {**QUICK, "epochs": 2}) for name in ("one", "two")]
    one, two = (tmp_path / plan.name for plan in plans)
    grid.make([grid.RunSpec("a/two", SCRIPT, {**QUICK, "epochs": 1, "schedule": "constant"})], tmp_path)
    config = json.loads((two / "config.json").read_text())
    config["options"] |= {"epochs": 2, "schedule": "cosine"}  # as if it had been planned for two epochs
    (two / "config.json").write_text(json.dumps(config))
    first = read_metrics(two)
    grid.make(plans, tmp_path, jobs=2)
    assert [epochs_done(folder) for folder in (one, two)] == [2, 2]
    pd.testing.assert_frame_equal(read_metrics(two)[:1], first)  # seconds and all: it was not made again
    written = [(folder / "metrics.csv").stat().st_mtime_ns for folder in (one, two)]
    grid.make(plans, tmp_path, jobs=2)
    assert [(folder / "metrics.csv").stat().st_mtime_ns for folder in (one, two)] == written
    assert capsys.readouterr().out.count("2 of 2 runs are in") == 2


def test_a_failure_is_told_with_its_reason_and_the_others_go_on(tmp_path, script, capsys):
    """Even if it says more than a pipe holds."""
    bad, good = (grid.RunSpec(f"{lr}", script, {"epochs": 1, "lr": lr}) for lr in (-1, 2))
    with pytest.raises(RunError, match="failed: -1; the same command tries them again"):
        grid.make([bad, good], tmp_path)
    assert epochs_done(tmp_path / "2") == 1
    assert "-1 failed: argument --lr: must be positive\n" in capsys.readouterr().out


def test_a_run_that_diverges_may_be_a_result(tmp_path, script, capsys):
    diverging, bad = (grid.RunSpec(lr, script, {"epochs": 1, "lr": lr}) for lr in ("1e9", "-1"))
    with pytest.raises(RunError, match="failed: 1e9"):
        grid.make([diverging], tmp_path)
    grid.make([diverging], tmp_path, may_diverge=True)
    assert capsys.readouterr().out.count("1e9 failed: the loss is inf") == 2
    with pytest.raises(RunError, match="failed: -1"):  # that is another reason
        grid.make([bad], tmp_path, may_diverge=True)


def test_records_without_weights_are_made_again_only_where_a_missing_run_begins_with_them(tmp_path, script):
    start = grid.RunSpec("start", script, {"epochs": 2})
    after = grid.RunSpec("after", script, {"epochs": 1, "from_checkpoint": tmp_path / "start"})
    weights = tmp_path / "start" / "checkpoint.pt"
    grid.make([start], tmp_path, then=[after])
    grid.make([after], tmp_path)
    for missing in (False, True):
        weights.unlink()
        if missing:
            (tmp_path / "after" / "metrics.csv").unlink()
        grid.make([start], tmp_path, then=[after])
        assert weights.exists() == missing
        weights.touch()
        grid.make([after], tmp_path)


def test_a_run_of_other_data_is_not_taken_for_the_one_planned(tmp_path, script):
    """Nor is a run asked for twice made twice."""
    for number, folder in enumerate(("one", "other")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text(f"word {number} " * 20_000)
    plans = [
        grid.RunSpec(name, script, {"epochs": 1, "dataset": "text", "data_dir": tmp_path / "one"})
        for name in ("first", "first", "second")
    ]
    grid.make(plans, tmp_path, jobs=2)
    assert grid.make(plans, tmp_path) is None
    config = tmp_path / "first" / "config.json"
    config.write_text(json.dumps({"options": {"epochs": 1, "data": "0", "dataset": "text"}}))
    with pytest.raises(RunError, match=r"first was made with data '0' instead of '[0-9a-f]{8}': move it"):
        grid.make(plans, tmp_path)


def test_a_run_of_other_options_is_not_taken_for_the_one_planned(tmp_path):
    """Whether it is finished or not; nothing is trained here."""
    options = {"width": 8, "augment": True, "skip": ["fc5"], "rank": 1.0, "weight_decay": 0.0, "epochs": 3}
    options |= {"finetune_epochs": 1, "from_checkpoint": "a b.pt 0123abcd"}
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").write_text(json.dumps({"options": options}))
    same = {"width": 8, "augment": True, "skip": ("fc5",), "rank": 1.0, "weight_decay": 0, "epochs": 3}
    same |= {"finetune_epochs": 1, "from_checkpoint": tmp_path / "a b.pt"}
    same |= {"data_dir": tmp_path, "device": "cuda"}

    def other(**changed):
        return grid.RunSpec("one", SCRIPT, {**same, **changed}).other_options(tmp_path)

    assert other() == []
    for changed in ({"width": 9}, {"augment": False}, {"skip": ()}, {"rank": 1}, {"from_checkpoint": "b.pt"}):
        (reported,) = other(**changed)
        assert reported.startswith(next(iter(changed)))
    assert other(epochs=4) == ["epochs 3 instead of 4"]
    assert other(spatial=False, amp=None) == []  # the record is older than these options
    assert other(spatial=True) == ["spatial None instead of True"]
    del same["finetune_epochs"]
    assert other() == ["finetune_epochs 1 instead of 0"]
    with pytest.raises(RunError, match="one was made with finetune_epochs 1 instead of 0: move it"):
        grid.make([grid.RunSpec("one", SCRIPT, same)], tmp_path)


def test_a_damaged_record_and_a_place_that_is_none_end_a_grid_before_its_first_run(tmp_path, script):
    plans = [grid.RunSpec(name, script, {"epochs": 2}) for name in ("one", "two")]
    grid.make(plans[:1], tmp_path)
    for name, text in (("metrics.csv", ""), ("metrics.csv", "epoch,ranks,seconds\n2,"), ("config.json", "{")):
        path = tmp_path / "one" / name
        whole = path.read_text()
        path.write_text(text)
        with pytest.raises(RunError, match=rf"one/{name} is lost or damaged: restore it, or delete"):
            grid.make(plans, tmp_path)
        path.write_text(whole)
    path.unlink()
    with pytest.raises(RunError, match=r"one/config.json is lost or damaged"):
        grid.make(plans, tmp_path)
    path.write_text(whole)
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Not a directory|File exists"):
        grid.make(plans, tmp_path / "file")
    assert not (tmp_path / "two").exists()
    grid.make(plans, tmp_path)  # nothing was lost
    assert (tmp_path / "two").exists()


def test_options_of_every_kind_reach_the_script(tmp_path, forked_grid):
    options = {"augment": False, "skip": ("fc4", "fc5"), "tau": 0.2, "s_steps": 3}
    epochs = {"epochs": 1, "finetune_epochs": 1}
    planned = grid.RunSpec("one", ROOT / "mnist" / "mlp_mnist.py", {**QUICK, **options, **epochs})
    grid.make([planned], tmp_path)
    was = json.loads((tmp_path / "one" / "config.json").read_text())["options"]
    assert [was[name] for name in options] == [False, ["fc4", "fc5"], 0.2, 3]
    assert list(read_metrics(tmp_path / "one")["frozen_bases"]) == [False, True]
    assert not planned.other_options(tmp_path)


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_what_ends_a_grid_ends_its_runs_and_keeps_their_epochs(sent, code, tmp_path, forked_grid):
    program = tmp_path / "program.py"
    program.write_text(f"""
from pathlib import Path
from dlrt import errors, grid
options = {QUICK | {"epochs": 100_000}!r}
with errors.boundary("the same command goes on"):
    grid.make([grid.RunSpec("long", Path({str(SCRIPT)!r}), options)], Path({str(tmp_path)!r}))
""")
    ended = fork([sys.executable, program], send=sent, once=tmp_path / "long" / "metrics.csv")
    assert ended.returncode == code
    assert ("interrupted; the same command goes on" in ended.stderr) == (sent == signal.SIGINT)
    done = epochs_done(tmp_path / "long")
    assert 1 <= done < 100_000
    time.sleep(0.5)
    assert epochs_done(tmp_path / "long") == done  # nobody is left to go on


@pytest.mark.parametrize(("jobs", "runs", "threads"), [(2, 2, 2), (3, 3, 1), (2, 1, 4), (8, 2, 2)])
def test_the_runs_share_the_cores(jobs, runs, threads, tmp_path, script):
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        grid.make([grid.RunSpec(str(n), script, {"epochs": 1}) for n in range(runs)], tmp_path, jobs)
    finally:
        torch.set_num_threads(before)
    assert f'"threads": "{threads}"' in (tmp_path / "0" / "config.json").read_text()
