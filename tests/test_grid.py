"""A grid: finished runs are left alone, broken ones go on, a failure is told and stops nobody else."""

import json
import signal
import subprocess
import sys
import time

import pandas as pd
import pytest
import torch

from dlrt import cli, grid
from dlrt.runs import epochs_done, read_metrics

SCRIPT = cli.ROOT / "mnist" / "mlp_mnist_baseline.py"
QUICK = {"dataset": "digits", "width": 8}


def plan(name, epochs=2, finetune_epochs=0, script=SCRIPT, **options):
    return grid.Plan(name, script, epochs, {**QUICK, **options}, finetune_epochs)


def test_what_is_finished_is_left_alone_and_what_broke_off_is_continued(tmp_path, capsys):
    plans = [plan("a/one"), plan("a/two")]
    grid.make(plans, tmp_path, jobs=2)
    assert [epochs_done(tmp_path / p.name) for p in plans] == [2, 2]
    one, two = (tmp_path / p.name / "metrics.csv" for p in plans)
    whole, written = pd.read_csv(two), one.stat().st_mtime_ns
    pd.read_csv(two)[:1].to_csv(two, index=False)  # as if the machine had gone down in the second epoch
    (two.parent / "checkpoint.pt").unlink()
    grid.make(plans, tmp_path, jobs=2)
    assert one.stat().st_mtime_ns == written
    timeless = [column for column in whole if column != "seconds"]
    pd.testing.assert_frame_equal(read_metrics(two.parent)[timeless], read_metrics(one.parent)[timeless])
    assert capsys.readouterr().out.count("2 of 2 runs are in") == 2


def test_a_failure_is_told_with_its_reason_and_the_others_go_on(tmp_path, capsys):
    with pytest.raises(SystemExit, match="failed: bad; the same command tries them again"):
        grid.make([plan("bad", lr=-1), plan("good", 1)], tmp_path)
    assert epochs_done(tmp_path / "good") == 1
    told = "bad failed: mlp_mnist_baseline.py: argument --lr: must lie in (0, inf)"
    assert told in capsys.readouterr().out


def test_a_run_that_diverges_may_be_a_result(tmp_path, capsys):
    diverging = plan("wild", lr=1e9, batch_size=32)
    with pytest.raises(SystemExit, match="failed: wild"):
        grid.make([diverging], tmp_path)
    grid.make([diverging], tmp_path, may_diverge=True)
    assert capsys.readouterr().out.count("wild failed: mlp_mnist_baseline.py: the loss is") == 2
    with pytest.raises(SystemExit, match="failed: bad"):  # that is another reason
        grid.make([plan("bad", lr=-1)], tmp_path, may_diverge=True)


def test_a_run_of_other_options_is_not_taken_for_the_one_planned(tmp_path):
    """Whether it is finished or not; nothing is trained here."""
    options = {"width": 8, "augment": True, "skip": ["fc5"], "rank": 1.0, "weight_decay": 0.0, "epochs": 3}
    options |= {"finetune_epochs": 1, "from_checkpoint": "a b.pt 0123abcd"}
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "config.json").write_text(json.dumps({"options": options}))
    same = {"width": 8, "augment": True, "skip": ("fc5",), "rank": 1.0, "weight_decay": 0}
    same |= {"from_checkpoint": tmp_path / "a b.pt", "data_dir": tmp_path, "device": "cuda"}

    def other(epochs=3, finetune_epochs=1, **changed):
        return grid.Plan("one", SCRIPT, epochs, {**same, **changed}, finetune_epochs).other_options(tmp_path)

    assert other() == []
    for changed in ({"width": 9}, {"augment": False}, {"skip": ()}, {"rank": 1}, {"from_checkpoint": "b.pt"}):
        (told,) = other(**changed)
        assert told.startswith(next(iter(changed)))
    assert other(epochs=4) == ["epochs 3 instead of 4"]
    assert other(finetune_epochs=0) == ["finetune_epochs 1 instead of 0"]
    with pytest.raises(SystemExit, match=r"one was made with epochs 3 instead of 4: move it"):
        grid.make([grid.Plan("one", SCRIPT, 4, same, 1)], tmp_path)


def test_options_of_every_kind_reach_the_script(tmp_path):
    script = cli.ROOT / "mnist" / "mlp_mnist.py"
    options = {"augment": False, "skip": ("fc4", "fc5"), "tau": 0.2, "s_steps": 3}
    planned = plan("one", 1, 1, script, **options)
    grid.make([planned], tmp_path)
    was = json.loads((tmp_path / "one" / "config.json").read_text())["options"]
    assert [was[name] for name in options] == [False, ["fc4", "fc5"], 0.2, 3]
    assert list(read_metrics(tmp_path / "one")["frozen_bases"]) == [False, True]
    assert not planned.other_options(tmp_path)


def test_a_run_that_says_much_goes_on(tmp_path, capsys):
    talkative = tmp_path / "talk.py"
    talkative.write_text("import sys\nsys.stderr.write('word ' * 10**5)\nsys.exit('\\nthat was it')")
    with pytest.raises(SystemExit):
        grid.make([plan("talk", 1, script=talkative)], tmp_path / "results")
    assert "talk failed: that was it" in capsys.readouterr().out


def test_control_c_stops_the_runs_and_keeps_their_epochs(tmp_path):
    code = f"""
import signal
from pathlib import Path
from dlrt import grid
signal.signal(signal.SIGINT, signal.default_int_handler)
grid.make([grid.Plan("long", Path({str(SCRIPT)!r}), 100000, {QUICK!r})], Path({str(tmp_path)!r}))
"""
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) as process:
        while epochs_done(tmp_path / "long") < 2 and process.poll() is None:
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 130
    done = epochs_done(tmp_path / "long")
    assert done >= 2
    time.sleep(0.5)
    assert epochs_done(tmp_path / "long") == done  # nobody is left to go on


def test_jobs_share_the_cores(tmp_path):
    grid.make([plan("one", 1)], tmp_path, jobs=torch.get_num_threads())
    assert '"threads": 1' in (tmp_path / "one" / "config.json").read_text()
