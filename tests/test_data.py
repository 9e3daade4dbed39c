"""The data sets: splits share nothing and lose nothing, layouts agree, damage is named."""

from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets as tv

from dlrt.data import Dataset, Split
from dlrt.data_files import read_npz
from dlrt.datasets import cifar10, digits, digits32, load, mnist
from dlrt.errors import DataError
from dlrt.picture_sets import picture_set

SAMPLES = 10_050  # MNIST's validation split takes 10,000 of them
IDX_FILES = {
    "x_train": "train-images-idx3-ubyte",
    "y_train": "train-labels-idx1-ubyte",
    "x_test": "t10k-images-idx3-ubyte",
    "y_test": "t10k-labels-idx1-ubyte",
}


def numbered_images(first, count, shape):
    """Images (count, *shape) that are all different: the first two bytes of each are its number."""
    images = np.random.default_rng(first).integers(0, 256, (count, *shape), dtype=np.uint8)
    number = np.arange(first, first + count)
    flat = images.reshape(count, -1)
    flat[:, 0], flat[:, 1] = number % 256, number // 256
    return images


def arrays(samples, shape, label_shape=(-1,)):
    """Keras' four arrays; a label is its image's number modulo 10, the test images are numbered on."""
    parts = {}
    for name, first, count in (("train", 0, samples), ("test", samples, 40)):
        parts[f"x_{name}"] = numbered_images(first, count, shape)
        parts[f"y_{name}"] = (np.arange(first, first + count) % 10).astype(np.uint8).reshape(label_shape)
    parts["x_test"][:, 2:] //= 2  # darker than the training images; the numbers are in row 0
    return parts


def numbers(split, dataset):
    """The numbers of a split's images, read back from their normalised pixels."""
    pixels = (split.images[:, 0, 0, :2] * dataset.std[0] + dataset.mean[0]) * 255
    return (pixels @ torch.tensor([1.0, 256.0])).round().long()


def write_idx(path, array):
    sizes = np.array(array.shape, dtype=">i4").tobytes()
    path.write_bytes(bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes())  # 8: unsigned bytes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A data folder with the idx files and, in folder/npz, the same images as mnist.npz."""
    folder, parts = tmp_path_factory.mktemp("data"), arrays(SAMPLES, (28, 28))
    raw = folder / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, file in IDX_FILES.items():
        write_idx(raw / file, parts[name])
    (folder / "npz").mkdir()
    np.savez(folder / "npz" / "mnist.npz", **parts)
    return folder


@pytest.fixture(scope="module")
def dataset(folder):
    return mnist(folder, 0)


@pytest.fixture
def damaged(folder, tmp_path):
    """A data folder that a test may damage: links to the good files."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in IDX_FILES.values():
        (raw / file).symlink_to(folder / "MNIST" / "raw" / file)
    return tmp_path


def offline(*_args, **_kwargs):
    raise OSError("no network")


def cut(path, source, keep):
    path.unlink(missing_ok=True)
    path.write_bytes(source.read_bytes()[:keep])


def test_splits_are_disjoint_and_complete(dataset):
    parts = [numbers(split, dataset) for split in (dataset.train, dataset.validation, dataset.test)]
    assert [len(part) for part in parts] == [SAMPLES - 10_000, 10_000, 40]
    assert torch.equal(torch.cat(parts[:2]).sort().values, torch.arange(SAMPLES))
    assert torch.equal(parts[2], torch.arange(SAMPLES, SAMPLES + 40))


def test_labels_stay_with_their_images(dataset):
    for split in (dataset.train, dataset.validation, dataset.test):
        assert split.images.dtype == torch.float32
        assert split.labels.dtype == torch.int64
        assert torch.equal(split.labels, numbers(split, dataset) % 10)


def test_the_seed_draws_the_validation_split_and_not_the_test_split(folder, dataset):
    again, other = mnist(folder, 0), mnist(folder, 1)
    held_out = numbers(dataset.validation, dataset)
    assert torch.equal(held_out, numbers(again.validation, again))
    assert set(held_out.tolist()) != set(numbers(other.validation, other).tolist())
    assert torch.equal(dataset.test.images, other.test.images)
    assert torch.equal(dataset.test.labels, other.test.labels)


def test_mean_and_deviation_are_those_of_all_training_images_and_of_no_test_image(dataset):
    images = torch.cat([dataset.train.images, dataset.validation.images])
    assert images.mean().abs() < 1e-4
    assert (images.std() - 1).abs() < 1e-4
    assert dataset.test.images.mean() < -0.5  # they are darker, and were measured by the same rule
    assert dataset.shape == (1, 28, 28)
    assert dataset.classes == 10


def test_idx_files_and_mnist_npz_give_the_same_data_set(folder, dataset):
    other = mnist(folder / "npz", 0)
    for name in ("name", "classes", "mean", "std"):
        assert getattr(dataset, name) == getattr(other, name)
    for name in ("train", "validation", "test"):
        assert torch.equal(getattr(dataset, name).images, getattr(other, name).images)
        assert torch.equal(getattr(dataset, name).labels, getattr(other, name).labels)


def test_cifar10_npz_gives_images_with_channels_first(tmp_path):
    parts = arrays(5_020, (32, 32, 3), label_shape=(-1, 1))
    np.savez(tmp_path / "cifar10.npz", **parts)
    dataset = cifar10(tmp_path, 0)
    assert (dataset.shape, dataset.shift, dataset.flip) == ((3, 32, 32), 4, True)
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [20, 5_000, 40]
    mean, std = (torch.tensor(values)[:, None, None] for values in (dataset.mean, dataset.std))
    pixels = ((dataset.test.images * std + mean) * 255).round().byte().permute(0, 2, 3, 1)
    assert torch.equal(pixels, torch.from_numpy(parts["x_test"]))
    assert dataset.test.labels.tolist() == parts["y_test"].flatten().tolist()
    images = torch.cat([dataset.train.images, dataset.validation.images])
    assert torch.allclose(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-4)
    assert torch.allclose(images.std((0, 2, 3)), torch.ones(3), atol=1e-4)


def test_digits_need_no_folder_and_keep_the_last_360_for_the_test():
    dataset, other = digits(None, 0), load("digits", None, 1)
    assert dataset.shape == (1, 28, 28)
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [1_077, 360, 360]
    assert torch.equal(dataset.test.images, other.test.images)
    assert not torch.equal(dataset.validation.labels, other.validation.labels)


def test_250_digits_have_the_shape_of_cifar10():
    dataset = digits32(None, 0)
    assert dataset.shape == (3, 32, 32)
    assert [len(split) for split in (dataset.train, dataset.validation, dataset.test)] == [150, 50, 50]
    assert torch.equal(dataset.test.labels, digits(None, 0).test.labels[-50:])
    assert not dataset.flip


@pytest.mark.parametrize("file", IDX_FILES.values())
@pytest.mark.parametrize("keep", [0, 2, 10, -1])
def test_truncated_idx_file_is_named(folder, damaged, file, keep):
    path = damaged / "MNIST" / "raw" / file
    cut(path, folder / "MNIST" / "raw" / file, keep)
    with pytest.raises(DataError, match="damaged") as error:
        mnist(damaged, 0)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("keep", [0, 1_000, 4_000_000, -1])
def test_truncated_npz_file_is_named(folder, tmp_path, keep):
    path = tmp_path / "mnist.npz"
    cut(path, folder / "npz" / "mnist.npz", keep)
    with pytest.raises(DataError, match="damaged") as error:
        mnist(tmp_path, 0)
    assert str(path) in str(error.value)


def test_npz_file_with_changed_bytes_is_named(folder, tmp_path):
    path = tmp_path / "mnist.npz"
    data = bytearray((folder / "npz" / "mnist.npz").read_bytes())
    data[4_000_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="damaged") as error:
        mnist(tmp_path, 0)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("name", "read"), [("mnist.npz", mnist), ("cifar10.npz", cifar10)])
def test_missing_array_in_an_npz_file_is_named_with_the_file(tmp_path, name, read):
    parts = arrays(20, (28, 28))
    del parts["y_test"]
    np.savez(tmp_path / name, **parts)
    with pytest.raises(DataError, match="y_test") as error:
        read(tmp_path, 0)
    assert str(tmp_path / name) in str(error.value)


def test_damaged_batch_of_cifar10_is_named(tmp_path):
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    (batches / "data_batch_1").write_bytes(b"cut")
    with pytest.raises(DataError, match="damaged") as error:
        cifar10(tmp_path, 0)
    assert str(batches / "data_batch_1") in str(error.value)


def test_too_few_images_and_too_few_labels_are_told_with_their_numbers(tmp_path):
    parts = arrays(20, (28, 28))
    np.savez(tmp_path / "mnist.npz", **parts)
    with pytest.raises(DataError, match="more than 10000 training images are needed, got 20"):
        mnist(tmp_path, 0)
    np.savez(tmp_path / "mnist.npz", **parts | {"y_train": parts["y_train"][:7]})
    with pytest.raises(DataError, match="got 7 for 20"):
        mnist(tmp_path, 0)


PIXELS, CLASSES = np.random.default_rng(0).integers(0, 256, (60, 8, 8, 3), dtype=np.uint8), np.arange(60) % 2
SOUND = {"x_train": PIXELS[:40], "y_train": CLASSES[:40], "x_test": PIXELS[40:], "y_test": CLASSES[40:]}


def of_both(change):
    return {key: change(SOUND[key]) for key in ("x_train", "x_test")}


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"y_test": CLASSES[40:] + 1}, "classes of the test need training images, got none of 2: add some"),
        ({"y_test": CLASSES[40:] - 1}, "got none of -1"),
        ({"y_train": CLASSES[:40] * 2}, "without a gap, got 2 classes from 0 to 2"),
        ({"y_train": CLASSES[:40] - 1}, "from -1 to 0"),
        ({"y_train": CLASSES[:40] + 1}, "from 1 to 2"),
        ({"y_train": np.append(CLASSES[:39], 255).astype(np.uint16)}, "from 0 to 255"),
        ({"y_train": CLASSES[:40] / 2}, r"whole numbers \(N,\), got torch.float64"),
        ({"y_train": np.eye(2)[CLASSES[:40]]}, r"\(40, 2\): reshape"),
        ({"y_test": np.array(1)}, "reshape"),
        ({"x_train": PIXELS[:40] * np.uint8([1, 0, 1]) + np.uint8([0, 7, 0])}, "channel 1 does not"),
        ({"x_train": 0 * PIXELS[:40, ..., 0], "x_test": PIXELS[40:, ..., 0]}, "channel 0 does not"),
        (of_both(lambda x: x.transpose(0, 3, 1, 2)), "1 channel or 3, .* got 8: transpose"),
        (of_both(lambda x: x[..., [0, 1, 2, 2]]), "1 channel or 3, .* got 4"),
        (of_both(lambda x: x[:, :0]), "reshape"),
        (of_both(lambda x: x / 255), r"uint8 from 0 to 255 .* got torch.float64"),
        (of_both(lambda x: x.reshape(len(x), -1)), "reshape"),
        ({"x_test": PIXELS[40:, :5]}, r"\(3, 8, 8\) as in training, got torch.uint8 and \(3, 5, 8\)"),
        ({"x_test": PIXELS[40:, ..., 0]}, r"and \(1, 8, 8\)"),
        ({"x_test": PIXELS[:0], "y_test": CLASSES[:0]}, "test images are needed, got none"),
        ({"x_train": PIXELS[:0], "y_train": CLASSES[:0]}, "more than 10 training images are needed, got 0"),
        ({"x_test": PIXELS[:9]}, "as many labels as images are needed, got 20 for 9"),
    ],
)
def test_arrays_that_are_no_data_set_are_told_in_a_line_that_fits(tmp_path, changed, told):
    np.savez(tmp_path / "own.npz", **{**SOUND, **changed})
    with pytest.raises(DataError, match=told) as error:
        picture_set("own", read_npz(tmp_path / "own.npz"), 0, validation=10)
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("part", "labels", "told"),
    [
        (torch.zeros(0, 1, 2, 2), [], "has none for test"),
        (torch.zeros(2, 1, 2, 2), [0, 2], r"labels must lie in \[0, 2\), got 0 to 2"),
        (torch.zeros(2, 1, 2, 2), [-1, 0], "got -1 to 0"),
        (torch.full((2, 1, 2, 2), torch.nan), [0, 1], "pixels must be finite"),
    ],
)
def test_a_data_set_made_by_hand_is_checked(part, labels, told):
    good, bad = (
        Split(torch.zeros(2, 1, 2, 2), torch.arange(2)),
        Split(part, torch.tensor(labels, dtype=torch.int64)),
    )
    with pytest.raises(ValueError, match=told):
        Dataset("own", good, good, bad, 2, (0.0,), (1.0,), 1, False).check()


@pytest.mark.parametrize(
    ("read", "module", "files"),
    [
        (mnist, tv.mnist, ["MNIST/raw", "mnist.npz", *IDX_FILES.values()]),
        (cifar10, tv.cifar, ["cifar-10-batches-py", "cifar10.npz", "data_batch_1", "test_batch"]),
    ],
)
def test_missing_files_that_cannot_be_downloaded_are_named(tmp_path, monkeypatch, read, module, files):
    monkeypatch.setattr(module, "download_and_extract_archive", offline)
    folder = tmp_path / "with" / "a slip"
    with pytest.raises(DataError) as error:
        read(folder, 0)
    for part in (*files, str(folder), "--dataset digits", "--data-dir", "no network"):
        assert part in str(error.value)
    assert tmp_path.exists()
    assert not folder.parent.exists()


def test_failed_mirrors_are_told_in_one_line(tmp_path, monkeypatch):
    def refused(*_args, **_kwargs):
        raise URLError("connection refused")

    monkeypatch.setattr(tv.mnist, "download_and_extract_archive", refused)
    with pytest.raises(DataError, match="connection refused") as error:
        mnist(tmp_path, 0)
    assert len(str(error.value).splitlines()) == 1


def test_npz_file_put_there_after_a_failed_download_is_read(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tv.mnist, "download_and_extract_archive", offline)
    with pytest.raises(DataError):
        mnist(tmp_path, 0)
    (tmp_path / "mnist.npz").symlink_to(folder / "npz" / "mnist.npz")  # as the message advises
    assert len(mnist(tmp_path, 0).validation) == 10_000


def test_a_data_set_moves_with_all_its_splits(dataset):
    moved = dataset.to("meta")
    assert {split.images.device.type for split in (moved.train, moved.validation, moved.test)} == {"meta"}
    assert {split.labels.device.type for split in (moved.train, moved.validation, moved.test)} == {"meta"}
