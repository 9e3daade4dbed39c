"""Batches visit every sample once, shifted and mirrored where that is asked for."""

import pytest
import torch

from dlrt.data import Split, augmented_batch


def small_split(samples):
    return Split(torch.arange(samples).float().view(-1, 1, 1, 1), torch.arange(samples))


def seen(split, size, shuffle=None):
    """The labels in the order of the batches; images must come with their labels."""
    batches = list(split.batches(size, shuffle))
    assert all(torch.equal(x.flatten().long(), y) for x, y in batches)
    assert all(len(y) == size for _, y in batches[:-1])
    return torch.cat([y for _, y in batches]).tolist()


@pytest.mark.parametrize("size", [1, 4, 10, 11, 50])
def test_batches_visit_every_sample_once(size):
    split = small_split(11)
    assert seen(split, size) == list(range(11))
    shuffled = seen(split, size, torch.Generator().manual_seed(3))
    assert sorted(shuffled) == list(range(11))
    assert shuffled != list(range(11))


def test_the_generator_alone_decides_on_the_order():
    split = small_split(50)
    first = seen(split, 8, torch.Generator().manual_seed(3))
    torch.manual_seed(99)
    generator = torch.Generator().manual_seed(3)
    assert seen(split, 8, generator) == first
    assert seen(split, 8, generator) != first  # the next epoch
    assert seen(split, 8, torch.Generator().manual_seed(4)) != first


def test_augmented_images_are_shifted_and_mirrored_copies():
    x = torch.rand(200, 3, 8, 6)
    augmented = augmented_batch(x, 2, True, torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(x, [2] * 4, mode="reflect")
    made = set()
    for image, source in zip(augmented, padded, strict=True):
        ways = {
            (down, right, flip)
            for down in range(5)
            for right in range(5)
            for flip in (False, True)
            if torch.equal(image.flip(2) if flip else image, source[:, down : down + 8, right : right + 6])
        }
        assert len(ways) == 1
        made |= ways
    assert len(made) > 40  # of the 50 ways


def test_digits_are_shifted_but_never_mirrored():
    x = torch.arange(6 * 6.0).view(1, 1, 6, 6).expand(100, 1, 6, 6)
    augmented = augmented_batch(x, 2, False, torch.Generator().manual_seed(0))
    assert (augmented[:, 0, 2, 3] > augmented[:, 0, 2, 2]).all()
    assert not torch.equal(augmented[0], augmented[1])
