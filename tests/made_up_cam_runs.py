"""Networks of random weights, as runs leave them, odd pictures, and the call of a script on them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dlrt
from dlrt import models

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
