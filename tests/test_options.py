"""The flags and the scripts: a mistake costs one line, no run is overwritten, a killed one can go on."""

import json
import re
import signal
import sys
from dataclasses import replace
from itertools import product

import pytest
import torch
from shared import fork

from dlrt import SpatialLowRankConv2d, to_low_rank
from dlrt.checkpoint import load_checkpoint, load_network
from dlrt.datasets import DATASETS
from dlrt.errors import OptionError
from dlrt.low_rank_options import RAMP, LowRankOptions
from dlrt.models import LeNet5
from dlrt.option_fields import as_flags
from dlrt.options import ROOT, DenseOptions
from dlrt.run_optimizer import make_optimizer
from dlrt.runs import read_metrics

SCRIPT = ROOT / "mnist" / "lenet5_mnist.py"
OFFLINE = dict.fromkeys(("http_proxy", "https_proxy"), "http://127.0.0.1:9")  # nobody listens there
TRAINING = ["--dataset", "digits", "--epochs", "3", "--batch-size", "64", "--seed", "1", "--device", "cpu"]
TRAINING += ["--tau-warmup", "2"]


def call(folder, *arguments, **signalled):
    """Run the script to its end, from a folder that is not the repository's."""
    return fork([sys.executable, SCRIPT, *arguments], cwd=folder, env=OFFLINE, **signalled)


def parse(*arguments, low_rank=True):
    return (LowRankOptions if low_rank else DenseOptions).parse("", [str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """An uninterrupted run: where it was called, and how it ended."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, call(folder, *TRAINING, "--output-dir", folder / "results", "--name", "a")


IMPOSSIBLE = [
    (["--tau", "1.5"], ["--tau", "[0, 1)", "got 1.5"]),
    (["--theta", "1"], ["--theta", "[0, 1)", "got 1"]),
    (["--epochs", "0"], ["--epochs", "[1, inf)", "got 0"]),
    (["--epochs", "2.5"], ["--epochs", "whole number", "2.5"]),
    (["--lr", "0"], ["--lr", "(0, inf)", "got 0"]),
    (["--lr", "high"], ["--lr", "number", "high"]),
    (["--weight-decay", "-1"], ["--weight-decay", "[0, inf)", "got -1"]),
    (["--rank", "1.5"], ["--rank", "(0, 1]", "got 1.5"]),
    (["--s-steps", "4", "--integrator", "bug"], ["--s-steps must be 1 with --integrator bug", "got 4"]),
    (["--s-steps", "2", "--integrator", "augmented"], ["--s-steps must be 1 with --integrator augmented"]),
    (
        ["--update", "muon", "--integrator", "bug"],
        ["--integrator bug must come with --update sgd", "got muon"],
    ),
    (["--optimizer", "adam", "--integrator", "bug"], ["must come with --update sgd, got adam"]),
    (["--update", "adam"], ["--update adam must come with --optimizer adam or adamw"]),
    (["--nesterov", "--s-steps", "2"], ["--nesterov needs more of the velocity"]),
    (["--nesterov", "--integrator", "augmented"], ["--nesterov needs more of the velocity"]),
    (["--amp", "float16", "--integrator", "augmented"], ["takes two gradients a step", "--amp bfloat16"]),
    (["--min-rank", "5", "--max-rank", "3"], ["--max-rank must be at least --min-rank", "3 < 5"]),
    (["--tau-warmup", "1", "--compression", "60"], ["--tau-warmup must come with --tau"]),
    (["--tau-warmup", "50", "--epochs", "3"], ["--tau-warmup must be at most --epochs", "50 > 3"]),
    (["--max-rank", "all"], ["--max-rank", "whole number from 1 on, or initial", "got 'all'"]),
    (["--compression", "0.6"], ["--compression", "a percentage in [1, 100), 75 and not 0.75, got 0.6"]),
    (["--compression", "60", "--integrator", "bug"], ["--compression changes ranks", "bug keeps them"]),
    (
        ["--compression", "60", "--ramp", "0"],
        ["--ramp 0 must come with --from-checkpoint", "nothing to keep"],
    ),
    (["--ramp", "0.5"], ["--ramp must come with --compression"]),
    (
        ["--compression", "60", "--ramp", "0", "--from-checkpoint", "a", "--rank", "3"],
        ["--ramp 0 cuts to ranks of its own: leave --rank out"],
    ),
    (["--dense-epochs", "2"], ["--dense-epochs must come with --compression"]),
    (
        ["--dense-epochs", "2", "--compression", "60", "--ramp", "0.5"],
        ["--dense-epochs cuts at once: leave --ramp out"],
    ),
    (
        ["--dense-epochs", "2", "--compression", "60", "--from-checkpoint", "a"],
        ["--dense-epochs begins at random", "leave --from-checkpoint out"],
    ),
    (
        ["--dense-epochs", "3", "--compression", "60", "--epochs", "3"],
        ["--dense-epochs must be less than --epochs, got 3 >= 3"],
    ),
    (
        ["--dense-epochs", "2", "--compression", "60", "--rank", "3"],
        ["--dense-epochs cuts to ranks of its own: leave --rank out"],
    ),
    (
        ["--dense-epochs", "2", "--compression", "60", "--update", "sgd", "--optimizer", "adam"],
        ["--dense-epochs with --optimizer adam steps by that or by --update muon, got --update sgd"],
    ),
    (["--dense-update-lr", "1", "--dense-epochs", "2", "--compression", "60"], ["and --update muon"]),
    (["--cut-by", "weights"], ["--cut-by must come with --compression, --from-checkpoint"]),
    (["--cut-by", "loss"], ["--cut-by must come with --compression, --from-checkpoint"]),
    (["--name", "../../x"], ["--name", "name of one folder", "--output-dir says where", "'../../x'"]),
    (["--device", "nonsense"], ["--device", "nonsense cannot be used here", "cpu always can"]),
    (["--dataset", "foo"], ["--dataset", "foo", *DATASETS]),
    (["--unknown", "1"], ["--unknown"]),
    (["--nesterov", "--momentum", "0"], ["--nesterov must come with", "a --momentum"]),
    (["--nesterov", "--optimizer", "adam"], ["--nesterov must come with --optimizer sgd"]),
]
OF_BASELINES = [
    (["--update", "adam"], ["--update", "adam", "sgd", "muon"]),
    (["--update-lr", "0.1"], ["--update-lr must come with --update muon"]),
    (["--update", "sgd", "--optimizer", "adam"], ["--update sgd must come with --optimizer sgd, got adam"]),
    (["--factors", "0.7"], ["--factors", "a percentage", "got 0.7"]),
    (["--factors", "70", "--from-checkpoint", "a"], ["--factors begins with random weights"]),
    (["--dense-epochs", "2"], ["--dense-epochs must come with --factors"]),
    (["--dense-epochs", "9", "--factors", "70", "--epochs", "9"], ["less than --epochs, got 9 >= 9"]),
    (["--dense-update-lr", "1", "--update", "muon"], ["--dense-update-lr must come with --dense-epochs"]),
    (["--cut-by", "loss", "--from-checkpoint", "a"], ["--cut-by must come with --dense-epochs"]),
    (["--tau", "0.1"], ["--tau"]),
]


@pytest.mark.parametrize("case", [*IMPOSSIBLE, *OF_BASELINES], ids=lambda case: " ".join(case[0]))
def test_an_impossible_value_costs_one_line_that_says_what_is_allowed(capsys, case):
    arguments, reported = case
    with pytest.raises(SystemExit) as error:
        parse(*arguments, low_rank=case in IMPOSSIBLE)
    out, err = capsys.readouterr()
    assert error.value.code == 2
    assert out == ""
    assert len(err.splitlines()) == 1
    for part in (*reported, "--help"):
        assert part in err


NUMBERS = ("lr", "update_lr", "weight_decay", "rank", "min_rank", "max_rank", "tau", "compression", "ramp")
STRANGE = ["0.1", float("nan"), float("inf"), -1, [], True]
WRONG = [*product(NUMBERS, STRANGE), *product(("min_rank", "max_rank", "epochs", "seed"), (1.5, -1))]
WRONG += [("rank", 0), ("rank", 1.5), ("tau", 1), ("momentum", 1.0), ("seed", 2**32), ("compression", 100)]
WRONG += [("compression", 0.75), ("lr", 0), ("batch_size", 0), ("epochs", None), ("augment", 1)]
WRONG += [*product(("update", "integrator", "optimizer", "schedule", "dataset"), ("foo", 3))]


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_an_impossible_value_is_refused_without_a_command_line(name, value):
    with pytest.raises(OptionError, match=rf"--{name.replace('_', '-')} must be "):
        LowRankOptions(**{name: value})


def test_options_that_are_settled_stay_so():
    for settled in (parse(), parse("--compression", "80"), parse("--update", "muon", low_rank=False)):
        assert replace(settled) == settled


def test_flags_say_what_a_record_says():
    options = {"epochs": 3, "rank": 1.0, "skip": ("fc1", "fc2"), "augment": False, "spatial": True}
    record = parse(*as_flags(options)).record()
    assert {name: record[name] for name in options} == options | {"skip": ["fc1", "fc2"]}
    assert not {"data_dir", "output_dir", "device", "resume", "quiet", "workers"} & record.keys()


def test_possible_values_at_the_edge_are_taken():
    args = parse("--tau", "0", "--momentum", "0", "--rank", "1", "--min-rank", "3", "--max-rank", "3")
    assert (args.tau, args.momentum, args.min_rank, args.max_rank) == (0.0, 0.0, 3, 3)
    assert parse("--tau-warmup", "3", "--epochs", "3").tau_warmup == 3
    assert parse("--momentum", "0.5", low_rank=False).momentum == 0.5


def test_a_whole_rank_is_a_rank_and_a_rank_with_a_point_a_share():
    for text, value in (("20", 20), ("1", 1), ("1.0", 1.0), ("0.5", 0.5)):
        assert parse("--rank", text).rank == value
        assert type(parse("--rank", text).rank) is type(value)


@pytest.mark.parametrize(("given", "every"), [(None, 10), (1, 1)])
def test_ranks_are_decided_as_often_as_is_asked(given, every):
    optimizer = make_optimizer(to_low_rank(LeNet5()), LowRankOptions(allot_every=given), steps=5)
    assert optimizer.group["allot_every"] == every


def test_theta_is_tau():
    assert parse("--theta", "0.2") == parse("--tau", "0.2")
    assert parse("--theta", "0.2").tau == 0.2


def test_a_dense_script_has_no_low_rank_flags(capsys):
    with pytest.raises(SystemExit):
        parse("--tau", "0.1", low_rank=False)
    assert "--tau" in capsys.readouterr().err


def test_help_lists_every_flag(capsys):
    with pytest.raises(SystemExit) as error:
        parse("--help")
    assert error.value.code == 0
    text = capsys.readouterr().out
    for flag in vars(parse()):
        assert f"--{flag.replace('_', '-')}" in text


def test_help_of_a_script_with_its_own_defaults_names_no_others():
    def help_text(**defaults):
        return " ".join(LowRankOptions.parser("", **defaults).format_help().split())

    assert "over which the tolerance rises from 0; by default half of all" in help_text()
    assert "over which the tolerance rises from 0 (default: 0)" in help_text(tau_warmup=0)


def test_a_run_from_any_folder_leaves_its_folder_and_prints_the_result(finished):
    folder, done = finished
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert [path.name for path in folder.iterdir()] == ["results"]
    run = folder / "results" / "a"
    assert sorted(path.name for path in run.iterdir()) == ["checkpoint.pt", "config.json", "metrics.csv"]
    metrics = read_metrics(run)
    assert metrics["epoch"].tolist() == [1, 2, 3]
    assert metrics["validation_accuracy"].max() > 50
    last = done.stdout.splitlines()[-1]
    test_accuracies = [f"test accuracy {accuracy:.2f} %" for accuracy in metrics["test_accuracy"]]
    assert any(text in last for text in test_accuracies)
    assert str(run) in last


def test_a_run_to_resume_must_be_there_where_it_is_named(run_script, tmp_path):
    done = run_script("mnist/lenet5_mnist.py", "--resume", "--name", "none", "--output-dir", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f"--resume must name a run that was begun, got {tmp_path / 'none'}" in done.stderr
    assert not (tmp_path / "none").exists()


def test_a_killed_run_resumes_to_the_weights_of_an_uninterrupted_one(finished, tmp_path):
    run = tmp_path / "results" / "a"
    arguments = [*TRAINING, "--output-dir", tmp_path / "results", "--name", "a"]
    killed = call(tmp_path, *arguments, send=signal.SIGKILL, once=run / "checkpoint.pt")
    assert killed.returncode == -signal.SIGKILL
    assert 1 <= len(load_checkpoint(run / "checkpoint.pt")["metrics"]) < 3
    done = call(tmp_path, *arguments, "--resume")
    assert done.returncode == 0, done.stderr
    straight = load_checkpoint(finished[0] / "results" / "a" / "checkpoint.pt")
    resumed = load_checkpoint(run / "checkpoint.pt")
    for weights in ("model", "chosen"):
        assert straight[weights].keys() == resumed[weights].keys()
        for name, weight in straight[weights].items():
            assert torch.equal(weight, resumed[weights][name]), name
    assert len(read_metrics(run)) == 3
    (run / "metrics.csv").unlink()  # the checkpoint has them, too
    assert call(tmp_path, *arguments, "--resume").returncode == 0
    assert len(read_metrics(run)) == 3


def test_ctrl_c_ends_with_130_and_says_how_to_continue(tmp_path):
    arguments = [*TRAINING, "--epochs", "100", "--output-dir", tmp_path, "--name", "a"]
    ended = call(tmp_path, *arguments, send=signal.SIGINT, once=tmp_path / "a" / "checkpoint.pt")
    assert ended.returncode == 130
    assert "--resume" in ended.stderr
    assert "Traceback" not in ended.stderr
    load_checkpoint(tmp_path / "a" / "checkpoint.pt")


def test_a_missing_data_set_costs_one_line_and_leaves_no_run(tmp_path):
    """Which would be in the way later."""
    (tmp_path / "data").mkdir()
    done = call(tmp_path, "--data-dir", tmp_path / "data", "--output-dir", tmp_path / "results")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    for part in ("train-images-idx3-ubyte", str(tmp_path / "data"), "--dataset digits"):
        assert part in line
    assert list(tmp_path.glob("results/**/config.json")) == []


def test_the_tolerance_rises_over_half_of_the_epochs_unless_told_otherwise():
    assert parse("--epochs", "7").tau_warmup == 3.5
    assert parse("--tau-warmup", "0").tau_warmup == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--momentum", "1.5"], "argument --momentum: must be a number in [0, 1), got 1.5"),
        (["--skip", "fc1", "fc9"], "--skip takes layers of conv1, conv2, fc1, fc2, got fc9"),
        (["--skip", "conv1", "conv2", "fc1", "fc2"], "--skip must leave a layer"),
    ],
)
def test_an_impossible_option_is_reported_before_any_data_are_read(flags, message, run_script, tmp_path):
    place = ["--data-dir", tmp_path / "data", "--output-dir", tmp_path / "runs"]
    result = run_script("mnist/lenet5_mnist.py", *flags, *place)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def lenet5(run_script, tmp_path):
    """One epoch of LeNet5 on the digits."""
    flags = ["--dataset", "digits", "--epochs", "1", "--device", "cpu", "--output-dir", tmp_path]
    return lambda *more, dense=False: run_script(
        f"mnist/lenet5_mnist{'_baseline' if dense else ''}.py", *flags, *more
    )


def test_a_budget_falls_from_full_rank_without_a_tolerance_unless_they_are_given():
    def settled(*more):
        args = parse("--compression", "80", *more)
        return args.ramp, args.rank, args.tau

    assert settled() == (RAMP, 1.0, 0.0)
    assert settled("--ramp", "0.3", "--rank", "0.4", "--tau", "0.2") == (0.3, 0.4, 0.2)
    assert settled("--tau", "0.1") == (RAMP, 1.0, 0.1)  # also where that is the default without a budget
    assert LowRankOptions(compression=80) == parse("--compression", "80")
    start = ["--compression", "80", "--from-checkpoint", "a"]
    assert parse(*start).rank == 1.0
    cut = parse(*start, "--ramp", "0")
    assert (cut.ramp, cut.rank, cut.tau, cut.max_rank) == (0.0, None, 0.0, "initial")
    begun_dense = parse("--compression", "80", "--dense-epochs", "3")
    assert begun_dense.cut_by == "loss"
    settled = ("ramp", "rank", "tau", "tau_warmup", "max_rank", "cut_by")
    assert all(getattr(begun_dense, name) == getattr(cut, name) for name in settled)


def test_the_budget_of_a_run_is_met_at_the_end_of_its_ramp_from_scratch_or_a_checkpoint(lenet5, tmp_path):
    assert lenet5("--name", "dense", dense=True).returncode == 0
    for start in ([], ["--from-checkpoint", tmp_path / "dense", "--name", "from_dense"]):
        done = lenet5("--compression", 85, "--ramp", 1, "--epochs", 2, *start)
        assert done.returncode == 0, done.stderr
        metrics = read_metrics(tmp_path / (start[-1] if start else "compression85_seed0"))
        assert (metrics["tau"] == 0).all()
        before, after = metrics["evaluation_compression"].iloc[-2:]
        assert before < 85 <= after < 87
    impossible = lenet5("--compression", "99.9", "--name", "none")
    assert (impossible.returncode, impossible.stderr.count("\n")) == (1, 1)
    assert re.search(r"--compression must be at most 0\.\d+ \(9.* %\) here", impossible.stderr)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("spatial", [(), ("--spatial",)])
def test_a_run_starts_at_a_compression_and_keeps_to_it(lenet5, tmp_path, spatial):
    assert lenet5("--name", "dense", dense=True).returncode == 0
    start = ["--from-checkpoint", tmp_path / "dense", "--ramp", "0"]
    budget = [*start, "--compression", "95", "--name", "cut", *spatial]
    assert lenet5(*budget).returncode == 0
    compression = read_metrics(tmp_path / "cut")["evaluation_compression"]
    assert 95 <= compression[0] < 95.5
    assert compression[1] == compression[0]
    (tmp_path / "dense").rename(tmp_path / "gone")  # what goes on has weights and ranks of its own
    assert f"compression {compression[1]:.2f} %" in lenet5(*budget, "--resume").stdout
    (tmp_path / "gone").rename(tmp_path / "dense")
    kinds = {type(module) for module in load_network(tmp_path / "cut")[0].modules()}
    assert (SpatialLowRankConv2d in kinds) == bool(spatial)
    recorded = json.loads((tmp_path / "cut" / "config.json").read_text())["options"]
    assert [recorded[name] for name in ("rank", "tau", "max_rank")] == [None, 0, "initial"]
    impossible = lenet5(*start, "--compression", "99.9", "--name", "none")
    assert (impossible.returncode, impossible.stderr.count("\n")) == (1, 1)
    assert "--compression must be at most 0.9" in impossible.stderr


def test_a_run_starts_from_the_truncated_weights_of_a_dense_run(lenet5, tmp_path):
    assert lenet5("--name", "dense", dense=True).returncode == 0
    start = ["--from-checkpoint", tmp_path / "dense", "--tau-warmup", "0"]
    line = lenet5(*start, "--name", "full", "--rank", "1.0").stdout.splitlines()[0]
    assert re.fullmatch(r"epoch   0/1  validation \S+ \S+ %  ranks \S+  compression \S+ %", line)
    assert lenet5(*start, "--name", "cut", "--rank", "2", "--quiet").returncode == 0
    full, cut, trained = (read_metrics(tmp_path / name) for name in ("full", "cut", "dense"))
    assert full["epoch"].tolist() == [0, 1]
    assert full["test_accuracy"][0] == trained["test_accuracy"][0]
    assert full["test_loss"][0] == pytest.approx(trained["test_loss"][0], rel=1e-4)
    assert cut["ranks"][0] == "2/2"
    assert cut["validation_loss"][0] > full["validation_loss"][0]
    assert lenet5(*start, "--name", "weights", "--rank", "2", "--cut-by", "weights").returncode == 0
    assert cut["validation_loss"][0] < read_metrics(tmp_path / "weights")["validation_loss"][0]
    spatial = lenet5("--spatial", "--skip", "conv1", "conv2", "--name", "flat")
    assert (spatial.returncode, spatial.stderr.count("\n")) == (1, 1)
    assert "--spatial needs a convolution" in spatial.stderr
    alone = lenet5("--spatial", dense=True)
    assert (alone.returncode, "--spatial must come with --factors" in alone.stderr) == (2, True)
    missing = lenet5("--from-checkpoint", tmp_path / "nowhere", "--name", "a")
    assert missing.returncode == 1
    assert "give a run's folder" in missing.stderr
    other = lenet5("--from-checkpoint", tmp_path / "full", "--name", "b")
    assert "is of a network in factors: give a dense one's" in other.stderr
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "other.pt")
    foreign = lenet5("--from-checkpoint", tmp_path / "other.pt", "--name", "c")
    assert "must be the weights of a dense LeNet5, got" in foreign.stderr
    weights = {name: torch.full_like(W, torch.nan) for name, W in LeNet5().state_dict().items()}
    torch.save(weights, tmp_path / "diverged.pt")
    diverged = lenet5("--from-checkpoint", tmp_path / "diverged.pt", "--name", "d")
    assert ".py: weights must be finite, got inf or nan in conv2" in diverged.stderr
    assert [each.stderr.count("\n") for each in (other, foreign, diverged)] == [1, 1, 1]


def test_a_run_knows_the_weights_it_began_with_and_goes_on_without_their_file(lenet5, tmp_path):
    for lr, name in ((0.05, "start"), (0.06, "another")):
        assert lenet5("--name", name, "--lr", lr, dense=True).returncode == 0
    flags = ["--from-checkpoint", tmp_path / "start", "--name", "a", "--quiet"]
    assert lenet5(*flags).returncode == 0
    assert lenet5(*flags, "--resume").returncode == 0
    config = tmp_path / "a" / "config.json"
    recorded = json.loads(config.read_text())["options"]["from_checkpoint"]
    assert re.fullmatch("start [0-9a-f]{8}", recorded)
    (tmp_path / "start").rename(tmp_path / "gone")
    assert lenet5(*flags, "--resume").returncode == 0
    (tmp_path / "another").rename(tmp_path / "start")
    refused = lenet5(*flags, "--resume")
    assert refused.returncode == 1
    assert f"was begun with other options (from_checkpoint '{recorded}' -> 'start " in refused.stderr
    config.write_text(config.read_text().replace(recorded, "start"))  # as it was recorded without a checksum
    assert lenet5(*flags, "--resume").returncode == 0


def test_weights_of_another_seed_have_seen_the_validation_split(lenet5, tmp_path):
    assert lenet5("--name", "start", dense=True).returncode == 0
    result = lenet5("--from-checkpoint", tmp_path / "start", "--name", "a", "--seed", 1)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "--seed must be 0, as that of" in result.stderr
    assert not (tmp_path / "a").exists()


def test_the_record_of_a_run_without_weights_is_not_written_over(lenet5, tmp_path):
    assert lenet5("--name", "a").returncode == 0
    (tmp_path / "a" / "checkpoint.pt").unlink()
    record = (tmp_path / "a" / "metrics.csv").read_bytes()
    for flags in ((), ("--resume",)):
        result = lenet5("--name", "a", *flags)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert (tmp_path / "a" / "metrics.csv").read_bytes() == record
    assert "holds the record of a run without its weights: move it, or delete" in result.stderr
