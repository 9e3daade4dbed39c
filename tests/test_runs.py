"""A run's folder: never overwritten, never half written, read back as it was; one rule chooses the epoch."""

import json
import os
import pickle
import subprocess
from pathlib import Path

import pandas as pd
import pytest
import torch

import dlrt
from dlrt.checkpoint import load_checkpoint, load_network, trained_weights
from dlrt.errors import RunError
from dlrt.models import LeNet5
from dlrt.runs import Run, chosen_epoch, read_metrics
from dlrt.summaries import read_runs

OPTIONS = {"lr": 0.05, "tau": 0.1, "max_rank": None, "amp": False, "name": "a"}


def row(epoch, accuracy, loss=1.0, tau=0.1, test=50.0):
    return {
        "epoch": epoch,
        "frozen_bases": False,
        "lr": 0.1,
        "tau": tau,
        "train_loss": 1.0,
        "train_accuracy": 50.0,
        "validation_loss": loss,
        "validation_accuracy": accuracy,
        "test_loss": 1.0,
        "test_accuracy": test,
        "ranks": "7",
        "evaluation_parameters": 100,
        "evaluation_compression": 50.0,
        "training_parameters": 200,
        "training_compression": 25.0,
        "seconds": float(epoch),
    }


def state(*rows):
    return {"model": {"S": torch.arange(1_000.0) * len(rows)}, "metrics": list(rows)}


def started(folder, *rows, **options):
    run = Run(folder)
    run.start(OPTIONS | options, resume=False)
    if rows:
        run.save(state(*rows))
    return run


def test_config_holds_options_versions_machine_and_commit(tmp_path):
    started(tmp_path / "a" / "b")
    config = json.loads((tmp_path / "a" / "b" / "config.json").read_text())
    assert config["options"] == OPTIONS
    assert config["versions"]["torch"] == torch.__version__
    assert {"python", "numpy"} <= config["versions"].keys()
    assert config["machine"]["threads"] == torch.get_num_threads()
    assert config["machine"]["processes"] == 1
    assert (config["machine"]["device"], config["machine"]["gpu"]) == ("cpu", None)  # with a GPU as without
    root = Path(dlrt.__file__).parents[1]
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, check=False)
    assert (config["commit"] is not None) == (git.returncode == 0)


def test_a_run_starts_on_a_machine_without_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    started(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "config.json").read_text())["commit"] is None


def test_a_folder_that_holds_a_run_is_refused_and_stays_as_it_was(tmp_path):
    started(tmp_path, row(1, 80.0))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(RunError, match="--resume") as error:
        Run(tmp_path).start(OPTIONS, resume=False)
    assert str(tmp_path) in str(error.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_run_resumes_with_equal_options_only_and_the_difference_is_told(tmp_path):
    started(tmp_path, row(1, 80.0))
    Run(tmp_path).start(dict(OPTIONS), resume=True)
    for key, value in (("lr", 0.1), ("max_rank", 20), ("amp", True), ("new", 1)):
        with pytest.raises(RunError, match=f"{key} .* -> {value!r}"):
            Run(tmp_path).start(OPTIONS | {key: value}, resume=True)
    dense = {key: value for key, value in OPTIONS.items() if key != "tau"}
    with pytest.raises(RunError, match=r"tau 0\.1 -> None"):
        Run(tmp_path).start(dense, resume=True)
    assert json.loads((tmp_path / "config.json").read_text())["options"] == OPTIONS


def test_a_share_of_the_full_rank_is_not_the_rank_one(tmp_path):
    started(tmp_path, row(1, 80.0), rank=1)
    with pytest.raises(RunError, match=r"rank 1 -> 1\.0"):
        Run(tmp_path).start(OPTIONS | {"rank": 1.0}, resume=True)


def test_resuming_where_nothing_was_begun_begins(tmp_path):
    run = Run(tmp_path / "new")
    run.start(OPTIONS, resume=True)
    assert (tmp_path / "new" / "config.json").exists()
    assert run.load() is None


def test_a_saved_state_comes_back_and_metrics_have_a_row_per_epoch(tmp_path):
    run = started(tmp_path, row(1, 80.0), row(2, 81.5))
    loaded = run.load()
    assert torch.equal(loaded["model"]["S"], state(0, 0)["model"]["S"])
    assert loaded["metrics"] == [row(1, 80.0), row(2, 81.5)]
    table = read_metrics(tmp_path)
    assert table["epoch"].tolist() == [1, 2]
    assert table["validation_accuracy"].tolist() == [80.0, 81.5]
    assert table["ranks"].tolist() == ["7", "7"]  # a name, not a number
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint.pt", "config.json", "metrics.csv"]


def test_a_checkpoint_that_fails_half_way_leaves_the_old_one(tmp_path):
    run = started(tmp_path, row(1, 80.0))
    before = run.checkpoint.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        run.save(state(row(1, 80.0), row(2, 81.0)) | {"cannot be pickled": lambda: None})
    assert run.checkpoint.read_bytes() == before
    assert len(Run(tmp_path).load()["metrics"]) == 1
    run.save(state(row(1, 80.0), row(2, 81.0)))
    assert len(run.load()["metrics"]) == 2


def test_control_c_while_a_file_is_written_is_control_c(tmp_path, monkeypatch):
    """torch's writer makes a RuntimeError of it."""
    run = started(tmp_path, row(1, 80.0))
    before = run.checkpoint.read_bytes()

    def interrupted(state, file):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 124288 vs 124240")

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run.save(state(row(1, 80.0), row(2, 81.0)))
    assert run.checkpoint.read_bytes() == before
    assert not list(tmp_path.glob("*.part"))


def test_a_run_that_never_completed_an_epoch_can_be_begun_anew(tmp_path):
    started(tmp_path, lr=1e6)
    started(tmp_path, row(1, 80.0), lr=0.05)
    assert json.loads((tmp_path / "config.json").read_text())["options"]["lr"] == 0.05
    with pytest.raises(RunError, match="holds a run: continue it with --resume"):
        started(tmp_path, lr=0.05)
    with pytest.raises(
        RunError, match=r"begun with other options \(lr 0.05 -> 0.1\): repeat those with --resume"
    ):
        started(tmp_path, lr=0.1)


def test_the_checkpoint_is_never_ahead_of_the_metrics(tmp_path):
    """Else a run broken off between the two files would lack a row for ever: no epoch is left to write it."""
    run = started(tmp_path, row(1, 80.0))
    (tmp_path / "metrics.csv.part").mkdir()  # metrics.csv cannot be written
    with pytest.raises(OSError, match=r"metrics\.csv"):
        run.save(state(row(1, 80.0), row(2, 81.0)))
    assert len(run.load()["metrics"]) <= len(read_metrics(tmp_path))


@pytest.mark.parametrize("keep", [0, 1, 4, 100, 0.5, 0.9, -1])
def test_truncated_checkpoint_is_named(tmp_path, keep):
    run = started(tmp_path, row(1, 80.0))
    data = run.checkpoint.read_bytes()
    run.checkpoint.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(RunError, match="damaged") as error:
        run.load()
    assert str(run.checkpoint) in str(error.value)
    assert len(str(error.value).splitlines()) == 1


class Trap:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def dump_plainly(state, path):
    path.write_bytes(pickle.dumps(state, protocol=2))


@pytest.mark.parametrize("dump", [torch.save, dump_plainly])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(tmp_path, dump):
    path, trace = tmp_path / "checkpoint.pt", tmp_path / "trace"
    dump({"model": Trap(trace), "metrics": []}, path)
    with pytest.raises(RunError, match="not a checkpoint") as error:
        load_checkpoint(path)
    assert str(path) in str(error.value)
    assert not trace.exists()


def test_a_file_of_torch_that_is_no_checkpoint_is_refused(tmp_path):
    torch.save(torch.zeros(2), tmp_path / "weights.pt")
    with pytest.raises(RunError, match="not a checkpoint"):
        load_checkpoint(tmp_path / "weights.pt")


def test_the_most_accurate_epoch_on_the_validation_split_is_chosen():
    assert chosen_epoch(pd.DataFrame([row(1, 90.0), row(2, 92.0), row(3, 91.0)])) == 1
    assert chosen_epoch(pd.DataFrame([row(1, 93.0), row(2, 92.0), row(3, 91.0)])) == 0
    assert chosen_epoch(pd.DataFrame([row(1, 90.0)])) == 0


def test_only_epochs_at_the_final_tolerance_count():
    rows = [row(1, 99.0, tau=0.05), row(2, 90.0), row(3, 92.0), row(4, 91.0)]
    assert chosen_epoch(pd.DataFrame(rows)) == 2
    assert chosen_epoch(pd.DataFrame(rows[:2])) == 1


def test_ties_go_to_the_smaller_validation_loss():
    rows = [row(1, 92.0, 0.5), row(2, 92.0, 0.3), row(3, 92.0, 0.4), row(4, 91.0, 0.1)]
    assert chosen_epoch(pd.DataFrame(rows)) == 1


def test_the_test_split_has_no_say():
    rows = [row(1, 90.0, test=99.0), row(2, 92.0, test=10.0), row(3, 91.0, test=50.0)]
    metrics = pd.DataFrame(rows)
    assert chosen_epoch(metrics) == 1
    assert chosen_epoch(metrics[["epoch", "tau", "validation_accuracy", "validation_loss"]]) == 1


def test_no_runs_are_an_error_that_names_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished runs") as error:
        read_runs(tmp_path)
    assert str(tmp_path) in str(error.value)
    started(tmp_path / "begun", epochs=2)
    with (
        pytest.warns(UserWarning, match=r"unfinished or diverged: begun \(0 of 2 epochs\)"),
        pytest.raises(FileNotFoundError, match="no finished runs"),
    ):
        read_runs(tmp_path)
    (tmp_path / "begun" / "metrics.csv").touch()
    (tmp_path / "begun" / "config.json").unlink()
    with pytest.raises(RunError, match=r"config.json is lost or damaged"):
        read_runs(tmp_path)


def test_many_runs_are_one_table_with_a_row_each(tmp_path):
    started(tmp_path / "lenet5" / "a", row(1, 92.0, test=40.0), row(2, 90.0, test=60.0), seed=0, epochs=2)
    rows = [row(1, 99.0, tau=0.0), row(2, 90.0), row(6, 91.0, test=70.0)]
    started(tmp_path / "lenet5" / "b", *rows, name="b", seed=1, epochs=6)
    table = read_runs(tmp_path)
    assert table["run"].tolist() == ["lenet5/a", "lenet5/b"]
    assert table["seed"].tolist() == [0, 1]
    assert table["epoch"].tolist() == [1, 6]  # the chosen ones
    assert table["test_accuracy"].tolist() == [40.0, 70.0]
    assert table["last_test_accuracy"].tolist() == [60.0, 70.0]


def test_an_unfinished_run_is_left_out_and_told(tmp_path):
    started(tmp_path / "whole", row(1, 92.0), row(2, 93.0), epochs=2)
    started(tmp_path / "half", row(1, 99.0), row(2, 99.0), epochs=2, finetune_epochs=2)
    with pytest.warns(UserWarning, match=r"left out, since unfinished or diverged: half \(2 of 4 epochs\)"):
        assert read_runs(tmp_path)["run"].tolist() == ["whole"]


def test_metrics_stay_numbers_where_one_is_not_finite(tmp_path):
    started(tmp_path, row(1, 92.0, 0.5), row(2, 10.0, float("nan")))
    table = read_metrics(tmp_path)
    assert pd.api.types.is_numeric_dtype(table["validation_loss"])
    assert chosen_epoch(table) == 0


def test_an_epoch_before_the_budget_is_met_is_not_chosen():
    rows = [row(1, 95.0) | {"budget": 900}, row(2, 90.0) | {"budget": 200}, row(3, 91.0) | {"budget": 200}]
    assert chosen_epoch(pd.DataFrame(rows)) == 2


def test_a_dense_run_has_no_ranks(tmp_path):
    started(tmp_path, row(1, 92.0) | {"ranks": ""})
    assert read_metrics(tmp_path)["ranks"].tolist() == [""]


GOOD = json.dumps({"options": {"epochs": 1, "lr": 0.1, "seed": 0, "name": "a"}})


@pytest.mark.parametrize(
    "config",
    [
        *("", "{", "null", "3", "[]", '"options"', "{}", "[" * 99_999, "\x00"),
        *(f'{{"options": {wrong}}}' for wrong in ("null", "[]", '"epochs"', '[["epochs", 1]]', "{}")),
        *(GOOD.replace("1,", f"{wrong},") for wrong in ('"1"', "null", "1.5", "[1]", "{}")),
        *(GOOD.replace(*pair) for pair in (("0.1", '"0.1"'), ('"a"', "[]"), ('"seed": 0', '"seed": []'))),
    ],
)
def test_a_damaged_config_is_told_whatever_is_wrong_with_it(tmp_path, config):
    started(tmp_path, row(1, 80.0))
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    with pytest.raises(RunError, match=r"config\.json is lost or damaged"):
        read_runs(tmp_path)


HEAD = "epoch,tau,validation_loss,validation_accuracy,test_accuracy,ranks,seconds\n"
NEEDED = HEAD.replace(",ranks,seconds", "").strip().split(",")


@pytest.mark.parametrize(
    "text",
    [
        *("", "\n", HEAD, "\0\0\n", HEAD + "1,0.1,1,80,50,7,1", HEAD + "one,0.1,1,80,50,7,1\n"),
        *(HEAD + "1,0.1,1,80,50,7,1,9\n", HEAD + "1,0.1,1,80,50,7,1\n1,2,3,4,5,6,7,8\n", HEAD + '1\n"\n'),
        *(HEAD + "1.5,0.1,1,80,50,7,1\n", HEAD + ",0.1,1,80,50,7,1\n", HEAD + "inf,0.1,1,80,50,7,1\n"),
        *(HEAD + "1,0.1,1,80 %,50,7,1\n", HEAD.replace(",", ";") + "1;0,1;1;80;50;7;1\n", "<html></html>\n"),
        *(HEAD.replace(name, "other") + "1,0.1,1,80,50,7,1\n" for name in NEEDED),
    ],
)
def test_a_damaged_table_of_metrics_is_told_whatever_is_wrong_with_it(tmp_path, text):
    started(tmp_path, row(1, 80.0), epochs=1)
    (tmp_path / "metrics.csv").write_text(text, encoding="utf-8")
    with pytest.raises(RunError, match=r"metrics\.csv is lost or damaged"):
        read_runs(tmp_path)


ABOUT = {"network": "LeNet5", "settings": {}, "shape": [1, 28, 28], "classes": 10, "dataset": "mnist"}
ABOUT |= {"mean": [0.0], "std": [1.0]}


def wrong_states():
    """What a damaged checkpoint of LeNet5 may hold in the place of something."""
    rows = (None, 3, {}, "rows", [1], [[1]], [None], [{}], [{"epoch": "1"}], [{**row(1, 80.0), "tau": "x"}])
    yield from ({"metrics": wrong} for wrong in rows)
    weights = (None, 3, [], "x", {"S": 1}, {1: torch.zeros(2)}, {"conv1.U": torch.zeros(())})
    yield from ({name: wrong} for name in ("model", "chosen") for wrong in weights[: 7 - (name == "model")])
    yield from ({"about": wrong} for wrong in (None, 3, [], {}))
    yield from ({"about": {name: ABOUT[name] for name in ABOUT if name != without}} for without in ABOUT)
    for name in ABOUT:
        right = {"classes": 3, "settings": []}.get(name, "")
        yield from ({"about": {**ABOUT, name: w}} for w in (None, 3, [], ["x"], {"a": 1}) if w != right)


@pytest.mark.parametrize("wrong", list(wrong_states()), ids=str)
def test_a_checkpoint_that_loads_is_checked_and_what_is_wrong_told(tmp_path, wrong):
    chosen = {"chosen": LeNet5().state_dict()} if "about" in wrong else {"chosen": {}}
    torch.save({**state(row(1, 80.0)), "about": ABOUT, **chosen, **wrong}, tmp_path / "checkpoint.pt")
    with pytest.raises(RunError, match=r"checkpoint\.pt") as error:
        load_network(tmp_path)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("weights", [{"chosen": 3}, {"model": {"a": torch.zeros(1)}}, {1: torch.zeros(1)}])
def test_a_file_without_weights_is_told(tmp_path, weights):
    torch.save(weights, tmp_path / "weights.pt")
    with pytest.raises(RunError, match="no state dict of tensors"):
        trained_weights(tmp_path / "weights.pt")


def test_weights_that_come_along_are_of_a_seed():
    weights, about = trained_weights(Path("resnet20_cifar10"))
    assert "conv1.weight" in weights
    assert (about["dataset"], about["seed"]) == ("cifar10", 0)
