"""A trained network comes back from its run, is described, and leaves in formats that others read."""

import re
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest
import torch
from shared import fork, plain
from torch import nn

import dlrt
from dlrt.__main__ import main
from dlrt.baselines import plain_factors
from dlrt.checkpoint import WEIGHTS, load_checkpoint, load_network, trained_weights
from dlrt.datasets import load
from dlrt.errors import RunError
from dlrt.factors import Factors
from dlrt.models import MLP
from dlrt.runs import Run, chosen_epoch, read_metrics
from dlrt.training import evaluate, fit


def train(folder, kind, network=MLP, **settings):
    """A short run on the bundled digits; its folder, the trained model and the data."""
    torch.manual_seed(0)
    digits = load("digits", folder, seed=0)
    model = network(digits.shape, digits.classes, **settings)
    about = {"network": network.__name__, "settings": settings, "shape": list(digits.shape)}
    if kind == "low-rank":
        dlrt.to_low_rank(model, rank=8, skip=["fc5"])
        optimizer = dlrt.DLRT(model, torch.optim.SGD, lr=0.1, tau=0.2)
    else:
        if kind == "factors":
            model = plain_factors(model, 0.6, skip=["fc5"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    about |= {"classes": 10, "dataset": "digits", "mean": list(digits.mean), "std": list(digits.std)}
    run = Run(folder)
    run.start({"network": network.__name__}, resume=False)
    fit(model, optimizer, scheduler, digits, plain(epochs=2, batch_size=64), run, about, quiet=True)
    return folder, model.eval(), digits


@pytest.fixture(scope="module", params=["low-rank", "dense", "factors"])
def trained(request, tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"), request.param, width=30)


@pytest.fixture(scope="module")
def low_rank(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"), "low-rank", width=30)


def test_a_checkpoint_of_the_chosen_epoch_alone_is_the_network_and_a_start(trained, tmp_path, run_script):
    folder, model, digits = trained
    main(["export", str(folder), "--format", "checkpoint", "--output", str(tmp_path / "slim.pt")])
    again, about = load_network(tmp_path / "slim.pt")
    assert torch.equal(again(digits.test.images), model(digits.test.images))
    assert about == load_network(folder)[1]
    state = load_checkpoint(tmp_path / "slim.pt")
    assert [row["epoch"] for row in state["metrics"]] == [chosen_epoch(read_metrics(folder)) + 1]
    assert (tmp_path / "slim.pt").stat().st_size < (folder / "checkpoint.pt").stat().st_size / 1.5


CARD = (WEIGHTS / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", sorted(WEIGHTS.glob("*.pt")), ids=lambda path: path.stem)
def test_networks_that_come_along_are_what_their_card_says(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, about = load_network(path.stem)
    cost, (row,) = dlrt.compression(model), load_checkpoint(path)["metrics"]
    cells = re.search(rf"^\| `{path.stem}` \|.*$", CARD, flags=re.MULTILINE)[0].split(" | ")
    accuracy, compression = f"{row['test_accuracy']:.2f}", f"{cost.evaluation_compression:.1f}"
    assert cells[1:5] == [about["network"], accuracy, compression, f"{cost.evaluation_parameters:,}"]
    assert path.stat().st_size < 1.5e6
    assert model(torch.zeros(2, *about["shape"])).shape == (2, about["classes"])


def test_a_run_gives_back_the_network_of_its_chosen_epoch(trained):
    folder, model, digits = trained
    for run in (folder, folder / "checkpoint.pt", str(folder)):
        loaded, about = load_network(run)
        assert not loaded.training
        assert dlrt.compression(loaded) == dlrt.compression(model)
        assert evaluate(loaded, digits.test) == evaluate(model, digits.test)
        assert (about["network"], about["settings"], about["classes"]) == ("MLP", {"width": 30}, 10)
        assert tuple(about["shape"]) == digits.shape
        assert (tuple(about["mean"]), tuple(about["std"])) == (digits.mean, digits.std)


class OwnNetwork(MLP):
    """A network that dlrt.models does not have."""


def test_an_unknown_network_is_named_and_can_be_given(tmp_path):
    folder, model, digits = train(tmp_path, "low-rank", OwnNetwork, width=20)
    with pytest.raises(RunError, match=r"network 'OwnNetwork'.*MLP.*load_network\(run, OwnNetwork\)"):
        load_network(folder)
    loaded, _ = load_network(folder, OwnNetwork)
    assert evaluate(loaded, digits.test) == evaluate(model, digits.test)


def test_what_is_no_run_costs_one_clear_line(low_rank, tmp_path, capsys):
    folder, _, _ = low_rank
    state = load_checkpoint(folder / "checkpoint.pt")
    other = {**state, "about": {**state["about"], "settings": {"width": 31}}}
    files = {"other.pt": other, "bare.pt": {"model": {}, "metrics": []}, "tensor.pt": torch.zeros(3)}
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    (tmp_path / "text.pt").write_text("no checkpoint")
    for name, reported in (
        ("other.pt", "do not fit MLP"),
        ("bare.pt", "no about and no chosen"),
        ("tensor.pt", "not a checkpoint"),
        ("text.pt", "not a checkpoint"),
        ("missing", "there is no"),
        ("", "there is no"),
    ):
        with pytest.raises(SystemExit):
            main(["info", str(tmp_path / name)])
        (line,) = capsys.readouterr().err.splitlines()
        assert reported in line
        assert str(tmp_path / name) in line


@pytest.mark.parametrize("about", [{}, {"about": None}], ids=["none", "no dict"])
def test_weights_to_begin_with_must_say_what_they_are(low_rank, tmp_path, about):
    state = load_checkpoint(low_rank[0] / "checkpoint.pt")
    torch.save({"chosen": state["chosen"], **about}, tmp_path / "bare.pt")
    with pytest.raises(RunError, match="does not say which network it holds"):
        trained_weights(tmp_path / "bare.pt")


def test_info_prints_what_the_layers_are_and_draws_their_spectra(trained, tmp_path, capsys):
    folder, model, _ = trained
    main(["info", str(folder), "--output-dir", str(tmp_path)])
    out = capsys.readouterr().out
    count = dlrt.compression(model)
    assert f"compression {count.evaluation_compression:.2f} %" in out
    rows = {line.split("|")[1].strip(): line for line in out.splitlines() if line.startswith("| fc")}
    assert list(rows) == list(dlrt.singular_values(model))
    for name, row in rows.items():
        assert f"| {getattr(model.get_submodule(name), 'rank', 'dense')} " in row
    for suffix in ("png", "pdf"):
        assert (tmp_path / f"singular_values.{suffix}").stat().st_size > 1000


def test_singular_values_are_those_of_the_weights(trained):
    _, model, _ = trained
    for name, sigma in dlrt.singular_values(model).items():
        layer = model.get_submodule(name)
        if isinstance(layer, Factors):
            B, A = layer.matrices()
            weight = A @ B
        else:
            weight = layer.weight
        expected = torch.linalg.svdvals(weight.detach().flatten(1))
        assert torch.allclose(sigma, expected[: len(sigma)], atol=1e-5)


def test_every_format_computes_what_the_network_does(low_rank, tmp_path):
    folder, model, digits = low_rank
    images = digits.test.images[:5]
    expected = model(images).detach()
    for kind in ("pt2", "onnx", "state_dict"):
        main(["export", str(folder), "--format", kind, "--output", str(tmp_path / kind)])
    assert {path.name for path in tmp_path.iterdir()} == {"pt2", "onnx", "state_dict"}  # each one file
    assert torch.allclose(torch.export.load(tmp_path / "pt2").module()(images), expected, atol=1e-5)
    session = onnxruntime.InferenceSession(tmp_path / "onnx")
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    assert torch.allclose(torch.from_numpy(logits), expected, rtol=0, atol=1e-5)
    weights = torch.load(tmp_path / "state_dict", weights_only=True)
    plain = dlrt.export(model)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    plain.load_state_dict(weights)
    assert torch.allclose(plain(images), expected, atol=1e-5)


def test_a_format_that_wants_another_package_names_it(low_rank, tmp_path):
    flags = ["export", str(low_rank[0]), "--format", "onnx", "--output", str(tmp_path / "onnx")]
    without = f"import sys; sys.modules['onnxscript'] = None; from dlrt.__main__ import main; main({flags})"
    done = subprocess.run([sys.executable, "-c", without], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert "--format onnx needs onnxscript: pip install 'dlrt[export]'" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_command_runs_from_any_folder_and_names_the_file(low_rank, tmp_path):
    folder, _, _ = low_rank
    done = fork([sys.executable, "-m", "dlrt", "export", folder, "--format", "state_dict"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(folder / "mlp.pt")
    assert (folder / "mlp.pt").exists()


@pytest.mark.parametrize("kind", ["pt2", "onnx", "state_dict"])
def test_a_file_that_cannot_be_written_costs_one_line(low_rank, tmp_path, kind, capsys):
    for output in (tmp_path, tmp_path / "nowhere" / "file", Path("/proc/x")):  # nobody writes to the last
        with pytest.raises(SystemExit):
            main(["export", str(low_rank[0]), "--format", kind, "--output", str(output)])
        (line,) = capsys.readouterr().err.splitlines()
        assert re.search("cannot be written.*: give --output a file", line)
    assert list(tmp_path.iterdir()) == []


def test_impossible_commands_cost_one_line(capsys):
    for arguments in ([], ["fly"], ["export", "somewhere"], ["export", "somewhere", "--format", "exe"]):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


def test_factors_load_into_a_dense_network_and_shared_layers_stay_shared(float64):
    def network():
        linear = nn.Linear(6, 6)
        return nn.Sequential(linear, nn.Tanh(), linear, nn.Conv1d(3, 3, 1), nn.Linear(6, 4))

    source, target = dlrt.to_low_rank(network(), rank=2, skip=["4"]), network()
    dlrt.load_factors(target, source.state_dict())
    x = torch.randn(2, 3, 6)
    assert torch.equal(target(x), source(x))
    assert target[0] is target[2]
    assert type(target[4]) is nn.Linear
    with pytest.raises(RuntimeError, match="Unexpected key"):
        dlrt.load_factors(nn.Sequential(nn.Linear(6, 6)), source.state_dict())
