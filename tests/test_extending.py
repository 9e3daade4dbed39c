"""A network, a data set and an update rule of one's own are as good as those that are there."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import dlrt
from dlrt import datasets, script, velocity
from dlrt.checkpoint import load_network
from dlrt.data_files import read_npz
from dlrt.errors import DataError
from dlrt.flags import NATURAL
from dlrt.low_rank_options import LowRankOptions
from dlrt.options import DenseOptions, option
from dlrt.picture_sets import picture_set
from dlrt.runs import Run
from dlrt.velocity import Rule


class Patches(nn.Sequential):
    """A linear map of each patch, the mean over them, and a classifier."""

    def __init__(self, shape=(1, 28, 28), classes=10, patch=7, width=32):
        channels, height, _ = shape
        if height % patch:
            raise ValueError(f"patch must divide {height}, got {patch}")
        embed = nn.Conv2d(channels, width, patch, patch)
        super().__init__(embed, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes))


@dataclass(kw_only=True)
class PatchOptions(LowRankOptions):
    patch: int = option(7, "pixels", NATURAL)
    width: int = option(32, "of the map", NATURAL)


def train(folder, *flags, options=PatchOptions):
    """The exit code of a training script with these flags."""
    quick = ("--epochs", 1, "--device", "cpu", "--quiet", "--name", "a", "--output-dir", folder)
    try:
        script.run(options.parse("", list(map(str, (*quick, *flags)))), Patches, folder)
    except SystemExit as error:
        return error.code
    return 0


@pytest.fixture(autouse=True)
def own(monkeypatch):
    monkeypatch.setitem(datasets.DATASETS, "halves", halves)


def halves(folder, seed):
    """Noise whose upper or lower half is brighter, as numpy has it."""
    generator, labels = np.random.default_rng(0), np.arange(120) % 2
    images = generator.integers(0, 128, (120, 1, 32, 32), dtype=np.uint8)
    images[labels == 0, :, :16] += 100
    images[labels == 1, :, 16:] += 100
    return picture_set("halves", (images[:80], labels[:80], images[80:], labels[80:]), seed, validation=20)


def test_options_that_a_script_adds_arrive_at_its_network_and_in_the_record(tmp_path):
    assert train(tmp_path, "--dataset", "halves", "--patch", 8, "--width", 12, "--skip", "4") == 0
    options = Run(tmp_path / "a").options()
    assert (options["patch"], options["width"], options["dataset"]) == (8, 12, "halves")
    model, about = load_network(tmp_path / "a", Patches)
    assert about["settings"] == {"patch": 8, "width": 12}
    assert model[0].shape == (12, 64)


def test_settings_that_do_not_fit_the_data_are_one_line(tmp_path, capsys):
    for flags in (["--patch", 7], ["--patch", 7, "--skip", 4]):  # 7 divides the default's 28, and not 32
        assert train(tmp_path, "--dataset", "halves", *flags) == 1
        message = capsys.readouterr().err
        assert "--dataset halves is not for this network with --patch 7 with --width 32: " in message
        assert message.endswith("patch must divide 32, got 7\n")


def test_a_slip_in_skip_is_one_line_whatever_the_data(tmp_path, capsys):
    assert train(tmp_path, "--dataset", "halves", "--patch", 7, "--skip", 9) == 2  # before data are read
    assert "--skip takes layers of 0, 4, got 9" in capsys.readouterr().err
    assert train(tmp_path, "--dataset", "halves", "--patch", 8, "--skip", 9) == 2  # afterwards
    assert "--skip takes layers of 0, 4, got 9" in capsys.readouterr().err


def test_a_slip_in_skip_of_a_dense_network_is_told_as_well(tmp_path, capsys):
    @dataclass(kw_only=True)
    class Options(DenseOptions):
        patch: int = option(7, "pixels", NATURAL)

    flags = ("--dataset", "halves", "--patch", 8, "--update", "muon", "--skip", 9)
    assert train(tmp_path, *flags, options=Options) == 2
    assert "--skip takes layers of 0, 4, got 9" in capsys.readouterr().err


def test_a_field_that_is_no_option_is_refused():
    @dataclass(kw_only=True)
    class Bare(LowRankOptions):
        width: int = 3

    with pytest.raises(TypeError, match="width of Bare must be an option"):
        Bare.parse("", [])


def test_a_data_set_of_another_name_than_its_key_is_refused(monkeypatch, tmp_path):
    monkeypatch.setitem(datasets.DATASETS, "thirds", halves)
    with pytest.raises(DataError, match="called what its key is, thirds, got 'halves'"):
        datasets.load("thirds", tmp_path, 0)


@pytest.mark.parametrize(
    ("parts", "told"),
    [
        (None, "own.npz is not there: put it there, or name its folder with --data-dir"),
        ({}, "must hold .*, but lacks x_train, y_train, x_test, y_test"),
        ({"x_test": None}, "but lacks x_test$"),
        ({"y_train": np.array(["cat", "dog"])}, "y_train must hold numbers, got <U3"),
        ({"x_train": np.array([{}])}, "own.npz is damaged"),
    ],
)
def test_a_file_without_the_arrays_of_a_data_set_says_what_is_wrong(tmp_path, parts, told):
    sound = {"x_train": np.zeros((2, 4, 4), np.uint8), "y_train": np.arange(2)}
    sound |= {"x_test": sound["x_train"], "y_test": sound["y_train"]}
    if parts is not None:
        changed = {**sound, **parts} if parts else {}
        np.savez(tmp_path / "own.npz", **{key: array for key, array in changed.items() if array is not None})
    with pytest.raises(DataError, match=told):
        read_npz(tmp_path / "own.npz")


def steps(update, count=5, rank=4, **options):
    """The weight of a layer after so many steps with a rule."""
    torch.manual_seed(0)
    layer = dlrt.LowRankLinear(9, 7, rank)
    optimizer = dlrt.DLRT(layer, torch.optim.SGD, lr=0.05, tau=0.0, max_rank=rank, update=update, **options)
    x = torch.randn(30, 9)
    for _ in range(count):
        optimizer.zero_grad()
        (layer(x) - x[:, :7].sin()).square().mean().backward()
        optimizer.step()
    return layer.factors.dense()


@pytest.mark.parametrize("s_steps", [1, 3])
def test_a_rule_may_overwrite_its_matrix(monkeypatch, s_steps):
    monkeypatch.setitem(velocity.RULES, "sign", Rule(torch.sign))
    monkeypatch.setitem(velocity.RULES, "sign in place", Rule(lambda D: D.sign_()))
    monkeypatch.setattr("dlrt.settings.UPDATES", ("sign", "sign in place"))
    made = [steps(name, momentum=0.9, s_steps=s_steps) for name in ("sign", "sign in place")]
    torch.testing.assert_close(*made, rtol=0, atol=0)


def test_a_rule_has_a_step_size_and_a_decay_of_its_own(monkeypatch):
    rules = {
        "sign": Rule(torch.sign),
        "short": Rule(torch.sign, share=0.1),
        "decoupled": Rule(torch.sign, decoupled=True),
    }
    monkeypatch.setattr("dlrt.settings.UPDATES", tuple(rules))
    for name, rule in rules.items():
        monkeypatch.setitem(velocity.RULES, name, rule)
    torch.testing.assert_close(steps("short"), steps("sign", update_lr=0.005), rtol=0, atol=0)
    assert not torch.allclose(steps("short"), steps("sign"))
    # a sign hardly sees a decay that is part of D, and one apart shrinks the weight
    once, start = {"count": 1, "rank": 7}, steps("sign", count=0, rank=7)
    apart = steps("decoupled", weight_decay=0.1, **once) - steps("decoupled", **once)
    torch.testing.assert_close(apart, -0.05 * 0.1 * start, rtol=1e-3, atol=1e-6)
    within = steps("sign", weight_decay=0.1, **once) - steps("sign", **once)
    assert not torch.allclose(within, apart, rtol=0.1, atol=1e-5)


def test_a_rule_that_gives_another_shape_is_refused(monkeypatch):
    monkeypatch.setattr("dlrt.settings.UPDATES", ("first",))
    monkeypatch.setitem(velocity.RULES, "first", Rule(lambda D: D[:, :1]))
    with pytest.raises(ValueError, match=r"must give a matrix of the shape of D, \(7, 8\), got \(7, 1\)"):
        steps("first")
