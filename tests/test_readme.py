"""The commands of README and docs are those tested: each runs, on the bundled digits, from another folder."""

import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from made_up_runs import copy_committed, makes
from shared import fork

import dlrt
from dlrt import grid
from dlrt.runs import epochs_done

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
COMMANDS = [
    line.split("#")[0].strip()
    for kind, block in BLOCKS
    if kind == "sh"
    for line in block.replace("\\\n", " ").splitlines()
]
PYTHON = sorted({command for command in COMMANDS if command.startswith("python ")})
# of these only the flags are tried: test_scripts.py, test_cifar10.py and others run them, on less
LONG = re.compile(
    "/run.py|/produce_results.py|/compare_cams.py|/convnet_clutter_baseline.py|^python (cifar10|gpt)/"
)
GRIDS = [command for command in PYTHON if LONG.search(command)]
SCRIPTS = [command for command in PYTHON if command not in GRIDS]
QUICK = ["--dataset", "digits", "--epochs", "1"]


def run(arguments, folder):
    return fork([sys.executable, *arguments], cwd=folder)


@pytest.mark.parametrize("command", SCRIPTS)
def test_a_command_of_the_readme_runs(command, tmp_path):
    script, *flags = shlex.split(command)[1:]
    if script.startswith("mnist/"):
        warmup = [] if "baseline" in script else ["--tau-warmup", "0"]
        flags += [*QUICK, *warmup, "--output-dir", str(tmp_path)]
    elif script == "timings/step.py":
        flags += ["--repeats", "1", "--runs", "1", "--width", "64", "--ranks", "2", "--networks", "mlp"]
        flags += ["--output-dir", str(tmp_path)]
    elif script == "timings/pca.py":
        flags += ["--sizes", "64", "--repeats", "1", "--output-dir", str(tmp_path)]
    elif script == "timings/growth.py":
        flags += ["--width", "32", "--widths", "16", "32", "--depths", "1", "2", "--ranks", "2", "4"]
        flags += ["--repeats", "1", "--output-dir", str(tmp_path)]
    elif script == "timings/at_scale.py":
        flags += ["--ranks", "64", "--output-dir", str(tmp_path)]
    elif script == "timings/memory.py":
        flags += ["--width", "64", "--ranks", "2", "--output-dir", str(tmp_path)]
    elif script == "pytorch-grad-cam/cam.py":
        picture = str(ROOT / "test_images" / "chelsea.png")
        flags = [picture if flag == "test_images" else flag for flag in flags]
    elif script == "pytorch-grad-cam/map_times.py":
        flags += ["--repeats", "1", "--sizes", "32", "--shares", "0.5"]
    elif script == "pytorch-grad-cam/randomise.py":
        flags = [str(ROOT / flag) if flag == "test_images" else flag for flag in flags]
        flags += ["--steps", "1", "--draws", "1", "--arch", "ResNet20", "--weights", "random"]
    elif script.startswith("pytorch-grad-cam/convnet"):
        flags += ["--epochs", "1", "--output-dir", str(tmp_path)]
    result = run([script if script == "-m" else str(ROOT / script), *flags], tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout
    if script.startswith("mnist/"):
        assert "test accuracy" in result.stdout
        assert result.stdout.count("epoch   1/1") == 1
        assert_is_a_run(next(tmp_path.iterdir()), low_rank="baseline" not in script)


def assert_is_a_run(folder, low_rank):
    """What a training script leaves behind."""
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.pt", "config.json", "metrics.csv"]
    config = (folder / "config.json").read_text()
    options = json.loads(config)["options"]
    assert (options["dataset"], options["seed"]) == ("digits", 0)
    assert str(folder.parent) not in config  # records can be published
    metrics = pd.read_csv(folder / "metrics.csv")
    assert len(metrics) == 1
    accuracies = metrics[["train_accuracy", "validation_accuracy", "test_accuracy"]]
    assert ((accuracies >= 0) & (accuracies <= 100)).all(axis=None)
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["about"]["shape"] == [1, 28, 28]
    assert any(name.endswith(".S") for name in checkpoint["model"]) == low_rank


@pytest.mark.parametrize("command", GRIDS)
def test_a_grid_of_the_readme_has_these_flags(command, tmp_path, run_script):
    script, *flags = shlex.split(command)[1:]
    flags += ["--output-dir", tmp_path / "results", "--nonsense"]
    told = "unrecognized arguments: --nonsense (--help lists all options)\n"
    assert run_script(script, *flags).stderr == f"{Path(script).name}: {told}"


@pytest.mark.parametrize(
    "command", [c for c in GRIDS if c.endswith("--tune 1") or "/fine_tune_e" in c or "gpt/run" in c]
)
def test_a_grid_of_the_readme_goes_on_with_the_runs_that_are_committed(
    command, tmp_path, run_script, monkeypatch
):
    """It trains nothing: what is there is compared, and what is missing made up, less accurate."""
    script, *flags = shlex.split(command)[1:]
    results = f"{Path(script).parent}/results"
    copy_committed(results, tmp_path)
    committed = (tmp_path / results).exists()
    make, made = makes(lambda options: 100.0)
    there = []

    def compare_and_make(plans, results, *_, **options):
        for plan in plans:
            assert plan.name in made or plan.other_options(results) == []
        missing = [plan for plan in plans if epochs_done(results / plan.name) < plan.epochs]
        there.extend(set(plans) - set(missing))
        make([plan for plan in missing if plan.name not in made], results)

    monkeypatch.setattr(grid, "make", compare_and_make)
    result = run_script(script, *flags, "--output-dir", tmp_path / results)
    assert result.returncode == 0, result.stderr
    assert there or not committed


def test_make_has_the_commands_of_the_readme():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert {command.split()[1] for command in COMMANDS if command.startswith("make ")} <= targets


def test_every_training_script_is_in_the_docs():
    paths = (path for folder in ("mnist", "cifar10") for path in (ROOT / folder).glob("*.py"))
    scripts = {f"{path.parent.name}/{path.name}" for path in paths if "__main__" in path.read_text()}
    assert scripts <= {command.split()[1] for command in PYTHON}


def test_the_lines_of_the_readme_train_a_network(tmp_path):
    """As they stand, on a small network and random data."""
    lines = next(block for kind, block in BLOCKS if kind == "python")
    before = """
import torch
from torch import nn

torch.manual_seed(0)
layers = [nn.Conv2d(1, 8, 3), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(8 * 36, 32), nn.ReLU()]
model = nn.Sequential(*layers, nn.Linear(32, 4))
loader = [(torch.randn(32, 1, 8, 8), torch.arange(32) % 4)] * 40
steps = len(loader)
criterion = nn.CrossEntropyLoss()
loss = criterion(model(loader[0][0]), loader[0][1]).item()
"""
    after = """
assert criterion(model(loader[0][0]), loader[0][1]).item() < loss / 2
print(dlrt.compression(model))
"""
    result = run(["-c", before + lines + after], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "Compression(" in result.stdout


def test_the_tree_of_the_docs_is_the_tree():
    tree = next(block for kind, block in BLOCKS if kind == "text")
    there = [path for folder in (ROOT, *ROOT.glob("[!.]*/")) for path in folder.glob("*")]
    there += (ROOT / "dlrt").rglob("*.py")
    for name in re.findall(r"[\w./-]+\.(?:py|ipynb|sh|txt)", tree):
        assert any(path.match(name) for path in there), f"{name} is in the tree of docs/library.md only"
    for path in (ROOT / "dlrt").glob("[!_]*.py"):
        assert path.name in tree, f"{path.name} is missing in the tree of docs/library.md"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_link_of_a_page_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[\w-]+)?\)", page.read_text(encoding="utf-8")):
        assert target.startswith("http") or (page.parent / target).exists(), target
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([\w-]+)\)", page.read_text(encoding="utf-8")):
        text = (page.parent / target if target else page).read_text(encoding="utf-8")
        headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
        assert anchor in {
            re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings
        }, anchor


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_table_of_a_page_is_the_one_that_is_committed(page):
    text = page.read_text(encoding="utf-8")
    assert runpy.run_path(str(ROOT / "docs" / "fill.py"))["filled"](text) == text, "call docs/fill.py"


def test_the_site_has_every_page_and_every_public_name():
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").split("nav:")[1]
    pages = set(re.findall(r"[\w-]+\.md", nav)) - {"index.md"}
    assert pages == {path.name for path in PAGES} - {"README.md"}
    reference = re.findall(r"^::: dlrt\.(\S+)$", (ROOT / "docs/reference.md").read_text(), flags=re.MULTILINE)
    assert {name.split(".")[-1] for name in reference} == set(dlrt.__all__)


def test_the_site_builds(tmp_path):
    """With warnings as errors: every link leads somewhere, every public name has a docstring."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    built = run(["-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(tmp_path)], ROOT)
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "figures/lenet5_frontier.png").exists()
