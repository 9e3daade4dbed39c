"""What cam.py says of pictures it cannot read, flags that do not fit, and Ctrl-C."""

import json
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from made_up_cam_runs import pictures, runs, save_run, script
from PIL import Image
from torch import nn

from dlrt.cams import known, networks
from dlrt.cams.map_records import published
from dlrt.cams.map_times import map_times

__all__ = ["pictures", "runs", "script"]  # fixtures


def test_an_unreadable_picture_is_told_and_the_others_are_done(script, runs, pictures, tmp_path):
    (pictures / "broken.png").write_bytes((pictures / "grey.png").read_bytes()[:200])
    (pictures / "text.jpg").write_text("no picture")
    flags = ["--checkpoint", runs / "dense_seed0", "--image-path", pictures, "--output-dir", tmp_path / "out"]
    code, _, err = script("cam", *flags)
    assert code == 1
    assert [line.split(" cannot be read")[0] for line in err.splitlines()] == [
        f"cam.py: {pictures / name}" for name in ("broken.png", "text.jpg")
    ]
    assert len(pd.read_csv(tmp_path / "out/cams.csv")) == 6


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--target-layer", "layer9"], "must be a layer that is called once"),
        (["--targets", "cat"], "unknown class 'cat'"),
        (["--targets", "nowhere.csv"], "there is no nowhere.csv"),
        (["--targets", "few.csv"], "names no class for cat.v2.png"),
        (["--targets", "odd.csv"], "line 1: unknown class 'cat'"),
        (["--method", "gradcan"], "invalid choice: 'gradcan'"),
        (["--method", "sess", "--aug-smooth"], "no smoothing by augmentation"),
        (["--method", "fullgrad", "--target-layer", "features"], "leave --target-layer out"),
        (["--image-path", "nowhere"], "nowhere is not there"),
        (["--image-path", "empty"], "holds no pictures"),
        (["--output-dir", "pictures"], "another folder than that of the pictures"),
        (["--rank", "0"], "must be a whole number from 1 on"),
        (["--image-size", "2"], "cannot see 2 x 2 pixels"),
        (["--checkpoint", "nowhere"], "there is no nowhere"),
        (["--checkpoint", "LOW_RANK", "--low-rank", "0.1"], "is low-rank already"),
        (["--weights", "random"], "--weights must come with --arch"),
        (["--skip", "linear"], "--skip must come with --low-rank, --rank or --compression"),
        (["--skip", "layer9", "--rank", "2"], "skip names no module of the model: layer9"),
        (["--compression", "0.5"], "a percentage"),
        (["--compression", "99.9"], "compression must be at most"),
        (["--compare", "COLOUR"], "only networks of the same classes and input can be compared"),
        (["--compare", "DENSE"], "two networks are called dense_seed0"),
    ],
)
def test_a_mistake_costs_one_line_and_nothing_is_made(flags, told, script, runs, pictures, tmp_path):
    (tmp_path / "few.csv").write_text("cat.v1.png,1\n")
    (tmp_path / "odd.csv").write_text("cat.v1.png,cat\n")
    (tmp_path / "empty").mkdir()
    places = {"LOW_RANK": "tau0.3_seed0", "DENSE": "dense_seed0", "COLOUR": "colour"}
    flags = [str(runs / places[flag]) if flag in places else flag for flag in flags]
    standing = ["--checkpoint", runs / "dense_seed0", "--image-path", "pictures", "--output-dir", "out"]
    code, out, err = script("cam", *standing, *flags)
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_where_no_picture_can_be_read_the_records_of_an_earlier_call_stay(script, runs, pictures, tmp_path):
    flags = ["--checkpoint", runs / "dense_seed0", "--output-dir", tmp_path / "out", "--image-path"]
    assert script("cam", *flags, pictures / "grey.png")[0] == 0
    before = (tmp_path / "out/cams.csv").read_text()
    (tmp_path / "text.jpg").write_text("no picture")
    assert script("cam", *flags, tmp_path / "text.jpg")[0] == 1
    assert (tmp_path / "out/cams.csv").read_text() == before


def test_a_file_that_cannot_be_written_ends_with_3_and_a_line(script, runs, pictures, tmp_path):
    (tmp_path / "out/grey.png.cam.npz").mkdir(parents=True)
    flags = ["--checkpoint", runs / "dense_seed0", "--image-path", pictures / "grey.png"]
    code, _, err = script("cam", *flags, "--output-dir", tmp_path / "out")
    assert (code, err.count("\n")) == (3, 1)
    assert "grey.png.cam.npz cannot be written" in err


def test_ctrl_c_ends_with_130_and_leaves_no_half_file(script, runs, pictures, tmp_path, monkeypatch):
    def interrupted(image, file, **options):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", interrupted)
    flags = ["--checkpoint", runs / "dense_seed0", "--image-path", pictures / "grey.png"]
    code, _, err = script("cam", *flags, "--output-dir", tmp_path / "out")
    assert (code, err) == (130, "\ncam.py: interrupted; what is finished is kept\n")
    assert not list((tmp_path / "out").iterdir())


def test_ctrl_c_while_a_network_is_read_is_one_line(script, runs, pictures, tmp_path, monkeypatch):
    def interrupted(*_, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "load", interrupted)
    flags = ["--checkpoint", runs / "dense_seed0", "--image-path", pictures / "grey.png"]
    code, _, err = script("cam", *flags, "--output-dir", tmp_path / "out")
    assert (code, err) == (130, "\ncam.py: interrupted; what is finished is kept\n")


@pytest.mark.parametrize(("cut", "larger"), [(["--low-rank", 0.01], True), (["--compression", 30], False)])
def test_factors_that_are_larger_than_the_weights_are_told(cut, larger, script, runs, pictures, tmp_path):
    flags = ["--checkpoint", runs / "dense_seed0", "--image-path", pictures / "grey.png", *cut]
    code, _, err = script("cam", *flags, "--output-dir", "out")
    assert code == 0
    assert ("is larger than its dense network" in err) == larger


def test_another_input_size_is_warned_of(script, runs, pictures, tmp_path):
    flags = ["--checkpoint", runs / "dense_seed0", "--image-path", pictures / "grey.png", "--image-size", 48]
    code, _, err = script("cam", *flags, "--output-dir", tmp_path / "out")
    assert code == 0
    assert "was trained at 32 x 32 pixels and now sees 48 x 48" in err


class Fussy(nn.Module):
    """A network for one size, which it asserts, as torchvision's vision transformers do."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(1, 2)

    def forward(self, x):
        torch._assert(x.shape[2] == 32, "Wrong image height!")
        return self.linear(x.mean((2, 3)))


def test_a_network_that_asserts_its_size_is_told_as_any_other(capsys):
    shape = (1, 32, 32)
    network = networks.Network("fussy", Fussy(), shape, (0.0,), (1.0,), ("a", "b"), shape)
    with pytest.raises(ValueError, match=r"fussy cannot see 16 x 16 pixels \(Wrong image height!\)"):
        networks.placed(network, 16, "cpu")
    with pytest.raises(ValueError, match="fussy must take pictures, got a network for text"):
        networks.placed(replace(network, shape=(128,)), None, "cpu")
    assert map_times(network, "features", "gradcam", [0.5], [16]).empty
    assert "its time is not measured there" in capsys.readouterr().out
    network = known.from_arch("ResNet20", "random")  # of 4 pixels it makes one, of which there is no map
    assert map_times(network, "layer3", "gradcam", [0.5], [4]).empty
    assert "its time is not measured there" in capsys.readouterr().out


def test_options_are_published_without_folders_and_names_as_they_are(tmp_path):
    (tmp_path / "there").touch()
    given = [tmp_path / "there", Path("lenet5_mnist"), "a name", 3, None]
    assert json.loads(json.dumps(published(given))) == ["there", "lenet5_mnist", "a name", 3, None]


def test_guided_maps_need_rectifiers(script, pictures, tmp_path):
    flags = ["--arch", "efficientnet_b0", "--weights", "random", "--image-path", pictures / "grey.png"]
    code, out, err = script("cam", *flags, "--guided", "--output-dir", tmp_path / "out")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "--guided needs nn.ReLU modules, EfficientNet has none" in err


def test_every_input_size_that_is_not_that_of_training_is_warned_of(script, runs, pictures, tmp_path):
    one, other = runs / "dense_seed0", save_run(tmp_path / "larger", shape=(1, 48, 48))
    flags = ["--checkpoint", one, "--compare", other, "--image-path", pictures / "grey.png"]
    code, _, err = script("cam", *flags, "--image-size", 40, "--output-dir", tmp_path / "out")
    assert code == 0
    assert [line.split()[1] for line in err.splitlines()] == ["dense_seed0", "larger"]
