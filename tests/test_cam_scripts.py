"""The scripts about class-activation maps: every kind of picture, every mistake, and from maps to figures."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import dlrt
from dlrt.models import ConvNet

ROOT = Path(__file__).parents[1]


@pytest.fixture
def script(run_script):
    """Run a script with flags; its exit code, what it printed, and errors."""

    def call(name, *flags):
        result = run_script(f"pytorch-grad-cam/{name}.py", *flags)
        return result.returncode, result.stdout, result.stderr

    return call


def save_run(folder, seed=0, shape=(1, 32, 32), **options):
    """A run's folder with a ConvNet of random weights, low-rank where options has a tau."""
    torch.manual_seed(seed)
    model = ConvNet(shape)
    if "tau" in options:
        dlrt.to_low_rank(model, tau=options["tau"])
    about = {"network": "ConvNet", "settings": {}, "shape": list(shape), "classes": 10, "dataset": "clutter"}
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
    assert (table[["forward_ms", "backward_ms", "assembly_ms"]] >= 0).all(axis=None)
    config = json.loads((out / "config.json").read_text())
    assert bool(config["ranks"]) == run.startswith("tau")
    assert str(tmp_path) not in json.dumps(config)


def test_one_picture_low_rank_guided_and_of_chosen_classes(script, runs, pictures, tmp_path):
    (tmp_path / "labels.csv").write_text("file,class\ngrey.png,3,5,box=1 2 3 4\n")
    flags = ["--checkpoint", runs / "dense_seed0", "--image-path", pictures / "grey.png", "--guided"]
    flags += ["--targets", tmp_path / "labels.csv", "--output-dir", tmp_path / "out", "--low-rank", 0.2]
    code, printed, err = script("cam", *flags, "--method", "LayerCAM", "--target-layer", "features.8")
    assert (code, err) == (0, "")
    assert "map of 3 + 5" in printed
    assert json.loads((tmp_path / "out/config.json").read_text())["ranks"]
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


def test_networks_of_torchvision_and_weights_that_do_not_fit(script, pictures, tmp_path):
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
    ):
        code, _, err = script("cam", "--arch", arch, "--weights", weights, *flags)
        assert code == 2
        assert told in err


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
    flags = [
        "--reference",
        runs / "dense_seed0",
        "--images",
        "clutter-test",
        "--count",
        2,
        "--no-faithfulness",
    ]
    flags += ["--output-dir", tmp_path, "--name", "one", "--time-shares"]
    code, _, err = script("compare_cams", *flags, "--seeds", runs / "colour")
    assert code == 2
    assert "only networks of the same task" in err
    assert script("compare_cams", *flags)[0] == 0
    code, _, err = script("compare_cams", *flags, "--method", "layercam")
    assert code == 2
    assert "begun with other options" in err


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


def test_the_photographs_are_there_with_source_and_licence():
    told = (ROOT / "test_images/README.md").read_text()
    for path in (ROOT / "test_images").iterdir():
        if path.suffix in (".png", ".jpg"):
            assert path.name in told
