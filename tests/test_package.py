"""The library installs as a wheel, and needs nothing but torch and numpy to train a network."""

import subprocess
import sys
from pathlib import Path

import dlrt

ROOT = Path(__file__).parents[1]
ALONE = """
import sys

absent = ("matplotlib", "pandas", "cv2", "torchvision", "tqdm", "sklearn", "scipy", "PIL")
sys.modules.update(dict.fromkeys(absent))  # an import of them fails
import torch
import dlrt

model = dlrt.to_low_rank(torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.ReLU(), torch.nn.Linear(6, 3)))
optimizer = dlrt.DLRT(model, torch.optim.SGD, lr=0.1, update="muon", compression=0.3, ramp=2, allot_every=1)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.randn(5, 8)).square().sum().backward()
    optimizer.step()
print(dlrt.__version__, dlrt.__file__)
"""


def test_a_wheel_of_a_clean_tree_imports_and_trains_with_torch_and_numpy_alone(tmp_path):
    listing = ["git", "ls-files", "-z", "dlrt", "pyproject.toml", "README.md", "LICENSE"]
    listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split("\0")
    for path in filter(None, listed):
        (tmp_path / "tree" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / path).write_bytes((ROOT / path).read_bytes())
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    installed = subprocess.run(
        [*pip, "--target", "installed", "./tree"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert installed.returncode == 0, installed.stderr
    environment = {"PYTHONPATH": str(tmp_path / "installed")}
    command = [sys.executable, "-c", ALONE]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    version, file = done.stdout.split()
    assert version == dlrt.__version__
    assert Path(file).parent == tmp_path / "installed" / "dlrt"
    assert (Path(file).parent / "py.typed").exists()
