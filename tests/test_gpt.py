"""The GPT attends to what was before alone, texts are split by document, and training counts bytes."""

import argparse
import math
import re
import runpy
import shutil
import sysconfig
from pathlib import Path

import pandas as pd
import pytest
import torch
from made_up_runs import makes
from torch.nn.functional import cross_entropy

import dlrt
from dlrt import grid, tuning
from dlrt.__main__ import main as command_line
from dlrt.checkpoint import load_network
from dlrt.data import Split
from dlrt.errors import DataError
from dlrt.models import GPT
from dlrt.models.gpt import rotated
from dlrt.option_fields import as_flags
from dlrt.options import NOT_PART_OF_THE_EXPERIMENT
from dlrt.text import WINDOW, as_text, as_tokens, stdlib, text
from dlrt.training import evaluate

ROOT = Path(__file__).parents[1]


def small(**options):
    return GPT((12,), classes=9, width=16, depth=2, heads=2, **options)


def test_it_has_the_parameters_that_it_says_and_ties_its_head():
    model = GPT()
    assert dlrt.compression(model).dense_parameters == 819_200 == 256 * 128 + 4 * 12 * 128**2
    assert model.head.weight is model.words.weight
    with pytest.raises(ValueError, match=r"a width that 8 divides, got \(128,\) and 100"):
        GPT(width=100)


def test_logits_depend_on_the_tokens_up_to_them_alone(float64):
    model, tokens = small(), torch.randint(0, 9, (3, 12))
    logits = model(tokens)
    assert logits.shape == (3, 9, 12)
    other = tokens.clone()
    other[:, 7] = (other[:, 7] + 1) % 9
    changed = (model(other) - logits).abs().amax((0, 1)) > 1e-9
    assert changed.tolist() == [False] * 7 + [True] * 5
    assert torch.allclose(model(tokens[:, :5]), logits[:, :, :5], atol=1e-12)


def test_products_of_rotated_features_depend_on_distances_alone(float64):
    q, k = torch.randn(2, 1, 1, 1, 8).expand(2, 1, 1, 6, 8)
    scores = rotated(q) @ rotated(k).mT
    for distance in range(-5, 6):
        diagonal = scores[0, 0].diagonal(distance)
        assert torch.allclose(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-12)
    assert not torch.allclose(scores[0, 0, 0, 0], scores[0, 0, 0, 3])


def test_it_learns_a_text_dense_and_low_rank_and_continues_it():
    tokens = as_tokens("abcdefgh" * 40)[: 4 * 17].view(4, 17)
    for low_rank in (False, True):
        model = GPT((16,), width=32, depth=1, heads=2)
        if low_rank:
            dlrt.to_low_rank(model, skip="head")
            settings = {"update": "muon", "update_lr": 0.05, "compression": 0.3, "ramp": 20}
            optimizer = dlrt.DLRT(model, torch.optim.AdamW, lr=0.01, **settings)
        else:
            optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        for _ in range(40):
            optimizer.zero_grad()
            loss = cross_entropy(model(tokens[:, :-1]), tokens[:, 1:])
            loss.backward()
            optimizer.step()
        assert loss < 0.2
        assert as_text(model.continued(as_tokens("cdef"), 8))[:8] == "cdefghab"
        assert model.head.weight is model.words.weight


def test_the_standard_library_is_split_by_file_and_labels_are_the_bytes_after():
    dataset = stdlib(None, 0)
    dataset.check()
    assert dataset.shape == (WINDOW,)
    sizes = [len(split) * WINDOW for split in (dataset.train, dataset.validation, dataset.test)]
    assert 1_400_000 < sizes[0] < 1_800_000
    assert all(130_000 < size < 400_000 for size in sizes[1:])
    for split in (dataset.train, dataset.validation, dataset.test):
        assert torch.equal(split.images[:, 1:], split.labels[:, :-1])
    texts = [as_text(split.images.flatten()) for split in (dataset.train, dataset.validation, dataset.test)]
    files = [
        path.read_text("utf-8", "replace") for path in Path(sysconfig.get_paths()["stdlib"]).glob("*.py")
    ]
    places = [[end in text for text in texts] for file in files if (end := file[-400:-200])]
    assert all(sum(hits) <= 1 for hits in places)
    assert all(map(any, zip(*places, strict=True)))


def test_another_seed_has_another_validation_split_and_the_same_test():
    first, second, again = stdlib(None, 0), stdlib(None, 1), stdlib(None, 0)
    assert torch.equal(first.test.images, second.test.images)
    assert not torch.equal(first.validation.images[:9], second.validation.images[:9])
    assert torch.equal(first.train.images, again.train.images)


def test_texts_of_ones_own_are_read_from_a_folder(tmp_path):
    (tmp_path / "books").mkdir()
    (tmp_path / "books" / "one.txt").write_text("wörter und 语言 " * 20_000, encoding="utf-8")
    (tmp_path / "other.py").write_text("#" * 50_000)
    (tmp_path / "folder.txt").mkdir()  # no file
    dataset = text(tmp_path, 0)
    dataset.check()
    assert dataset.checksum == text(tmp_path, 1).checksum
    whole = len(("wörter und 语言 " * 20_000).encode())
    parts = [len(split) * WINDOW for split in (dataset.train, dataset.validation, dataset.test)]
    assert 0.9 * whole < sum(parts) <= whole
    assert "wörter und 语言" in as_text(dataset.test.images[0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(
        DataError, match=r"text: each of three splits needs .* got 0 of 0 bytes .*\*.txt below"
    ):
        text(tmp_path / "empty", 0)
    for wrong in ("nowhere", "other.py"):
        with pytest.raises(DataError, match=rf"must be a folder with \*.txt files, got .*{wrong}"):
            text(tmp_path / wrong, 0)


def test_the_loss_is_a_mean_over_bytes_and_so_are_accuracies():
    class Constant(torch.nn.Module):
        def forward(self, tokens):
            return torch.zeros(len(tokens), 256, tokens.shape[1]).index_fill(1, torch.tensor([32]), 1.0)

    test = stdlib(None, 0).test
    test = Split(test.images[:100], test.labels[:100])
    loss, accuracy = evaluate(Constant(), test)
    spaces = (test.labels == 32).double().mean().item()
    assert accuracy == pytest.approx(100 * spaces)
    assert loss == pytest.approx(math.log(255 + math.e) - spaces, rel=1e-5)


@pytest.fixture
def quick(tmp_path):
    """Flags for a run of seconds."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "fox.txt").write_text("the quick brown fox jumps over the lazy dog. " * 1200)
    place = ("--data-dir", tmp_path / "texts", "--output-dir", tmp_path / "results")
    return "--dataset", "text", "--width", 32, "--depth", 1, "--epochs", 2, *place


def test_runs_leave_bits_per_byte_a_table_and_samples(quick, tmp_path, run_script, capsys):
    for script, flags in (
        ("gpt_text", ("--compression", 30, "--update", "muon", "--update-lr", 0.02)),
        ("gpt_text_baseline", ("--update", "muon", "--update-lr", 0.02)),
        ("gpt_text_baseline", ("--factors", 30, "--seed", 1)),
        ("gpt_text", ("--tau", 0.1)),
    ):
        result = run_script(f"gpt/{script}.py", *quick, *flags)
        assert result.returncode == 0, result.stderr
        assert "bits per byte" in result.stdout
    result = run_script("gpt/produce_results.py", "--results", "results", "--output-dir", "out")
    assert result.returncode == 0, result.stderr
    table = pd.read_csv(tmp_path / "out" / "table.csv")
    assert set(table["trained"]) == {"dense", "plain factors", "DLRT", "DLRT, τ"}
    metrics = pd.read_csv(tmp_path / "results" / "width32_depth1_dense_muon_seed0" / "metrics.csv")
    dense = table.set_index("trained").loc["dense"]
    bits = [f"{loss / math.log(2):.4f}" for loss in metrics["test_loss"]]
    assert f"{dense['bits per byte']:.4f}" in bits
    assert dense["parameters"] == "20,480"
    for run in (tmp_path / "results").iterdir():
        result = run_script("gpt/sample.py", run, "--prompt", "the quick", "--length", 9)
        assert result.stdout.startswith("the quick")
    assert as_text(as_tokens("\udcff")) == "\ufffd"  # a byte of a command line that is not UTF-8
    assert "--prompt must have" in run_script("gpt/sample.py", run, "--prompt", "").stderr
    low_rank = next(run for run in (tmp_path / "results").iterdir() if "compression" in run.name)
    command_line(["export", str(low_rank), "--format", "pt2", "--output", str(tmp_path / "plain.pt2")])
    assert "windows of 128 tokens, 256 classes" in capsys.readouterr().out
    plain, (model, _) = torch.export.load(tmp_path / "plain.pt2").module(), load_network(low_rank)
    tokens = torch.randint(256, (5, 128))
    torch.testing.assert_close(plain(tokens), model(tokens), rtol=1e-4, atol=1e-5)
    dense = next(run for run in (tmp_path / "results").iterdir() if "dense" in run.name)
    flags = ("--from-checkpoint", dense, "--ramp", 0, "--compression", 54, "--max-rank", "initial")
    by_loss = run_script("gpt/gpt_text.py", *quick, *flags, "--cut-by", "loss")
    assert "takes --cut-by weights" in by_loss.stderr
    cut = run_script("gpt/gpt_text.py", *quick, *flags, "--name", "cut")
    assert cut.returncode == 0, cut.stderr
    recorded = pd.read_csv(tmp_path / "results" / "cut" / "metrics.csv").iloc[-1]
    assert 54 <= recorded["evaluation_compression"] < 55
    assert min(map(int, recorded["ranks"].split("/"))) >= 2  # the cut keeps --min-rank
    shutil.rmtree(tmp_path / "results" / "cut")
    shutil.rmtree(dense)  # nothing to compare with
    run_script("gpt/produce_results.py", "--results", "results", "--output-dir", "out")
    compared = pd.read_csv(tmp_path / "out" / "table.csv")[["above the best dense [%]", "compression [%]"]]
    assert len(compared) == 3
    assert compared.isna().all(axis=None)


def test_every_way_of_the_study_is_a_run_that_its_script_takes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "gpt")
    study = runpy.run_path(str(ROOT / "gpt" / "run.py"))
    args = argparse.Namespace(
        width=128, depth=4, dataset="stdlib", data_dir=Path("data"), device="cpu", data=""
    )
    sizes = {}
    for way, rules in study["RULES"].items():
        for rule in rules:
            name, (smallest, *_) = study["STEP_SIZES"][rule]
            made = study["plan"](way, rule, 75.0, args, epochs=5, seed=1, **{name: smallest})
            kind = runpy.run_path(str(made.script))["Options"]
            options = kind.parse("", as_flags(made.options), optimizer="adamw", skip=["head"])
            recorded = {
                name: value for name, value in made.options.items() if name not in NOT_PART_OF_THE_EXPERIMENT
            }
            assert recorded.items() <= options.record().items()
            sizes[made.name] = dlrt.compression(GPT(width=options.width)).dense_parameters
    assert len(sizes) == 9
    assert study["plan"]("narrow", "muon", 99.0, args, epochs=5, seed=1).options["width"] >= 8
    assert 0.7 < 1 - sizes["narrow75_muon_seed1"] / sizes["dense_muon_seed1"] < 0.8


def test_a_text_is_part_of_what_a_run_is(quick, tmp_path, run_script, monkeypatch):
    flags = ("--update", "muon", "--update-lr", 0.02, "--name", "dense_muon_seed0", "--lr", 0.003)
    assert run_script("gpt/gpt_text_baseline.py", *quick, *flags).returncode == 0
    (tmp_path / "texts" / "fox.txt").write_text("another fox. " * 4000)
    resumed = run_script("gpt/gpt_text_baseline.py", *quick, *flags, "--resume")
    assert (resumed.returncode, resumed.stderr.count("\n")) == (1, 1)
    assert "was begun with other options (data " in resumed.stderr
    monkeypatch.setattr(tuning, "try_values", lambda first, *_, **__: dict.fromkeys(first, 0.02))
    study = run_script("gpt/run.py", *quick, "--ways", "dense", "--compressions", 50, "--seeds", 1)
    assert (study.returncode, study.stderr.count("\n")) == (1, 1)
    assert re.search(r"dense_muon_seed0 was made with .*data '[0-9a-f]{8}' instead of", study.stderr)


@pytest.mark.parametrize(
    ("flags", "told"), [(["--width", 13], "a multiple of 8"), (["--data-dir", "no"], "must be a folder")]
)
def test_a_mistake_is_told_once_and_before_any_run(flags, told, quick, run_script, tmp_path):
    result = run_script("gpt/run.py", *quick, *flags)
    assert (result.returncode != 0, result.stderr.count("\n"), told in result.stderr) == (True, 1, True)
    assert not (tmp_path / "results").exists()


def test_the_study_trains_every_seed_as_validation_chose(run_script, monkeypatch, tmp_path):
    """Here the loss is least for step sizes of 0.01."""

    def step_size(options):
        return options.get("update_lr") or options["lr"]

    make, made = makes(lambda options: abs(math.log(step_size(options) / 0.01)))
    monkeypatch.setattr(grid, "make", make)
    result = run_script("gpt/run.py", "--ways", "dlrt", "narrow", "--seeds", 2, "--output-dir", tmp_path)
    assert result.returncode == 0, result.stderr
    runs = {name: options for name, options in made.items() if not name.startswith("tuning/")}
    assert len(runs) == 2 * 2 * 5  # budgets, seeds, ways with their rules
    assert all(0.005 < step_size(options) < 0.02 for options in runs.values())
