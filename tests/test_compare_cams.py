"""compare_cams.py and its produce_results.py: from networks to a table and figures, and every refusal."""

import base64
import io
import json
import re
import shutil
from collections import defaultdict
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from made_up_cam_runs import pictures, runs, script
from PIL import Image

from dlrt.cams import drawings, load_pictures, summary
from dlrt.cams.comparison import check_full_rank
from dlrt.cams.networks import Network
from dlrt.errors import RunError

__all__ = ["pictures", "runs", "script"]  # fixtures


class Page(HTMLParser):
    """How often each tag begins, all attributes of it, and the tags that are open."""

    def __init__(self, text):
        super().__init__()
        self.found, self.open = defaultdict(list), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found[tag].append(dict(attributes))
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_page(text, networks, drawn, pictures):
    """It is well-formed and alone: all pictures are in it, and no address."""
    page = Page(text)
    assert page.open == []
    assert "http" not in text
    assert not {"link", "iframe"} & page.found.keys()
    images = page.found["img"]
    assert len(images) == pictures * (1 + drawn)
    for image in images:
        kind, data = image["src"].split(";base64,")
        assert kind == "data:image/webp"
        assert Image.open(io.BytesIO(base64.b64decode(data))).size == (32, 32)
    shown = [image for image in images if "hidden" not in image]
    assert {image.get("data-network") for image in shown} == {None, "0"}
    (slider,) = page.found["input"]
    assert int(slider["max"]) == drawn - 1
    assert len(page.found["tr"]) == 1 + networks
    assert len(page.found["td"]) == networks * len(page.found["th"])
    script = text.split("<script>")[1].split("</script>")[0]
    assert script.count("\n") <= 60
    names = json.loads(re.search("names = (.*);", script)[1])
    assert len(names) == drawn
    assert names[0] == "0 %, dense_seed0, r = 1.000"


def test_a_comparison_goes_from_networks_to_table_and_figures(script, runs, tmp_path):
    flags = ["--reference", runs / "dense_seed0", "--low-rank", runs / "tau0.3_seed0", "--taus", 0.2]
    flags += ["--seeds", runs / "dense_seed1", "--images", "clutter-test", "--count", 6]
    flags += ["--output-dir", tmp_path / "results", "--name", "one", "--time-shares", 0.5, "--time-sizes", 32]
    code, printed, err = script("compare_cams", *flags, "--html")
    assert (code, err) == (0, "")
    check_page((tmp_path / "results/one/page.html").read_text(), networks=7, drawn=3, pictures=6)
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
        code, _, err = script("compare_cams", *flags, "--seeds", runs / network)
        assert code == 2
        assert told in err
        assert err.count("\n") == 1
    assert not (tmp_path / "results").exists()
    assert script("compare_cams", *flags)[0] == 0
    for changed in (["--method", "layercam"], ["--images", "other/one"]):
        code, _, err = script("compare_cams", *flags, *changed)
        assert code == 2
        assert "begun with other options" in err


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--low-rank", "dense_seed1"], "dense_seed1 is dense: give it as --seeds, not as --low-rank"),
        (["--seeds", "tau0.3_seed0"], "tau0.3_seed0 is low-rank: give it as --low-rank, not as --seeds"),
        (["--low-rank", "times"], "no network can be called times"),
        (["--name", "two/folders"], "name of one folder"),
    ],
)
def test_networks_in_the_wrong_place_are_refused(flags, told, script, runs, tmp_path):
    places = {"dense_seed1": runs / "dense_seed1", "tau0.3_seed0": runs / "tau0.3_seed0"}
    flags = [places.get(flag, flag) for flag in flags]
    shutil.copytree(runs / "tau0.3_seed0", tmp_path / "copies" / "times")
    flags = [tmp_path / "copies" / "times" if flag == "times" else flag for flag in flags]
    standing = ["--reference", runs / "dense_seed0", "--images", "clutter-test", "--count", 2]
    code, _, err = script("compare_cams", *standing, *flags, "--output-dir", "results")
    assert (code, err.count("\n")) == (2, 1)
    assert told in err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("method", ["fullgrad", "sess"])
def test_methods_whose_raw_maps_are_as_large_as_the_picture_are_compared(method, script, runs, tmp_path):
    flags = ["--reference", runs / "dense_seed0", "--images", "clutter-test", "--count", 2]
    flags += ["--method", method, "--no-faithfulness", "--time-shares", "--output-dir", "results"]
    code, printed, err = script("compare_cams", *flags)
    assert (code, err) == (0, "")
    assert "full rank: maps " in printed
    rows = pd.read_csv(tmp_path / "results/clutter-test/randomcam.csv")
    assert rows["pearson_raw"].isna().all()
    assert rows["pearson"].notna().any()


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


def test_labels_of_no_picture_are_told_and_boxes_outside_leave_a_picture_out(pictures, capsys):
    (pictures / "labels.csv").write_text("absent.png,3\ngrey.png,3,box=1 2 300 4\ncat.v2.png,3,3\n")
    names, shape = tuple("0123456789"), (1, 32, 32)
    network = Network("digits", None, shape, (0.0,), (1.0,), names, shape)
    found, failed = load_pictures.pictures_of(str(pictures), 9, None, network)
    assert failed
    assert "grey.png" not in [picture.name for picture in found]
    assert {picture.name: picture.classes for picture in found}["cat.v2.png"] == (3,)
    strange, outside = capsys.readouterr().err.splitlines()
    assert "there is no picture absent.png" in strange
    assert "a box must lie in the 90 x 37 pixels of grey.png, got 1 2 300 4" in outside


def test_a_class_that_a_network_does_not_have_leaves_a_picture_its_box(pictures, capsys):
    lines = "cat.v1.png,cat,box=1 2 3 4\ncat.v2.png,3,dog\ngrey.png,cat\n"
    (pictures / "labels.csv").write_text(lines)
    names, shape = tuple("0123456789"), (1, 32, 32)
    network = Network("digits", None, shape, (0.0,), (1.0,), names, shape)
    found, failed = load_pictures.pictures_of(str(pictures), 9, None, network)
    assert not failed
    labels = {picture.name: (picture.classes, picture.boxes) for picture in found}
    assert labels["cat.v1.png"] == ((), ((1, 2, 3, 4),))
    assert labels["cat.v2.png"] == ((3,), ())
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "digits has no class cat, dog" in told


@pytest.mark.parametrize(
    ("defined", "difference", "told"),
    [([True, False], [0, np.nan], "of b.png only one"), ([True, True], [0, np.nan], "differ by inf")],
)
def test_a_map_that_is_undefined_fails_the_control_of_full_rank(defined, difference, told, tmp_path):
    rows = {"file": ["a.png", "b.png"], "target": "same"}
    for name, flags, gaps in (("dense", [True, True], [0, 0]), ("full_rank", defined, difference)):
        table = pd.DataFrame({**rows, "defined": flags, "largest_difference": gaps})
        table.to_csv(tmp_path / f"{name}.csv", index=False)
    with pytest.raises(RunError, match=told):
        check_full_rank(tmp_path, "dense", "gradcam")


def test_a_comparison_that_broke_off_is_not_drawn(script, tmp_path):
    (tmp_path / "results/one").mkdir(parents=True)
    (tmp_path / "results/one/config.json").write_text('{"options": {"method": "gradcam"}}')
    (tmp_path / "results/one/full_rank.csv").write_text("network,target\nfull_rank,same\n")
    code, _, err = script("produce_results", "--results", "results", "--output-dir", "out")
    assert code == 1
    left_out, nothing = err.splitlines()
    assert "results/one is left out (there is no randomcam.csv yet)" in left_out
    assert "no finished comparisons in results" in nothing


def test_a_network_that_is_called_a_number_keeps_its_name(tmp_path):
    for name in ("01", "randomcam"):
        pd.DataFrame([{"network": name, "file": "007"}]).to_csv(tmp_path / f"{name}.csv", index=False)
    found = summary.read_study(tmp_path)
    assert (list(found["network"]), set(found["file"])) == (["01", "randomcam"], {"007"})


def test_a_grid_of_undefined_maps_is_drawn(tmp_path):
    np.savez(tmp_path / "pictures.npz", **{"a.png": np.zeros((8, 8, 3), np.uint8)})
    for name, value in (("dense", 0.5), ("low_rank", np.nan)):
        np.savez(tmp_path / f"{name}.npz", displayed=np.full((1, 8, 8), value))
    summary = {"network": ["dense", "low_rank"], "kind": ["reference", "low-rank"], "tau": [np.nan, 0.1]}
    figure = drawings.grid(tmp_path, pd.DataFrame({**summary, "compression": [0, 50]}))
    assert [ax.get_ylabel() for ax in figure.axes][-1].startswith("map - dense map")


def test_times_at_many_sizes_have_curves_that_differ():
    times = {"pixels": range(6), "share": 0.5, "ratio": 0.5, "dense_milliseconds": 1}
    figure = drawings.time_over_rank(pd.DataFrame(times))
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()[:6]}
    assert len(looks) == 6


def test_without_comparisons_it_says_where_they_come_from(script, tmp_path):
    code, _, err = script("produce_results", "--results", tmp_path)
    assert code == 1
    assert "compare_cams.py" in err
