"""The GPT attends to what was before alone, texts are split by document, and training counts bytes."""

import math
import sysconfig
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

import dlrt
from dlrt.data import Split
from dlrt.errors import DataError
from dlrt.models import GPT
from dlrt.models.gpt import rotated
from dlrt.text import WINDOW, as_text, as_tokens, stdlib, text
from dlrt.training import evaluate


def small(**options):
    return GPT((12,), classes=9, width=16, depth=2, heads=2, **options)


def test_it_has_the_parameters_that_it_says_and_ties_its_head():
    model = GPT()
    assert dlrt.compression(model).dense_parameters == 1_818_624 == 256 * 192 + 4 * 12 * 192**2
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
    torch.manual_seed(0)
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
    texts = [as_text(of.images.flatten()) for of in (dataset.train, dataset.validation, dataset.test)]
    files = [
        path.read_text("utf-8", "replace") for path in Path(sysconfig.get_paths()["stdlib"]).glob("*.py")
    ]
    places = [[end in text for text in texts] for file in files if (end := file[-400:-200])]
    assert all(sum(of) <= 1 for of in places)
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
    dataset = text(tmp_path, 0)
    dataset.check()
    whole = len(("wörter und 语言 " * 20_000).encode())
    parts = [len(split) * WINDOW for split in (dataset.train, dataset.validation, dataset.test)]
    assert 0.9 * whole < sum(parts) <= whole
    assert "wörter und 语言" in as_text(dataset.test.images[0])
    with pytest.raises(DataError, match="text: every split needs more than 128 bytes, got 0 documents"):
        text(tmp_path / "nothing", 0)


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
