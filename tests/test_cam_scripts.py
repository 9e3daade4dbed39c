"""cam.py draws every kind of picture, networks side by side, and classes of choice."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from made_up_cam_runs import pictures, runs, script
from PIL import Image

from dlrt.cams import Maps, batch_maps, networks
from dlrt.cams.pictures import Picture

__all__ = ["pictures", "runs", "script"]  # fixtures


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


def test_a_folder_of_one_picture_is_explained(script, runs, tmp_path):
    Image.linear_gradient("L").save(tmp_path / "one.png")
    flags = ["--checkpoint", runs / "dense_seed0", "--image-path", ".", "--output-dir", "maps"]
    code, printed, err = script("cam", *flags)
    assert (code, err) == (0, "")
    assert printed.startswith("one.png: ")
    assert printed.count("\n") == 1
    assert json.loads((tmp_path / "maps/config.json").read_text())["options"]["image_path"] == tmp_path.name
