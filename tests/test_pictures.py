"""Pictures, their labels and the names of classes are read, however they were written."""

import numpy as np
import pytest
from PIL import ExifTags, Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from dlrt.cams.pictures import PictureError, read, read_labels
from dlrt.cams.targets import class_number


def test_a_picture_of_fractions_is_not_black(tmp_path):
    values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
    Image.fromarray(values).save(tmp_path / "heights.tiff")
    np.testing.assert_allclose(read(tmp_path / "heights.tiff").pixels()[..., 0], values, atol=1 / 255)
    Image.fromarray(8 * values).save(tmp_path / "metres.tiff")  # what exceeds 1 is scaled by its largest
    np.testing.assert_allclose(read(tmp_path / "metres.tiff").pixels()[..., 0], values, atol=1 / 255)


def damaged(tags, rng):
    """The bytes of EXIF with some of them replaced, and cut at times; the orientation may be among them."""
    tags = bytearray(tags)
    for place in rng.integers(6, len(tags), rng.integers(1, 7)):
        tags[place] = rng.integers(256)
    return bytes(tags[: rng.integers(6, len(tags))] if rng.random() < 0.3 else tags)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp"])
def test_damaged_metadata_do_not_keep_a_picture_from_being_shown(kind, tmp_path):
    rng, tags = np.random.default_rng(0), Image.Exif()
    tags[ExifTags.Base.Orientation], tags[ExifTags.Base.Make] = 6, "maker"
    tags[ExifTags.IFD.Exif] = {0x9286: b"x" * 20}
    tags[ExifTags.IFD.GPSInfo] = {1: "N", 2: (1.0, 2.0, 3.0)}
    image = Image.fromarray(rng.integers(256, size=(5, 7, 3), dtype=np.uint8))
    for _ in range(150):
        image.save(tmp_path / "picture", kind, exif=damaged(tags.tobytes(), rng))
        assert sorted(read(tmp_path / "picture").image.size) == [5, 7]


def test_a_wrong_checksum_of_metadata_is_passed_over_and_missing_pixels_are_told(tmp_path):
    path, about = tmp_path / "picture.png", PngInfo()
    about.add_text("comment", "nothing much")
    Image.effect_noise((40, 40), 50).save(path, pnginfo=about)
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"nothing much", b"nothing mush"))
    assert read(path).image.size == (40, 40)
    for part in (whole[: len(whole) // 2], whole[:20], whole[:100] + bytes(200) + whole[300:], b""):
        path.write_bytes(part)
        with pytest.raises(PictureError, match=r"picture\.png cannot be read"):
            read(path)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "segment",
    [
        b"\xff\xed\x00\x16Photoshop 3.0\x008BIMxx",
        b"\xff\xe2\x00\x10MPF\x00II*\x00\xff\xff\xff\xff\x00\x00",
        b"\xff\xe1\x00\x12Exif\x00\x00MM\x00*\x00\x00\x00\x08\xff\xff",
    ],
)
def test_a_damaged_segment_of_a_jpeg_is_passed_over(segment, tmp_path):
    path = tmp_path / "picture.jpg"
    Image.effect_noise((5, 7), 50).save(path)
    expected, whole = np.asarray(read(path).image), path.read_bytes()
    path.write_bytes(whole[:2] + segment + whole[2:])
    np.testing.assert_array_equal(read(path).image, expected)


@pytest.mark.parametrize("tag", range(10))
def test_a_picture_is_turned_as_its_tag_says(tag, tmp_path):
    tags = Image.Exif()
    tags[ExifTags.Base.Orientation] = tag
    image = Image.fromarray(np.arange(105, dtype=np.uint8).reshape(5, 7, 3))
    image.save(tmp_path / "picture.png", exif=tags)
    turned = ImageOps.exif_transpose(Image.open(tmp_path / "picture.png"))
    np.testing.assert_array_equal(read(tmp_path / "picture.png").image, turned)


def test_labels_are_read_as_a_spreadsheet_writes_them(tmp_path):
    (tmp_path / "labels.csv").write_text("file,class\nä.png,3\nä.png,4,5\n", encoding="utf-8-sig")
    assert read_labels(tmp_path / "labels.csv", int) == {"ä.png": [((3,), ()), ((4, 5), ())]}


def test_a_class_is_found_by_name_or_number():
    names = ["cat", "tiger cat", "dog"]
    assert [class_number(text, names) for text in ("cat", "Tiger Cat", " 2 ")] == [0, 1, 2]
    for text in ("ca", "3", "-1"):
        with pytest.raises(ValueError, match="unknown class"):
            class_number(text, names)
