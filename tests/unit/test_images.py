"""Every kind of file becomes the picture that a person would see, or an error that says why not."""

import numpy as np
import pytest
from PIL import Image, ImageOps

from stethoscope.errors import DataError
from stethoscope.images import rgb
from stethoscope.records import ImageRef

RED, WHITE = (220, 30, 40), (255, 255, 255)


def read(path):
    return ImageRef(path.name, path).load()


@pytest.fixture
def photo():
    """Upright, with a different colour in every corner."""
    pixels = np.zeros((40, 60, 3), dtype=np.uint8)
    pixels[:20, :30], pixels[:20, 30:], pixels[20:, :30], pixels[20:, 30:] = 250, RED, (10, 200, 20), (20, 30, 240)
    return Image.fromarray(pixels)


def same(one, other, tolerance=0):
    assert one.mode == other.mode == "RGB"
    assert one.size == other.size
    difference = np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int))
    assert difference.max() <= tolerance


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_turned_photograph_is_set_upright(photo, tmp_path, orientation):
    turned = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # how the camera has stored it
    stored = photo if turned is None else photo.transpose(Image.Transpose(turned))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "a.png", exif=exif)
    same(read(tmp_path / "a.png"), photo)
    same(rgb(rgb(Image.open(tmp_path / "a.png"))), photo)  # once is enough


def test_a_broken_note_about_the_camera_does_no_harm(photo, tmp_path):
    photo.save(tmp_path / "a.png", exif=b"Exif\x00\x00MM\x00\x00nonsense")
    same(read(tmp_path / "a.png"), photo)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled(tmp_path, suffix):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey * 257).save(tmp_path / f"a.{suffix}")
    same(read(tmp_path / f"a.{suffix}"), Image.fromarray(grey.astype(np.uint8)).convert("RGB"))


def test_a_dark_picture_of_sixteen_bits_stays_dark(tmp_path):
    Image.fromarray(np.full((4, 4), 200, dtype=np.uint16)).save(tmp_path / "a.png")
    same(read(tmp_path / "a.png"), Image.new("RGB", (4, 4), (1, 1, 1)))


@pytest.mark.parametrize(
    ("values", "dtype", "seen"),
    [([0, 128, 255], np.int32, [0, 128, 255]), ([0, 257, 65535], np.int32, [0, 1, 255]),
     ([0, 0.2, 1], np.float32, [0, 51, 255]), ([0, 20.4, 255], np.float32, [0, 20, 255])],
)  # fmt: skip
def test_wide_numbers_without_a_range_of_their_own(values, dtype, seen):
    image = rgb(Image.fromarray(np.array([values], dtype=dtype)))
    assert np.asarray(image)[0, :, 0].tolist() == seen


@pytest.mark.parametrize("values", [[-1, 5], [0, 70000], [0, float("nan")]])
def test_numbers_that_are_no_brightness(values):
    with pytest.raises(DataError, match="0 to 65535"):
        rgb(Image.fromarray(np.array([values], dtype=np.float32)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_are_white_whatever_colour_they_hide(tmp_path, mode):
    image = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    image.paste((*RED, 255), (10, 0, 20, 10))
    image.convert(mode).save(tmp_path / "a.png")
    found = read(tmp_path / "a.png")
    grey = Image.new("RGB", (1, 1), RED).convert("L").getpixel((0, 0))
    assert found.getpixel((2, 5)) == WHITE
    assert found.getpixel((15, 5)) == ((grey,) * 3 if mode == "LA" else RED)


def test_half_transparent_is_half_white():
    assert rgb(Image.new("RGBA", (2, 2), (0, 100, 255, 127))).getpixel((0, 0)) == (128, 178, 255)


@pytest.mark.parametrize(
    ("mode", "suffix"), [("L", "png"), ("1", "png"), ("CMYK", "tiff"), ("CMYK", "jpg"), ("P", "gif")]
)
def test_other_modes(photo, tmp_path, mode, suffix):
    flat = Image.new("RGB", (16, 16), RED)
    flat.convert(mode).save(tmp_path / f"a.{suffix}")
    expected = flat.convert(mode).convert("RGB")
    same(read(tmp_path / f"a.{suffix}"), expected, tolerance=3)


def test_an_animation_is_its_first_frame(photo, tmp_path):
    frames = [photo, ImageOps.mirror(photo), ImageOps.flip(photo)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    same(read(tmp_path / "a.gif"), photo)
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    same(read(tmp_path / "a.webp"), photo)


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tiff", "webp", "bmp"])
def test_a_file_that_is_cut_short(tmp_path, suffix):
    pixels = np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match="cannot be read") as error:
        read(path)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)


def test_a_picture_that_fails_while_it_is_made():
    def fails():
        raise OSError("broken row")

    with pytest.raises(DataError, match="'row 7' cannot be read: broken row"):
        ImageRef("row 7", fails).load()


def test_no_pixels():
    with pytest.raises(DataError, match="no pixels: 0 x 5"):
        rgb(Image.new("RGB", (0, 5)))


def test_a_picture_that_needs_nothing_is_not_copied(photo):
    assert rgb(photo) is photo
