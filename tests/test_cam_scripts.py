"""The scripts about class-activation maps: every kind of picture, every mistake, and from maps to figures."""

import argparse
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

import dlrt
from dlrt import models
from dlrt.cams.pictures import read_labels

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(run_script):
    """Run a script with flags; its exit code, what it printed, and errors."""

    def call(name, *flags):
        result = run_script(f"pytorch-grad-cam/{name}.py", *flags)
        return result.returncode, result.stdout, result.stderr

    return call


@pytest.fixture
def modules(monkeypatch):
    """The modules of the scripts' folder by name."""
    names = ("compare_cams", "drawings", "map_times", "networks", "sources")
    loaded = set(sys.modules)
    monkeypatch.syspath_prepend(ROOT / "pytorch-grad-cam")
    yield argparse.Namespace(**{name: importlib.import_module(name) for name in names})
    for name in set(sys.modules) - loaded:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == ROOT / "pytorch-grad-cam":
            del sys.modules[name]


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
        assert Image.open(out / f"{name}.cam.png").size == size
        with np.load(out / f"{name}.cam.npz") as maps:
            assert maps["raw"].shape == (8, 8)
            assert maps["displayed"].shape == (32, 32)
    assert (table[["forward_ms", "backward_ms", "assembly_ms"]] > 0).all(axis=None)
    config = json.loads((out / "config.json").read_text())
    assert bool(config["ranks"]) == run.startswith("tau")
    options = {"checkpoint": run, "image_path": "pictures", "batch_size": 4, "targets": None, "guided": False}
    assert options.items() <= config["options"].items()
    assert {"versions", "machine", "commit"} <= config.keys()
    assert str(tmp_path) not in json.dumps(config)


def test_one_picture_low_rank_guided_and_of_chosen_classes(script, runs, pictures, tmp_path):
    (tmp_path / "labels.csv").write_text("file,class\ngrey.png,3,5,box=1 2 3 4\n")
    flags = ["--checkpoint", runs / "dense_seed0", "--image-path", pictures / "grey.png", "--guided"]
    flags += ["--targets", tmp_path / "labels.csv", "--output-dir", tmp_path / "out", "--low-rank", 0.2]
    code, printed, err = script("cam", *flags, "--method", "LayerCAM", "--target-layer", "features.8")
    assert (code, err) == (0, "")
    assert "map of 3 + 5" in printed
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["ranks"]
    assert config["options"]["targets"] == "labels.csv"
    assert config["options"]["target_layer"] == "features.8"
    assert Image.open(tmp_path / "out/grey.png.guided.png").size == (90, 37)


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
        (["--rank", "0"], "must lie in"),
        (["--image-size", "2"], "cannot see 2 x 2 pixels"),
        (["--checkpoint", "nowhere"], "there is no nowhere"),
        (["--checkpoint", "LOW_RANK", "--low-rank", "0.1"], "is low-rank already"),
    ],
)
def test_a_mistake_costs_one_line_and_nothing_is_made(flags, told, script, runs, pictures, tmp_path):
    (tmp_path / "few.csv").write_text("cat.v1.png,1\n")
    (tmp_path / "odd.csv").write_text("cat.v1.png,cat\n")
    (tmp_path / "empty").mkdir()
    flags = [str(runs / "tau0.3_seed0") if flag == "LOW_RANK" else flag for flag in flags]
    standing = ["--checkpoint", runs / "dense_seed0", "--image-path", "pictures", "--output-dir", "out"]
    code, out, err = script("cam", *standing, *flags)
    assert (code, out) == (2, "")
    assert told in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


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


def test_a_network_that_asserts_its_size_is_told_as_any_other(modules, capsys):
    shape = (1, 32, 32)
    network = modules.networks.Network("fussy", Fussy(), shape, (0.0,), (1.0,), ("a", "b"), shape)
    with pytest.raises(ValueError, match=r"fussy cannot see 16 x 16 pixels \(Wrong image height!\)"):
        modules.networks.placed(network, 16, "cpu")
    assert modules.map_times.map_times(network, "features", "gradcam", [0.5], [16]).empty
    assert "its time is not measured there" in capsys.readouterr().out


def test_a_comparison_goes_from_networks_to_table_and_figures(script, runs, tmp_path):
    flags = ["--reference", runs / "dense_seed0", "--low-rank", runs / "tau0.3_seed0", "--taus", 0.2]
    flags += ["--seeds", runs / "dense_seed1", "--images", "clutter-test", "--count", 6]
    flags += ["--output-dir", tmp_path / "results", "--name", "one", "--time-shares", 0.5, "--time-sizes", 32]
    code, printed, err = script("compare_cams", *flags)
    assert (code, err) == (0, "")
    assert "full rank: maps agree" in printed
    code, printed, _ = script("compare_cams", *flags)  # what is there is not measured again
    assert printed.count("is there") == 7
    rows = pd.read_csv(tmp_path / "results/one/tau0.3_seed0.csv")
    assert (rows["tau"] == 0.3).all()
    same = rows[rows["target"] == "same"]
    for name in ("deletion", "insertion", "road", "pointing", "energy"):
        assert (same[name].notna() == same["defined"]).all()
    for _ in range(2):  # it can be run twice
        flags = ["--results", tmp_path / "results", "--output-dir", tmp_path / "out"]
        code, printed, err = script("produce_results", *flags)
        assert (code, err) == (0, "")
    table = pd.read_csv(tmp_path / "out/table.csv").set_index("kind")
    assert list(table.index) == [
        *("reference", "low-rank", "SVD", "other seed", "full rank", "random weights", "RandomCAM")
    ]
    assert table.loc["reference", "Pearson raw"] == table.loc["full rank", "Pearson raw"] == 1
    assert table.loc["random weights", "Pearson raw"] < table.loc["low-rank", "Pearson raw"] < 1
    assert table.loc["low-rank", "seeds"] in ("above", "inside", "below")
    for name in ("gradcam_one", "gradcam_one_grid", "gradcam_one_time"):
        assert (tmp_path / f"out/{name}.png").stat().st_size > 5000


def test_a_comparison_of_other_tasks_or_settings_is_refused(script, runs, tmp_path):
    flags = ["--reference", runs / "dense_seed0", "--images", "one", "--no-faithfulness", "--time-shares"]
    flags += ["--output-dir", "results", "--name", "both"]
    for number, folder in enumerate(("one", "other/one")):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("L", (20, 20), 100 + number).save(tmp_path / folder / "grey.png")
    for network, told in (
        ("colour", "only networks of the same classes and input"),
        ("small", "small (10 classes, 1 x 16 x 16 pixels)"),
        ("lenet", "choose a --target-layer"),
    ):
        code, _, err = script("compare_cams", *flags, "--low-rank", runs / network)
        assert code == 2
        assert told in err
        assert err.count("\n") == 1
    assert not (tmp_path / "results").exists()
    assert script("compare_cams", *flags)[0] == 0
    for changed in (["--method", "layercam"], ["--images", "other/one"]):
        code, _, err = script("compare_cams", *flags, *changed)
        assert code == 2
        assert "begun with other options" in err


def test_networks_are_compared_at_another_size_on_a_single_picture(script, runs, tmp_path):
    Image.linear_gradient("L").save(tmp_path / "one.png")
    flags = ["--reference", runs / "dense_seed0", "--low-rank", runs / "tau0.3_seed0", "--images", "."]
    flags += ["--seeds", runs / "small", "--image-size", 24, "--no-faithfulness", "--time-shares"]
    code, _, err = script("compare_cams", *flags, "--output-dir", "results")
    assert code == 0
    assert err.splitlines() == [
        f"warning: {name} was trained at {size} pixels and now sees 24 x 24; "
        "its predictions may be worth nothing there"
        for name, size in (("dense_seed0", "32 x 32"), ("small", "16 x 16"))
    ]
    for name in ("tau0.3_seed0", "small"):
        maps = np.load(tmp_path / f"results/{tmp_path.name}/{name}.npz")["displayed"]
        assert maps.shape == (1, 24, 24)


def test_a_folder_of_one_picture_is_explained(script, runs, tmp_path):
    Image.linear_gradient("L").save(tmp_path / "one.png")
    flags = ["--checkpoint", runs / "dense_seed0", "--image-path", ".", "--output-dir", "maps"]
    code, printed, err = script("cam", *flags)
    assert (code, err) == (0, "")
    assert printed.startswith("one.png: ")
    assert printed.count("\n") == 1
    assert json.loads((tmp_path / "maps/config.json").read_text())["options"]["image_path"] == tmp_path.name


def test_a_class_that_a_network_does_not_have_leaves_a_picture_its_box(modules, pictures, capsys):
    lines = "cat.v1.png,cat,box=1 2 3 4\ncat.v2.png,3,dog\ngrey.png,cat\n"
    (pictures / "labels.csv").write_text(lines)
    names, shape = tuple("0123456789"), (1, 32, 32)
    network = modules.networks.Network("digits", None, shape, (0.0,), (1.0,), names, shape)
    found, failed = modules.sources.pictures_of(str(pictures), 9, None, network)
    assert not failed
    its = {picture.name: (picture.classes, picture.boxes) for picture in found}
    assert its["cat.v1.png"] == ((), ((1, 2, 3, 4),))
    assert its["cat.v2.png"] == ((3,), ())
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "digits has no class cat, dog" in told


@pytest.mark.parametrize(
    ("defined", "difference", "told"),
    [([True, False], [0, np.nan], "of b.png only one"), ([True, True], [0, np.nan], "differ by inf")],
)
def test_a_map_that_is_undefined_fails_the_control_of_full_rank(defined, difference, told, modules, tmp_path):
    rows = {"file": ["a.png", "b.png"], "target": "same"}
    for name, its, gaps in (("dense", [True, True], [0, 0]), ("full_rank", defined, difference)):
        table = pd.DataFrame({**rows, "defined": its, "largest_difference": gaps})
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    with pytest.raises(SystemExit, match=told):
        modules.compare_cams.check_full_rank(tmp_path, "dense", "gradcam")


def test_a_comparison_that_broke_off_is_not_drawn(script, tmp_path):
    (tmp_path / "results/one").mkdir(parents=True)
    (tmp_path / "results/one/config.json").write_text('{"options": {"method": "gradcam"}}')
    (tmp_path / "results/one/full_rank.csv").write_text("network,target\nfull_rank,same\n")
    code, _, err = script("produce_results", "--results", "results", "--output-dir", "out")
    assert code == 1
    assert "no comparisons in results" in err


def test_a_grid_of_undefined_maps_is_drawn(modules, tmp_path):
    np.savez(tmp_path / "pictures.npz", **{"a.png": np.zeros((8, 8, 3), np.uint8)})
    for name, value in (("dense", 0.5), ("low_rank", np.nan)):
        np.savez(tmp_path / f"{name}.npz", displayed=np.full((1, 8, 8), value))
    summary = {"network": ["dense", "low_rank"], "kind": ["reference", "low-rank"], "tau": [np.nan, 0.1]}
    figure = modules.drawings.grid(tmp_path, pd.DataFrame({**summary, "compression": [0, 50]}))
    assert [ax.get_ylabel() for ax in figure.axes][-1].startswith("map - dense map")


def test_times_at_many_sizes_have_curves_that_differ(modules):
    times = {"pixels": range(6), "share": 0.5, "ratio": 0.5, "dense_milliseconds": 1}
    figure = modules.drawings.time_over_rank(pd.DataFrame(times))
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()[:6]}
    assert len(looks) == 6


def test_without_comparisons_it_says_where_they_come_from(script, tmp_path):
    code, _, err = script("produce_results", "--results", tmp_path)
    assert code == 1
    assert "compare_cams.py" in err


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
    (runs / "dense_seed1").mkdir()  # its record was committed, its checkpoint was not
    code, commands = run_sh(runs, out)
    assert code == 0
    assert len(commands) == 9
    *commands, (script, *flags) = commands
    assert run_script(script, *flags, "--nonsense").stderr.endswith(
        "unrecognized arguments: --nonsense (--help lists all options)\n"
    )
    assert flags == ["--results", str(out / "comparison"), "--output-dir", str(out)]
    drawn = [Path(flags[flags.index("--output-dir") + 1]).name for _, *flags in commands[:-1]]
    assert drawn == ["dense", "tau0.04", "tau0.08", "tau0.12", "tau0.16", "tau0.2", "tau0.3"]
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
    trained = {"dense_seed0", "dense_seed2", "tau0.12_seed0", "tau0.3_seed0"}
    assert networks == trained | cut | {"full_rank", "random_weights", "randomcam"}


@pytest.mark.parametrize(("code", "commands"), [(1, 8), (2, 1)])
def test_run_sh_goes_on_after_an_unreadable_picture_and_after_nothing_else(code, commands, run_sh, tmp_path):
    save_run(tmp_path / "runs/dense_seed0")
    ended, called = run_sh(tmp_path / "runs", tmp_path / "out", code)
    assert (ended, len(called)) == (code, commands)


@pytest.mark.parametrize("name", ["convnet_clutter", "convnet_clutter_baseline"])
def test_the_network_to_explain_trains(name, script, tmp_path):
    flags = ["--dataset", "digits32", "--epochs", 1, "--output-dir", "runs", "--name", "one"]
    code, printed, err = script(name, *flags)
    assert (code, err) == (0, "")
    assert "test accuracy" in printed
    assert (tmp_path / "runs/one/checkpoint.pt").is_file()


def test_pictures_in_clutter_come_with_labels_and_boxes(script, tmp_path):
    code, printed, _ = script("clutter_pictures", "some", "--count", 3)
    assert (code, printed) == (0, "some\n")
    labels = read_labels(tmp_path / "some/labels.csv", int)
    assert sorted(labels) == sorted(path.name for path in (tmp_path / "some").glob("*.png"))
    for classes, boxes in labels.values():
        assert (len(classes), len(boxes)) == (1, 1)


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
